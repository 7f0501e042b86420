"""Measured potentials in galpy, gala and agama, so that orbits can be integrated in them.

A measured field is known inside its ball only. Beyond it an exported potential refuses (`GalrayError`), or
with ``outside="nan"`` gives NaN and counts the positions in ``num_outside``; nothing is extrapolated.

The frames: gala and agama share galray's Cartesian axes (the Sun at −x, the disc turning towards +y); galpy's
left-handed cylindrical coordinates are galray's (R, φ, z), φ growing along Galactic rotation from the Sun's.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from galray.errors import GalrayError
from galray.gravity.region import Region

__all__ = ["Exportable", "Outside", "PositionGuard", "to_agama", "to_gala", "to_galpy"]

Array = NDArray[np.float64]
Outside = Literal["error", "nan"]


class Exportable:
    """Gives a field the three exports as methods."""

    def exported_field(self) -> Any:
        """The field that the exports evaluate: itself, unless a class says otherwise."""
        return self

    def to_galpy(self, **options: Any) -> Any:
        """The field as a galpy ``Potential``; options as in `galray.gravity.to_galpy`."""
        return to_galpy(self.exported_field(), **options)

    def to_gala(self, **options: Any) -> Any:
        """The field as a gala ``PotentialBase``; options as in `galray.gravity.to_gala`."""
        return to_gala(self.exported_field(), **options)

    def to_agama(self, **options: Any) -> Any:
        """The field as an ``agama.Potential``; options as in `galray.gravity.to_agama`."""
        return to_agama(self.exported_field(), **options)


def to_galpy(
    field: Any,
    *,
    length_kpc: float = 8.122,
    speed_km_s: float = 229.0,
    outside: Outside = "error",
    axisymmetric: bool | None = None,
) -> Any:
    """A field with a potential as a ``galpy.potential.Potential``: Φ, the forces, second derivatives and ρ.

    Second derivatives in (R, z) are differences of the forces over 1 pc. galpy integrates orbits in it with
    its Python integrators (``method="dop853"`` or ``"odeint"``).

    Arguments:
        field: The field; its Φ, a and ρ are in galray's units.
        length_kpc: galpy's ``ro``.
        speed_km_s: galpy's ``vo``.
        outside: What a position beyond the field's region gives: an error, or NaN.
        axisymmetric: Whether the field is; None looks at how the field is built.

    Raises:
        GalrayError: galpy is not installed, or the field has no potential.
    """
    guard = PositionGuard(field, outside)
    if axisymmetric is None:
        axisymmetric = is_axisymmetric(field)
    module = _extra("galpy", "galray.gravity.exports_galpy")
    return module.MeasuredPotential(guard, length_kpc, speed_km_s, axisymmetric)


def to_gala(field: Any, *, outside: Outside = "error") -> Any:
    """A field with a potential as a gala potential in gala's galactic units (kpc, Myr, Msun).

    It is written in Python: orbits need a Python integrator, such as
    ``gala.integrate.DOPRI853Integrator`` with ``cython_if_possible=False``.

    Arguments:
        field: The field.
        outside: What a position beyond the field's region gives: an error, or NaN.

    Raises:
        GalrayError: gala is not installed, or the field has no potential.
    """
    guard = PositionGuard(field, outside)
    return _extra("gala", "galray.gravity.exports_gala").MeasuredPotential(guard)


def to_agama(field: Any, *, outside: Outside = "nan", axisymmetric: bool | None = None) -> Any:
    """A field with a potential as an ``agama.Potential`` that calls it; agama differences Φ for forces.

    agama's units are global: where none are set, they become kpc, km/s and Msun; otherwise the potential
    converts to those in force when it is called.

    Arguments:
        field: The field.
        outside: What a position beyond the field's region gives; NaN by default, since an exception cannot
            pass through agama's C++ code.
        axisymmetric: Whether the field is; None looks at how the field is built.

    Raises:
        GalrayError: agama is not installed, or the field has no potential.
    """
    guard = PositionGuard(field, outside)
    agama = _extra("agama", "agama")
    if axisymmetric is None:
        axisymmetric = is_axisymmetric(field)
    if not agama.getUnits():
        agama.setUnits(length=1, mass=1, velocity=1)

    def potential(x: Array) -> Array:
        units = agama.getUnits()
        length, speed = (float(getattr(units[key], "value", units[key])) for key in ("length", "velocity"))
        return guard.potential(np.asarray(x, dtype=np.float64) * length) / speed**2

    return agama.Potential(potential=potential, symmetry="axisymmetric" if axisymmetric else "none")


class PositionGuard:
    """A field behind a check of positions, in numpy: what the exported potentials evaluate.

    Arguments:
        field: A field with ``potential``, ``acceleration`` and ``mass_density``.
        outside: ``error`` or ``nan``.

    Raises:
        GalrayError: The field has no potential.
    """

    def __init__(self, field: Any, outside: Outside = "error") -> None:
        if outside not in ("error", "nan"):
            raise GalrayError(f"outside = {outside!r}", "give 'error' or 'nan'")
        if not has_potential(field):
            raise GalrayError(
                f"a {type(field).__name__} has accelerations but no potential, which an export needs",
                "fit a potential to its accelerations (galray.gravity.fit_spline_to_accelerations) first",
            )
        self.field = field
        self.region: Region | None = getattr(field, "region", None)
        self.outside = outside
        self.num_outside = 0
        self._last: tuple[bytes, Array] = (b"", np.empty(0))

    def potential(self, x: Array) -> Array:
        """Φ at positions (n, 3) in kpc, in (km/s)², shape (n,)."""
        return self._evaluate("potential", x)

    def acceleration(self, x: Array) -> Array:
        """A at positions (n, 3), in (km/s)²/kpc, shape (n, 3).

        The last answer is kept: galpy asks for the three components of one place one after the other.
        """
        key = x.tobytes()
        if self._last[0] != key:
            self._last = (key, self._evaluate("acceleration", x))
        return self._last[1]

    def mass_density(self, x: Array) -> Array:
        """ρ at positions (n, 3), in Msun/kpc³, shape (n,)."""
        return self._evaluate("mass_density", x)

    def _evaluate(self, name: str, x: Array) -> Array:
        tail = (3,) if name == "acceleration" else ()
        positions = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
        inside = np.ones(len(x), dtype=bool)
        if self.region is not None:
            inside = self.region.contains(positions).numpy()
        if not inside.all():
            self._refuse(np.asarray(x)[~inside])
        values = np.full((len(x), *tail), np.nan)
        if inside.any():
            values[inside] = getattr(self.field, name)(positions[torch.from_numpy(inside)]).detach().numpy()
        return values

    def _refuse(self, x: Array) -> None:
        self.num_outside += len(x)
        if self.outside == "nan":
            return
        assert self.region is not None
        where = ", ".join(f"{value:.3f}" for value in x[0])
        centre = ", ".join(f"{value:.3f}" for value in self.region.center)
        raise GalrayError(
            f"({where}) kpc lies beyond the ball of {self.region.radius:g} kpc around ({centre}) in which "
            "this potential was measured",
            "integrate orbits that stay inside, or export with outside='nan'",
        )


def has_potential(field: Any) -> bool:
    """Whether a field, and every field that it is the mean of, has a potential."""
    parts = getattr(field, "fields", None)
    if isinstance(parts, list):
        return all(has_potential(part) for part in parts)
    return hasattr(field, "potential")


def is_axisymmetric(field: Any) -> bool:
    """Whether a field is axisymmetric by construction: splines in (R, z), and means of such."""
    from galray.potentials import Potential

    parts = getattr(field, "fields", None)
    if isinstance(parts, list):
        return all(is_axisymmetric(part) for part in parts)
    return isinstance(field, Potential) or getattr(getattr(field, "basis", None), "kind", None) == "Rz"


def _extra(package: str, module: str) -> Any:
    try:
        importlib.import_module(package)
    except ImportError:
        raise GalrayError(
            f"{package} is not installed", f"pip install galray[{package}], or evaluate the field itself"
        ) from None
    return importlib.import_module(module)
