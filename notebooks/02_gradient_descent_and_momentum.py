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
# # Gradient descent, mini-batches and momentum
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/lockstep/blob/main/notebooks/02_gradient_descent_and_momentum.ipynb)
#
# **中文摘要**：本笔记从最简单的一步梯度下降讲起，先用手算，再分别用 JAX 和 PyTorch 验证。
# 接着在两个权重的曲面上比较不同学习率：有的太慢，有的收敛，有的发散，并用海森矩阵的特征值说明原因。
# 然后测量小批量梯度的噪声怎样随批量大小的平方根减小，以及每一步的代价。
# 最后比较平均形式、教科书形式与 PyTorch 的动量公式，指出它们在哪里不同，并证明 optax 与 torch 走的是同一条路。
#
# You will see one step made by hand and by two frameworks, why a learning rate creeps, converges or diverges, what a
# mini-batch costs and what it gets wrong, and that "momentum" is the name of several rules. If you come from the
# PyTorch lesson, part 6 is for you: JAX's optax and torch are held side by side there, to the last digits of float64.

# %%
# On Colab: this installs the package and what is missing, and upgrades nothing that is there.
import sys

if "google.colab" in sys.modules:
    print("installing, for a minute or two ...")
    # !pip list --format=freeze > installed.txt
    # !pip install --quiet --constraint installed.txt "lockstep[notebooks] @ git+https://github.com/OWNER/lockstep"

# %%
# %matplotlib inline
import dataclasses
import timeit

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from IPython.display import HTML

import jax_impl.optim
from jax_impl.objective import example_losses
from spec import datasets, params, quick, recipe
from spec.lessons import descent, minibatches
from spec.plots import descent as pictures
from spec.quick import sized
from spec_tests.tolerances import DEVIATIONS, path_bound, unit_roundoff

jax.config.update("jax_enable_x64", True)  # JAX computes in float32 unless told; torch is told tensor by tensor
jax.config.update("jax_default_device", jax.devices("cpu")[0])  # a TPU has no float64 of its own

print(quick.said())
print(f"{jax.device_count()} device{'s' * (jax.device_count() > 1)}: {', '.join(map(str, jax.devices()))}")

# %% [markdown]
# ## 1. One step
#
# The lesson stands at the point $(10, 7.5)$, the gradient there is $(5, 5)$, the learning rate is 1. A step of descent
# goes against the gradient: $\theta - \eta\, g$.

# %%
point, gradient, rate = np.array([10, 7.5]), np.array([5.0, 5.0]), 1.0
print("by hand:", point - rate * gradient)

# %% [markdown]
# In torch the optimiser holds the parameters and changes them in place. In optax it is a pair of functions: `init`
# makes its state, `update` turns gradients into what has to be added. Nothing is changed in place.

# %%
weights = torch.tensor(point, requires_grad=True)
weights.grad = torch.tensor(gradient)
torch.optim.SGD([weights], lr=rate).step()
print("torch:  ", weights.detach().numpy())

rule = optax.sgd(rate)
updates, _ = rule.update(jnp.array(gradient), rule.init(jnp.array(point)))
print("optax:  ", optax.apply_updates(jnp.array(point), updates))
assert weights.tolist() == optax.apply_updates(jnp.array(point), updates).tolist() == [5, 2.5]

# %% [markdown]
# Where does a gradient come from? `jax.grad` takes a function and returns another one, its derivative. torch records
# what you compute and walks back with `backward()`. The derivative of $x^2$ is $2x$, so at 1 it is 2.

# %%
x = torch.tensor(1.0, requires_grad=True)
(x**2).backward()
slope = jax.grad(lambda x: x**2)(1.0)
print("torch:", x.grad.item(), " jax.grad:", slope.item())
assert x.grad.item() == slope.item() == 2

# %% [markdown]
# ## 2. A surface of two weights
#
# Two examples, two weights, squared errors:
#
# $$L(w_1, w_2) = (2 - w_1 - w_2)^2 + (4 - 3 w_1 - w_2)^2$$
#
# Both errors vanish at $(1, 1)$. Turn the surface with the mouse: it is a gully, steep across and nearly flat along.

