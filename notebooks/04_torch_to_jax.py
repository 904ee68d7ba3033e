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
# # From PyTorch to JAX, in step
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/lockstep/blob/main/notebooks/04_torch_to_jax.ipynb)
#
# **中文摘要**：本笔记写给学过 PyTorch 课程、想转到 JAX 的读者。先把数据、模型、损失、优化器、
# 训练循环、评估与保存逐项左右对照，代码直接取自仓库里的程序。然后用相同的初始权重和相同的批次，
# 同时训练两边，逐步打印权重的最大差，证明二者同步。最后逐个演示容易踩的坑，
# 例如忘记调用 `optimizer.step()`、梯度累加、softmax 用了两次、通道顺序与 BatchNorm 的动量。
#
# You know the lesson's PyTorch program. Here it stands beside the same run in JAX, part by part; then both are trained
# from the same weights on the same batches, and we measure how far apart they get; then come the traps, each in a cell
# that shows what happens.

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
# ## 1. Side by side
#
# Left the lesson's way in torch, right ours in JAX. Nothing here is typed in: the cells ask Python for the source.
#
# **Data.** torch's `DataLoader` takes images one at a time, turns each into floats and stacks them. Ours puts the whole
# data set on the device once, as bytes; a table of their float values, made by the host, turns them into numbers there.

# %%
from IPython.display import HTML

import jax_impl.convert
import jax_impl.epoch
import jax_impl.models
import jax_impl.objective
import jax_impl.optim
import jax_impl.step
import jax_impl.stepper
import torch_ref.convert
import torch_ref.lesson
import torch_ref.models
import torch_ref.objective
import torch_ref.optim
import torch_ref.step
from spec.batches import epoch_order
from spec.listing import side_by_side

HTML(side_by_side({"torch": [torch_ref.lesson.batches], "JAX": [jax_impl.stepper.put, epoch_order]}))

# %% [markdown]
# **Model.** An `nn.Module` holds its weights in both. In torch that is where they live; in JAX a module is split into a
# static graph and a tree of arrays, and the step is a pure function of that tree.

# %%
HTML(side_by_side({"torch": [torch_ref.models.network, torch_ref.models._mlp], "JAX": [jax_impl.models.MLP]}))

# %% [markdown]
# **Loss.** Both take logits, not probabilities, and give one number an example.

# %%
HTML(side_by_side({"torch": [torch_ref.objective.example_losses], "JAX": [jax_impl.objective.example_losses]}))

# %% [markdown]
# **Optimiser.** torch's optimiser owns the parameters and changes them in place. An optax optimiser owns nothing: it
# takes gradients and its own state, and returns updates and a new state.

# %%
HTML(side_by_side({"torch": [torch_ref.optim.optimizer], "JAX": [jax_impl.optim.optimizer]}))

# %% [markdown]
# **Loop.** On the left Python runs every step: the lesson's loop, and the reference's step, which part 2 runs and which
# hands out what it computes. On the right `gradients` is what `loss.backward()` is in torch, `train_step` is one step,
# and `run_steps` is a whole epoch of them in a `fori_loop`, compiled once and called once an epoch.

# %%
HTML(
    side_by_side(
        {
            "torch": [torch_ref.lesson.train_epoch, torch_ref.step.train_step],
            "JAX": [jax_impl.step.make_gradients, jax_impl.step.make_train_step, jax_impl.epoch.make_run_steps],
        }
    )
)

# %% [markdown]
# **Evaluation.** In torch the mode is a switch on the module. In JAX it is an argument, `train=False`: nobody can
# forget to switch it back.

# %%
HTML(
    side_by_side(
        {"torch": [torch_ref.lesson.evaluate, torch_ref.lesson._correct], "JAX": [jax_impl.step.make_eval_step]}
    )
)

# %% [markdown]
# **Saving.** Both sides write the same: a dict from torch's names to arrays in torch's layouts.

# %%
HTML(side_by_side({"torch": [torch_ref.convert.state], "JAX": [jax_impl.convert.to_canonical]}))

