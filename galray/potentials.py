"""Analytic gravitational potentials in torch float64: Φ, a = −∇Φ and ρ to round-off."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from galray.double_power_law import DoublePowerLawTable
from galray.errors import GalrayError
from galray.units import G

__all__ = [
    "NFW",
    "Composite",
    "DoublePowerLaw",
    "Hernquist",
    "Isochrone",
    "MiyamotoNagai",
    "Plummer",
    "Potential",
    "from_dict",
]

_TINY = 1e-40  # kpc²: keeps 0/0 at the centre of a cusp finite without touching any other value


def _float64(values: Any) -> Tensor:
    """Numbers in double precision from the start: torch alone would round plain floats to single."""
    return (
        values.to(torch.float64)
        if isinstance(values, Tensor)
        else torch.as_tensor(values, dtype=torch.float64)
    )


def _positions(x: Any) -> Tensor:
    """Positions as a float64 tensor of shape (*, 3), on the device of the input."""
    x = _float64(x)
    if x.ndim == 0 or x.shape[-1] != 3:
        raise ValueError(f"positions must have shape (*, 3), not {tuple(x.shape)}")
    return x


class Potential(ABC):
    """A gravitational potential that is known exactly.

    Every method takes positions x of shape (*, 3) in kpc (tensor, array or nested list), computes in
    float64 on the input's device, and can be differentiated by autograd. The names are those of
    galray's acceleration fields, so a `Potential` stands wherever a measured field does.
    """

    _kinds: ClassVar[dict[str, type[Potential]]] = {}
    _parameters: ClassVar[tuple[str, ...]] = ()
    axisymmetric: bool = True
    """Whether gravity is the same at every azimuth, so that `force_factors` exist."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Potential._kinds[cls.__name__] = cls

    def __init__(self, **parameters: float) -> None:
        for name, value in parameters.items():
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise GalrayError(
                    f"{type(self).__name__}: {name} = {value!r} is not a positive number",
                    "give masses in Msun and lengths in kpc, all above zero",
                )
            setattr(self, name, float(value))

    @abstractmethod
    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*), zero at infinity."""

    @abstractmethod
    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """The two numbers (g_R, g_z) with a = −(g_R x, g_R y, g_z z), which orbits in (R, z) need alone.

        Arguments:
            radius2: R² = x² + y² in kpc², shape (*).
            z2: z² in kpc², shape (*).

        Returns:
            g_R = Ω² and g_z in (km/s/kpc)², each of shape (*); equal for a sphere.
        """

    def acceleration(self, x: Any) -> Tensor:
        """a(x) = −∇Φ in (km/s)²/kpc, shape (*, 3)."""
        x = _positions(x)
        radial, vertical = self.force_factors(x[..., 0].square() + x[..., 1].square(), x[..., 2].square())
        return -x * torch.stack([radial, radial, vertical], -1)

    @abstractmethod
    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) = ∇²Φ / 4πG in Msun/kpc³, shape (*)."""

    def circular_velocity(self, radius: Any) -> Tensor:
        """v_c = √(R ∂Φ/∂R) in km/s at cylindrical radius R (kpc, shape (*)) in the plane z = 0."""
        radius = _float64(radius)
        return radius * torch.sqrt(self.force_factors(radius.square(), torch.zeros_like(radius))[0])

    def to_dict(self) -> dict[str, Any]:
        """The potential as plain JSON values; `from_dict` builds it again."""
        return {"type": type(self).__name__, **{name: getattr(self, name) for name in self._parameters}}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Potential) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self.to_dict()))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={getattr(self, name):g}" for name in self._parameters)
        return f"{type(self).__name__}({arguments})"


class Plummer(Potential):
    """Plummer (1911) sphere: Φ = −GM / √(r² + b²).

    Arguments:
        m_tot: Total mass in Msun.
        b: Scale radius in kpc.

    References:
        Binney & Tremaine 2008, eqs. 2.44a and 2.44b.
    """

    _parameters = ("m_tot", "b")
    m_tot: float
    b: float

    def __init__(self, m_tot: float, b: float) -> None:
        super().__init__(m_tot=m_tot, b=b)

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return -G * self.m_tot * (_positions(x).square().sum(-1) + self.b**2).rsqrt()

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        g = G * self.m_tot * (radius2 + z2 + self.b**2).pow(-1.5)
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        s2 = _positions(x).square().sum(-1) / self.b**2
        return 3 * self.m_tot / (4 * math.pi * self.b**3) * (1 + s2).pow(-2.5)


