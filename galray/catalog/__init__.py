"""Star files → shards of 6D stars: reading, cutting, transforming, and accounting for every row."""

from __future__ import annotations

from galray.catalog.astrometry import (
    add_states,
    draw_observables,
    galactocentric,
    galactocentric_covariance,
    jacobian,
    state_expressions,
)
from galray.catalog.distances import EdsdPosterior, EdsdSettings, JoinedDistanceSettings
from galray.catalog.fetch import fetch
from galray.catalog.fetch_tiles import TileQuery, archive_query
from galray.catalog.ingest import ingest, plan
from galray.catalog.inputs import InputUnit, input_units
from galray.catalog.inspection import inspect
from galray.catalog.joins import JoinSettings, JoinTable
from galray.catalog.masks import MaskSettings
from galray.catalog.quality import parse_cuts
from galray.catalog.radial_velocities import RadialVelocitySettings, SurveySettings
from galray.catalog.readers import Source, open_source
from galray.catalog.regions import Region
from galray.catalog.rvs_selection import RVSelection, RVSelectionSettings
from galray.catalog.settings import BallSettings, CatalogSettings, FrameSettings, StatesSettings
from galray.catalog.shards import BallRegion, Draw, ShardStore
from galray.catalog.state_errors import observer_of, state_covariances
from galray.catalog.summary import StoreSummary, summarize
from galray.catalog.tracers import TRACERS, CompletenessSettings, ExtinctionSettings, TracerSettings
from galray.catalog.verification import Verification, verify
from galray.catalog.writers import write_gaia_source
from galray.catalog.zero_point import parallax_zero_point, zero_point_expression

__all__ = [
    "TRACERS",
    "BallRegion",
    "BallSettings",
    "CatalogSettings",
    "CompletenessSettings",
    "Draw",
    "EdsdPosterior",
    "EdsdSettings",
    "ExtinctionSettings",
    "FrameSettings",
    "InputUnit",
    "JoinSettings",
    "JoinTable",
    "JoinedDistanceSettings",
    "MaskSettings",
    "RVSelection",
    "RVSelectionSettings",
    "RadialVelocitySettings",
    "Region",
    "ShardStore",
    "Source",
    "StatesSettings",
    "StoreSummary",
    "SurveySettings",
    "TileQuery",
    "TracerSettings",
    "Verification",
    "add_states",
    "archive_query",
    "draw_observables",
    "fetch",
    "galactocentric",
    "galactocentric_covariance",
    "ingest",
    "input_units",
    "inspect",
    "jacobian",
    "observer_of",
    "open_source",
    "parallax_zero_point",
    "parse_cuts",
    "plan",
    "state_covariances",
    "state_expressions",
    "summarize",
    "verify",
    "write_gaia_source",
    "zero_point_expression",
]
