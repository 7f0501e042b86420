"""Ensembles: their members, their runs through Ray Tune, and the error budget they add up to."""

from galray.ensemble.execute import MemberFunction
from galray.ensemble.members import EnsembleSettings, FamilyDesign, MemberSpec, design, stream_seed
from galray.ensemble.resample import bootstrap_counts, bootstrap_indices, split_indices
from galray.ensemble.runner import run_members
from galray.ensemble.store import MemberOutcome, MemberStore, report_progress

__all__ = [
    "EnsembleSettings",
    "FamilyDesign",
    "MemberFunction",
    "MemberOutcome",
    "MemberSpec",
    "MemberStore",
    "bootstrap_counts",
    "bootstrap_indices",
    "design",
    "report_progress",
    "run_members",
    "split_indices",
    "stream_seed",
]