# %% [markdown]
# ## 2. In step
#
# **The same start.** The initial weights are drawn by NumPy from the seed and each array's name, outside both
# frameworks. An adapter holds one side's network and optimiser behind dicts of arrays.

# %%
import dataclasses

from spec import datasets, recipe
from spec_tests.adapters import JaxAdapter, TorchAdapter
from spec_tests.assertions import assert_identical, assert_within, largest_difference
from spec_tests.lockstep.runs import Pair

mlp128 = dataclasses.replace(recipe.load("mlp128"), precision="float64")
pair = Pair.of(mlp128, datasets.load(mlp128.data))
ours, theirs = JaxAdapter(pair.network), TorchAdapter(pair.network)
assert_identical(ours.state(), theirs.state(), item="initial state")
for name, array in ours.state().items():
    print(f"{name:16} {array.shape!s:12} {array.dtype}, the same bits on both sides")

# %% [markdown]
# **The same gradients.** One batch, in float64. The bound is no number that was tuned until it fits: a sum of m
# products is off by at most m u times their size (u is half the distance from 1 to the next number), and `chain_bound`
# counts the products of all sums, forward and back.

# %%
from spec_tests.tolerances import FREE_RUN_FLOAT64, chain_bound

batch = next(pair.batches(epoch=1))
images, labels = pair.train.inputs[batch], pair.train.labels[batch]
gradients = ours.gradients(images, labels), theirs.gradients(images, labels)
bound = chain_bound(pair.network.leaves, len(batch), "float64")
assert_within(*gradients, bound=bound, item="gradients", relative_to_layer=True)
for name in gradients[0]:
    apart = abs(gradients[0][name] - gradients[1][name]).max()
    print(f"{name:16} largest {abs(gradients[0][name]).max():.1e}, differs by {apart:.1e}")
print(f"allowed: {bound:.1e} of a layer's largest value")

# %% [markdown]
# **The same run.** Now both train on, each from its own weights, on the same batches; nothing is handed over.

# %%
from itertools import chain, islice

STEPS = sized(full=2 * pair.counts.steps_per_epoch, quick=100)
EVERY = 50
differences = {}
for step, batch in enumerate(islice(chain.from_iterable(map(pair.batches, range(1, 99))), STEPS), start=1):
    images, labels = pair.train.inputs[batch], pair.train.labels[batch]
    loss, their_loss = ours.step(images, labels)[0], theirs.step(images, labels)[0]
    if step % EVERY == 0:
        differences[step] = largest_difference(ours.state(), theirs.state())
        print(f"step {step:4}: loss {loss:.4f} and {their_loss:.4f}, weights differ by {differences[step]:.1e}")
assert max(differences.values()) <= FREE_RUN_FLOAT64
print(f"bound: {FREE_RUN_FLOAT64:.0e}")

# %% [markdown]
# Look at the picture's scale: the curve lies far below the dashed bound. A wrong formula anywhere, a sign, a mean for a
# sum, would lift it by many powers of ten at the first step.

# %%
from spec.plots.differences import differences_picture

differences_picture(differences, bound=FREE_RUN_FLOAT64, title=f"{mlp128.name} in float64: JAX against torch")

# %% [markdown]
# **And the same answers.** Every test image is put to both networks.

# %%
answers = [side.evaluate(pair.scored.inputs, pair.scored.labels)[1] for side in (ours, theirs)]
print(f"accuracy {(answers[0] == pair.scored.labels).mean():.4f} and {(answers[1] == pair.scored.labels).mean():.4f}")
print(f"different answers: {(answers[0] != answers[1]).sum()} of {len(answers[0])}")
assert (answers[0] == answers[1]).all()

# %% [markdown]
# **Weights carried across.** `convert` on the JAX side gives what torch's `load_state_dict` takes, and back, bit for
# bit. Here torch's trained network becomes Flax's tree and returns.

# %%
from jax_impl.programs import precision_scope

