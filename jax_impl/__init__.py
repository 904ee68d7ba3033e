"""Recipe in, run out: Flax NNX modules, optax, and an epoch in one compiled program."""