# %%
HTML(pictures.turnable_surface().to_html(full_html=False, include_plotlyjs=True))

# %% [markdown]
# The same surface for those who cannot turn it. Along one direction the lines of equal loss lie close together, along
# the other far apart.

# %%
pictures.surface_picture()

# %% [markdown]
# `descent.surface` is plain arithmetic, so NumPy, JAX and torch can all compute it. Value and gradient at the minimum,
# and the gradient at another point by hand, by JAX and by torch:

# %%
print("loss at (1, 1):", descent.surface(np.array(descent.MINIMUM)))
print("gradient at (1, 1):", jax.grad(descent.surface)(jnp.array(descent.MINIMUM)))

START = np.array([0.0, 2.5])
weights = torch.tensor(START, requires_grad=True)
descent.surface(weights).backward()
by_jax = jax.grad(descent.surface)(jnp.array(START))
print("gradient at", START, "by hand:", descent.surface_gradient(START), "jax:", by_jax, "torch:", weights.grad.numpy())
assert descent.surface_gradient(START).tolist() == by_jax.tolist() == weights.grad.tolist()

# %% [markdown]
# ## 3. Which learning rate?
#
# The surface is a parabola in every direction, so its second derivatives, the Hessian $H$, are the same everywhere. Its
# eigenvectors are the directions across and along the gully, its eigenvalues $\lambda$ the curvatures.

# %%
hessian = jax.hessian(descent.surface)(jnp.array(START))
assert np.array_equal(hessian, descent.HESSIAN)
curvatures, directions = np.linalg.eigh(np.array(hessian))
flat, steep = curvatures
print("Hessian:", hessian.tolist())
print(f"along the gully: curvature {flat:.4f}, direction {directions[:, 0].round(3)}")
print(f"across the gully: curvature {steep:.4f}, direction {directions[:, 1].round(3)}")
print(f"steepest over flattest: {steep / flat:.1f}")

# %% [markdown]
# A step multiplies the distance to the minimum by $1 - \eta\lambda$ along each eigenvector. So
#
# - $\eta\lambda$ near 0: the factor is near 1, descent *creeps*;
# - $\eta\lambda$ over 1: the factor is negative, descent jumps to the other side, a zigzag;
# - $\eta\lambda$ over 2: the factor is below $-1$, every jump is longer than the last: descent *diverges*.
#
# The steepest direction decides: $\eta < 2/\lambda_{\max}$. Momentum carries descent along the gully and moves that limit
# to $2(1 + \mu)/\lambda_{\max}$; across the gully it may swing for longer.

# %%
MOMENTUM = 0.8
limits = {mu: descent.largest_stable_rate(steep, momentum=mu) for mu in (0.0, MOMENTUM)}
for mu, limit in limits.items():
    print(f"momentum {mu}: the largest stable rate is {limit:.5f}")

# %% [markdown]
# Three rates each: a twentieth of the limit, eight tenths of it, and just over it.

# %%
STEPS = 40
SHARES = {"creeps": 0.05, "converges": 0.8, "diverges": 1.03}
rows = {}
for mu, limit in limits.items():
    name = f"momentum {mu}" if mu else "plain"
    rows[name] = {}
    for verdict, share in SHARES.items():
        rate = share * limit
        factors = [descent.shrinkage(rate, curvature, momentum=mu) for curvature in curvatures]
        path = descent.path(descent.surface_gradient, START, descent.plain(rate, momentum=mu), steps=STEPS)
        rows[name][f"{verdict}, rate {rate:.4f}"] = path
        print(
            f"{name:13} rate {rate:.4f} {verdict:10} distance times {factors[0]:.3f} a step along the gully, "
            f"{factors[1]:.3f} across; loss after {STEPS} steps {descent.surface(path[-1]):.2g}"
        )
        assert (max(factors) > 1) == (verdict == "diverges")

# %% [markdown]
# The star is the start, the cross the minimum; a path ends where it leaves the picture. Look at the middle column:
# plain descent zigzags across the gully and goes along it slowly; with momentum the path overshoots and swings in. In
# the right column the jumps grow.

