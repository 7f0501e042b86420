"""What Gaia would have seen: states and absolute magnitudes → a `gaia_source` table with its errors.

The errors are those of Gaia DR3 as ESA's science-performance page gives them (sky averages): parallax from
G, positions and proper motions in proportion to it, radial velocities from G_RVS. The five astrometric errors
of a star are correlated, the noise is drawn with those correlations, and both are reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import hpgeom
import numpy as np
import pyarrow as pa

from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.mocks.dust import DustMap
from galray.mocks.settings import ObserveSettings
from galray.units import K_PROPER_MOTION

__all__ = [
    "observables",
    "observe",
    "observe_with_truth",
    "parallax_error",
    "radial_velocity_error",
    "source_ids",
]

_PARAMETERS = ("ra", "dec", "parallax", "pmra", "pmdec")
# Errors relative to the parallax error, DR3 (mas and mas/yr): ESA science-performance page
_RELATIVE_ERRORS = (0.80, 0.70, 1.0, 1.03, 0.89)
_MAS_PER_DEGREE = 3.6e6
_NSIDE_12 = 4096  # HEALPix level 12, which source_id encodes in its bits above 35

# Rotation from ICRS to Galactic axes, the Hipparcos definition of Gaia's l and b (ESA 1997, vol. 1, §1.5.3)
_GALACTIC = np.array(
    [
        [-0.0548755604162154, -0.8734370902348850, -0.4838350155487132],
        [0.4941094278755837, -0.4448296299600112, 0.7469822444972189],
        [-0.8676661490190047, -0.1980763734312015, 0.4559837761750669],
    ]
)

Selection = Callable[[np.ndarray], np.ndarray]


def observables(w: np.ndarray, frame: GalacticFrame | None = None) -> dict[str, np.ndarray]:
    """The exact observables of stars: the inverse of the ICRS → Galactocentric transformation.

    Arguments:
        w: Galactocentric states in kpc and km/s, shape (n, 6).
        frame: The frame's numbers.

    Returns:
        ``ra``, ``dec`` (deg), ``parallax`` (mas), ``pmra`` (with cos δ), ``pmdec`` (mas/yr) and
        ``radial_velocity`` (km/s), shape (n,) each.
    """
    frame = frame or GalacticFrame()
    rotation = np.array(frame.icrs_to_galactocentric())  # x_gal = rotation @ x_icrs + sun
    x = (w[:, :3] - np.array(frame.sun_position)) @ rotation
    v = (w[:, 3:] - np.array(frame.sun_velocity_km_s)) @ rotation
    distance = np.linalg.norm(x, axis=1)
    across = np.hypot(x[:, 0], x[:, 1])
    cos_a, sin_a = x[:, 0] / across, x[:, 1] / across
    cos_d, sin_d = across / distance, x[:, 2] / distance
    inward = cos_a * v[:, 0] + sin_a * v[:, 1]
    return {
        "ra": np.degrees(np.arctan2(x[:, 1], x[:, 0])) % 360.0,
        "dec": np.degrees(np.arctan2(x[:, 2], across)),
        "parallax": 1.0 / distance,
        "pmra": (cos_a * v[:, 1] - sin_a * v[:, 0]) / (K_PROPER_MOTION * distance),
        "pmdec": (cos_d * v[:, 2] - sin_d * inward) / (K_PROPER_MOTION * distance),
        "radial_velocity": cos_d * inward + sin_d * v[:, 2],
    }


def parallax_error(g_mag: np.ndarray) -> np.ndarray:
    """Gaia DR3's sky-averaged parallax uncertainty in mas.

    σ = √(40 + 800 ζ + 30 ζ²) µas with ζ = 10^{0.4 (max(G, 13) − 15)} (ESA, Gaia science performance).

    Arguments:
        g_mag: Apparent G in mag, shape (n,).
    """
    zeta = 10 ** (0.4 * (np.maximum(g_mag, 13.0) - 15.0))
    return 1e-3 * np.sqrt(40 + 800 * zeta + 30 * zeta**2)


def radial_velocity_error(grvs_mag: np.ndarray) -> np.ndarray:
    """A DR3-like radial-velocity uncertainty for cool giants in km/s: 0.12 + 6 exp[0.9 (G_RVS − 14)].

    About 0.15 at G_RVS = 8, 1.1 at 12 and 6 at the limit of 14, which is the run of Katz et al. 2023.

    Arguments:
        grvs_mag: Apparent G_RVS in mag, shape (n,).
    """
    return 0.12 + 6.0 * np.exp(0.9 * (grvs_mag - 14.0))


def source_ids(ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
    """Gaia-like source identifiers, unique within the table.

    Bits 36 to 63 hold the HEALPix pixel (level 12, nested, ICRS), bits 8 to 32 a running number within it.

    Arguments:
        ra: Right ascension in deg, shape (n,).
        dec: Declination in deg, shape (n,).

    Returns:
        Shape (n,), int64.
    """
    pixel = hpgeom.angle_to_pixel(_NSIDE_12, ra, dec, nest=True, lonlat=True).astype(np.int64)
    order = np.argsort(pixel, kind="stable")
    ordered = pixel[order]
    first = np.searchsorted(ordered, ordered)  # where each pixel begins
    number = np.empty_like(pixel)
    number[order] = np.arange(len(pixel)) - first + 1
    return (pixel << 35) | (number << 7)


def observe(
    table: pa.Table,
    settings: ObserveSettings,
    seed: int,
    *,
    frame: GalacticFrame | None = None,
    selection: Selection | None = None,
    dust: DustMap | None = None,
) -> pa.Table:
    """Observe a mock with Gaia.

    Arguments:
        table: x, y, z (kpc), vx, vy, vz (km/s), ``abs_g_mag`` and ``bp_rp``, one row per star.
        settings: Noise and missing radial velocities.
        seed: Root of the random streams.
        frame: The frame's numbers; the Sun observes from its origin of velocities.
        selection: ε(x), the probability between 0 and 1 that a star at x (shape (n, 3), kpc) is in the
            catalogue, shape (n,); default: every star is.
        dust: Dims and reddens the stars, and hides those that it makes too faint.

    Returns:
        The columns of ``gaia_source`` that follow from a star's place, motion and magnitude, with Gaia's
        names, types and units, in the table's order.

    Raises:
        GalrayError: A column is missing, or a star stands at the Sun.
    """
    return observe_with_truth(table, settings, seed, frame=frame, selection=selection, dust=dust)[0]


def observe_with_truth(
    table: pa.Table,
    settings: ObserveSettings,
    seed: int,
    *,
    frame: GalacticFrame | None = None,
    selection: Selection | None = None,
    dust: DustMap | None = None,
) -> tuple[pa.Table, pa.Table]:
    """As `observe`; also the true states of the stars observed, row by row, with their ``source_id``."""
    missing = [
        c for c in ("x", "y", "z", "vx", "vy", "vz", "abs_g_mag", "bp_rp") if c not in table.column_names
    ]
    if missing:
        raise GalrayError(
            f"the mock's table has no column {', '.join(missing)}", "give states and magnitudes"
        )
    streams = np.random.SeedSequence(seed).spawn(4)
    selection_rng, noise_rng, velocity_rng, other_rng = (np.random.default_rng(s) for s in streams)
    x = np.stack([table[c].to_numpy() for c in ("x", "y", "z")], -1)
    if dust is not None:
        chance = dust.probability(x, table["abs_g_mag"].to_numpy())
        chosen = selection_rng.random(len(x)) < chance
        table, x = table.filter(pa.array(chosen)), x[chosen]
    if selection is not None:
        efficiency = np.asarray(selection(x), dtype=float)
        if efficiency.shape != (len(x),) or not ((efficiency >= 0) & (efficiency <= 1)).all():
            raise GalrayError(
                "the selection efficiency is not one number from 0 to 1 per star", "scale ε by its maximum"
            )
        chosen = selection_rng.random(len(x)) < efficiency
        table, x = table.filter(pa.array(chosen)), x[chosen]
    w = np.stack([table[c].to_numpy() for c in ("x", "y", "z", "vx", "vy", "vz")], -1)
    frame = frame or GalacticFrame()
    true = observables(w, frame)
    if not np.isfinite(true["parallax"]).all():
        raise GalrayError("a star stands at the Sun's own place", "remove it: its parallax is infinite")
    extinction = np.zeros(len(w)) if dust is None else dust.extinction(x)
    photometry = _photometry(
        table["abs_g_mag"].to_numpy() + extinction,
        table["bp_rp"].to_numpy() + (0.0 if dust is None else dust.settings.reddening * extinction),
        true["parallax"],
    )

    errors = parallax_error(photometry["phot_g_mean_mag"])[:, None] * np.array(_RELATIVE_ERRORS)
    errors = (settings.noise_scale * errors).astype(np.float32).astype(float)  # Gaia reports single precision
    factor = _correlation_factors(len(w), settings.correlation_strength, noise_rng)
    noise = errors * np.einsum("nij,nj->ni", factor, noise_rng.standard_normal((len(w), 5)))
    correlation = np.einsum("nik,njk->nij", factor, factor)
    seen = {name: true[name] + noise[:, i] for i, name in enumerate(_PARAMETERS[2:], start=2)}
    seen["ra"], seen["dec"] = _displace(true["ra"], true["dec"], noise[:, :2] / _MAS_PER_DEGREE)

    velocity_error = settings.noise_scale * radial_velocity_error(photometry["grvs_mag"])
    velocity_error = velocity_error.astype(np.float32).astype(float)
    velocity = true["radial_velocity"] + velocity_error * velocity_rng.standard_normal(len(w))
    unseen = velocity_rng.random(len(w)) < settings.rv_missing_fraction

    identifiers = source_ids(seen["ra"], seen["dec"])
    longitude, latitude = _galactic(seen["ra"], seen["dec"])
    with np.errstate(divide="ignore"):
        parallax_over_error = seen["parallax"] / errors[:, 2]
    single = {
        **{f"{name}_error": errors[:, i] for i, name in enumerate(_PARAMETERS)},
        **{
            f"{a}_{b}_corr": correlation[:, i, j]
            for i, a in enumerate(_PARAMETERS)
            for j, b in enumerate(_PARAMETERS)
            if i < j
        },
        "parallax_over_error": parallax_over_error,
        "pm": np.hypot(seen["pmra"], seen["pmdec"]),
        "ruwe": np.exp(0.06 * other_rng.standard_normal(len(w))),
        "nu_eff_used_in_astrometry": 1.0 / (0.40 + 0.20 * photometry["bp_rp"]),
        **photometry,
    }
    n = len(w)
    columns = {
        "source_id": pa.array(identifiers),
        "random_index": pa.array(other_rng.permutation(n).astype(np.int64)),
        "ref_epoch": pa.array(np.full(n, 2016.0)),
        **{name: pa.array(seen[name]) for name in _PARAMETERS},
        "l": pa.array(longitude),
        "b": pa.array(latitude),
        **{name: pa.array(values.astype(np.float32)) for name, values in single.items()},
        "radial_velocity": pa.array(velocity.astype(np.float32), mask=unseen),
        "radial_velocity_error": pa.array(velocity_error.astype(np.float32), mask=unseen),
        "rv_nb_transits": pa.array(other_rng.integers(8, 40, n).astype(np.int16), mask=unseen),
        "astrometric_params_solved": pa.array(np.full(n, 31, np.int8)),
        "visibility_periods_used": pa.array(other_rng.integers(12, 28, n).astype(np.int16)),
        "duplicated_source": pa.array(np.zeros(n, bool)),
    }
    description = {
        "observed": settings.model_dump(mode="json"),
        "seed": seed,
        "frame": frame.as_dict(),
        "stars": n,
        "without_radial_velocity": int(unseen.sum()),
    }
    observed = pa.table(columns).replace_schema_metadata({"galray": json.dumps(description)})
    return observed, table.add_column(0, "source_id", columns["source_id"])


def _photometry(absolute: np.ndarray, colour: np.ndarray, parallax: np.ndarray) -> dict[str, np.ndarray]:
    """Apparent magnitudes from absolute ones and colours, extinction in both; parallax in mas."""
    g = absolute + 10.0 - 5.0 * np.log10(parallax)
    # G_BP and G_RP straddle G: G − G_RP ≈ 0.5 (G_BP − G_RP) for giants
    rp = g - 0.58 * colour + 0.05 * colour**2
    return {
        "phot_g_mean_mag": g,
        "phot_bp_mean_mag": rp + colour,
        "phot_rp_mean_mag": rp,
        "bp_rp": colour,
        "bp_g": rp + colour - g,
        "g_rp": g - rp,
        "grvs_mag": rp - 0.15,  # the RVS band lies at the red end of G_RP
    }


def _correlation_factors(n: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Lower Cholesky factors of random 5 × 5 correlation matrices, shape (n, 5, 5)."""
    loading = strength * rng.standard_normal((n, 5, 2))
    covariance = np.eye(5) + loading @ loading.transpose(0, 2, 1)
    scale = np.sqrt(np.einsum("nii->ni", covariance))
    return np.linalg.cholesky(covariance / (scale[:, :, None] * scale[:, None, :]))


def _displace(ra: np.ndarray, dec: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift places on the sky by (Δα cos δ, Δδ) in deg, safely at the poles and at α = 0."""
    declination = dec + offset[:, 1]
    over = np.abs(declination) > 90.0
    declination = np.where(over, np.sign(declination) * 180.0 - declination, declination)
    cosine = np.maximum(np.cos(np.radians(dec)), 1e-9)
    return (ra + offset[:, 0] / cosine + 180.0 * over) % 360.0, declination


def _galactic(ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Galactic longitude and latitude in deg."""
    a, d = np.radians(ra), np.radians(dec)
    x = np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)]).T @ _GALACTIC.T
    longitude = np.degrees(np.arctan2(x[:, 1], x[:, 0])) % 360.0
    return longitude, np.degrees(np.arctan2(x[:, 2], np.hypot(x[:, 0], x[:, 1])))
