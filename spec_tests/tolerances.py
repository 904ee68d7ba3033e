"""Every tolerance of the suite: its name, its value, where it comes from (S12). No test types one in.

`u` is the unit roundoff: 2^-53 in float64, 2^-24 in float32. A sum of m products a_i b_i comes out within
m u sum|a_i b_i| of the truth, whatever its order (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
3.1); rounding errors that are independent grow as sqrt(m) only (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, A2815).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from spec.params import Leaf

# S12.5: the error of one side, against float64, may be this many times the other side's. Both sides round sums of the
# same terms in orders of their own, so the ratio of their largest errors is near 1. Over 64 values or more of a leaf it
# stays under 3; a leaf of ten values can be lucky on one side. A wrong formula is off by 1 / u: a million times.
KAPPA = 8

# S9: a free run in float64 is 2,000 to 24,000 steps, each adding about u = 1.1e-16 of a weight's size (weights are of
# size 1): sqrt(24,000) u = 1.7e-14 if roundings are independent, 24,000 u = 2.7e-12 if all were one way. A decision
# (the sign of a pre-activation) that flips would show as 1e-8 or more, and so would any difference of formula.
FREE_RUN_FLOAT64 = 1e-12
# torch's BatchNorm kernel sums its 128 * 784 values one after another, in float64 too, and is 6e-13 off the oracle at
# every step where JAX is 2e-16 off (measured 2026-11-22). The bound is n u, the most that one such sum may be off.
BATCHNORM_RUN_FLOAT64 = 128 * 784 * 2.0**-53  # 1.1e-11
# The same sums, of 64 * 784 values, at each of the CNN's five BatchNorms, which divide by deviations below 1: 5 n u =
# 2.8e-11 for one step if all were one way. 7.3e-13 was measured after 300 steps (2026-11-22).
CNN_FEW_STEPS = 300
CNN_FEW_STEPS_FLOAT64 = 1e-11
CNN_RUN_FLOAT64 = 1e-9
# A bound that comes from how far one side is from itself says nothing once it is over this.
TWIN_CEILING_FLOAT64 = 1e-9
# The same count in float32, u = 6e-8: sqrt(2,415) u = 2.9e-6 for weights of size 1; those of the sigmoid recipe are
# 0.3 at most. Its first layer is smooth; its second has 8 relu units, of which none was seen to flip.
SMOOTH_RUN_FLOAT32 = 1e-6

# S11.3: one batch divided in two ways is the same sums in another order. In float64 a free run is bound as in S9:
# 3.6e-13 was measured of the CNN after 100 steps on 8 devices (2026-11-22). In float32 100 steps of mlp128 add up to
# 4 sqrt(100) u = 2.4e-6, and momentum 0.8 hands each rounding on, 1 / (1 - 0.8) = 5 times: 1.2e-5; 4e-7 was measured.
SEVERAL_DEVICES_FLOAT64 = 1e-12
SEVERAL_DEVICES_FLOAT32 = 1e-5
SEVERAL_DEVICES = {"float32": SEVERAL_DEVICES_FLOAT32, "float64": SEVERAL_DEVICES_FLOAT64}

# Central differences with step h: the cubic term gives h^2 = 1e-12, rounding of the loss some tens of u / h = 1e-10.
DIFFERENCE_STEP = 1e-6
CENTRAL_DIFFERENCE = 1e-8


# A figure printed, by a lesson or a table, with four decimals; one with seven significant digits.
FOUR_DECIMALS = 5e-5
SEVEN_DIGITS = 1e-6

# The oracle in float64 (u = 1.1e-16) against values by hand: a handful of operations; sums of up to some hundred
# products, or a few layers of them.
ORACLE_FORMULA = 64 * 2.0**-53
ORACLE_SUM = 1024 * 2.0**-53

# Neither `assert_within` nor the floor of `error_ratios` may allow more than this of the largest value, however the
# bound was computed; an absolute bound of `assert_within` may allow it of 1.
CEILING_FLOAT32 = 1e-3
CEILING_FLOAT64 = 1e-9


def ceiling(dtype: np.typing.DTypeLike) -> float:
    """Return the most that a comparison of this dtype may allow; for integers, all that is under 1 means equal."""
    return CEILING_FLOAT64 if np.dtype(dtype) == np.float64 else CEILING_FLOAT32


def unit_roundoff(dtype: np.typing.DTypeLike) -> float:
    """Return u = 2^-p: half the distance from 1 to the next number."""
    return float(np.finfo(dtype).eps) / 2


def sum_bound(terms: int, magnitude: float, dtype: np.typing.DTypeLike) -> float:
    """Return m u sum|a_i b_i|: how far a sum of m products may lie from the truth; `magnitude` is sum|a_i b_i|."""
    return terms * unit_roundoff(dtype) * magnitude


def chain_bound(leaves: Iterable[Leaf], batch_values: int, dtype: np.typing.DTypeLike) -> float:
    """Return the relative error that a whole pass, forward and back, may have: u times the terms of all its sums.

    A layer sums `fan_in` products forward and as many back; a gradient sums over `batch_values` examples or pixels.
    """
    terms = sum(2 * leaf.fan_in for leaf in leaves if leaf.role == "weight") + batch_values
    return terms * unit_roundoff(dtype)


def twin_bound(steps: int, twin_difference: float) -> float:
    """Return how far two sides may be apart that round at each of `steps` steps, where one side is `twin_difference`
    from itself after a single rounding at the start: sqrt(steps) times, four standard deviations.

    Adam divides by the root of a gradient's second moment. Where gradients vanish, rounding is all there is to divide,
    and the run is chaotic in float64 too.
    """
    return 4 * math.sqrt(steps) * max(twin_difference, unit_roundoff(np.float64))


def walk_bound(steps: int, dtype: np.typing.DTypeLike) -> float:
    """Return sqrt(steps) u, four standard deviations of it: what independent roundings of `steps` updates add up to."""
    return 4 * math.sqrt(steps) * unit_roundoff(dtype)


def path_bound(steps: int, magnitude: float, dtype: np.typing.DTypeLike, *, momentum: float = 0.0) -> float:
    """Return how far a parameter may be off after `steps` updates from given gradients (S6).

    An update (decay, buffer, rate, subtraction; Adam's two moments and root) rounds numbers up to `magnitude` at most
    16 times; momentum hands each rounding of the buffer on, 1 + mu + mu^2 + ... = 1 / (1 - mu) times.
    """
    return 16 * steps * unit_roundoff(dtype) * magnitude / (1 - momentum)


def run_bound(leaves: Iterable[Leaf], batch_values: int, steps: int, dtype: np.typing.DTypeLike) -> float:
    """Return the relative error of a layer after `steps` training steps: each adds that of one pass, `chain_bound`.

    For short runs of small networks at rates that descend: an error of the parameters is not enlarged by a later step.
    """
    return steps * chain_bound(leaves, batch_values, dtype)


# S12.5: a fault to plant, which the tolerance rule must see: 1e-4 of a leaf's largest value, 1,700 float32 roundings.
PLANTED_FAULT = 1e-4


# A statistic of fixed draws may lie this many of its standard deviations off; a fair draw is further off once in 1.7
# million.
DEVIATIONS = 5


def formula_bound(magnitude: float, dtype: np.typing.DTypeLike) -> float:
    """Return 64 u `magnitude`: a formula of some tens of operations, each right to u of the largest value met."""
    return 64 * unit_roundoff(dtype) * magnitude


# A mean or a quotient of a few numbers in float64, each operation right to u, as a relative error.
ROUNDED_MEAN = 1e-12

# A line through a few points that lie on one, solved for in float64, as a relative error of its slope and its offset:
# the points' sizes are 1e6 apart, and so much worse than a sum is the offset conditioned.
SOLVED = 1e-9