with precision_scope("float64"):
    flax_tree, statistics = jax_impl.convert.from_canonical(
        theirs.state(), pair.network.leaves, dtype="float64", device=jax.devices("cpu")[0]
    )
    returned = jax_impl.convert.to_canonical(flax_tree, statistics, pair.network.leaves)
assert_identical(returned, theirs.state(), item="there and back")
torch_ref.convert.load_state(theirs.module, ours.state())
assert_identical(theirs.state(), ours.state(), item="JAX's weights in torch")
print({name: leaf["kernel"].shape for name, leaf in flax_tree.items()}, "in Flax")
print({name: array.shape for name, array in returned.items()}, "in torch")

# %% [markdown]
# ## 3. The traps
#
# Small cells, each with one thing that goes wrong without an error.
#
# ### `optimizer.step` without the call
#
# The lesson's slip: the name alone is a valid expression, and no weight ever moves. In optax the same slip is an update
# that is computed and not applied.

# %%
import copy

import jax.numpy as jnp
import numpy as np
import optax
import torch

layer = torch.nn.Linear(3, 2)
before = copy.deepcopy(layer.state_dict())
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
layer(torch.ones(4, 3)).sum().backward()
optimizer.step
print("step without the call moves", (layer.weight - before["weight"]).abs().max().item())
optimizer.step()
print("step() moves", (layer.weight - before["weight"]).abs().max().item())

sgd, weight = optax.sgd(0.1), jnp.ones(3)
updates, state = sgd.update(jnp.full(3, 4.0), sgd.init(weight))
print("optax: the weight is still", weight, "and after apply_updates", optax.apply_updates(weight, updates))

# %% [markdown]
# ### Gradients that accumulate
#
# torch adds to `.grad` until it is told to stop; `jax.grad` returns a new value on every call.

# %%
w = torch.tensor(3.0, requires_grad=True)
for call in (1, 2, 3):
    (w**2).backward()
    print(f"call {call}: torch's w.grad is {w.grad.item()}, jax.grad gives {jax.grad(lambda w: w**2)(3.0)}")

# %% [markdown]
# ### Softmax twice
#
# A cross-entropy takes logits. Given probabilities, it applies softmax again: the loss of the best possible answer is
# far from 0, and the gradient of a wrong one is small.

# %%
from spec.recipe import Loss

right = jnp.array([[50.0] + [0.0] * 9])
wrong = jnp.array([[0.0, 50.0] + [0.0] * 8])
label = jnp.array([0])
for kind in ("cross_entropy", "cross_entropy_of_softmax"):
    loss = Loss(name=kind, reduction="mean", label_smoothing=0.0)
    slope = jax.grad(lambda logits, loss=loss: jax_impl.objective.example_losses(logits, label, loss)[0])(wrong)
    perfect = jax_impl.objective.example_losses(right, label, loss)[0]
    print(f"{kind:25} of a sure right answer {perfect:.4f}; slope at a sure wrong one {jnp.abs(slope).max():.1e}")

# %% [markdown]
# ### The order of a flattened image
#
# torch's images run channel, row, column; Flax's row, column, channel. The data may stay as they are, but then the
# columns of the first dense weight have to be permuted, or the network sees a scrambled image.

# %%
nhwc = np.arange(2 * 2 * 3).reshape(1, 2, 2, 3)
print("Flax flattens to ", nhwc.reshape(-1))
print("torch flattens to", nhwc.transpose(0, 3, 1, 2).reshape(-1))

# %% [markdown]
# ### Kernels are transposed
#
# A dense weight is [out, in] in torch and [in, out] in Flax; a convolution's is [out, in, h, w] and [h, w, in, out]. If
# in and out are equal, a forgotten transpose raises no error and gives other numbers.

# %%
from flax import nnx

