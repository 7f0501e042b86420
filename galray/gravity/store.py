"""Fields on disk: numbers as safetensors, structure as JSON, nothing that needs unpickling."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.density_grid import BallGrid
from galray.gravity.dust import DustField
from galray.gravity.dust_functions import LogFunction
from galray.gravity.exports import Exportable
from galray.gravity.masses import MassField
from galray.gravity.moment_selection import LogSelection
from galray.gravity.potential import PotentialField, PotentialNetwork
from galray.gravity.region import Region, as_positions
from galray.gravity.settings import DustSettings
from galray.gravity.spline_field import SplineField
from galray.gravity.splines import TensorBasis, to_numpy
from galray.potentials import Potential, from_dict

__all__ = ["MeanField", "load_field", "save_field"]

_JSON, _TENSORS = "field.json", "field.safetensors"


class MeanField(Exportable):
    """The mean of several fields: accelerations are linear, so potentials and densities average too.

    Arguments:
        fields: Fields known in the same region.
        weights: Their shares; None for equal ones.
    """

    def __init__(self, fields: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        if not fields:
            raise GalrayError("the mean of no field", "give at least one")
        self.fields = list(fields)
        shares = [1.0] * len(fields) if weights is None else [float(w) for w in weights]
        self.weights = [w / sum(shares) for w in shares]
        regions = [f.region for f in fields if getattr(f, "region", None) is not None]
        if regions:
            self.region: Region = min(regions, key=lambda r: r.radius)

    def _mean(self, name: str, x: Any) -> Tensor:
        x = as_positions(x)
        parts = [w * getattr(f, name)(x) for f, w in zip(self.fields, self.weights, strict=True)]
        return torch.stack(parts).sum(0)

    def acceleration(self, x: Any) -> Tensor:
        """a(x) in (km/s)²/kpc, shape (*, 3)."""
        return self._mean("acceleration", x)

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return self._mean("potential", x)

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        return self._mean("mass_density", x)


def save_field(field: Any, path: str | Path) -> None:
    """Write a field to a folder: ``field.json`` and ``field.safetensors``.

    Arguments:
        field: A `SplineField`, `MassField`, `PotentialField`, `MeanField`, analytic `Potential`, or a
            `DustField` (a conditional one keeps the density seen, by which n(x) gives ε, on a grid).
        path: The folder; made where absent. The JSON is written last.

    Raises:
        GalrayError: The field cannot be stored (one that evaluates a model: fit a spline to it), or the
            folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    description = _describe(field, "", tensors)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tensors:
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / _TENSORS)
        temporary = folder / (_JSON + ".part")
        temporary.write_text(json.dumps(description, indent=1), encoding="utf-8")
        os.replace(temporary, folder / _JSON)
    except OSError as error:
        raise GalrayError(
            f"{folder}: cannot be written: {error.strerror}", "check the folder's permissions"
        ) from None


