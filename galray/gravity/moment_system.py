"""The unknowns of the moment equations and the equations in them: Φ, log ε, their penalties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from galray.errors import GalrayError
from galray.gravity.moment_settings import MomentsSettings
from galray.gravity.moment_sums import MomentSums, add_up
from galray.gravity.penalised import Equations, Penalty, Unknowns, Whitener
from galray.gravity.region import Region, as_region
from galray.gravity.roughness import axial_departure, third_differences
from galray.gravity.splines import Array, SumBasis, TensorBasis, ball_axes
from galray.gravity.velocity_functions import Family
from galray.gravity.weak_form import TestFamily, WeakForm

__all__ = ["MomentSystem"]

_STRONGEST_DEPARTURE = 5.0  # decades of the penalty on what breaks axial symmetry


class MomentSystem:
    """Bases, unknowns and equations of one set of settings on one ball.

    Arguments:
        settings: Bases, velocity functions and penalty.
        ball: Any object with ``center`` and ``radius`` in kpc.
    """

    def __init__(self, settings: MomentsSettings, ball: Any) -> None:
        self.settings = settings
        self.region: Region = as_region(ball)
        self.functions = settings.functions
        potential = self._basis(settings.potential_splines, settings.family, settings.concentrations)
        self.tests = self._basis(settings.test_splines, settings.family, settings.concentrations)
        families = [TestFamily(self.tests, self.functions, settings.velocity_window)]
        self.basis: TensorBasis | SumBasis = potential
        if settings.basis == "Rz+xyz":
            self.basis = SumBasis((potential, self._departure(settings.departure_splines)))
            streaming = ("1",) if settings.pattern_speed == "fit" else ()
            functions = (*streaming, "v_x", "v_y", "v_z")
            departure = self._departure(settings.departure_tests)
            families.append(TestFamily(departure, functions, settings.velocity_window))
        self.selection_basis = None
        if settings.selection != "known":
            self.selection_basis = self._basis(
                settings.selection_splines, settings.selection_family, settings.selection_concentrations
            )
        self.form = WeakForm(
            tuple(families), self.basis, self.selection_basis, self.region, settings.window, self._fixed_speed
        )
        self.num_moments = self.form.num_moments
        self.key = f"{settings.model_dump_json()} {self.region}"

    @property
    def _fixed_speed(self) -> float:
        speed = self.settings.pattern_speed
        return 0.0 if isinstance(speed, str) else speed

    def _basis(self, sizes: tuple[int, ...], kind: Family, concentration: tuple[float, ...]) -> TensorBasis:
        region = self.region
        return TensorBasis(kind, ball_axes(kind, region.center, region.radius, sizes, concentration))

    def _departure(self, sizes: tuple[int, ...]) -> TensorBasis:
        across, height = self.settings.concentrations
        region = self.region
        axes = ball_axes("xyz", region.center, region.radius, sizes, (across, across, height))
        return TensorBasis("xyz", axes)

    def _selections(self, populations: int) -> int:
        return {"known": 0, "shared": 1, "each": populations}[self.settings.selection]

    def _unknowns(self, selections: int) -> Unknowns:
        """Φ, then `selections` functions log ε, with their penalties."""
        maps, penalties, parts = [], [], []
        begin = 0

        def append(reduction: Array, forms: Sequence[Array], group: int, strongest: Sequence[float]) -> None:
            nonlocal begin
            part = slice(begin, begin + reduction.shape[1])
            for i, (form, top) in enumerate(zip(forms, strongest, strict=True)):
                penalties.append(Penalty(reduction.T @ form @ reduction, part, group + i, top))
            maps.append(reduction)
            parts.append(part)
            begin = part.stop

        main, *departures = self.basis.parts
        north_south = self.settings.north_south
        append(main.reduction(north_south=north_south), third_differences(main), 0, (1.0, 1.0))
        for part in departures:
            forms = [sum(third_differences(part), np.zeros(())), axial_departure(part)]
            append(part.reduction(north_south=north_south), forms, 2, (_STRONGEST_DEPARTURE,) * 2)
        smooth = begin
        for _ in range(selections):
            assert self.selection_basis is not None
            rough = sum(third_differences(self.selection_basis), np.zeros(()))
            append(self.selection_basis.reduction(north_south=False), [rough], 4, (1.0,))
        prior = np.zeros(begin)
        prior[smooth:] = self.settings.selection_amplitude**-2
        return Unknowns(linalg.block_diag(*maps), tuple(parts), tuple(penalties), prior)

    def _blocks(
        self, populations: Mapping[str, Sequence[MomentSums]], speed: float, num: int
    ) -> list[list[tuple[Array, Array, Array]]]:
        """(A, b, c) of `num` blocks of each population, A in all unknowns and Ω = `speed` taken out of b."""
        width = self.basis.size
        selections = self._selections(len(populations))
        step = self.selection_basis.size if self.selection_basis else 0

        def embedded(matrix: Array, number: int) -> Array:
            if selections <= 1:
                return matrix
            out = np.zeros((len(matrix), width + selections * step))
            out[:, :width] = matrix[:, :width]
            out[:, width + number * step : width + (number + 1) * step] = matrix[:, width:]
            return out

        found = []
        for number, sums in enumerate(populations.values()):
            parts = [add_up(replace(s, scatter=None) for s in sums[i::num]) for i in range(num)]
            found.append([(embedded(p.matrix, number), p.vector - speed * p.spin, p.spin) for p in parts])
        return found

    def _equations(
        self, populations: Mapping[str, Sequence[MomentSums]], speed: float, folds: int
    ) -> list[Equations]:
        """The equations of every population, in all unknowns."""
        whole = self._blocks(populations, speed, 1)
        parts = self._blocks(populations, speed, folds)
        out = []
        for i, (name, sums) in enumerate(populations.items()):
            total, usable = self._total(sums, name)
            assert total.scatter is not None
            matrix, vector, _ = whole[i][0]
            out.append(
                Equations(matrix, vector, Whitener(total.scatter, usable), [(a, b) for a, b, _ in parts[i]])
            )
        return out

    def _mass_rows(self, unknowns: Unknowns) -> Array:
        """∇² of the free unknowns at the nodes where ρ ≥ 0 is asked for, (nodes, free)."""
        nodes = self._nodes(self.basis.parts[-1])
        index, local = self.basis.laplacian(nodes)
        rows = np.zeros((len(nodes), unknowns.reduction.shape[0]))
        np.put_along_axis(rows, index, local, 1)
        return rows @ unknowns.reduction

    def _bounds(self, unknowns: Unknowns) -> Array:
        """Rows over the free unknowns that must not be negative, (rows, free)."""
        parts = [np.zeros((0, unknowns.reduction.shape[1]))]
        if self.settings.positive_mass:
            parts.append(self._mass_rows(unknowns))
        if self.settings.selection_monotone and self.selection_basis is not None:
            nodes = self._nodes(self.selection_basis)
            offset = nodes - np.array(self.region.center)
            away = offset / np.maximum(np.linalg.norm(offset, axis=1, keepdims=True), 1e-9)
            index, gradient = self.selection_basis.gradient(nodes)
            fall = -np.einsum("nj,njp->np", away, gradient)
            for begin in range(self.basis.size, unknowns.reduction.shape[0], self.selection_basis.size):
                rows = np.zeros((len(nodes), unknowns.reduction.shape[0]))
                np.put_along_axis(rows, begin + index, fall, 1)
                parts.append(rows @ unknowns.reduction)
        return np.concatenate(parts)

    def _nodes(self, basis: TensorBasis) -> Array:
        """Positions (n, 3) in the ball where bounds are asked for: several in every cell of a basis."""
        center, radius = np.array(self.region.center), self.region.radius
        part = 1 / (6 if basis.kind == "Rz" else 3)  # of a cell, from node to node
        steps = [
            np.interp(np.arange(0, a.cells + part / 2, part), range(a.cells + 1), a.breaks)
            for a in basis.axes
        ]
        nodes = np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, len(steps))
        if basis.kind == "Rz":
            across = np.hypot(center[0], center[1])
            angle = np.arctan2(center[1], center[0]) if across else 0.0
            nodes = np.stack([nodes[:, 0] * np.cos(angle), nodes[:, 0] * np.sin(angle), nodes[:, 1]], 1)
        return nodes[((nodes - center) ** 2).sum(1) < radius**2]

    def _total(self, sums: Sequence[MomentSums], name: str) -> tuple[MomentSums, NDArray[np.bool_]]:
        total = add_up(sums)
        if total.scatter is None:
            raise GalrayError("no block holds the scatter of the moments", "sum one with scatter=True")
        usable = total.counts >= self.settings.min_stars
        if usable.sum() < self.basis.size // 2 or total.num_stars < self.basis.size:
            of = f" of {name}" if name else ""
            raise GalrayError(
                f"{total.num_stars} stars{of} give {int(usable.sum())} usable moments for {self.basis.size} "
                "splines",
                "take more stars, fewer gravity.moments.num_potential_splines or a smaller "
                "gravity.moments.min_stars",
            )
        return total, usable
