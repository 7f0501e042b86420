"""Models of f(x, v) and of its score."""
