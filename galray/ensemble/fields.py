"""The measured gravity of a run: the fields of all methods and members, and what they say together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from galray.ensemble.members import MemberSpec
from galray.errors import GalrayError
from galray.gravity import load_field
from galray.gravity.exports import Exportable
from galray.units import MSUN_PC3, to_internal

__all__ = ["FieldEnsemble", "member_fields"]


def member_fields(folder: Path) -> dict[str, list[tuple[MemberSpec, Any]]]:
    """The finished members of every method of a run that has a full-sample member, with their fields.

    Arguments:
        folder: The run directory.
    """
    found: dict[str, list[tuple[MemberSpec, Any]]] = {}
    for result in sorted((folder / "members").glob("[0-9][0-9][0-9]*/result.json")):
        if json.loads(result.read_text())["status"] == "finished":
            spec = MemberSpec.from_dict(json.loads((result.parent / "spec.json").read_text()))
            found.setdefault(spec.family, []).append((spec, load_field(result.parent / "field")))
    found = {family: pairs for family, pairs in found.items() if any(spec.whole for spec, _ in pairs)}
    moments = folder / "fields" / "moments"
    if (moments / "field" / "field.json").is_file():
        found["moments"] = [(MemberSpec(0, "moments"), load_field(moments / "field"))]
        for path in sorted(moments.glob("*-*/field.json")):
            labels = dict(part.rsplit("-", 1) for part in path.parent.name.split("+"))
            spec = MemberSpec.from_dict(
                {"index": 0, "family": "moments"} | {n: int(v) for n, v in labels.items()}
            )
            found["moments"].append((spec, load_field(path.parent)))
    return found


class FieldEnsemble(Exportable):
    """Fields with the tag of what was varied; differentiate inside a member, combine after.

    The value of a method is the mean over its full-sample members, the value of the ensemble the weighted
    mean over methods, with the weights of the run's headline quantity.

    Arguments:
        fields: For each method, pairs of what was varied (``base``, ``seed``, …) and a field.
        weights: Weight of each method; equal where absent.
        offset: Added to every density, Msun/kpc³: that of a blind run.
    """

    def __init__(
        self,
        fields: Mapping[str, Sequence[tuple[str, Any]]],
        weights: Mapping[str, float] | None = None,
        offset: float = 0.0,
    ) -> None:
        if not fields:
            raise GalrayError("no field to combine", "run until at least one member is finished")
        self.offset = offset
        self.fields = {method: list(members) for method, members in fields.items()}
        given = {method: float((weights or {}).get(method, 1.0)) for method in self.fields}
        self.weights = {method: weight / sum(given.values()) for method, weight in given.items()}

    @classmethod
    def from_run(cls, folder: Path) -> FieldEnsemble:
        """Load the fields of a run directory.

        Raises:
            GalrayError: The run has no finished member.
        """
        from galray.blinding import hidden_offset
        from galray.rundir import load_run

        found = member_fields(folder)
        if not found:
            raise GalrayError(f"{folder}: holds no finished member", "run `galray run` on it first")
        fields = {method: [(spec.varied, field) for spec, field in pairs] for method, pairs in found.items()}
        summary = folder / "results" / "summary.json"
        weights = json.loads(summary.read_text()).get("weights") if summary.is_file() else None
        return cls(fields, weights, hidden_offset(load_run(folder).config, folder) * MSUN_PC3)

    @property
    def methods(self) -> list[str]:
        """The inversions in the ensemble."""
        return list(self.fields)

    def acceleration(self, x: Any, method: str | None = None) -> np.ndarray:
        """Acceleration of the ensemble, or of one method.

        Arguments:
            x: Galactocentric positions, shape (*, 3), in kpc or as a Quantity.
            method: ``flow``, ``score`` or ``moments``; all together where not given.

        Returns:
            a in (km/s)²/kpc, shape (*, 3).

        Raises:
            GalrayError: A position lies outside the ball of the stars.
        """
        return self._combine(lambda field, points: field.acceleration(points), x, method)

    def mass_density(self, x: Any, kernel: Any, method: str | None = None) -> np.ndarray:
        """Total mass density smoothed with a kernel.

        Arguments:
            x: Galactocentric positions, shape (*, 3), in kpc or as a Quantity.
            kernel: `galray.gravity.Kernel`; a density is quoted with the kernel that smoothed it.
            method: One method; all together where not given.

        Returns:
            ρ in Msun/kpc³, shape (*).
        """
        from galray.gravity import smoothed_density

        found = self._combine(lambda field, points: smoothed_density(field, points, kernel), x, method)
        return found + self.offset

    def mean_field(self, method: str | None = None) -> Any:
        """The same mean as one field with a potential and a density, `galray.gravity.MeanField`.

        Arguments:
            method: One method; all together where not given.
        """
        from galray.gravity import MeanField

        fields, shares = [], []
        for name, weight in (self.weights if method is None else {method: 1.0}).items():
            whole = [field for varied, field in self._of(name) if varied in ("base", "seed")]
            fields += whole
            shares += [weight / len(whole)] * len(whole)
        return MeanField(fields, shares)

    def exported_field(self) -> Any:
        """What the exports to galpy, gala and agama evaluate: the mean over methods."""
        return self.mean_field()

    def members(self, x: Any, method: str) -> np.ndarray:
        """Accelerations of every member of a method, shape (members, *, 3), in (km/s)²/kpc."""
        points = self._points(x)
        return np.array([np.asarray(field.acceleration(points).detach()) for _, field in self._of(method)])

    def _of(self, method: str) -> list[tuple[str, Any]]:
        if method not in self.fields:
            raise GalrayError(f"method '{method}': the run has none", f"it has {', '.join(self.fields)}")
        return self.fields[method]

    def _points(self, x: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(to_internal(x, "length"), dtype=float))

    def _combine(self, value: Any, x: Any, method: str | None) -> np.ndarray:
        from galray.gravity import check_region

        points = self._points(x)
        weights = self.weights if method is None else {method: 1.0}
        total: Any = 0.0
        for name, weight in weights.items():
            whole = [field for varied, field in self._of(name) if varied in ("base", "seed")]
            check_region(whole[0], points)
            values = [np.asarray(value(field, points).detach()) for field in whole]
            total = total + weight * np.mean(values, axis=0)
        return total
