"""Functions of velocity that multiply the test functions of the moments: products of its components.

In the (R, z) family the factors are R v_R = x v_x + y v_y, R v_φ = y v_x − x v_y and v_z: they are smooth on
the axis, and their free-flight derivatives, v_R² + v_φ², 0 and 0, carry the metric terms.

All carry the factor exp(−v_z²/2s²). The stars that say most about the gravity of a disc are the cold ones;
the hot ones among them would add most of the noise, and with the factor they count little. Any function
of velocity obeys the equation, so this biases nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from galray.gravity.splines import Array

__all__ = ["FACTORS", "Family", "Term", "check_function", "terms", "up_to_order"]

Family = Literal["Rz", "xyz"]

FACTORS: dict[str, tuple[str, str, str]] = {"Rz": ("v_R", "v_phi", "v_z"), "xyz": ("v_x", "v_y", "v_z")}
"""The components whose products are the functions of each family."""

_MAX_ORDER = 4


@dataclass(frozen=True)
class Term:
    """One function u(x, v) at the stars.

    Attributes:
        value: u, shape (n,).
        free: v·∂ₓu, shape (n,); None where it vanishes.
        pulls: What multiplies each slope of Φ in ∂ᵥu·∇Φ: slopes along x, y, z for ``xyz``; along R, z, and
            the torque y ∂_xΦ − x ∂_yΦ, for ``Rz``.
        spin: The derivative of u by a turn of the star along Galactic rotation; None where it vanishes.
    """

    value: Array
    free: Array | None
    pulls: dict[int, Array]
    spin: Array | None


def check_function(name: str, family: str) -> tuple[int, int, int]:
    """The powers of the three factors in a function's name.

    Raises:
        ValueError: A name that is no product of the family's components, or of too high an order.
    """
    if name == "1":
        return (0, 0, 0)
    factors = name.split()
    unknown = [factor for factor in factors if factor not in FACTORS[family]]
    if unknown or not factors:
        raise ValueError(
            f"'{name}' does not belong to the {family} basis: give products such as "
            f"'{FACTORS[family][0]} v_z' of {', '.join(FACTORS[family])}, or '1'"
        )
    if len(factors) > _MAX_ORDER:
        raise ValueError(f"'{name}' is of order {len(factors)}: at most {_MAX_ORDER}")
    return tuple(factors.count(factor) for factor in FACTORS[family])  # type: ignore[return-value]


def up_to_order(family: Family, order: int) -> tuple[str, ...]:
    """All products of up to `order` components.

    In the (R, z) family odd powers of v_φ alone say nothing of an axially symmetric Φ or ε that the even
    ones do not: only its even powers are given.
    """
    names = []
    a, b, c = FACTORS[family]
    for total in range(order + 1):
        for i in range(total, -1, -1):
            for j in range(total - i, -1, -1):
                if family == "Rz" and j % 2:
                    continue
                names.append(" ".join([a] * i + [b] * j + [c] * (total - i - j)) or "1")
    return tuple(names)


def terms(family: Family, functions: tuple[str, ...], w: Any, window: float) -> list[Term]:
    """Evaluate functions at the stars.

    Arguments:
        family: Their factors.
        functions: Their names.
        w: States (n, 6), or anything that is indexed and calculates like them.
        window: s of exp(−v_z²/2s²), km/s.
    """
    x, y, vx, vy, vz = w[:, 0], w[:, 1], w[:, 3], w[:, 4], w[:, 5]
    if family == "xyz":
        factors = [vx, vy, vz]
    else:
        factors = [x * vx + y * vy, y * vx - x * vy, vz]
        radius = np.hypot(x, y)
        square = vx**2 + vy**2  # d(R v_R)/dt in free flight
    few = np.exp(vz**2 * (-0.5 / window**2))
    steep = vz * (-1.0 / window**2)  # of its logarithm along v_z, which free flight leaves alone
    vertical = 2 if family == "xyz" else 1  # of the slopes of Φ
    out = []
    for name in functions:
        powers = check_function(name, family)

        def lowered(i: int, powers: tuple[int, int, int] = powers) -> Array | None:
            """∂u/∂(factor i)."""
            if powers[i] == 0:
                return None
            return powers[i] * _product(factors, [p - (j == i) for j, p in enumerate(powers)])

        value = _product(factors, list(powers))
        slopes = [lowered(i) for i in range(3)]
        spin = free = None
        if family == "xyz":
            pulls = {i: s for i, s in enumerate(slopes) if s is not None}
            if slopes[0] is not None:
                spin = factors[1] * slopes[0]
            if slopes[1] is not None:
                spin = (0.0 if spin is None else spin) - factors[0] * slopes[1]
        else:
            pulls = {}
            if slopes[0] is not None:
                pulls[0] = radius * slopes[0]
                free = square * slopes[0]
            if slopes[2] is not None:
                pulls[1] = slopes[2]
            if slopes[1] is not None:
                pulls[2] = slopes[1]
        pulls[vertical] = pulls.get(vertical, 0.0) + steep * value
        free = None if free is None else few * free
        spin = None if spin is None else few * spin
        out.append(Term(few * value, free, {i: few * pull for i, pull in pulls.items()}, spin))
    return out


def _product(factors: list[Array], powers: list[int]) -> Array:
    out = 1.0 + 0.0 * factors[0]
    for factor, power in zip(factors, powers, strict=True):
        for _ in range(power):
            out = out * factor
    return out
