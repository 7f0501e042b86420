"""A mock galaxy as star files: drawn, hidden by dust, observed, written in Gaia's bulk form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from galray.config import RunConfig
from galray.seeds import seed_for

__all__ = ["write_mock"]


def write_mock(
    config: RunConfig, folder: Path, progress: Callable[[float, str], None]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Draw the stars of a configuration's mock galaxy on all nodes and write them as Gaia would.

    Arguments:
        config: With a ``[mock]`` section.
        folder: Takes the files; it exists.
        progress: Called with the part that is done and what is being done.

    Returns:
        Numbers of stars and files; and the truth of the galaxy, as JSON.
    """
    from galray.catalog.writers import write_gaia_source
    from galray.cluster import ClusterExecutor
    from galray.mocks import DustMap, MilkyWay
    from galray.mocks.observe import observe

    mock = config.mock
    assert mock is not None
    frame = config.catalog.frame.build()
    galaxy = MilkyWay(mock.galaxy, frame)
    states = galaxy.sample(
        seed_for(config.seed, "mock", "stars"),
        executor=ClusterExecutor(),
        progress=lambda done, total: progress(0.7 * done / total, f"{done:,} of {total:,} stars"),
    )
    truth, dust = galaxy.truth(), None
    if mock.dust is not None:
        seed = seed_for(config.seed, "mock", "dust")
        dust = DustMap(mock.dust, frame.sun_position, mock.galaxy.ball_radius_kpc, seed)
        truth["dust"] = dust.to_dict()
    seed = seed_for(config.seed, "mock", "observe")
    observed = observe(states, mock.observe, seed, frame=frame, dust=dust)
    progress(0.75, "writing GaiaSource files")
    files = write_gaia_source(observed, folder, rows_per_file=mock.rows_per_file)
    return {"stars": observed.num_rows, "files": len(files)}, truth
