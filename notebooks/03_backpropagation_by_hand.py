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
# # Backpropagation by hand
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/lockstep/blob/main/notebooks/03_backpropagation_by_hand.ipynb)
#
# **中文摘要**：本笔记用课程中的两层二分类网络（乳腺癌数据）手工推导反向传播，每个公式旁边都有对应的 NumPy 代码。
# 结果用三种方法检验：`jax.grad`、PyTorch 的 autograd 和数值微分。
# 我们指出课程公式中的一处笔误：隐藏层的导数里误用了输出层的 `sigma`，并测量这个错误使训练慢了多少。
# 最后画出各种激活函数及其导数，并说明多层 sigmoid 网络为什么会梯度消失。
#
# You will derive the gradients of a two-layer net with pencil and NumPy, and put them before three witnesses:
# `jax.grad`, torch's autograd and numerical differentiation. One of the lesson's formulas does not pass. You will see
# what that slip costs, and why deep nets of sigmoids learn so slowly.

# %%
# On Colab: this installs the package and what is missing, and upgrades nothing that is there.
import sys

if "google.colab" in sys.modules:
    print("installing, for a minute or two ...")
    # !pip list --format=freeze > installed.txt
    # !pip install --quiet --constraint installed.txt "lockstep[notebooks] @ git+https://github.com/OWNER/lockstep"

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from jax_impl.objective import example_losses
from spec import batches, datasets, oracle, params, quick, recipe
from spec.lessons import backpropagation
from spec.lessons.activations import ACTIVATIONS, derivative_products, gradient_sizes, softmax_jacobian
from spec.plots import activations as activation_pictures
from spec.plots import backpropagation as pictures
from spec.quick import sized
from spec_tests.tolerances import chain_bound

jax.config.update("jax_enable_x64", True)  # JAX computes in float32 unless told; torch is told tensor by tensor
jax.config.update("jax_default_device", jax.devices("cpu")[0])  # a TPU has no float64 of its own

print(quick.said())
print(f"{jax.device_count()} device{'s' * (jax.device_count() > 1)}: {', '.join(map(str, jax.devices()))}")

# %% [markdown]
# ## 1. The net and the data
#
# scikit-learn's table of breast tumours: 30 measurements each, malignant or benign. The net of the lesson has one
# hidden layer and a single output, both with the sigmoid $S(z) = 1/(1 + e^{-z})$:
#
# $$h = S(x W_1 + b_1), \qquad z = h W_2 + b_2, \qquad \sigma = S(z)$$
#
# Weights are written [inputs, outputs] here, as the lesson does; torch keeps them the other way round.

# %%
chosen = recipe.load("breast-cancer")
data = datasets.preprocess(datasets.load(chosen.data), chosen.preprocessing)
x, y = data.train.inputs.astype(np.float64), data.train.labels
leaves = params.leaves(chosen.model, data.input_shape, 1)
initial = params.initial_state(leaves, chosen.init, chosen.seed)
weights = tuple(array.T.astype(np.float64) for array in initial.values())
NAMES = ("W1", "b1", "W2", "b2")
w1, b1, w2, b2 = weights
print(f"{x.shape[0]} tumours of {x.shape[1]} measurements: {data.class_names}, {np.bincount(y).tolist()}")
for name, weight in zip(NAMES, weights, strict=True):
    print(f"{name}: {weight.shape}")

# %% [markdown]
# ## 2. Forward
#
# We go through the net with the first batch of five. The loss is the binary cross-entropy, summed over the batch:
#
# $$L = -\sum_i \left[ y_i \log \sigma_i + (1 - y_i) \log (1 - \sigma_i) \right]$$

# %%
first = batches.epoch_order(chosen.seed, 1, len(x))[: chosen.batch_size]
xb, yb = x[first], y[first, None]
h = 1 / (1 + np.exp(-(xb @ w1 + b1)))
z = h @ w2 + b2
sigma = 1 / (1 + np.exp(-z))
loss = -np.sum(yb * np.log(sigma) + (1 - yb) * np.log(1 - sigma))
print("labels y:       ", yb.ravel())
print("sigma:          ", sigma.ravel().round(4))
print(f"loss:            {loss:.6f}")
print(f"h has shape {h.shape}, sigma {sigma.shape}")

# %% [markdown]
# ## 3. Backward, one factor at a time
#
# The chain rule goes from the loss to the weights, and each step needs only what the step before it gave.
#
# **The output.** Two factors, the loss by $\sigma$ and $\sigma$ by $z$. Each has a denominator or a product that looks
# dangerous, but they cancel:
#
# $$\frac{\partial L}{\partial \sigma} = \frac{\sigma - y}{\sigma (1 - \sigma)}, \qquad
# \frac{\partial \sigma}{\partial z} = \sigma (1 - \sigma), \qquad
# \frac{\partial L}{\partial z} = \sigma - y$$

