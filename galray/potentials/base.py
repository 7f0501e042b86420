"""What every analytic potential is, and how potentials add up."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from galray.errors import GalrayError

__all__ = ["TINY", "Composite", "Potential", "float64", "from_dict", "positions", "radius_of"]

TINY = 1e-40  # kpc²: keeps 0/0 at the centre of a cusp finite without touching any other value


def float64(values: Any) -> Tensor:
    """Numbers in double precision from the start: torch alone would round plain floats to single."""
    return (
        values.to(torch.float64)
        if isinstance(values, Tensor)
        else torch.as_tensor(values, dtype=torch.float64)
    )


def positions(x: Any) -> Tensor:
    """Positions as a float64 tensor of shape (*, 3), on the device of the input."""
    x = float64(x)
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
        x = positions(x)
        radial, vertical = self.force_factors(x[..., 0].square() + x[..., 1].square(), x[..., 2].square())
        return -x * torch.stack([radial, radial, vertical], -1)

    @abstractmethod
    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) = ∇²Φ / 4πG in Msun/kpc³, shape (*)."""

    def circular_velocity(self, radius: Any) -> Tensor:
        """v_c = √(R ∂Φ/∂R) in km/s at cylindrical radius R (kpc, shape (*)) in the plane z = 0."""
        radius = float64(radius)
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
        x = positions(x)
        return torch.stack([part.potential(x) for part in self.components.values()]).sum(0)

    def acceleration(self, x: Any) -> Tensor:
        """a(x) = −∇Φ in (km/s)²/kpc, shape (*, 3)."""
        if self.axisymmetric:
            return super().acceleration(x)
        x = positions(x)
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
        x = positions(x)
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


def radius_of(x: Tensor) -> Tensor:
    """|x|, kept above zero so that cusps and their gradients stay finite."""
    return torch.sqrt(x.square().sum(-1).clamp_min(TINY))