def load_field(path: str | Path) -> Any:
    """Read what `save_field` wrote.

    Raises:
        GalrayError: The folder holds no field, or a broken one.
    """
    folder = Path(path)
    try:
        description = json.loads((folder / _JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GalrayError(
            f"{folder}: no readable {_JSON}: {error}", "name a folder written by save_field"
        ) from None
    try:
        tensors = load_file(folder / _TENSORS) if (folder / _TENSORS).is_file() else {}
        return _rebuild(description, "", tensors)
    except GalrayError:
        raise
    except Exception as error:
        raise GalrayError(f"{folder}: a broken field: {error}", "write it again") from None


def _describe(field: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(field, Potential):
        return {"kind": "potential", "potential": field.to_dict()}
    if isinstance(field, SplineField):
        for name in ("parameters", "covariance", "posterior"):
            tensors[f"{prefix}{name}"] = torch.from_numpy(getattr(field, name))
        return {
            "kind": "spline",
            "basis": field.basis.to_dict(),
            "region": {"center": field.region.center, "radius": field.region.radius},
            "penalty": field.penalty,
            "statistics": field.statistics,
        }
    if isinstance(field, MassField):
        for name in ("centres", "widths", "masses", "tide"):
            tensors[f"{prefix}{name}"] = getattr(field, name)
        return {
            "kind": "masses",
            "region": {"center": field.region.center, "radius": field.region.radius},
            "statistics": field.statistics,
        }
    if isinstance(field, PotentialField):
        for name, value in field.network.state_dict().items():
            tensors[f"{prefix}network.{name}"] = value
        return {
            "kind": "network",
            "base": _describe(field.base, f"{prefix}base.", tensors),
            **_shape(field.network),
            "curve": field.curve,
        }
    if isinstance(field, LogSelection):
        for name in ("parameters", "covariance"):
            tensors[f"{prefix}{name}"] = torch.from_numpy(getattr(field, name))
        return {
            "kind": "selection",
            "basis": field.basis.to_dict(),
            "region": {"center": field.region.center, "radius": field.region.radius},
        }
    if isinstance(field, DustField):
        network = field.selection.network
        for name, value in ({} if network is None else network.state_dict()).items():
            tensors[f"{prefix}network.{name}"] = value
        if field.log_observed is not None:
            seen = field.log_observed
            grid = seen if isinstance(seen, BallGrid) else BallGrid.of(seen, field.region)
            tensors[f"{prefix}observed"] = torch.from_numpy(grid.values)
        return {
            "kind": "dust",
            "settings": field.settings.model_dump(mode="json"),
            "field": _describe(field.field, f"{prefix}field.", tensors),
            "selection": _describe(field.selection.base, f"{prefix}selection.", tensors),
            "network": None if network is None else _shape(network),
        }
    if isinstance(field, MeanField):
        return {
            "kind": "mean",
            "weights": field.weights,
            "fields": [_describe(f, f"{prefix}{i}.", tensors) for i, f in enumerate(field.fields)],
        }
    raise GalrayError(
        f"a {type(field).__name__} cannot be stored",
        "fit a spline to its accelerations (fit_spline_to_accelerations) and store that",
    )


def _shape(network: PotentialNetwork) -> dict[str, Any]:
    hidden = [layer.out_features for layer in list(network.layers)[:-1]]
    return {"hidden": hidden, "scale": network.scale}


def _network(values: dict[str, Any], region: Region, prefix: str, tensors: dict[str, Tensor]) -> Any:
    network = PotentialNetwork(region, tuple(values["hidden"]), values["scale"]).double()
    start = f"{prefix}network."
    network.load_state_dict({k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)})
    return network


def _region(values: dict[str, Any]) -> Region:
    center = values["region"]["center"]
    return Region((center[0], center[1], center[2]), values["region"]["radius"])


def _rebuild(values: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Any:
    kind = values.get("kind")
    if kind == "potential":
        return from_dict(values["potential"])
    if kind == "spline":
        return SplineField(
            TensorBasis.from_dict(values["basis"]),
            _region(values),
            tensors[f"{prefix}parameters"],
            covariance=tensors[f"{prefix}covariance"],
            posterior=tensors[f"{prefix}posterior"],
            penalty=tuple(values["penalty"]),
            statistics=values["statistics"],
        )
    if kind == "masses":
        return MassField(
            _region(values),
            *(tensors[f"{prefix}{name}"] for name in ("centres", "widths", "masses", "tide")),
            statistics=values["statistics"],
        )
    if kind == "network":
        base = _rebuild(values["base"], f"{prefix}base.", tensors)
        network = _network(values, base.region, prefix, tensors)
        return PotentialField(base, network, values["curve"])
    if kind == "selection":
        basis = TensorBasis.from_dict(values["basis"])
        assert isinstance(basis, TensorBasis)
        given = (to_numpy(tensors[f"{prefix}{name}"]) for name in ("parameters", "covariance"))
        return LogSelection(basis, _region(values), *given)
    if kind == "dust":
        field = _rebuild(values["field"], f"{prefix}field.", tensors)
        base = _rebuild(values["selection"], f"{prefix}selection.", tensors)
        network = None
        if values["network"] is not None:
            network = _network(values["network"], base.region, prefix, tensors)
        settings = DustSettings.model_validate(values["settings"])
        seen = tensors.get(f"{prefix}observed")
        grid = None if seen is None else BallGrid(field.region, to_numpy(seen))
        return DustField(field, LogFunction(base, network), settings, log_observed=grid)
    if kind == "mean":
        parts = [_rebuild(f, f"{prefix}{i}.", tensors) for i, f in enumerate(values["fields"])]
        return MeanField(parts, values["weights"])
    raise GalrayError(f"unknown kind of field {kind!r}", "it was written by another version of galray")