print("dense", tuple(torch.nn.Linear(5, 7).weight.shape), nnx.Linear(5, 7, rngs=nnx.Rngs(0)).kernel[...].shape)
print("conv ", tuple(torch.nn.Conv2d(1, 8, 3).weight.shape), nnx.Conv(1, 8, (3, 3), rngs=nnx.Rngs(0)).kernel[...].shape)
square = np.arange(9.0).reshape(3, 3)
print("square, transposed or not:", np.ones(3) @ square, square @ np.ones(3))

# %% [markdown]
# ### The initial weights
#
# torch draws weight and bias from U(-1/sqrt(fan_in), 1/sqrt(fan_in)); Flax draws wider weights, and zeros for biases.

# %%
torch_layer, flax_layer = torch.nn.Linear(784, 128), nnx.Linear(784, 128, rngs=nnx.Rngs(0))
print(
    f"weights' deviation: torch {torch_layer.weight.std():.4f}, Flax {flax_layer.kernel[...].std():.4f}, "
    f"ratio {flax_layer.kernel[...].std() / torch_layer.weight.std().item():.3f}; sqrt(3) is {3**0.5:.3f}"
)
print(f"largest bias: torch {torch_layer.bias.abs().max():.4f}, Flax {jnp.abs(flax_layer.bias[...]).max():.4f}")

# %% [markdown]
# ### BatchNorm: whose momentum, which variance
#
# torch's momentum 0.1 is the share of the new value, Flax's 0.9 that of the old one: the same thing with two names.
# Copy the number and the running figures are wrong. And torch averages unbiased variances, each n/(n - 1) times the
# one that Flax averages. Our layer follows torch.

# %%
from jax_impl.layers import BatchNorm

rows = np.random.default_rng(0).normal(5, 2, (4, 1)).astype(np.float32)
torch_norm = torch.nn.BatchNorm1d(1)
torch_norm(torch.from_numpy(rows))
our_norm = BatchNorm(1)
our_norm(jnp.array(rows), train=True)
print(f"torch, momentum 0.1: mean {torch_norm.running_mean.item():.5f}, variance {torch_norm.running_var.item():.5f}")
print(f"ours:                mean {our_norm.mean[...].item():.5f}, variance {our_norm.var[...].item():.5f}")
for momentum in (0.9, 0.1):
    norm = nnx.BatchNorm(1, use_running_average=False, momentum=momentum, rngs=nnx.Rngs(0))
    norm(jnp.array(rows))
    print(f"Flax, momentum {momentum}:  mean {norm.mean[...].item():.5f}, variance {norm.var[...].item():.5f}")
assert abs(our_norm.var[...].item() - torch_norm.running_var.item()) <= 64 * 2.0**-24 * torch_norm.running_var.item()

# %% [markdown]
# ### Evaluation mode that stays
#
# `model.eval()` is for ever. The lesson's network has no dropout in its first chapters, so nobody notices; with dropout
# the rest of the training runs without it.

# %%
dropout = torch.nn.Dropout(0.5)
print("training  ", dropout(torch.ones(6)))
dropout.eval()
print("evaluation", dropout(torch.ones(6)))
print("next epoch", dropout(torch.ones(6)), "<- nobody called train(): no unit is dropped")

# %% [markdown]
# ### Momentum's first step
#
# torch's buffer starts as the gradient itself; optax's `trace` starts at 0 and adds the whole gradient: the same. An
# exponential mean, as Adam has inside and as some textbooks write momentum, takes only a share of it.

# %%
moved = {}
torch_w = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([torch_w], lr=1.0, momentum=0.9)
torch_w.grad = torch.ones(1)
moved["torch SGD"] = []
for _ in range(3):
    optimizer.step()
    moved["torch SGD"].append(-torch_w.item())
mean = optax.chain(optax.ema(0.9, debias=False), optax.sgd(1.0))
rules = {"optax.sgd": optax.sgd(1.0, momentum=0.9), "exponential mean": mean}
for name, rule in rules.items():
    weight, state, moved[name] = jnp.zeros(1), rule.init(jnp.zeros(1)), []
    for _ in range(3):
        updates, state = rule.update(jnp.ones(1), state)
        weight = optax.apply_updates(weight, updates)
        moved[name].append(-weight.item())
