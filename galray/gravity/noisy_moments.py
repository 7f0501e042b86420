"""Weak-form moments of stars with errors: each sum freed from what the noise adds to it.

Every term of the moments is a number of the star times a spline of its position, or two splines: a test
function and a slope of the potential. With q the coordinates of the splines, D as in `galray.gravity.jets`
and C_ab = ∇q_a·C·∇q_b,

    D[F(q)] = ½ Σ_ab C_ab ∂_a∂_b F + Σ_a D[q_a] ∂_a F,
    D[S F] = S D[F] + F D[S] + Σ_a (∇S·C·∇q_a) ∂_a F,

so that sums of g − D[g] need spline derivatives of one and two orders more, and remain sums over stars.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.gravity.jets import Jet, StarJets
from galray.gravity.splines import Array, TensorBasis, cell_groups
from galray.gravity.velocity_functions import Term, terms
from galray.gravity.weak_form import fall

__all__ = ["NoisySums"]


class _Splines:
    """Local splines at stars, their derivatives by their own coordinates, and D of each.

    Arguments:
        basis: The splines.
        q: Their coordinates as numbers with errors.
        cell: The cell of all the stars.
        slopes: The highest order of derivative whose D is wanted, 0 or 1.
    """

    def __init__(self, basis: TensorBasis, q: list[Jet], cell: int) -> None:
        self.dimension = len(q)
        self.q = q
        self.spread = [[a.covariance(b) for b in q] for a in q]
        self._basis, self._cell = basis, cell
        self._t = np.stack([jet.value for jet in q], 1)
        self._known: dict[tuple[int, ...], Array] = {}

    def derivative(self, *axes: int) -> Array:
        """∂_a∂_b… of the splines, shape (n, 4^d)."""
        orders = tuple(axes.count(a) for a in range(self.dimension))
        if orders not in self._known:
            if max(orders) > 3:
                raise ValueError(f"cubic splines have no derivative of orders {orders}")
            self._known[orders] = self._basis.local(self._t, self._cell, orders)
        return self._known[orders]

    def drift(self, *axes: int) -> Array:
        """D[∂_a… F], shape (n, 4^d)."""
        total = np.zeros_like(self.derivative(*axes))
        for a in range(self.dimension):
            total += self.q[a].drift[:, None] * self.derivative(*axes, a)
            for b in range(self.dimension):
                total += 0.5 * self.spread[a][b][:, None] * self.derivative(*axes, a, b)
        return total

    def times(self, number: Jet, *axes: int) -> Array:
        """S ∂_a… F − D[S ∂_a… F], shape (n, 4^d)."""
        total = number.corrected[:, None] * self.derivative(*axes)
        total -= number.value[:, None] * self.drift(*axes)
        for a in range(self.dimension):
            total -= number.covariance(self.q[a])[:, None] * self.derivative(*axes, a)
        return total


class NoisySums:
    """The two passes of `Moments` over stars with errors.

    Arguments:
        moments: The estimator: its bases, velocity functions and window.
        stars: States inside the ball, shape (n, 6).
        mass: Weights, shape (n,).
        factors: Cholesky factors of the covariances, shape (n, 6, 6).
        observer: As in `galray.gravity.jets.StarErrors`.
    """

    def __init__(self, moments: Any, stars: Array, mass: Array, factors: Array, observer: Any) -> None:
        self.moments = moments
        self.stars, self.mass, self.factors, self.observer = stars, mass, factors, observer

    def _groups(self) -> Iterator[tuple[_Group, NDArray[np.intp]]]:
        moments = self.moments
        num = int(np.prod(moments.basis.cell_shape))
        t = moments.basis.coordinates(self.stars[:, :3])
        for joint, rows in cell_groups(moments.tests.locate(t) * num + moments.basis.locate(t)):
            test_cell, cell = divmod(joint, num)
            jets = StarJets(self.stars[rows], self.factors[rows], self.observer)
            yield _Group(self.moments, jets, test_cell, cell), rows

    def first_pass(self) -> tuple[Array, Array, Array, Array, Array]:
        """Matrix, vector, spin (none), counts and power, as `WeakForm` sums them."""
        moments = self.moments
        num_tests, num = moments.tests.size, len(moments.functions)
        matrix = np.zeros((num, num_tests, moments.basis.size))
        vector = np.zeros((num, num_tests))
        power = np.zeros((num, num_tests))
        counts = np.zeros(num_tests)
        for group, rows in self._groups():
            mass = self.mass[rows][:, None]
            k, p = group.tests_here, group.splines_here
            counts[k] += len(rows)
            for i, term in enumerate(group.functions):
                psi = mass * group.moment(term.value, term.free)
                vector[i, k] += psi.sum(0)
                power[i, k] += np.einsum("nk,nk->k", psi, psi)
                for j, pull in group.pulls(term):
                    matrix[i][np.ix_(k, p)] += group.response(pull * group.window, j, mass)
        flat = matrix.reshape(-1, moments.basis.size)
        spin = np.zeros(vector.size)
        return flat, vector.reshape(-1), spin, np.tile(counts, num), power.reshape(-1)

    def second_pass(self, theta: Array) -> Array:
        """The scatter of the freed residual moments under a pilot potential."""
        moments = self.moments
        num_tests, num = moments.tests.size, len(moments.functions)
        scatter = np.zeros((moments.num_moments, moments.num_moments))
        for group, rows in self._groups():
            gradient = group.slopes_of(theta)
            psi = []
            for term in group.functions:
                rate: Any = 0.0 if term.free is None else term.free
                for j, pull in group.pulls(term):
                    rate = rate - pull * gradient[j]
                psi.append(group.moment(term.value, rate))
            flat = np.concatenate(psi, 1) * self.mass[rows][:, None]
            k = (np.arange(num)[:, None] * num_tests + group.tests_here).reshape(-1)
            scatter[np.ix_(k, k)] += flat.T @ flat
        return scatter


class _Group:
    """Stars of one test cell and one potential cell."""

    def __init__(self, moments: Any, stars: StarJets, test_cell: int, cell: int) -> None:
        x, y, z = (stars[:, i] for i in range(3))
        q = [x, y, z] if moments.basis.kind == "xyz" else [(x**2 + y**2) ** 0.5, z]
        self.tests = _Splines(moments.tests, q, test_cell)
        self.basis = _Splines(moments.basis, q, cell)
        self.tests_here = moments.tests.indices(test_cell)
        self.splines_here = moments.basis.indices(cell)
        self.functions = terms(moments.basis.kind, moments.functions, stars, moments.settings.velocity_window)
        self.speeds = [stars[:, 3], stars[:, 4], stars[:, 5]]
        if moments.basis.kind == "Rz":
            radial = x * stars[:, 3] + y * stars[:, 4]
            self.speeds = [radial / q[0], stars[:, 5]]
        center, radius2 = moments.region.center, moments.region.radius**2
        offset = [stars[:, i] - center[i] for i in range(3)]
        square = offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2
        outward = offset[0] * stars[:, 3] + offset[1] * stars[:, 4] + offset[2] * stars[:, 5]
        self.window, slope = fall(square / radius2, moments.settings.window)
        self.opening = slope * outward * (2 / radius2)  # v·∇ of the window

    def pulls(self, term: Term) -> list[tuple[int, Any]]:
        """What multiplies the slopes of Φ, along the coordinates of the splines."""
        return [(j, pull) for j, pull in term.pulls.items() if j < self.basis.dimension]

    def moment(self, value: Any, rate: Any) -> Array:
        """Value × v·∇h + rate × h, freed from noise, shape (n, 4^d)."""
        number = value * self.opening
        if rate is not None:
            number = number + rate * self.window
        total = self.tests.times(number)
        for a, speed in enumerate(self.speeds):
            total += self.tests.times(value * self.window * speed, a)
        return total

    def response(self, number: Jet, j: int, mass: Array) -> Array:
        """Σ mass × (S T_k ∂_jB_p), freed from noise, shape (4^d, 4^d)."""
        tests, basis = self.tests, self.basis
        value = number.value[:, None] * mass
        total = (mass * tests.times(number)).T @ basis.derivative(j)
        total -= (value * tests.derivative()).T @ basis.drift(j)
        for b in range(tests.dimension):
            left = number.covariance(tests.q[b])[:, None] * mass * tests.derivative()
            for a in range(tests.dimension):
                left += value * tests.spread[a][b][:, None] * tests.derivative(a)
            total -= left.T @ basis.derivative(j, b)
        return total

    def slopes_of(self, theta: Array) -> list[Jet]:
        """∂_jΦ of the pilot at the stars as numbers with errors."""
        local = theta[self.splines_here]
        found = []
        for j, _ in enumerate(self.basis.q):
            bends = [self.basis.derivative(j, b) @ local for b in range(self.basis.dimension)]
            slope = sum(bend[:, None] * q.slope for bend, q in zip(bends, self.basis.q, strict=True))
            drift = self.basis.drift(j) @ local
            found.append(Jet(self.basis.derivative(j) @ local, np.asarray(slope), drift))
        return found
