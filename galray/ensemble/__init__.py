"""Ensembles: their members, their runs through Ray Tune, and the error budget they add up to."""

from galray.ensemble.budget import Estimate, Term, combine_family, combine_methods
from galray.ensemble.execute import MemberFunction
from galray.ensemble.members import (
    BudgetSettings,
    EnsembleSettings,
    FamilyDesign,
    MemberSpec,
    design,
    stream_seed,
)
from galray.ensemble.resample import bootstrap_counts, bootstrap_indices, split_indices
from galray.ensemble.runner import run_members
from galray.ensemble.store import MemberOutcome, MemberStore, report_progress
from galray.ensemble.variance import jackknife_covariance, student_factor

__all__ = [
    "BudgetSettings",
    "EnsembleSettings",
    "Estimate",
    "FamilyDesign",
    "MemberFunction",
    "MemberOutcome",
    "MemberSpec",
    "MemberStore",
    "Term",
    "bootstrap_counts",
    "bootstrap_indices",
    "combine_family",
    "combine_methods",
    "design",
    "jackknife_covariance",
    "report_progress",
    "run_members",
    "split_indices",
    "stream_seed",
    "student_factor",
]