# %%
loss_by_sigma = (sigma - yb) / (sigma * (1 - sigma))
sigma_by_z = sigma * (1 - sigma)
loss_by_z = loss_by_sigma * sigma_by_z
print("product of the two:", loss_by_z.ravel().round(6))
print("sigma - y:         ", (sigma - yb).ravel().round(6))
assert np.abs(loss_by_z - (sigma - yb)).max() <= 4 * np.finfo(float).eps  # four operations on numbers up to 1

# %% [markdown]
# **The output layer's weights.** $z = h W_2 + b_2$ is linear, so each weight's share is the hidden unit that it
# multiplies, added up over the batch:
#
# $$\frac{\partial L}{\partial W_2} = h^\top (\sigma - y), \qquad
# \frac{\partial L}{\partial b_2} = \sum_i (\sigma_i - y_i)$$

# %%
delta2 = sigma - yb
loss_by_w2, loss_by_b2 = h.T @ delta2, delta2.sum(axis=0)
print("dL/dW2 has the shape of W2:", loss_by_w2.shape, " dL/db2:", loss_by_b2.round(4))

# %% [markdown]
# **Back into the hidden layer.** The error goes back along the weights that it came by, then through the hidden layer's
# sigmoid, whose derivative is $h (1 - h)$:
#
# $$\frac{\partial L}{\partial h} = (\sigma - y) W_2^\top, \qquad
# \delta_1 = \frac{\partial L}{\partial h} \odot h (1 - h)$$
#
# **The first layer's weights**, as before with $x$ in the place of $h$:
#
# $$\frac{\partial L}{\partial W_1} = x^\top \delta_1 = x^\top \left[ (\sigma - y) W_2^\top \odot h (1 - h) \right],
# \qquad \frac{\partial L}{\partial b_1} = \sum_i \delta_{1,i}$$

# %%
loss_by_h = delta2 @ w2.T
delta1 = loss_by_h * h * (1 - h)
loss_by_w1, loss_by_b1 = xb.T @ delta1, delta1.sum(axis=0)
step_by_step = (loss_by_w1, loss_by_b1, loss_by_w2, loss_by_b2)
print("dL/dW1 has the shape of W1:", loss_by_w1.shape, " dL/db1:", loss_by_b1.shape)

# %% [markdown]
# The package keeps these formulas in one function, `oracle.two_layer_binary_gradients`. It is what we put before the
# witnesses, so first: is it what we have just derived?

# %%
closed = oracle.two_layer_binary_gradients(*weights, xb, y[first], "sum")
errors = backpropagation.relative_errors(step_by_step, closed)
bound = chain_bound(leaves, len(xb), np.float64)
print("step by step against the closed form:", [f"{error:.1e}" for error in errors], f"bound {bound:.1e}")
assert max(errors) <= bound

# %% [markdown]
# ## 4. Three witnesses
#
# **`jax.grad`** takes the forward pass as a function and returns the function that computes the gradients. **torch**
# records the forward pass and walks back through it. Both in float64, over the whole table, with the mean as loss.
#
# Errors are relative to the largest entry of each array. Every sum rounds: the bound is $u = 2^{-53}$ times the number
# of terms of all sums, forward and back, plus one for each example.

# %%
closed = oracle.two_layer_binary_gradients(*weights, x, y, "mean")
by_jax = jax.grad(
    lambda w1, b1, w2, b2: example_losses(jax.nn.sigmoid(x @ w1 + b1) @ w2 + b2, y, chosen.loss).mean(),
    argnums=(0, 1, 2, 3),
)(*map(jnp.array, weights))

tensors = [torch.tensor(weight, requires_grad=True) for weight in weights]
v1, c1, v2, c2 = tensors
logits = (torch.tensor(x) @ v1 + c1).sigmoid() @ v2 + c2
functional.binary_cross_entropy_with_logits(logits[:, 0], torch.tensor(y, dtype=torch.float64)).backward()
by_torch = [tensor.grad.numpy() for tensor in tensors]

bound = chain_bound(leaves, len(x), np.float64)
for witness, grads in {"jax.grad": by_jax, "torch": by_torch}.items():
    errors = backpropagation.relative_errors(grads, closed)
    said = ", ".join(f"{name} {error:.1e}" for name, error in zip(NAMES, errors, strict=True))
    print(f"{witness:8} against the closed form: {said}; bound {bound:.1e}")
    assert max(errors) <= bound

