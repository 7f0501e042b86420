"""Numbers with errors: functions of noisy stars and what their noise adds to their mean.

For a measured state w' = w + e with covariance C of e, any smooth g has E[g(w')] = g(w) + D[g] to first order
in C, D[g] = ½ C:∇∇g + b·∇g, where b = E[e] is the mean shift of errors that are Gaussian in the observables
rather than in w. So g(w') − D[g](w') is the measured value freed from its noise. D of a product and of a
function of a function follow from values, slopes and drifts alone (Itô's lemma):

    D[f g] = f D[g] + g D[f] + ∇f·C·∇g,      D[φ(f)] = φ' D[f] + ½ φ'' ∇f·C·∇f.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from galray.errors import GalrayError
from galray.gravity.splines import Array, to_numpy

__all__ = ["Jet", "StarErrors", "StarJets", "noise_corrected"]

_JITTER = (
    1e-9  # added to correlation matrices, which are singular where the distance is all that is uncertain
)


class Jet:
    """One number of each of n stars, with its slopes along the directions of the star's error and its drift.

    Arithmetic, integer powers, ``np.hypot``, ``np.sqrt``, ``np.exp``, ``np.maximum`` and ``clip`` with plain
    numbers, and any mix with arrays (n,) without errors, work as they do for arrays.

    Arguments:
        value: g(w'), shape (n,).
        slope: Derivatives along the columns of a factor L of C = L Lᵀ, shape (n, m).
        drift: D[g], shape (n,).
    """

    __slots__ = ("drift", "slope", "value")
    __array_priority__ = 100.0

    def __init__(self, value: Array, slope: Array, drift: Array) -> None:
        self.value, self.slope, self.drift = value, slope, drift

    @property
    def corrected(self) -> Array:
        """The value freed from its noise, g − D[g]: shape (n,)."""
        return self.value - self.drift

    def covariance(self, other: Jet) -> Array:
        """∇f·C·∇g of two numbers: shape (n,)."""
        return np.einsum("nj,nj->n", self.slope, other.slope)

    def _of(self, value: Array, first: Array, second: Array) -> Jet:
        """φ(self) from φ, φ' and φ''."""
        drift = first * self.drift + 0.5 * second * self.covariance(self)
        return Jet(value, first[:, None] * self.slope, drift)

    def __add__(self, other: Any) -> Jet:
        if isinstance(other, Jet):
            return Jet(self.value + other.value, self.slope + other.slope, self.drift + other.drift)
        return Jet(self.value + other, self.slope, self.drift)

    def __mul__(self, other: Any) -> Jet:
        if isinstance(other, Jet):
            slope = self.value[:, None] * other.slope + other.value[:, None] * self.slope
            drift = self.value * other.drift + other.value * self.drift + self.covariance(other)
            return Jet(self.value * other.value, slope, drift)
        factor = np.asarray(other, dtype=float)
        return Jet(self.value * factor, self.slope * factor[..., None], self.drift * factor)

    def __neg__(self) -> Jet:
        return Jet(-self.value, -self.slope, -self.drift)

    def __sub__(self, other: Any) -> Jet:
        return self + (-other)

    def __rsub__(self, other: Any) -> Jet:
        return (-self) + other

    def __pow__(self, power: Any) -> Jet:
        x = self.value
        second = power * (power - 1) * x ** (power - 2) if power != 1 else np.zeros_like(x)
        return self._of(x**power, power * x ** (power - 1), second)

    def __truediv__(self, other: Any) -> Jet:
        return self * (other**-1.0 if isinstance(other, Jet) else 1.0 / np.asarray(other, dtype=float))

    def __rtruediv__(self, other: Any) -> Jet:
        return self**-1.0 * other

    __radd__ = __add__
    __rmul__ = __mul__

    def clip(self, low: float, high: float, **_: Any) -> Jet:
        """Keep values between two numbers; what is cut has no noise."""
        free = ((self.value > low) & (self.value < high)).astype(float)
        return Jet(np.clip(self.value, low, high), self.slope * free[:, None], self.drift * free)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or options or ufunc not in _UFUNCS:
            return NotImplemented
        return _UFUNCS[ufunc](*inputs)


def _square_root(x: Jet) -> Jet:
    root = np.sqrt(x.value)
    return x._of(root, 0.5 / root, -0.25 / (root * x.value))


def _exponential(x: Jet) -> Jet:
    value = np.exp(x.value)
    return x._of(value, value, value)


def _floor(x: Any, y: Any) -> Jet:
    jet, bound = (x, y) if isinstance(x, Jet) else (y, x)
    return jet.clip(bound, np.inf)


_UFUNCS: dict[Any, Callable[..., Any]] = {
    np.add: lambda x, y: y + x if isinstance(y, Jet) else x + y,
    np.multiply: lambda x, y: y * x if isinstance(y, Jet) else x * y,
    np.subtract: lambda x, y: (-y) + x if isinstance(y, Jet) else x - y,
    np.true_divide: lambda x, y: y**-1.0 * x if isinstance(y, Jet) else x / y,
    np.negative: lambda x: -x,
    np.square: lambda x: x * x,
    np.power: lambda x, y: x**y,
    np.sqrt: _square_root,
    np.exp: _exponential,
    np.hypot: lambda x, y: _square_root(x * x + y * y),
    np.maximum: _floor,
}


@dataclass(frozen=True)
class StarErrors:
    """The errors of stars in phase space.

    Arguments:
        covariance: Shape (n, 6, 6), in kpc², kpc km/s and (km/s)².
        observer: (x, y, z, v_x, v_y, v_z) from which parallaxes were measured; errors are then Gaussian in
            parallax, proper motions and radial velocity. None: Gaussian in phase space.
    """

    covariance: Any
    observer: Any = None

    def __getitem__(self, rows: Any) -> StarErrors:
        """The errors of some of the stars: a slice, mask or array of row numbers."""
        return StarErrors(to_numpy(self.covariance)[rows], self.observer)

    def factors(self) -> Array:
        """Cholesky factors L, shape (n, 6, 6).

        Raises:
            GalrayError: A covariance is not finite and positive semidefinite.
        """
        covariance = to_numpy(self.covariance)
        size = np.sqrt(np.maximum(np.einsum("nii->ni", covariance), 0.0))
        unit = np.where(size > 0, size, 1.0)
        matrix = covariance / (unit[:, :, None] * unit[:, None, :])
        matrix[:, range(6), range(6)] += _JITTER + (size == 0)
        try:
            if not np.isfinite(matrix).all():
                raise np.linalg.LinAlgError
            factor = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            raise GalrayError(
                "some stars' error covariances are not finite and positive semidefinite",
                "give covariances in kpc², kpc km/s and (km/s)²; leave out stars without errors",
            ) from None
        return factor * size[:, :, None]


class StarJets:
    """The six coordinates of stars as numbers with errors; ``stars[:, i]`` is coordinate i.

    Seen from an observer, a step along column l of L moves a star on a curved path (see
    `galray.phasespace.noise.displace`), whose second order is the drift: with τ = l_x·r̂ / d,

        b_x = Σ τ l_x,      b_v = Σ τ (l_v − (l_v·r̂) r̂).

    Arguments:
        states: Shape (n, 6).
        factors: From `StarErrors.factors`, shape (n, 6, 6).
        observer: As in `StarErrors`.
    """

    def __init__(self, states: Array, factors: Array, observer: Any = None) -> None:
        self._states, self._factors = states, factors
        self._drift = np.zeros_like(states)
        if observer is not None:
            offset = states[:, :3] - to_numpy(observer)[:3]
            distance = np.linalg.norm(offset, axis=1)
            sight = offset / distance[:, None]
            step = np.einsum("nij,ni->nj", factors[:, :3], sight)
            across = (
                factors[:, 3:] - sight[:, :, None] * np.einsum("nij,ni->nj", factors[:, 3:], sight)[:, None]
            )
            along = step / distance[:, None]
            self._drift[:, :3] = np.einsum("nij,nj->ni", factors[:, :3], along)
            self._drift[:, 3:] = np.einsum("nij,nj->ni", across, along)

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, key: tuple[Any, int]) -> Jet:
        rows, i = key
        return Jet(self._states[rows, i], self._factors[rows, i], self._drift[rows, i])


def noise_corrected(function: Callable[[StarJets], Jet], w: Any, errors: StarErrors) -> Array:
    """A function of noisy stars, freed from the bias of the noise: g − ½ C:∇∇g − b·∇g.

    Its mean over measured stars is that of g over the stars before their errors, to first order in the
    covariances.

    Arguments:
        function: From the stars' coordinates, ``stars[:, i]``, to a number by the operations of `Jet`.
        w: Measured states, shape (n, 6).
        errors: Their errors.

    Returns:
        Shape (n,).
    """
    return function(StarJets(to_numpy(w), errors.factors(), errors.observer)).corrected