class Isochrone(Potential):
    """Hénon's (1959) isochrone: Φ = −GM / (b + √(b² + r²)).

    Arguments:
        m_tot: Total mass in Msun.
        b: Scale radius in kpc.

    References:
        Binney & Tremaine 2008, eqs. 2.47 and 2.49.
    """

    _parameters = ("m_tot", "b")
    m_tot: float
    b: float

    def __init__(self, m_tot: float, b: float) -> None:
        super().__init__(m_tot=m_tot, b=b)

    def _root(self, x: Tensor) -> Tensor:
        return torch.sqrt(x.square().sum(-1) + self.b**2)

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return -G * self.m_tot / (self.b + self._root(_positions(x)))

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        root = torch.sqrt(radius2 + z2 + self.b**2)
        g = G * self.m_tot / (root * (self.b + root).square())
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        x = _positions(x)
        root, r2, b = self._root(x), x.square().sum(-1), self.b
        return (
            self.m_tot
            * (3 * (b + root) * root**2 - r2 * (b + 3 * root))
            / (4 * math.pi * ((b + root) * root) ** 3)
        )


class Hernquist(Potential):
    """Hernquist (1990) sphere: Φ = −GM / (r + a), with a density cusp ρ ∝ 1/r.

    Arguments:
        m_tot: Total mass in Msun.
        a: Scale radius in kpc.

    References:
        Hernquist 1990, ApJ 356, 359; Binney & Tremaine 2008, eqs. 2.64 and 2.67.
    """

    _parameters = ("m_tot", "a")
    m_tot: float
    a: float

    def __init__(self, m_tot: float, a: float) -> None:
        super().__init__(m_tot=m_tot, a=a)

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return -G * self.m_tot / (_radius(_positions(x)) + self.a)

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        r = torch.sqrt((radius2 + z2).clamp_min(_TINY))
        g = G * self.m_tot / (r * (r + self.a).square())
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        r = _radius(_positions(x))
        return self.m_tot * self.a / (2 * math.pi * r * (r + self.a) ** 3)


class NFW(Potential):
    """Navarro, Frenk & White (1996) halo: ρ = ρ_s / [(r/r_s)(1 + r/r_s)²].

    Φ = −(G m / r) ln(1 + r/r_s), with the mass scale m = 4π ρ_s r_s³ (the total mass diverges).

    Arguments:
        m_tot: Mass scale 4π ρ_s r_s³ in Msun.
        r_s: Scale radius in kpc.

    References:
        Binney & Tremaine 2008, eqs. 2.64 to 2.67.
    """

    _parameters = ("m_tot", "r_s")
    m_tot: float
    r_s: float

    def __init__(self, m_tot: float, r_s: float) -> None:
        super().__init__(m_tot=m_tot, r_s=r_s)

    @classmethod
    def from_density(cls, rho_s: float, r_s: float) -> NFW:
        """Build the halo from its density scale ρ_s in Msun/kpc³ and scale radius r_s in kpc."""
        return cls(4 * math.pi * rho_s * r_s**3, r_s)

    @property
    def rho_s(self) -> float:
        """The density scale ρ_s in Msun/kpc³ (four times the density at r_s)."""
        return self.m_tot / (4 * math.pi * self.r_s**3)

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        s = _radius(_positions(x)) / self.r_s
        return -G * self.m_tot / self.r_s * torch.log1p(s) / s

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        s = torch.sqrt((radius2 + z2).clamp_min(_TINY)) / self.r_s
        g = G * self.m_tot / self.r_s**3 * _nfw_mean_density(s)
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        s = _radius(_positions(x)) / self.r_s
        return self.rho_s / (s * (1 + s) ** 2)