# %% [markdown]
# **Numerical differentiation** knows no calculus at all: move one weight a little up and a little down, and see how the
# loss changes,
#
# $$\frac{\partial L}{\partial w} \approx \frac{L(w + \varepsilon) - L(w - \varepsilon)}{2 \varepsilon}$$
#
# It is a slow witness (two forward passes a weight) and a rough one, but it cannot make our mistakes. Too large an
# $\varepsilon$ and the formula is off by $\varepsilon^2$; too small, and the difference of two nearly equal losses is
# all rounding:

# %%
SIZES = sized(full=(1e-2, 1e-3, 1e-4, 1e-5, 6e-6, 1e-6, 1e-8, 1e-10, 1e-12), quick=(1e-2, 6e-6, 1e-12))
worst = {}
for size in SIZES:
    numerical = backpropagation.numerical_gradients(weights, x, y, "mean", step=size)
    worst[size] = max(backpropagation.relative_errors(numerical, closed))
    print(f"step {size:.0e}: off by {worst[size]:.1e} of the layer's largest")
assert worst[6e-6] < min(worst[1e-2], worst[1e-12])

# %% [markdown]
# ## 5. The lesson's slip
#
# For the first layer the lesson prints the *output's* sigma where the hidden layer's belongs:
#
# $$\text{printed: } \; x^\top \left[ (\sigma - y) W_2^\top \odot \sigma (1 - \sigma) \right], \qquad
# \text{right: } \; x^\top \left[ (\sigma - y) W_2^\top \odot h (1 - h) \right]$$
#
# NumPy does not mind. $\sigma$ is one column and $h$ sixteen, and broadcasting spreads the column over all units:

# %%
print(
    "shapes:", loss_by_h.shape, "times", (sigma * (1 - sigma)).shape, "gives", (loss_by_h * sigma * (1 - sigma)).shape
)
slipped = backpropagation.slipped_gradients(*weights, x, y, "mean")
numerical = backpropagation.numerical_gradients(weights, x, y, "mean")
for name, derived in {"right": closed, "printed": slipped}.items():
    errors = backpropagation.relative_errors(derived, numerical)
    print(
        f"{name:8} against numerical differentiation:",
        ", ".join(f"{n} {e:.1e}" for n, e in zip(NAMES, errors, strict=True)),
    )
assert (
    max(backpropagation.relative_errors(closed, numerical))
    < 1e-7
    < backpropagation.relative_errors(slipped, numerical)[0]
)

# %% [markdown]
# Numerical differentiation finds the culprits: $W_1$ and $b_1$ alone. In the picture each dot is one entry of the
# gradient by $W_1$; what is right lies on the diagonal.

# %%
pictures.entries_picture(numerical[0], {"h (1 - h): right": closed[0], "sigma (1 - sigma): printed": slipped[0]})

# %% [markdown]
# ## 6. What the slip costs
#
# Train with both, from the same weights, over the same batches, by plain descent.

# %%
RATE, EPOCHS = 0.5, sized(full=100, quick=20)
derivatives = {"right": oracle.two_layer_binary_gradients, "printed": backpropagation.slipped_gradients}
losses, trained = {}, {}
for name, gradients in derivatives.items():
    trained[name], losses[name] = backpropagation.train(
        gradients, weights, x, y, rate=RATE, batch_size=chosen.batch_size, epochs=EPOCHS
    )
    right = (backpropagation.forward(trained[name], x).sigma[:, 0] > 0.5) == y
    print(
        f"{name:8} loss {losses[name][0]:.4f} at first, {losses[name][1]:.4f} after an epoch, "
        f"{losses[name][-1]:.4f} after {EPOCHS}; {right.sum()} of {len(y)} right"
    )

# %%
pictures.losses_picture(losses)

# %% [markdown]
# This is what makes the slip dangerous: nothing breaks. The output layer's gradients are right, and the loss falls.
# Without the right curve beside it you would take the other for the best there is.
#
# Where may it come from? Where the net has become sure of an example, $\sigma (1 - \sigma)$ is near 0, so with the
# printed formula that example hardly moves the first layer, be it right or wrong. Look at the two factors in the net
# that was trained rightly, and at how wrong the printed gradient has become there:

# %%
passed = backpropagation.forward(trained["right"], x)
output_factor, hidden_factor = passed.sigma * (1 - passed.sigma), passed.hidden * (1 - passed.hidden)
print(f"median of sigma (1 - sigma): {np.median(output_factor):.1e}")
print(f"median of h (1 - h):         {np.median(hidden_factor):.1e}")
assert np.median(output_factor) < np.median(hidden_factor)

