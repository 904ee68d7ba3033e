"""What both implementations must do: recipes, data, order, counts, names. Imports neither framework."""
