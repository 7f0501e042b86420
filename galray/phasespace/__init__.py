"""Models of f(x, v) and of its score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galray.phasespace.noise_settings import NoiseSettings
from galray.phasespace.settings import BaseSettings, FlowPart, FlowSettings, ScoreSettings

if TYPE_CHECKING:
    from galray.phasespace.checks import run_checks
    from galray.phasespace.exact import ExactModel
    from galray.phasespace.flow import ConditionalFlow, PhaseSpaceFlow
    from galray.phasespace.models import build_model, load_model, save_model
    from galray.phasespace.noise import attach_errors
    from galray.phasespace.noise_objectives import (
        ConvolvedLikelihood,
        PosteriorScoreMatching,
        posterior_stars,
    )
    from galray.phasespace.objectives import Objective, objective
    from galray.phasespace.protocols import ConditionalModel, PhaseSpaceModel
    from galray.phasespace.score import ScoreNetwork
    from galray.phasespace.selection import SelectionEfficiency
    from galray.phasespace.sightlines import SightlineLikelihood, completed_stars, project_out
    from galray.phasespace.transforms import Ball, Chart

__all__ = [
    "Ball",
    "BaseSettings",
    "Chart",
    "ConditionalFlow",
    "ConditionalModel",
    "ConvolvedLikelihood",
    "ExactModel",
    "FlowPart",
    "FlowSettings",
    "NoiseSettings",
    "Objective",
    "PhaseSpaceFlow",
    "PhaseSpaceModel",
    "PosteriorScoreMatching",
    "ScoreNetwork",
    "ScoreSettings",
    "SelectionEfficiency",
    "SightlineLikelihood",
    "attach_errors",
    "build_model",
    "completed_stars",
    "load_model",
    "objective",
    "posterior_stars",
    "project_out",
    "run_checks",
    "save_model",
]

# torch and zuko are imported with what needs them; a configuration needs the settings alone
_HOMES = {
    "Ball": "transforms",
    "Chart": "transforms",
    "ConditionalFlow": "flow",
    "ConditionalModel": "protocols",
    "ConvolvedLikelihood": "noise_objectives",
    "ExactModel": "exact",
    "Objective": "objectives",
    "PhaseSpaceFlow": "flow",
    "PhaseSpaceModel": "protocols",
    "PosteriorScoreMatching": "noise_objectives",
    "ScoreNetwork": "score",
    "SelectionEfficiency": "selection",
    "SightlineLikelihood": "sightlines",
    "completed_stars": "sightlines",
    "attach_errors": "noise",
    "build_model": "models",
    "load_model": "models",
    "objective": "objectives",
    "posterior_stars": "noise_objectives",
    "project_out": "sightlines",
    "run_checks": "checks",
    "save_model": "models",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