# %%
pictures.paths_picture(rows)

# %% [markdown]
# The same paths as loss against step. On this scale a constant factor a step is a straight line, and how steep it is
# is that factor of the table (squared, for the loss goes with the square of the distance).

# %%
pictures.losses_picture(rows)

# %% [markdown]
# "Momentum speeds training", says the lesson. On this surface one can say by how much: the best rate for plain descent,
# $2/(\lambda_{\min} + \lambda_{\max})$, against the same search over rates with momentum.

# %%
best = {}
for mu, limit in limits.items():
    rates = np.linspace(0.01, 0.99, 99) * limit
    worst = [max(descent.shrinkage(rate, curvature, momentum=mu) for curvature in curvatures) for rate in rates]
    best[mu] = min(worst)
    as_good = rates[np.isclose(worst, best[mu], rtol=1e-6)]
    needed = np.log(1e-6) / np.log(best[mu])
    print(
        f"momentum {mu}: best factor {best[mu]:.4f}, at {len(as_good)} of 99 rates from {as_good[0]:.4f} to "
        f"{as_good[-1]:.4f}; {needed:.0f} steps to bring the distance to a millionth"
    )
print(f"the best plain rate by the formula: {2 / (flat + steep):.4f}; the square root of mu: {MOMENTUM**0.5:.4f}")
assert best[MOMENTUM] < best[0.0]

# %% [markdown]
# With momentum no rate has to be met exactly: wherever both directions swing, the factor is $\sqrt{\mu}$, whatever the
# rate.

# %% [markdown]
# ## 4. Why mini-batches?
#
# The true gradient is the mean over all 60,000 images. A mini-batch takes the mean over a few. How far off is it?
#
# The mean of $B$ independent values has the standard deviation of one value over $\sqrt{B}$. Here the "values" are
# whole gradients of softmax regression on Fashion-MNIST, at its initial weights.

# %%
chosen = recipe.load("softmax-regression")
data = datasets.preprocess(datasets.load(chosen.data), chosen.preprocessing)
EXAMPLES = sized(full=60_000, quick=6_000)
images = data.train.inputs[:EXAMPLES].reshape(EXAMPLES, -1)
labels = data.train.labels[:EXAMPLES]
leaves = params.leaves(chosen.model, data.input_shape, data.num_classes)
initial = params.initial_state(leaves, chosen.init, chosen.seed)
weight, bias = initial["linear1.weight"], initial["linear1.bias"]
print(f"{EXAMPLES:,} images, {weight.size + bias.size:,} weights")

# %%
BATCH_SIZES = (1, 4, 16, 64, 256, 1024, 4096)
DRAWS = sized(full=200, quick=20)
one = minibatches.spread(weight, bias, images, labels)
measured, expected = [], []
for batch_size in BATCH_SIZES:
    squares = minibatches.squared_distances(
        weight, bias, images, labels, batch_size=batch_size, draws=DRAWS, seed=chosen.seed
    )
    measured.append(np.sqrt(squares.mean()))
    expected.append(minibatches.expected_deviation(one, batch_size, EXAMPLES))
    uncertain = squares.std(ddof=1) / np.sqrt(DRAWS)  # of the mean of the squares
    print(f"batch {batch_size:5}: standard deviation {measured[-1]:.4f}, expected {expected[-1]:.4f}")
    assert abs(squares.mean() - expected[-1] ** 2) <= DEVIATIONS * uncertain
slope = np.polyfit(np.log(BATCH_SIZES), np.log(measured), 1)[0]
print(f"it goes with the batch size to the power {slope:.3f}; 1/sqrt(batch) is the power -0.5")

# %% [markdown]
# (For the largest batches a little less is expected than $1/\sqrt{B}$: they are drawn without putting back, and a batch
# of all the images would not be off at all. "Expected" has that in it.)
#
# What does a step cost? The gradient of one batch, compiled, by the clock:

