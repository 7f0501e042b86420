"""Ensembles: their members, their runs through Ray Tune, and the error budget they add up to."""

from typing import TYPE_CHECKING, Any

from galray.ensemble.budget import combine_family
from galray.ensemble.estimate import Estimate, Term
from galray.ensemble.execute import MemberFunction, limit_threads
from galray.ensemble.members import MemberSpec, design
from galray.ensemble.methods import combine_methods
from galray.ensemble.resample import bootstrap_counts, bootstrap_indices, split_indices
from galray.ensemble.runner import concurrent_members, run_members
from galray.ensemble.search import Trial, read_trials, run_search
from galray.ensemble.search_space import SearchRange, TuneSettings
from galray.ensemble.settings import BudgetSettings, EnsembleSettings, FamilyDesign, SystematicsSettings
from galray.ensemble.store import MemberOutcome, MemberStore, report_progress
from galray.ensemble.variance import jackknife_covariance, student_factor, welch_satterthwaite

if TYPE_CHECKING:
    from galray.ensemble.fields import FieldEnsemble

__all__ = [
    "BudgetSettings",
    "EnsembleSettings",
    "Estimate",
    "FamilyDesign",
    "FieldEnsemble",
    "MemberFunction",
    "MemberOutcome",
    "MemberSpec",
    "MemberStore",
    "SearchRange",
    "SystematicsSettings",
    "Term",
    "Trial",
    "TuneSettings",
    "bootstrap_counts",
    "bootstrap_indices",
    "combine_family",
    "combine_methods",
    "concurrent_members",
    "design",
    "jackknife_covariance",
    "limit_threads",
    "read_trials",
    "report_progress",
    "run_members",
    "run_search",
    "split_indices",
    "student_factor",
    "welch_satterthwaite",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name == "FieldEnsemble":
        from galray.ensemble.fields import FieldEnsemble

        return FieldEnsemble
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
