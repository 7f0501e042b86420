"""Galaxies whose truth is known: exact spheres, an orbit-mixed Milky Way, and Gaia-like observations."""

from __future__ import annotations

from galray.mocks.spheres import HernquistSphere, IsochroneSphere, PlummerSphere

__all__ = ["HernquistSphere", "IsochroneSphere", "PlummerSphere"]