there = {name: gradients(*trained["right"], x, y, "mean")[0] for name, gradients in derivatives.items()}
(before,), (after,) = (
    backpropagation.relative_errors([printed], [right])
    for printed, right in ((slipped[0], closed[0]), (there["printed"], there["right"]))
)
print(f"the printed dL/dW1 is off by {before:.0%} of the largest entry before training, by {after:.0%} after it")
assert after > before

# %% [markdown]
# ## 7. Activations and their derivatives
#
# Going back through a layer multiplies by its activation's derivative. Look at how high each dashed line gets, and
# where it is 0. For softmax the derivative shown is that of the first probability by its own logit, $p (1 - p)$.

# %%
activation_pictures.activations_picture()

# %%
points = np.linspace(-5, 5, 1001)
for name, activation in ACTIVATIONS.items():
    slopes = activation.derivative(points)
    by_differences = (activation.value(points + 5e-6) - activation.value(points - 5e-6)) / 1e-5
    smooth = np.abs(points) > 1e-5  # relu and leaky relu have a kink at 0
    print(
        f"{name:10} derivative from {slopes.min():.4f} to {slopes.max():.4f}, "
        f"off the central difference by {np.abs(slopes - by_differences)[smooth].max():.0e}"
    )
    assert np.abs(slopes - by_differences)[smooth].max() < 1e-8

# %% [markdown]
# **Vanishing gradients.** A gradient that goes back through $n$ layers holds a product of $n$ derivatives. The
# sigmoid's is $1/4$ at best, so ten layers multiply by less than a millionth, before the weights have their say:

# %%
for depth in (1, 2, 5, 10):
    print(f"{depth:2} layers of sigmoids: at most {derivative_products('sigmoid', depth):.1e}")

# %% [markdown]
# That is the ceiling. What a real net has, one with torch's initial weights, is measured on the right: the gradient of
# each layer's weights, from the loss (the last layer) back to the inputs (the first).

# %%
sizes = {
    kind: gradient_sizes(kind, layers=10, width=sized(full=128, quick=64), examples=256, seed=0)
    for kind in ("sigmoid", "tanh", "relu")
}
for kind, measured in sizes.items():
    print(f"{kind:8} first layer {measured[0]:.1e}, last {measured[-1]:.1e}: {measured[-1] / measured[0]:,.0f} times")
assert sizes["sigmoid"][0] < min(sizes["tanh"][0], sizes["relu"][0])

# %%
activation_pictures.vanishing_picture(sizes)

# %% [markdown]
# Relu and tanh fade too, since torch's initial weights are small, but by some powers of ten fewer. For sigmoids the
# first layers get next to nothing: they stay as they were drawn.
#
# ## 8. Softmax, without overflow
#
# $$p_k = \frac{e^{z_k}}{\sum_j e^{z_j}}$$
#
# Written like this it overflows at logits near 710 in float64. Adding one number to every logit changes nothing, so all
# implementations take the largest logit off first.

# %%
logits = np.array([1.0, 2.0, 3.0, 4.0])
with np.errstate(over="ignore", invalid="ignore"):
    as_written = np.exp(logits + 1000) / np.exp(logits + 1000).sum()
print("as written, with 1000 added:", as_written)
softmaxes = {"NumPy": oracle.softmax, "JAX": jax.nn.softmax, "torch": lambda z: torch.tensor(z).softmax(dim=0).numpy()}
for name, softmax in softmaxes.items():
    print(f"{name:5} {np.array(softmax(logits)).round(4)}, with 1000 added {np.array(softmax(logits + 1000)).round(4)}")
    assert np.array(softmax(logits)).round(4).tolist() == [0.0321, 0.0871, 0.2369, 0.6439]
    assert np.array_equal(softmax(logits), softmax(logits + 1000))

# %% [markdown]
# Its derivative is a matrix, for every logit moves every probability:
# $\partial p_i / \partial z_j = p_i ([i = j] - p_j)$. Against `jax.jacobian`:

# %%
jacobian = softmax_jacobian(logits)
print(jacobian.round(4))
apart = np.abs(jacobian - jax.jacobian(jax.nn.softmax)(jnp.array(logits))).max()
print(f"off jax.jacobian by {apart:.1e}; its rows sum to 0 within {np.abs(jacobian.sum(axis=1)).max():.1e}")
assert apart <= 8 * np.finfo(float).eps

# %% [markdown]
# What to take along: derive, then differentiate numerically once, at one small batch, before you trust either the
# formula or the code. The shapes fitting and the loss falling prove nothing.
