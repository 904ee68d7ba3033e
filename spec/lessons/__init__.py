"""Facts of the lessons in NumPy: what the notebooks show and the tests check by hand."""
