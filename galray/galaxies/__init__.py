"""Runs of dwarf galaxies: configuration, members side by side, products, figures, one page per galaxy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galray.galaxies.config import DwarfConfig, load_dwarf_config, ready_dwarf_configs
    from galray.galaxies.results import GalaxyResult
    from galray.galaxies.run import Fleet, Job, find_jobs, fit_galaxies, fit_galaxy

__all__ = [
    "DwarfConfig",
    "Fleet",
    "GalaxyResult",
    "Job",
    "find_jobs",
    "fit_galaxies",
    "fit_galaxy",
    "load_dwarf_config",
    "ready_dwarf_configs",
]

_HOMES = {
    "DwarfConfig": "config",
    "Fleet": "run",
    "GalaxyResult": "results",
    "Job": "run",
    "find_jobs": "run",
    "fit_galaxies": "run",
    "fit_galaxy": "run",
    "load_dwarf_config": "config",
    "ready_dwarf_configs": "config",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
