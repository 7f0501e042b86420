"""Galactic dark matter from star catalogues, with neural networks, on a laptop or a Ray cluster."""

__version__ = "0.1.0"
