"""Made-up stars with gaia_source columns, for the catalogue's tests."""

from __future__ import annotations

import hpgeom
import numpy as np
import polars as pl

from galray.catalog.columns import CORRELATIONS, ERRORS


def stars(n: int, seed: int = 0, rv_fraction: float = 0.8) -> pl.DataFrame:
    """Stars all over the sky; source_id holds the true HEALPix pixel."""
    rng = np.random.default_rng(seed)
    ra, dec = rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    pixel = hpgeom.angle_to_pixel(4096, ra, dec, nest=True).astype(np.int64)
    has_rv = rng.random(n) < rv_fraction
    data = {
        "source_id": (pixel << 35) | (np.arange(n, dtype=np.int64) + 1 + n * seed) << 7,
        "ra": ra,
        "dec": dec,
        "parallax": rng.gamma(2, 0.8, n) + 0.05,
        "pmra": rng.normal(0, 10, n),
        "pmdec": rng.normal(0, 10, n),
        "radial_velocity": np.where(has_rv, rng.normal(0, 40, n), np.nan),
        "phot_g_mean_mag": rng.uniform(8, 15, n),
        "bp_rp": rng.normal(1, 0.3, n),
        "grvs_mag": rng.uniform(7, 14, n),
        "ruwe": rng.normal(1.1, 0.2, n),
        "has_rvs": has_rv,
        "phot_variable_flag": np.where(rng.random(n) < 0.1, "VARIABLE", "NOT_AVAILABLE"),
    }
    data |= {name: rng.uniform(0.01, 0.05, n) for name in ERRORS[:5]}
    data[ERRORS[5]] = np.where(has_rv, rng.uniform(0.1, 3, n), np.nan)
    data |= {name: rng.uniform(-0.3, 0.3, n) for name in CORRELATIONS}
    return pl.DataFrame(data)
