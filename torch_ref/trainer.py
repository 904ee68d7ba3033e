"""A whole run in torch: recipe and data set -> initial state -> epochs -> events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from spec import params
from spec.batches import count, epoch_order
from spec.datasets import Dataset
from spec.errors import UserError
from spec.history import EpochDone, Event, StepsDone
from spec.program import Implementation
from spec.recipe import Recipe
from torch_ref import convert, data, models, optim
from torch_ref.step import eval_step, train_step


class Trainer:
    """One run of `recipe` over `dataset` (raw, as `torch_ref.data.load` gives it), ready on `device`.

    Raises RecipeError or DataError when the recipe and the data do not fit.
    """

    compile_seconds = 0.0

    def __init__(self, recipe: Recipe, dataset: Dataset, device: torch.device) -> None:
        outputs = params.num_outputs(recipe, dataset.num_classes)
        self.recipe = recipe
        self.device = device
        self.counts = count(recipe, len(dataset.train.labels))
        self.leaves = params.leaves(recipe.model, dataset.input_shape, outputs)
        dtype = torch.float64 if recipe.precision == "float64" else torch.float32
        self.train_split, *rest = data.preprocess(dataset, recipe.preprocessing, dtype=dtype)
        self.test_split = rest[0] if rest else None
        self.network = models.network(recipe.model, dataset.input_shape, outputs).to(device, dtype)
        convert.load_state(self.network, params.initial_state(self.leaves, recipe.init, recipe.seed))
        self.optimizer = optim.optimizer(recipe, self.network.parameters())
        self.scheduler = optim.scheduler(recipe, self.optimizer)

    def events(self, *, steps_per_call: int | None = None) -> Iterator[Event]:
        """Run every epoch, yielding what happens, after every `steps_per_call` steps (default: an epoch's)."""
        for epoch in range(1, self.recipe.epochs + 1):
            start = time.perf_counter()
            yield from self._run_epoch(epoch, steps_per_call or self.counts.steps_per_epoch)
            self.scheduler.step()
            losses, predictions = self.evaluate()
            correct = None if predictions is None else predictions == self.test_split.tensors[1].numpy()
            seconds = time.perf_counter() - start
            yield EpochDone(epoch=epoch, seconds=seconds, test_losses=losses, test_correct=correct)

    def evaluate(self) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """Return loss [n] and predicted class [n] of each test example as the network is now; None without a split."""
        if self.test_split is None:
            return None, None
        inputs, labels = (tensor.to(self.device).split(self.recipe.batch_size) for tensor in self.test_split.tensors)
        with self._autocast():
            parts = [eval_step(self.network, *batch, self.recipe.loss) for batch in zip(inputs, labels, strict=True)]
        losses, predictions = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return losses, predictions

    def state(self) -> dict[str, np.ndarray]:
        """Return the present parameters and running statistics, canonical names and layouts (`spec.params`)."""
        return convert.state(self.network)

    def _run_epoch(self, epoch: int, steps_per_report: int) -> Iterator[StepsDone]:
        order = epoch_order(self.recipe.seed, epoch, self.counts.num_examples)
        start, metrics = 0, []
        for step, (images, labels) in enumerate(data.batches(self.train_split, self.counts, order)):
            seed_dropout(self.recipe, epoch, step)
            with self._autocast():
                metrics.append(
                    train_step(
                        self.network,
                        self.optimizer,
                        images.to(self.device),
                        labels.to(self.device),
                        self.recipe.loss,
                    )
                )
            if len(metrics) == steps_per_report or step + 1 == self.counts.steps_per_epoch:
                losses, num_correct = (np.array(column) for column in zip(*metrics, strict=True))
                yield StepsDone(epoch=epoch, start=start, stop=step + 1, losses=losses, num_correct=num_correct)
                start, metrics = step + 1, []

    def _autocast(self) -> AbstractContextManager:
        """Return the scope of bfloat16 products over float32 parameters, if the recipe asks for it."""
        if self.recipe.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def prepare(recipe: Recipe, device: torch.device) -> Callable[[Dataset], Trainer]:
    """Return what makes a trainer of a data set; torch has nothing to do before."""
    return lambda dataset: Trainer(recipe, dataset, device)


def seed_dropout(recipe: Recipe, epoch: int, step: int) -> None:
    """Give the step masks of its own that depend on (seed, epoch, step) alone (S7)."""
    if recipe.model.dropout:
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, epoch, step]).generate_state(1)[0]))


def select_device(platform: str | None) -> torch.device:
    """Return the device of `platform`, or a GPU if there is one, else the CPU; products at full width (S12).

    Raises UserError when torch does not have it here.
    """
    there = {"cpu": "cpu"} | ({"gpu": "cuda"} if torch.cuda.is_available() else {})
    if platform and platform not in there:
        raise UserError(f"--platform {platform} is not one that torch has here ({', '.join(there)}); leave it out")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(there.get(platform or "gpu", "cpu"))


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turn the device's refusal of memory into a UserError."""
    try:
        yield
    except RuntimeError as error:
        # On a GPU torch.OutOfMemoryError, which is one; on the CPU nothing but the allocator's name tells.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"the device has too little memory: {reason}; use a smaller --batch-size or network") from None


IMPLEMENTATION = Implementation(
    framework="torch",
    packages=("torch", "torchvision"),
    select_device=select_device,
    describe_device=str,
    load=data.load,
    prepare=prepare,
    memory_explained=memory_explained,
)