class DoublePowerLaw(Potential):
    """A sphere ρ = ρ₀ (r/r_s)^−γ [1 + (r/r_s)^α]^((γ−β)/α): cores, cusps and everything between.

    (α, β, γ) = (1, 3, 1) is NFW, (1, 4, 1) Hernquist, (2, 5, 0) Plummer. The enclosed mass and the outer
    part of the potential are incomplete beta functions, tabulated at construction to 1e-12.

    Arguments:
        rho_0: Density scale ρ₀ in Msun/kpc³ (the density at r_s is ρ₀ 2^((γ−β)/α)).
        r_s: Scale radius in kpc.
        alpha: Sharpness of the turn between the slopes, > 0.
        beta: Outer slope, > 2, or the potential would not vanish at infinity; > 3 for a finite mass.
        gamma: Inner slope, 0 ≤ γ < 3.

    Raises:
        GalrayError: A parameter out of range.

    References:
        Zhao 1996, MNRAS 278, 488.
    """

    _parameters = ("rho_0", "r_s", "alpha", "beta", "gamma")
    rho_0: float
    r_s: float
    alpha: float
    beta: float
    gamma: float

    def __init__(self, rho_0: float, r_s: float, alpha: float, beta: float, gamma: float) -> None:
        super().__init__(rho_0=rho_0, r_s=r_s, alpha=alpha, beta=beta)
        for name, value, good in (("beta", beta, beta > 2), ("gamma", gamma, 0 <= gamma < 3)):
            if not good:
                raise GalrayError(
                    f"DoublePowerLaw: {name} = {value!r} gives no gravity that vanishes at infinity and is "
                    "finite within every radius",
                    "give an outer slope beta > 2 and an inner slope 0 <= gamma < 3",
                )
        self.gamma = float(gamma)
        self._table = DoublePowerLawTable(self.alpha, self.beta, self.gamma)

    @property
    def total_mass(self) -> float:
        """M(∞) in Msun; infinite for β ≤ 3."""
        if self.beta <= 3:
            return math.inf
        a, b = (3 - self.gamma) / self.alpha, (self.beta - 3) / self.alpha
        log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return 4 * math.pi * self.rho_0 * self.r_s**3 / self.alpha * math.exp(log_beta)

    def density(self, r: Any) -> Tensor:
        """ρ(r) in Msun/kpc³ at radius r in kpc, shape (*)."""
        return torch.exp(self._log_density(self._log_s(r)))

    def enclosed_mass(self, r: Any) -> Tensor:
        """M(<r) in Msun at radius r in kpc, shape (*)."""
        return 4 * math.pi * self.rho_0 * self.r_s**3 * torch.exp(self._table.log_mass(self._log_s(r)))

    def density_slope(self, r: Any) -> Tensor:
        """Give d ln ρ / d ln r at radius r in kpc, shape (*): −γ at the centre, −β far out."""
        return -self.gamma - (self.beta - self.gamma) * torch.sigmoid(self.alpha * self._log_s(r))

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        s = self._log_s(_radius(_positions(x)))
        depth = torch.exp(self._table.log_mass(s) - s) + torch.exp(self._table.log_outer(s))
        return -4 * math.pi * G * self.rho_0 * self.r_s**2 * depth

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        s = self._log_s(torch.sqrt((radius2 + z2).clamp_min(_TINY)))
        g = 4 * math.pi * G * self.rho_0 * torch.exp(self._table.log_mass(s) - 3 * s)
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        return self.density(_radius(_positions(x)))

    def _log_s(self, r: Any) -> Tensor:
        return torch.log(_float64(r).clamp_min(math.sqrt(_TINY)) / self.r_s)

    def _log_density(self, log_s: Tensor) -> Tensor:
        turn = torch.nn.functional.softplus(self.alpha * log_s, threshold=40.0) / self.alpha
        return math.log(self.rho_0) - self.gamma * log_s + (self.gamma - self.beta) * turn


class MiyamotoNagai(Potential):
    """Miyamoto & Nagai (1975) disc: Φ = −GM / √(R² + (a + √(z² + b²))²).

    Arguments:
        m_tot: Total mass in Msun.
        a: Radial scale in kpc.
        b: Vertical scale in kpc.

    References:
        Binney & Tremaine 2008, eqs. 2.69a and 2.69b.
    """

    _parameters = ("m_tot", "a", "b")
    m_tot: float
    a: float
    b: float

    def __init__(self, m_tot: float, a: float, b: float) -> None:
        super().__init__(m_tot=m_tot, a=a, b=b)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r2 = x[..., 0].square() + x[..., 1].square()
        root = torch.sqrt(x[..., 2].square() + self.b**2)
        return r2, root, r2 + (self.a + root).square()

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return -G * self.m_tot * self._parts(_positions(x))[2].rsqrt()

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        root = torch.sqrt(z2 + self.b**2)
        stretched = self.a + root
        inverse2 = 1 / (radius2 + stretched * stretched)  # no pow: orbits call this a thousand times a star
        g = G * self.m_tot * inverse2 * inverse2.sqrt()
        return g, g * stretched / root

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        r2, root, d2 = self._parts(_positions(x))
        a, b = self.a, self.b
        return (
            self.m_tot
            * b**2
            / (4 * math.pi)
            * (a * r2 + (a + 3 * root) * (a + root).square())
            / (d2.pow(2.5) * root.pow(3))
        )


