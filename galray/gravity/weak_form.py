"""The sums of the weak form over stars: tests, potential, selection and rotation, cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galray.gravity.region import Region
from galray.gravity.splines import Array, SumBasis, TensorBasis, cell_groups
from galray.gravity.velocity_functions import Family, Term, terms

__all__ = ["KnownSelection", "TestFamily", "WeakForm", "fall", "patch_directions"]

KnownSelection = Callable[[Array], Array]
"""∇log ε at positions (n, 3) in kpc: shape (n, 3), in 1/kpc."""

_ROWS = 4096  # stars at a time: blocks of this many rows stay in the processor's cache
_CHUNK = 2**18  # stars sorted by cell at a time: bounds the memory
_FEWEST_PER_GROUP = 256
_PATCH_SHARPNESS = 16.0
_PATCH_CORE = 0.15  # of the ball's radius: inside it all patches share the stars


@dataclass(frozen=True)
class TestFamily:
    """Test functions (function of velocity) × (tensor spline).

    Attributes:
        basis: The splines h_k.
        functions: Names of the functions of velocity, see `velocity_functions`.
        velocity_window: Their common window in v_z, km/s.
    """

    __test__ = False  # no test case, whatever pytest thinks of the name

    basis: TensorBasis
    functions: tuple[str, ...]
    velocity_window: float

    @property
    def kind(self) -> Family:
        """The coordinates and the components of velocity."""
        return self.basis.kind

    @property
    def size(self) -> int:
        """The number of moments."""
        return len(self.functions) * self.basis.size


@dataclass
class _Local:
    """A family's test functions that live on a group of stars: columns k, and values at the stars (n, k)."""

    columns: NDArray[np.intp]
    value: Array
    flow: Array
    turn: Array
    terms: list[Term]


