"""The full run: one recipe trained by both implementations from one initial state in one order, compared all along."""
