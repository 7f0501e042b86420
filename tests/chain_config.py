"""A whole run made as small as it goes, for the tests of the chain."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOUR_MOCKS", "SMALL_MODELS", "write_config"]

FOUR_MOCKS = """
[calibration]
mocks = 4
[calibration.galaxy]
num_stars = 4000
mixing_periods = 3
energy_tolerance = 1e-3
"""

SMALL_MODELS = """
[catalog.ball]
radius_kpc = 4.0

[score]
coordinates = "cylindrical"
hidden = [16]
base = { components = 2, hidden = [16], star_passes = 4e4, batch_size = 512 }

[training.score]
epochs = 2
batch_size = 512

[gravity.moments]
num_potential_splines = [5, 7]
num_test_splines = [6, 9]
penalty_steps = 3

[gravity.potential]
basis = "spline"
base = "Rz"
base_splines = [5, 7]

[gravity.kernel]
radial_nodes = 3
polar_nodes = 8
azimuthal_nodes = 6

[places]
heights = [1.0]
num_profile_points = 5
num_map_points = 5
"""
"""Networks, splines and tables of a few hundred numbers: the chain in seconds."""


def write_config(folder: Path, *, num_stars: int = 20_000, name: str = "tiny", extra: str = "") -> Path:
    """Write the configuration of a run on a tiny mock: two score networks, moments with a redraw.

    Arguments:
        folder: Where the file, the run directory and MLflow's store will lie.
        num_stars: Stars of the mock.
        name: Of the run.
        extra: More TOML, for sections that are not here.
    """
    path = folder / f"{name}.toml"
    path.write_text(
        f"""
name = "{name}"
seed = 3
output = "{folder}"
methods = ["score", "moments"]

[mock.galaxy]
num_stars = {num_stars}
ball_radius_kpc = 4.2
mixing_periods = 3
energy_tolerance = 1e-3

[catalog]
num_shards = 5
cuts = {{ parallax_snr = 5.0 }}

[gravity.baryons]
model = "potential"

[ensemble]
score = {{ seeds = 2, bootstraps = 0, draws = 0 }}
moments = {{ seeds = 1, draws = 1 }}

[tracking]
patience = 1e4
{SMALL_MODELS}
{extra}
"""
    )
    return path