class WeakForm:
    """Evaluates ψ = v·∂ₓg + a·∂ᵥg + g (v − Ω×x)·∂ₓlog ε − Ω ∂g/∂φ on stars and sums it.

    Arguments:
        families: The test functions.
        potential: Splines of Φ.
        selection: Splines of log ε, or None.
        region: The ball.
        flat: Fraction of the radius up to which the window on |x − centre| is 1.
        pattern_speed: Ω in km/s/kpc of the frame in which a selection that is solved for drifts.
    """

    def __init__(
        self,
        families: tuple[TestFamily, ...],
        potential: TensorBasis | SumBasis,
        selection: TensorBasis | None,
        region: Region,
        flat: float,
        pattern_speed: float = 0.0,
    ) -> None:
        self.families = families
        self.potential = potential
        self.selection = selection
        self.region = region
        self.flat = flat
        self.pattern_speed = pattern_speed
        self.num_moments = sum(family.size for family in families)
        self.num_columns = potential.size + (selection.size if selection else 0)
        sizes = [family.size for family in families]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def first(
        self, w: Array, mass: Array, known: KnownSelection | None = None, patch: Array | None = None
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Sum everything that needs no potential.

        Arguments:
            w: States (n, 6) inside the ball.
            mass: Weights (n,).
            known: The gradient of a known log ε.
            patch: Directions (patches, 3) whose first is the patch that the tests are multiplied with.

        Returns:
            Matrix, vector, spin, counts, and Σ ψ² before gravity is known; see `MomentSums`.
        """
        matrix = np.zeros((self.num_moments, self.num_columns))
        vector, spin, counts, power = np.zeros((4, self.num_moments))
        for rows in self._groups(w):
            stars, weight = w[rows], mass[rows]
            slopes = self._slopes(stars)
            drift: Array | None = None
            turned: Array | None = None
            if known is not None:
                steep = known(stars[:, :3])
                drift, turned = (stars[:, 3:] * steep).sum(1), (_turning(stars) * steep).sum(1)
            selected = self._selection_drift(stars)
            for start, family, local in self._locals(stars, patch):
                for i, term in enumerate(local.terms):
                    k = start + i * family.basis.size + local.columns
                    psi = term.value[:, None] * local.flow
                    rate: Array | None = term.free
                    if drift is not None:
                        rate = term.value * drift + (0.0 if rate is None else rate)
                    if rate is not None:
                        psi += rate[:, None] * local.value
                    vector[k] += weight @ psi
                    power[k] += np.einsum("n,nk,nk->k", weight**2, psi, psi)
                    spin[k] += (weight * term.value) @ local.turn
                    if term.spin is not None:
                        spin[k] += (weight * term.spin) @ local.value
                    if turned is not None:
                        spin[k] += (weight * term.value * turned) @ local.value
                    counts[k] += len(rows)
                    for j, pull in term.pulls.items():
                        weighted = (weight * pull)[:, None] * local.value
                        for columns, along in slopes:
                            slope = along(family.kind)[j]
                            if slope is not None:
                                matrix[np.ix_(k, columns)] += weighted.T @ slope
                    if selected is not None:
                        weighted = (weight * term.value)[:, None] * local.value
                        matrix[np.ix_(k, selected[0])] -= weighted.T @ selected[1]
        return matrix, vector, spin, counts, power

    def second(
        self,
        w: Array,
        mass: Array,
        parameters: Array,
        pattern_speed: float,
        known: KnownSelection | None = None,
    ) -> Array:
        """Σ w² ψ ψᵀ under a pilot solution, shape (moments, moments).

        Arguments:
            w: States (n, 6) inside the ball.
            mass: Weights (n,).
            parameters: Coefficients of Φ, then those of log ε.
            pattern_speed: Ω in km/s/kpc.
            known: As in `first`.
        """
        scatter = np.zeros((self.num_moments, self.num_moments))
        for rows in self._groups(w):
            stars = w[rows]
            slopes = self._slopes(stars)
            streaming = np.zeros(len(stars))
            if known is not None:
                carried = stars[:, 3:] - pattern_speed * _turning(stars)
                streaming += (carried * known(stars[:, :3])).sum(1)
            selected = self._selection_drift(stars)
            if selected is not None:
                streaming += selected[1] @ parameters[selected[0]]
            numbers, values = [], []
            for start, family, local in self._locals(stars, None):
                for i, term in enumerate(local.terms):
                    rate = term.value * streaming
                    if term.free is not None:
                        rate += term.free
                    if term.spin is not None and pattern_speed:
                        rate -= pattern_speed * term.spin
                    for j, pull in term.pulls.items():
                        for columns, along in slopes:
                            slope = along(family.kind)[j]
                            if slope is not None:
                                rate -= pull * (slope @ parameters[columns])
                    flow = local.flow - pattern_speed * local.turn if pattern_speed else local.flow
                    psi = term.value[:, None] * flow
                    psi += rate[:, None] * local.value
                    numbers.append(start + i * family.basis.size + local.columns)
                    values.append(psi)
            flat = np.concatenate(values, 1) * mass[rows, None]
            k = np.concatenate(numbers)
            scatter[np.ix_(k, k)] += flat.T @ flat
        return scatter

    # -- pieces ----------------------------------------------------------------------------------------

    def _groups(self, w: Array) -> Iterator[NDArray[np.intp]]:
        """Rows of stars that share their cells as far as that leaves groups of a useful size."""
        bases = [family.basis for family in self.families[::-1]] + list(self.potential.parts)
        if self.selection is not None:
            bases.append(self.selection)
        for begin in range(0, len(w), _CHUNK):
            x = w[begin : begin + _CHUNK, :3]
            joint = np.zeros(len(x), dtype=np.intp)
            for i, basis in enumerate(bases):
                finer = joint * int(np.prod(basis.cell_shape)) + basis.locate(basis.coordinates(x))
                found, finer = np.unique(finer, return_inverse=True)
                if i and len(found) * _FEWEST_PER_GROUP > len(x):
                    break
                joint = finer
            for _, rows in cell_groups(joint, _ROWS):
                yield begin + rows

    def _locals(self, stars: Array, patch: Array | None) -> Iterator[tuple[int, TestFamily, _Local]]:
        window, gradient = self._window(stars[:, :3], patch)
        turning = _turning(stars)
        along = (gradient * stars[:, 3:]).sum(1), (gradient * turning).sum(1)
        for start, family in zip(self._starts, self.families, strict=True):
            columns, values, slopes = _on_group(family.basis, stars[:, :3])
            derivatives = []
            for direction, slope_of_window in zip((stars[:, 3:], turning), along, strict=True):
                own = _own_components(family.basis, stars, direction)
                inner = sum((o[:, None] * s for o, s in zip(own, slopes, strict=True) if o is not None), 0.0)
                derivatives.append(slope_of_window[:, None] * values + window[:, None] * inner)
            local = _Local(
                columns,
                window[:, None] * values,
                derivatives[0],
                derivatives[1],
                terms(family.kind, family.functions, stars, family.velocity_window),
            )
            yield start, family, local

    def _slopes(self, stars: Array) -> list[tuple[NDArray[np.intp], Callable[[str], list[Array | None]]]]:
        """For each part of Φ: its columns, and its slopes as a family of tests needs them."""
        out = []
        offset = 0
        for part in self.potential.parts:
            columns, _, own = _on_group(part, stars[:, :3])
            out.append((offset + columns, _converter(part.kind, own, stars)))
            offset += part.size
        return out

    def _selection_drift(self, stars: Array) -> tuple[NDArray[np.intp], Array] | None:
        """Columns of log ε and (v − Ω×x)·∇S there."""
        if self.selection is None:
            return None
        columns, _, slopes = _on_group(self.selection, stars[:, :3])
        carried = stars[:, 3:] - self.pattern_speed * _turning(stars)
        own = _own_components(self.selection, stars, carried)
        drift = sum((o[:, None] * s for o, s in zip(own, slopes, strict=True) if o is not None), 0.0)
        return self.potential.size + columns, np.asarray(drift)

    def _window(self, x: Array, patch: Array | None) -> tuple[Array, Array]:
        """The factor of all tests that vanishes at the border, (n,), and its gradient (n, 3)."""
        offset = x - np.array(self.region.center)
        value, slope = fall(np.square(offset).sum(1) / self.region.radius**2, self.flat)
        gradient = (2 * slope / self.region.radius**2)[:, None] * offset
        if patch is None:
            return value, gradient
        share, share_gradient = _patch_share(offset, patch, _PATCH_CORE * self.region.radius)
        return value * share, share[:, None] * gradient + value[:, None] * share_gradient


def _on_group(basis: TensorBasis, x: Array) -> tuple[NDArray[np.intp], Array, list[Array]]:
    """Splines that live on a group of positions: their numbers (k,), values and slopes (n, k)."""
    t = basis.coordinates(x)
    cell = basis.locate(t)
    if (cell == cell[0]).all():
        one = int(cell[0])
        values, slopes = basis.local_and_slopes(t, one)
        return basis.indices(one), values, slopes
    values, slopes = basis.local_and_slopes(t, cell)
    columns, place = np.unique(basis.indices(cell), return_inverse=True)
    place = place.reshape(values.shape)

    def spread(local: Array) -> Array:
        out = np.zeros((len(x), len(columns)))
        np.put_along_axis(out, place, local, 1)
        return out

    return columns, spread(values), [spread(s) for s in slopes]


def _turning(stars: Array) -> Array:
    """Velocities of a turn at unit angular velocity along Galactic rotation, shape (n, 3)."""
    return np.stack([stars[:, 1], -stars[:, 0], np.zeros(len(stars))], 1)


def _own_components(basis: TensorBasis, stars: Array, direction: Array) -> list[Array | None]:
    """Components of Cartesian directions (n, 3) along the basis's own coordinates; None where they vanish."""
    if basis.kind == "xyz":
        return [direction[:, 0], direction[:, 1], direction[:, 2]]
    radius = np.maximum(np.hypot(stars[:, 0], stars[:, 1]), 1e-12)
    radial = (stars[:, 0] * direction[:, 0] + stars[:, 1] * direction[:, 1]) / radius
    return [radial, direction[:, 2]]


def _converter(kind: str, own: list[Array], stars: Array) -> Callable[[str], list[Array | None]]:
    """Slopes of Φ's splines along what the pulls of a family multiply, see `Term.pulls`."""
    x, y = stars[:, :1], stars[:, 1:2]
    radius = np.maximum(np.hypot(x, y), 1e-12)

    def convert(family: str) -> list[Array | None]:
        if family == kind:
            return [own[0], own[1], own[2]] if kind == "xyz" else [own[0], own[1], None]
        if kind == "Rz":
            return [own[0] * (x / radius), own[0] * (y / radius), own[1]]
        return [(x * own[0] + y * own[1]) / radius, own[2], y * own[0] - x * own[1]]

    return convert


def fall(s2: Array, flat: float) -> tuple[Array, Array]:
    """The window and its derivative by s² = |x − centre|²/radius²: 1 inside `flat`, 0 from 1 on."""
    inner = flat**2
    u = np.clip((1.0 - s2) / (1.0 - inner), 0.0, 1.0)
    return u**3 * (10 - 15 * u + 6 * u * u), -30 * u**2 * (1 - u) ** 2 / (1.0 - inner)


def patch_directions(number: int) -> Array:
    """Evenly spread unit vectors (Fibonacci lattice), shape (number, 3)."""
    i = np.arange(number) + 0.5
    z = 1 - 2 * i / number
    phi = np.pi * (1 + 5**0.5) * i
    return np.stack([np.sqrt(1 - z**2) * np.cos(phi), np.sqrt(1 - z**2) * np.sin(phi), z], 1)


def _patch_share(offset: Array, directions: Array, core: float) -> tuple[Array, Array]:
    """The first of smooth patches of the sky that add up to 1, p = e^{κ u·n₁} / Σ_i e^{κ u·n_i}, and ∇p.

    u = δ/√(δ² + core²) is the direction of the offset δ from the centre, so that p is smooth there too. A
    patch must be smooth: cut at an edge, its stars would have a flux through it.
    """
    length = np.sqrt(np.square(offset).sum(1) + core**2)[:, None]
    unit = offset / length
    exponent = _PATCH_SHARPNESS * unit @ directions.T
    share = np.exp(exponent - exponent.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    slope = _PATCH_SHARPNESS * (directions[0] - share @ directions) * share[:, :1]  # ∂p/∂u
    return share[:, 0], (slope - unit * (unit * slope).sum(1, keepdims=True)) / length
