"""Pictures of any kind made into examples of a data set: grey or colour, light on dark as it is, its size, its values.

A border whose mean is over half of white is a light background. Fashion-MNIST, MNIST and the digits are light on dark:
none of their 141,797 images has such a border.
"""

from __future__ import annotations

import gzip
import math
import os
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from spec.datasets import idx
from spec.datasets.dataset import Dataset
from spec.datasets.sizes import Size
from spec.errors import DataError, UserError

Invert = Literal["auto", "yes", "no"]
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MOST_IDX_BYTES = 200_000_000
WHITE_16_BIT = 65_535
MODES = {"1": "black and white", "L": "grey", "P": "palette", "I": "16-bit grey", "I;16": "16-bit grey"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the examples are: [height, width, channels], the values of black and white, their dtype, the background."""

    shape: tuple[int, ...]
    black: float
    white: float
    dtype: np.dtype
    light_background: bool


class Picture(NamedTuple):
    """One example: where it is from, its values [height, width, channels], and what was done to make them."""

    name: str
    values: np.ndarray
    done: str


def target_of(size: Size, dataset: Dataset | None = None) -> Target:
    """Return what a data set's examples are: bytes, light on dark, or as its training split shows.

    Raises DataError when they are no images.
    """
    if len(size.input_shape) != 3 or size.input_shape[2] not in (1, 3):
        raise DataError(
            f"this run's examples have shape {list(size.input_shape)}; only a run on images, [height, width, 1] or "
            "[height, width, 3], can be shown a picture"
        )
    if dataset is None:
        return Target(shape=size.input_shape, black=0, white=255, dtype=size.input_dtype, light_background=False)
    inputs = dataset.train.inputs
    lowest, highest = (0, 255) if inputs.dtype == np.uint8 else (float(inputs.min()), float(inputs.max()))
    span = (highest - lowest) or 1.0
    light = is_light((inputs.astype(np.float64) - lowest) / span)
    return Target(shape=size.input_shape, black=lowest, white=highest, dtype=inputs.dtype, light_background=light)


def read(
    paths: Iterable[Path], target: Target, *, invert: Invert = "auto"
) -> tuple[list[Picture], list[tuple[Path, str]]]:
    """Return the pictures in image files, idx files and folders of both, and what a folder held besides, with reasons.

    Raises DataError for a file named that is neither, and for a folder without any.
    """
    pictures: list[Picture] = []
    skipped: list[tuple[Path, str]] = []
    for path in (path.expanduser() for path in paths):
        if os.path.isdir(path):
            found, passed_over = _read_folder(path, target, invert)
            pictures += found
            skipped += passed_over
        else:
            pictures += _read_file(path, target, invert)
    return pictures, skipped


def is_light(unit: np.ndarray) -> bool:
    """Say whether images [..., height, width, channels] of values in 0..1 have a light background: by their borders."""
    rows, columns = unit[..., [0, -1], :, :], unit[..., 1:-1, [0, -1], :]
    return bool((rows.sum() + columns.sum()) / (rows.size + columns.size) > 0.5)


def fit(unit: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """Return an image of values in 0..1 as large as fits [height, width] of `shape`, the rest padded with the median of
    its border, and what was done. An image of that size is returned as it is."""
    height, width = unit.shape[:2]
    if (height, width) == tuple(shape[:2]):
        return unit, ""
    scale = min(shape[0] / height, shape[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    planes = [
        Image.fromarray(np.ascontiguousarray(unit[..., channel], np.float32)).resize(
            inner[::-1], Image.Resampling.BILINEAR
        )
        for channel in range(unit.shape[2])
    ]
    small = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    done = f"resized to {inner[1]}x{inner[0]}"
    if inner == tuple(shape[:2]):
        return small, done
    border = np.concatenate([unit[0], unit[-1], unit[:, 0], unit[:, -1]])
    padded = np.empty((*shape[:2], unit.shape[2]), np.float32)
    padded[:] = np.median(border, axis=0)
    top, left = (shape[0] - inner[0]) // 2, (shape[1] - inner[1]) // 2
    padded[top : top + inner[0], left : left + inner[1]] = small
    return padded, f"{done}, padded to {shape[1]}x{shape[0]}"


def _read_folder(folder: Path, target: Target, invert: Invert) -> tuple[list[Picture], list[tuple[Path, str]]]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}; name another folder") from None
    pictures: list[Picture] = []
    skipped: list[tuple[Path, str]] = []
    for path in inside:
        try:
            pictures += _read_file(path, target, invert)
        except DataError as error:
            skipped.append((path, str(error).removeprefix(f"{path} ").partition("; ")[0]))  # why, not what to do
    if not pictures:
        first = f"; {skipped[0][0].name}, say, {skipped[0][1]}" if skipped else ""
        raise DataError(f"{folder} holds no image among {len(skipped)} files{first}; name a folder that does")
    return pictures, skipped


def _read_file(path: Path, target: Target, invert: Invert) -> list[Picture]:
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "is no regular file" if os.path.exists(path) else "is missing"
        raise DataError(f"{path} {what}; name an image, an idx file of images, or a folder of them")
    units, done = _idx_images(path) if _is_idx(path) else _image(path, target.shape[2])
    light = is_light(units)  # one answer for all images of an idx file, which are alike
    turned = invert == "yes" or (invert == "auto" and light != target.light_background)
    alone = len(units) == 1
    return [
        _picture(str(path) if alone else f"{path}[{index}]", unit, done, target, turned)
        for index, unit in enumerate(units)
    ]


def _picture(name: str, unit: np.ndarray, done: str, target: Target, turned: bool) -> Picture:
    fitted, how = fit(1 - unit if turned else unit, target.shape)
    values = target.black + np.clip(fitted.astype(np.float64), 0, 1) * (target.white - target.black)
    values = np.rint(values) if target.dtype.kind in "bui" else values
    values = np.broadcast_to(values, target.shape).astype(target.dtype)  # a grey idx image in every channel
    return Picture(name, values, ", ".join(step for step in (done, how, "inverted" if turned else "") if step))


# idx files


def _is_idx(path: Path) -> bool:
    """Say whether a file is an idx file, by its first bytes, decompressed if it is gzip."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(0)
            start = gzip.GzipFile(fileobj=file).read(2) if start == idx.GZIP_MAGIC else start
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; name another file") from None
    return start == b"\0\0"


def _idx_images(path: Path) -> tuple[np.ndarray, str]:
    """Return the images of an idx file, [n, height, width, 1] in 0..1."""
    content = idx.read_bytes(path, limit=MOST_IDX_BYTES)
    if content[3:4] == b"\x01":
        raise DataError(f"{path} holds labels; name the idx file of the images")
    array = idx.parse(content, rank=3, source=str(path))
    if 0 in array.shape:
        raise DataError(f"{path} holds no image: its shape is {list(array.shape)}; name another idx file")
    return np.float32(array[..., None]) / np.float32(255), ""


# Image files


def _image(path: Path, channels: int) -> tuple[np.ndarray, str]:
    """Return the image in a file as [1, height, width, channels] in 0..1, and what was done to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tags in a file
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as image:
                return _unit(image, channels, path)
        except (UserError, MemoryError):
            raise
        except UnidentifiedImageError:
            raise DataError(f"{path} is no image that can be read; give {', '.join(FORMATS)}, or idx") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            limit = f"{Image.MAX_IMAGE_PIXELS:,}"
            raise DataError(f"{path} has more pixels than the limit of {limit}; make it smaller") from None
        except Exception as error:  # what a decoder raises at a damaged file is its own affair
            raise DataError(f"{path} is a damaged image: {error}; give a good copy") from None


def _unit(image: Image.Image, channels: int, path: Path) -> tuple[np.ndarray, str]:
    """Return an opened image as [1, height, width, channels] in 0..1, and what was done."""
    frames = getattr(image, "n_frames", 1)
    done = [f"{image.width}x{image.height} {MODES.get(image.mode, image.mode)}"] + (
        [f"first of {frames} frames"] if frames > 1 else []
    )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        unit = _deep(image, path)
    else:
        if image.has_transparency_data:
            image, background = _opaque(image.convert("RGBA"))
            done.append(f"put on {background}")
        if image.mode not in ("L", "1"):
            image = image.convert("RGB")
            done += ["turned grey"] if channels == 1 else []
        unit = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32) / np.float32(255)
    unit = unit if unit.ndim == 3 else unit[..., None]
    return np.broadcast_to(unit, (*unit.shape[:2], channels))[None], ", ".join(done)


def _deep(image: Image.Image, path: Path) -> np.ndarray:
    """Return a grey image of 16 bits, or of floating-point numbers in 0..1, as [height, width] in 0..1."""
    array = np.asarray(image, np.float64)
    white = 1 if image.mode == "F" else WHITE_16_BIT
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= white):
        raise DataError(
            f"{path} has values from {array.min():g} to {array.max():g}; white is {white}; save it with 8 or 16 bits"
        )
    return (array / white).astype(np.float32)


def _opaque(image: Image.Image) -> tuple[Image.Image, str]:
    """Return an RGBA image as RGB on white, or on black where what can be seen of it is light, and which."""
    alpha = np.asarray(image.getchannel("A"), np.float64)
    grey = np.asarray(image.convert("L"), np.float64)
    light = math.isclose(alpha.sum(), 0) or (grey * alpha).sum() / alpha.sum() > 127.5
    background = Image.new("RGBA", image.size, (0, 0, 0, 255) if light else (255, 255, 255, 255))
    return Image.alpha_composite(background, image).convert("RGB"), "black" if light else "white"