for name, distances in moved.items():
    print(f"{name:17}", " ".join(f"{distance:.3f}" for distance in distances))

# %% [markdown]
# ### An accuracy that cannot reach one
#
# The lesson divides each batch's right answers by the batch size and the sum by the number of batches. The last batch
# is short, so a perfect network does not get 1.

# %%
sizes = np.array([len(part) for part in np.split(np.arange(10_000), range(64, 10_000, 64))])
print(f"{len(sizes)} batches, the last of {sizes[-1]}: a perfect network gets {(sizes / 64).sum() / len(sizes):.4f}")
print(f"right answers over examples: {sizes.sum() / 10_000:.4f}")

# %% [markdown]
# ### Random keys
#
# torch has one generator that moves on by itself. In JAX a key is a value: the same key gives the same numbers, for
# ever. A step's key here is folded from seed, epoch and step, so a run that goes on after a stop draws what it would
# have drawn.

# %%
key = jax.random.key(0)
print("torch, twice:     ", torch.rand(1).item(), torch.rand(1).item())
print("one key, twice:   ", jax.random.uniform(key).item(), jax.random.uniform(key).item())
print("folded with 1, 2: ", *(jax.random.uniform(jax.random.fold_in(key, step)).item() for step in (1, 2)))

# %% [markdown]
# ### A new shape compiles again
#
# `jit` runs the Python function once for each shape, and the compiled program after that. A short last batch is one
# more program.

# %%
double = jax.jit(lambda x: 2 * x)
for size in (64, 64, 64, 16):
    double(jnp.ones(size))
    print(f"batch of {size}: {double._cache_size()} compiled so far")

# %% [markdown]
# ### Products on an accelerator are narrower
#
# Asked for nothing, a TPU multiplies float32 matrices in bfloat16, and newer GPUs in TensorFloat-32. A port that
# agrees on a CPU then parts from the first product on. A run here asks for full width; a plain `@` does not. On a CPU
# the two rows are the same.

# %%
left, right = np.random.default_rng(0).standard_normal((2, 256, 256))
exact = left @ right
for precision in ("default", "highest"):
    with jax.default_matmul_precision(precision):
        product = jnp.array(left, jnp.float32) @ jnp.array(right, jnp.float32)
    print(f"{precision:8} off by {np.abs(product - exact).max() / np.abs(exact).max():.1e} of the largest value")

# %% [markdown]
# ### float64 needs a flag
#
# Without it JAX makes float32 of whatever it is given.

# %%
print("plainly:  ", jnp.array(np.pi, float).dtype, " 1 + 1e-9 - 1 =", jnp.array(1 + 1e-9, float) - 1)
with precision_scope("float64"):
    print("with flag:", jnp.array(np.pi, float).dtype, " 1 + 1e-9 - 1 =", jnp.array(1 + 1e-9, float) - 1)

# %% [markdown]
# ### NaN makes no noise
#
# Neither framework raises. Worse, a `where` that leaves out the bad branch still differentiates it. A run here stops at
# the first step that made a number infinite or NaN, and says which array it spoiled.

# %%
print("log at 0, hidden by where:", jax.grad(lambda x: jnp.where(x > 0, jnp.log(x), 0.0) * x)(0.0))
x = torch.tensor(0.0, requires_grad=True)
(torch.where(x > 0, torch.log(x), 0.0) * x).backward()
print("torch:                    ", x.grad.item())

# %%
from jax_impl import train
from spec.errors import UserError

layers = ["--model.hidden-sizes", *["64"] * 6, "--model.activations", *["relu"] * 6]
try:
    train.main(["--recipe", "digits", *layers, "--learning-rate", "1e6", "--out", "runs/diverges", "--quiet"])
except UserError as error:
    print(error)

# %% [markdown]
# ## Where to go from here
#
# Every statement that both sides obey, with its trap and its tests, stands in `spec/SPEC.md` of the repository.
