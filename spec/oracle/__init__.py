"""The truth: the specification's mathematics in float64 NumPy, with gradients worked out by hand (S3 to S8)."""

from spec.oracle.closed_forms import softmax_regression_gradients, two_layer_binary_gradients
from spec.oracle.functions import sigmoid, softmax
from spec.oracle.losses import example_losses, loss_gradient, predictions
from spec.oracle.metrics import accuracy, weighted_mean
from spec.oracle.network import Forward, backward, forward, gradients, layer_names
from spec.oracle.optimizers import initial_opt_state, learning_rate, update
from spec.oracle.sums import FLOAT64, PlainSums, Sums
from spec.oracle.training import train_step

__all__ = [
    "FLOAT64",
    "Forward",
    "PlainSums",
    "Sums",
    "accuracy",
    "backward",
    "example_losses",
    "forward",
    "gradients",
    "initial_opt_state",
    "layer_names",
    "learning_rate",
    "loss_gradient",
    "predictions",
    "sigmoid",
    "softmax",
    "softmax_regression_gradients",
    "train_step",
    "two_layer_binary_gradients",
    "update",
    "weighted_mean",
]