class Composite(Potential):
    """A sum of named potentials.

    Arguments:
        components: Name → `Potential`, at least one.
    """

    components: dict[str, Potential]

    def __init__(self, components: Mapping[str, Potential]) -> None:
        if not components:
            raise GalrayError("a composite potential needs at least one component", "name one, e.g. 'halo'")
        super().__init__()
        self.components = dict(components)
        self.axisymmetric = all(part.axisymmetric for part in self.components.values())

    def subset(self, names: Iterable[str]) -> Composite:
        """The sum of the named components alone.

        Raises:
            GalrayError: A name is not a component.
        """
        names = list(names)
        for name in names:
            if name not in self.components:
                raise GalrayError(
                    f"the potential has no component '{name}'",
                    f"its components: {', '.join(self.components)}",
                )
        return Composite({name: self.components[name] for name in names})

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        x = _positions(x)
        return torch.stack([part.potential(x) for part in self.components.values()]).sum(0)

    def acceleration(self, x: Any) -> Tensor:
        """a(x) = −∇Φ in (km/s)²/kpc, shape (*, 3)."""
        if self.axisymmetric:
            return super().acceleration(x)
        x = _positions(x)
        return torch.stack([part.acceleration(x) for part in self.components.values()]).sum(0)

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        first, *rest = (part.force_factors(radius2, z2) for part in self.components.values())
        radial, vertical = first
        for g_radial, g_vertical in rest:
            radial, vertical = radial + g_radial, vertical + g_vertical
        return radial, vertical

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        x = _positions(x)
        return torch.stack([part.mass_density(x) for part in self.components.values()]).sum(0)

    def to_dict(self) -> dict[str, Any]:
        """The components as plain JSON values."""
        return {
            "type": "Composite",
            "components": {name: part.to_dict() for name, part in self.components.items()},
        }

    def __repr__(self) -> str:
        return "Composite({" + ", ".join(f"{k!r}: {v!r}" for k, v in self.components.items()) + "})"


def from_dict(description: Mapping[str, Any]) -> Potential:
    """Build a potential from what `Potential.to_dict` returned.

    Arguments:
        description: ``{"type": name, parameter: value, …}``, or
            ``{"type": "Composite", "components": {name: description, …}}``.

    Raises:
        GalrayError: An unknown type, or a missing, unknown or impossible parameter.
    """
    import galray.bar_potential  # noqa: F401  (names its potential by being imported)

    values = dict(description)
    kind = values.pop("type", None)
    cls = Potential._kinds.get(str(kind))
    if cls is None:
        raise GalrayError(
            f"unknown potential type {kind!r}", f"one of: {', '.join(sorted(Potential._kinds))}"
        )
    if cls is Composite:
        parts = values.get("components")
        if set(values) != {"components"} or not isinstance(parts, Mapping):
            raise GalrayError(
                "a Composite needs exactly the key 'components'", "a table of potentials by name"
            )
        return Composite({name: from_dict(part) for name, part in parts.items()})
    if set(values) != set(cls._parameters):
        raise GalrayError(
            f"{kind} was given {sorted(values)}", f"it takes exactly: {', '.join(cls._parameters)}"
        )
    return cls(**values)


def _radius(x: Tensor) -> Tensor:
    """|x|, kept above zero so that cusps and their gradients stay finite."""
    return torch.sqrt(x.square().sum(-1).clamp_min(_TINY))


def _nfw_mean_density(s: Tensor) -> Tensor:
    """[ln(1+s) − s/(1+s)] / s³; the difference loses digits as 2⁻⁵²/s, so s is kept above 10⁻⁶ of r_s."""
    s = s.clamp_min(1e-6)
    return (torch.log1p(s) - s / (1 + s)) / (s * s * s)
