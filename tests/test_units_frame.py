from __future__ import annotations

import numpy as np
import pytest
import torch
from astropy import constants, coordinates
from astropy import units as u

from galray import units
from galray.errors import GalrayError
from galray.frame import GalacticFrame, cartesian, cylindrical


def test_constants_equal_astropy():
    assert units.G == pytest.approx(constants.G.to_value("kpc km2 / (s2 Msun)"), rel=1e-12)
    one = 1 * u.Msun / u.pc**3
    assert units.GEV_PER_CM3 == pytest.approx((one * constants.c**2).to_value("GeV/cm3"), rel=1e-9)
    assert units.density_to_gev(1e9) == pytest.approx(37.965, rel=1e-4)
    per_year = (1 * u.mas / u.yr * u.kpc).to_value("km/s", u.dimensionless_angles())
    assert units.K_PROPER_MOTION == pytest.approx(per_year, rel=1e-9)


def test_quantities_are_stripped_at_the_edge():
    assert units.to_internal(8122 * u.pc, "length") == pytest.approx(8.122)
    assert units.to_internal(3.0, "length") == 3.0
    with pytest.raises(GalrayError, match="length"):
        units.to_internal(3 * u.s, "length")


def test_frame_equals_astropy():
    frame = GalacticFrame()
    assert frame.sun_position == pytest.approx((-8.121973, 0, 0.0208), abs=1e-6)
    rng = np.random.default_rng(1)
    sky = coordinates.SkyCoord(
        ra=rng.uniform(0, 360, 100) * u.deg,
        dec=np.linspace(-90, 90, 100) * u.deg,
        distance=rng.uniform(0.1, 5, 100) * u.kpc,
    )
    galactocentric = coordinates.Galactocentric(
        galcen_coord=coordinates.ICRS(frame.galcen_ra_deg * u.deg, frame.galcen_dec_deg * u.deg),
        galcen_distance=frame.sun_galcen_distance_kpc * u.kpc,
        galcen_v_sun=coordinates.CartesianDifferential(frame.sun_velocity_km_s * u.km / u.s),
        z_sun=frame.sun_height_kpc * u.kpc,
        roll=frame.roll_deg * u.deg,
    )
    truth = sky.transform_to(galactocentric).cartesian.xyz.to_value(u.kpc).T
    ours = (
        sky.cartesian.xyz.to_value(u.kpc).T @ np.array(frame.icrs_to_galactocentric()).T + frame.sun_position
    )
    np.testing.assert_allclose(ours, truth, atol=1e-12)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_cylindrical_turns_with_the_galaxy(kind):
    w = np.array([[-8.0, 0, 0.1, 10, 230, 5], [-8.0, 1e-3, 0, 0, 230, 0], [8.0, 1e-9, 0, 0, -230, 0]])
    w = torch.tensor(w) if kind == "torch" else w
    c = cylindrical(w)
    assert float(c[0, 0]) == 8.0
    assert float(c[0, 1]) == 0.0
    assert float(c[0, 3]) == -10.0  # towards the Galactic centre is inwards
    assert float(c[0, 4]) == 230.0  # along rotation is positive
    assert 0 < float(c[1, 1]) < 1e-3  # φ grows along rotation
    assert float(c[2, 1]) == pytest.approx(np.pi)  # the cut lies opposite the Sun
    assert float(c[2, 4]) == pytest.approx(230.0)
    np.testing.assert_allclose(np.asarray(cartesian(c)), np.asarray(w), atol=1e-12)