# %%
grad = jax.jit(jax.grad(lambda weight, x, y: example_losses(x @ weight.T + bias, y, chosen.loss).mean()))
on_device = jnp.asarray(weight, jnp.float32)
seconds = []
for batch_size in BATCH_SIZES:
    batch = jnp.asarray(images[:batch_size], jnp.float32), jnp.asarray(labels[:batch_size])
    jax.block_until_ready(grad(on_device, *batch))  # compiles
    timer = timeit.Timer(lambda batch=batch: jax.block_until_ready(grad(on_device, *batch)))
    seconds.append(min(timer.repeat(repeat=5, number=sized(full=20, quick=5))) / sized(full=20, quick=5))
    print(
        f"batch {batch_size:5}: {seconds[-1] * 1e3:7.3f} ms a step, {batch_size / seconds[-1]:12,.0f} images a second"
    )

# %%
pictures.noise_picture(BATCH_SIZES, measured, expected, seconds)

# %% [markdown]
# Left: half the noise costs four times the images. Right: compare the line with the dashed one. Small batches lie far
# above it, for there starting a step is what costs, not the images in it. A good batch is large enough to keep the
# device busy, and no larger than the noise asks.

# %% [markdown]
# ## 5. Momentum: an average, or torch's sum
#
# Some books average: $v_t = \mu v_{t-1} + (1 - \mu)\, g_t$ with $v = 0$ before the first step.
# torch adds up: $b_t = \mu b_{t-1} + g_t$, and the first buffer is the first gradient itself.
#
# Give both a gradient of 1 at every step and watch the velocity:

# %%
mu, ones = 0.9, np.ones((30, 1))
pictures.buffers_picture(
    {
        "torch, momentum 0.9": descent.buffers(ones, momentum=mu)[:, 0],
        "torch, momentum 0.9, dampening 0.9": descent.buffers(ones, momentum=mu, dampening=mu)[:, 0],
        "average, 0.9": descent.averaged(ones, momentum=mu)[:, 0],
    }
)

# %% [markdown]
# torch's velocity climbs to $1/(1 - \mu) = 10$: with the same learning rate its steps become ten times as long. The
# average climbs to 1. Now the first steps, with gradients that are drawn:

# %%
grads = np.random.default_rng(0).standard_normal((200, 5))
summed = descent.buffers(grads, momentum=mu)
dampened = descent.buffers(grads, momentum=mu, dampening=mu)
average = descent.averaged(grads, momentum=mu)
print("first gradient:       ", grads[0].round(4))
print("torch's first step:   ", summed[0].round(4))
print("dampened first step:  ", dampened[0].round(4))
print("the average's first:  ", average[0].round(4), "= (1 - mu) times the gradient")

# %% [markdown]
# So the average with the rate $\eta/(1-\mu)$ is torch's rule with the rate $\eta$. And torch's `dampening=mu` is
# *not* the average: its first buffer is undamped, and what is too much in it, $\mu g_0$, fades as $\mu^t$.

# %%
bound = path_bound(len(grads), np.abs(summed).max(), np.float64, momentum=mu)
print("average / (1 - mu) against torch's:", np.abs(average / (1 - mu) - summed).max(), "bound", bound)
assert np.abs(average / (1 - mu) - summed).max() <= bound

too_much = mu ** np.arange(1, len(grads) + 1)[:, None] * grads[0]
print("dampened less average, less mu^(t+1) g_0:", np.abs(dampened - average - too_much).max(), "bound", bound)
assert np.abs(dampened - average - too_much).max() <= bound
for step in (0, 1, 10, 50):
    print(f"step {step:2}: dampened is off the average by {np.abs(dampened - average)[step].max():.2e}")

# %% [markdown]
# ## 6. torch and optax, side by side
#
# The claim is now put to the frameworks themselves. Every rule takes the same 200 gradients from the same point, in
# float64. On the left torch's own optimiser, on the right optax as `jax_impl.optim` puts it together.

