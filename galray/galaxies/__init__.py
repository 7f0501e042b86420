"""Runs of dwarf galaxies: configuration, members side by side, products, figures, one page per galaxy."""
