# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a CNN on every device there is
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/lockstep/blob/main/notebooks/01_train_on_colab_tpu.ipynb)
#
# **中文摘要**：本笔记从打开 Colab 开始，一直做到训练好的卷积网络。先检查有哪些设备（CPU、GPU 或 TPU），
# 再用全部设备训练课程中的 CNN，看学习曲线、混淆矩阵和分错的图片。最后把权重存成 safetensors，在 PyTorch 中打开，
# 并演示运行中断之后怎样继续。
#
# From the badge to a trained network: the lesson's CNN on Fashion-MNIST, each batch divided over all devices of this
# machine. On Colab choose *Runtime, Change runtime type, TPU* (or GPU) first. You need no JAX for this notebook: a run
# is one call, and what it leaves behind are files that torch reads too.

# %%
# On Colab: this installs the package and what is missing, and upgrades nothing that is there.
import sys

if "google.colab" in sys.modules:
    print("installing, for a minute or two ...")
    # !pip list --format=freeze > installed.txt
    # !pip install --quiet --constraint installed.txt "lockstep[notebooks] @ git+https://github.com/OWNER/lockstep"

# %%
# %matplotlib inline
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own log is long, and of no use here

import jax

from spec import quick
from spec.quick import sized

print(quick.said())
print(f"{jax.device_count()} device{'s' * (jax.device_count() > 1)}: {', '.join(map(str, jax.devices()))}")

# %% [markdown]
# ## 1. Which devices are there?
#
# A TPU shows one device or several, a GPU mostly one. A CPU is one device, unless `JAX_NUM_CPU_DEVICES` says to make several
# of it, which is how this notebook is tested without a TPU. The batch is divided evenly among them.

# %%
DEVICES = jax.device_count()
for device in jax.devices():
    print(device.platform, device.device_kind, device.id)

# %% [markdown]
# ## 2. Train
#
# A *recipe* states everything that a run depends on; the flags after it change some of it. `--parallel sharded` is one
# program whose batch the compiler divides over the devices; the result is that of one device, but for rounding.
#
# On a machine with a CPU alone an epoch of the whole CNN takes a while: have a coffee, or change the runtime.

# %%
from pathlib import Path

from jax_impl import train

EPOCHS = sized(full=5, quick=1)
# In quick mode a CNN of a few channels, in large batches.
SMALLER = sized(full="", quick="--model.channels 4 --model.hidden-sizes 16 --batch-size 1024 --learning-rate 0.1")
# To keep the run when Colab ends the machine, put it into your Google Drive instead of this machine's disk:
#   from google.colab import drive
#   drive.mount("/content/drive")
#   RUN = Path("/content/drive/MyDrive/lockstep/cnn")
RUN = Path("runs/cnn")
PLACES = ["--devices", str(DEVICES), "--parallel", "sharded"]
if not (RUN / "config.json").exists():  # a run that is there is not trained again: section 3 goes on with it
    train.main(["--recipe", "cnn", "--epochs", str(EPOCHS), *SMALLER.split(), *PLACES, "--out", str(RUN), "--quiet"])

# %% [markdown]
# What was trained, layer by layer, ours beside torch's: shapes, parameters, operations.

# %%
train.main(["--recipe", "cnn", *SMALLER.split(), "--summary"])

# %% [markdown]
# A run is a directory. `metrics.jsonl` has a line for each progress report (the lesson's running loss too, the mean of
# the last 100 batches) and each epoch.

# %%
import json

for file in sorted(RUN.iterdir()):
    print(file.name)
for line in map(json.loads, (RUN / "metrics.jsonl").read_text().splitlines()):
    if line["event"] == "epoch":
        print(
            f"epoch {line['epoch']}: training loss {line['train_loss']:.4f}, accuracy {line['train_accuracy']:.4f}; "
            f"test loss {line['test_loss']:.4f}, accuracy {line['test_accuracy']:.4f}"
        )

# %% [markdown]
# ## 3. The runtime was disconnected: go on
#
# Colab may take the machine away. If the directory survived (in your Drive, say), this goes on from the last
# checkpoint; a run that was finished says so and is left alone.

# %%
train.main(["--resume", str(RUN), *PLACES])

# %% [markdown]
# It can also be given more epochs. They follow on the same weights, the same optimiser and the next order, as if
# they had been asked for from the start.

# %%
train.main(["--resume", str(RUN), "--resume-with-changes", "--epochs", str(EPOCHS + 1), *PLACES, "--quiet"])
summary = json.loads((RUN / "summary.json").read_text())
print(f"{summary['steps']} steps in {summary['epochs']} epochs")

# %% [markdown]
# ## 4. How good is it?
#
# Loss and accuracy on the test images, whether they are the figures that the run itself wrote down, and each class.

# %%
from jax_impl import evaluate

evaluate.main([str(RUN)])

# %% [markdown]
# And the pictures. In the learning curves look at the gap between training and test: it is what the network learned by
# heart. In the confusion matrix a row is a true class; what lies off the diagonal is confused: look at the shirts. The
# grid begins with the mistakes that the network was surest of.

# %%
from IPython.display import Image, display

from jax_impl import plot

plot.main([str(RUN), "--format", "png"])
for picture in sorted((RUN / "plots").glob("*.png")):
    print(picture.name)
    display(Image(str(picture)))

# %% [markdown]
# ## 5. The weights, in torch
#
# `weights.safetensors` has torch's names and torch's layouts. The lesson's own network takes it by `load_state_dict`.

# %%
from safetensors.torch import load_file

import torch_ref.models
from spec import recipe

weights = load_file(RUN / "weights.safetensors")
network = torch_ref.models.network(recipe.load(str(RUN)).model, (28, 28, 1), 10)
print(network.load_state_dict(weights))
for name, tensor in weights.items():
    print(f"{name:22} {tuple(tensor.shape)!s:18} {tensor.dtype}")

# %% [markdown]
# torch's evaluation of JAX's run: the same answers, but for an image on the very edge between two classes.

# %%
import torch_ref.evaluate

torch_ref.evaluate.main([str(RUN)])

# %% [markdown]
# On Colab this downloads the file to your own computer.

# %%
if "google.colab" in sys.modules:
    from google.colab import files

    files.download(str(RUN / "weights.safetensors"))
print(f"{(RUN / 'weights.safetensors').stat().st_size:,} bytes in {RUN / 'weights.safetensors'}")