# %%
rules = {
    "plain": descent.plain(0.1),
    "momentum": descent.plain(0.1, momentum=mu),
    "nesterov": descent.plain(0.1, momentum=mu, nesterov=True),
    "dampening": descent.plain(0.1, momentum=mu, dampening=mu),
}
for name, options in rules.items():
    weights = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    in_torch = torch.optim.SGD(
        [weights], lr=0.1, momentum=options.momentum, dampening=options.dampening, nesterov=options.nesterov
    )
    in_optax = jax_impl.optim.optimizer(dataclasses.replace(chosen, optimizer=options), steps_per_epoch=1)
    there = jnp.zeros(5)
    state, apart, reached = in_optax.init(there), 0.0, 0.0
    for grad in grads:
        weights.grad = torch.tensor(grad)
        in_torch.step()
        updates, state = in_optax.update(jnp.array(grad), state, there)
        there = optax.apply_updates(there, updates)
        apart = max(apart, np.abs(weights.detach().numpy() - there).max())
        reached = max(reached, np.abs(there).max())
    bound = path_bound(len(grads), max(reached, np.abs(grads).max()), np.float64, momentum=options.momentum)
    print(
        f"{name:10} furthest apart in {len(grads)} steps: {apart:.1e}, bound {bound:.1e}; first step "
        f"{descent.path(lambda _: grads[0], np.zeros(5), options, steps=1)[1][0] / (-0.1 * grads[0][0]):.1f} gradients"
    )
    assert apart <= bound

# %% [markdown]
# Where does the bound come from? A number in float64 is right to $u = 2^{-53}$, about $1.1 \cdot 10^{-16}$. A step
# rounds at most 16 times, 200 steps do it 200 times as often, and momentum hands each rounding on, $1/(1-\mu)$ times in
# all. What is measured is far less, as roundings go either way.

# %%
print(f"u = {unit_roundoff(np.float64):.2e}")

# %% [markdown]
# And on the surface, where each step asks for the gradient at the point that the last step reached: the loop as you
# know it from torch, and optax's.

# %%
rate = 0.02
weights = torch.tensor(START, requires_grad=True)
in_torch, torch_path = torch.optim.SGD([weights], lr=rate, momentum=MOMENTUM), [START]
for _ in range(200):
    in_torch.zero_grad()
    descent.surface(weights).backward()
    in_torch.step()
    torch_path.append(weights.detach().numpy().copy())

there, in_optax = jnp.array(START), optax.sgd(rate, momentum=MOMENTUM)
state, gradient, optax_path = in_optax.init(there), jax.jit(jax.grad(descent.surface)), [START]
for _ in range(200):
    updates, state = in_optax.update(gradient(there), state)
    there = optax.apply_updates(there, updates)
    optax_path.append(np.array(there))

oracle_path = descent.path(descent.surface_gradient, START, descent.plain(rate, momentum=MOMENTUM), steps=200)
bound = path_bound(200, np.abs(oracle_path).max(), np.float64, momentum=MOMENTUM)
for name, path in {"torch": torch_path, "optax": optax_path}.items():
    print(
        f"{name}: ends at {path[-1]}, at most {np.abs(path - oracle_path).max():.1e} off the oracle, bound {bound:.1e}"
    )
    assert np.abs(path - oracle_path).max() <= bound
print(f"torch and optax: at most {np.abs(np.array(torch_path) - optax_path).max():.1e} apart")

# %% [markdown]
# ## 7. The textbook's form, which parts later
#
# The textbook puts the rate inside: $w_t = \mu w_{t-1} - \eta_t g_t$, $\theta_{t+1} = \theta_t + w_t$. While the rate is
# constant that is torch's rule. At the first change of the rate they part: torch's whole buffer is scaled by the new
# rate, here only the newest gradient is.

# %%
rates = np.where(np.arange(len(grads)) < 100, 0.1, 0.01)
apart = np.abs(descent.rate_inside(grads, rates, momentum=mu) + rates[:, None] * summed).max(axis=1)
print(f"steps 0 to 99, rate 0.1:    at most {apart[:100].max():.1e} apart")
print(f"steps 100 to 199, rate 0.01: up to {apart[100:].max():.2f} apart, at step {100 + apart[100:].argmax()}")
assert apart[:100].max() <= path_bound(100, np.abs(summed).max(), np.float64, momentum=mu)

# %% [markdown]
# What to take along: the largest rate is a property of the surface; the noise of a batch falls with its square root;
# and when a paper or a port says "momentum 0.9", ask which of these rules, and what its first step is.
