"""Galactic dark matter from star catalogues, with neural networks, on a laptop or a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galray.catalog import ShardStore as Catalog
    from galray.config import RunConfig, load_config
    from galray.errors import GalrayError
    from galray.pipeline import Pipeline, run
    from galray.rundir import Run, load_run

__version__ = "0.1.0"

__all__ = [
    "Catalog",
    "GalrayError",
    "Pipeline",
    "Run",
    "RunConfig",
    "__version__",
    "load_config",
    "load_run",
    "run",
]

# Torch takes seconds to import, so that a name is fetched from its module when it is first used (PEP 562).
_HOMES = {
    "Catalog": ("galray.catalog", "ShardStore"),
    "GalrayError": ("galray.errors", "GalrayError"),
    "Pipeline": ("galray.pipeline", "Pipeline"),
    "Run": ("galray.rundir", "Run"),
    "RunConfig": ("galray.config", "RunConfig"),
    "load_config": ("galray.config", "load_config"),
    "load_run": ("galray.rundir", "load_run"),
    "run": ("galray.pipeline", "run"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'galray' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
