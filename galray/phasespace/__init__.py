"""Models of f(x, v) and of its score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galray.phasespace.settings import BaseSettings, FlowPart, FlowSettings, ScoreSettings

if TYPE_CHECKING:
    from galray.phasespace.checks import run_checks
    from galray.phasespace.exact import ExactModel
    from galray.phasespace.flow import PhaseSpaceFlow
    from galray.phasespace.models import build_model, load_model, save_model
    from galray.phasespace.objectives import Objective, objective
    from galray.phasespace.protocols import ConditionalModel, PhaseSpaceModel
    from galray.phasespace.score import ScoreNetwork
    from galray.phasespace.transforms import Ball, Chart

__all__ = [
    "Ball",
    "BaseSettings",
    "Chart",
    "ConditionalModel",
    "ExactModel",
    "FlowPart",
    "FlowSettings",
    "Objective",
    "PhaseSpaceFlow",
    "PhaseSpaceModel",
    "ScoreNetwork",
    "ScoreSettings",
    "build_model",
    "load_model",
    "objective",
    "run_checks",
    "save_model",
]

# torch and zuko are imported with what needs them; a configuration needs the settings alone
_HOMES = {
    "Ball": "transforms",
    "Chart": "transforms",
    "ConditionalModel": "protocols",
    "ExactModel": "exact",
    "Objective": "objectives",
    "PhaseSpaceFlow": "flow",
    "PhaseSpaceModel": "protocols",
    "ScoreNetwork": "score",
    "build_model": "models",
    "load_model": "models",
    "objective": "objectives",
    "run_checks": "checks",
    "save_model": "models",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
