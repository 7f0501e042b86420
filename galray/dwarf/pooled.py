"""What a posterior of one galaxy offers, and the posteriors of several members as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from galray.errors import GalrayError

__all__ = ["PooledHalo", "SampledHalo", "stretch_of"]

Array = NDArray[np.float64]


class SampledHalo(Protocol):
    """What a posterior offers: samples of each profile, shape (S, k) at k radii in kpc."""

    def density(self, r: Any) -> Array:
        """ρ(r), Msun/kpc³."""
        ...

    def mass(self, r: Any) -> Array:
        """M(<r), Msun."""
        ...

    def slope(self, r: Any) -> Array:
        """γ(r) = −dln ρ/dln r."""
        ...

    def number_density(self, r: Any) -> Array:
        """n(r) of the stars, one star in all, kpc⁻³."""
        ...

    def surface_density(self, radius: Any) -> Array:
        """Σ(R) of the stars, one star in all, kpc⁻²."""
        ...

    def dispersion_los(self, radius: Any) -> Array:
        """σ_los(R), km/s."""
        ...

    def dispersion_r(self, r: Any) -> Array:
        """σ_r(r), km/s."""
        ...

    def anisotropy(self, r: Any) -> Array:
        """β(r)."""
        ...

    def half_light_radius(self) -> Array:
        """Projected half-light radius, kpc, shape (S,)."""
        ...


class PooledHalo:
    """The samples of several posteriors of one galaxy together, each with an equal share.

    Arguments:
        members: The posteriors.
    """

    def __init__(self, members: Sequence[SampledHalo]) -> None:
        if not members:
            raise GalrayError("no finished fit to pool", "run the members first")
        self.members = list(members)

    def _joined(self, name: str, *arguments: Any) -> Array:
        parts = [np.asarray(getattr(member, name)(*arguments), dtype=float) for member in self.members]
        least = min(len(part) for part in parts)
        rows = [np.linspace(0, len(part) - 1, least).round().astype(int) for part in parts]
        return np.concatenate([part[row] for part, row in zip(parts, rows, strict=True)])

    @property
    def stretch(self) -> Array:
        """Distance of each sample over the nominal one."""
        lengths = [len(member.half_light_radius()) for member in self.members]
        least = min(lengths)
        rows = [np.linspace(0, length - 1, least).round().astype(int) for length in lengths]
        parts = [stretch_of(member) for member in self.members]
        return np.concatenate([part[row] for part, row in zip(parts, rows, strict=True)])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "half_light_radius":
            return lambda: self._joined(name)
        return lambda r: self._joined(name, r)


def stretch_of(halo: SampledHalo) -> Array:
    """Distance of each sample over the nominal one, shape (S,); 1 where the distance has no error."""
    count = len(halo.half_light_radius())
    return np.broadcast_to(np.asarray(getattr(halo, "stretch", 1.0), dtype=float), (count,))
