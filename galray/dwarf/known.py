"""The known dwarf galaxies of the Milky Way: places, distances, sizes and velocities, with references."""

from __future__ import annotations

import csv
import difflib
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from galray.errors import GalrayError

__all__ = ["KnownDwarf", "PublishedHalo", "find_dwarf", "known_dwarfs", "published_haloes"]

_ROMAN = {"i": "1", "ii": "2", "iii": "3", "iv": "4", "v": "5", "vi": "6"}
_ADS = re.compile(r"^(?P<author>.+?)(?P<code>\d{4}.{15})$")


@dataclass(frozen=True)
class KnownDwarf:
    """One galaxy of the table; NaN where a quantity is not measured.

    Arguments:
        key: Such as ``ursa_minor_1``.
        name: Such as ``Ursa Minor``.
        abbreviation: Such as ``UMi``.
        ra, dec: Centre, deg (ICRS).
        distance, distance_error: kpc.
        r_half, r_half_error: Half-light radius along the major axis, arcmin.
        ellipticity: 1 − b/a.
        position_angle: Of the major axis, deg, north through east.
        velocity, velocity_error: Systemic heliocentric velocity, km/s.
        dispersion, dispersion_error: Along the line of sight, km/s.
        pmra, pmra_error, pmdec, pmdec_error: Proper motion, mas/yr (pmra with cos dec).
        absolute_magnitude: M_V.
        log10_stellar_mass: Of the stars, Msun, for a mass-to-light ratio of 2.
        sersic_radius, sersic_index: Half-light radius (major axis, arcmin) and n of a Sérsic profile.
        king_core, king_limit: Core and limiting radius of a King profile (major axis, arcmin).
        ref_structure, ref_distance, ref_velocity, ref_proper_motion, ref_light: First author and ADS code.
    """

    key: str
    name: str
    abbreviation: str
    ra: float
    dec: float
    distance: float
    distance_error: float
    r_half: float
    r_half_error: float
    ellipticity: float
    position_angle: float
    velocity: float
    velocity_error: float
    dispersion: float
    dispersion_error: float
    pmra: float
    pmra_error: float
    pmdec: float
    pmdec_error: float
    absolute_magnitude: float
    log10_stellar_mass: float
    sersic_radius: float
    sersic_index: float
    king_core: float
    king_limit: float
    ref_structure: str
    ref_distance: str
    ref_velocity: str
    ref_proper_motion: str
    ref_light: str

    @property
    def r_half_kpc(self) -> float:
        """Circularised half-light radius a √(1 − ε), kpc; an ellipticity that is not measured counts as 0."""
        ellipticity = self.ellipticity if math.isfinite(self.ellipticity) else 0.0
        return self.distance * math.radians(self.r_half / 60) * math.sqrt(1 - ellipticity)

    @property
    def references(self) -> dict[str, str]:
        """Where structure, distance, velocity and proper motion come from: author, year, ADS code."""
        named = {
            "structure": self.ref_structure,
            "distance": self.ref_distance,
            "velocity": self.ref_velocity,
            "proper motion": self.ref_proper_motion,
            "light": self.ref_light,
        }
        return {what: _reference(code) for what, code in named.items() if code}


@dataclass(frozen=True)
class PublishedHalo:
    """A published value of one galaxy.

    Arguments:
        key: Of the galaxy.
        quantity: ``rho_150pc`` (1e7 Msun/kpc³), ``log10_j_0.5deg`` (GeV² cm⁻⁵) or ``log10_mass_wolf`` (Msun).
        value: The value.
        minus: Its error downwards.
        plus: Its error upwards.
        label: Authors and year.
        reference: Where it was published.
    """

    key: str
    quantity: str
    value: float
    minus: float
    plus: float
    label: str
    reference: str


def published_haloes(key: str) -> list[PublishedHalo]:
    """The published values of a galaxy that ship with galray; none for a key that is not known."""
    return [
        PublishedHalo(
            row["key"],
            row["quantity"],
            float(row["value"]),
            float(row["minus"]),
            float(row["plus"]),
            row["label"],
            row["reference"],
        )
        for row in _rows("published.csv")
        if row["key"] == key
    ]


@cache
def _rows(name: str) -> list[dict[str, str]]:
    text = (files("galray.dwarf") / "data" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


@cache
def known_dwarfs() -> dict[str, KnownDwarf]:
    """Read the table that ships with galray (Local Volume Database, CC0), by key."""
    found = {}
    words = {"key", "name", "abbreviation"}
    for row in _rows("dwarfs.csv"):
        values = {
            column: value if column in words or column.startswith("ref_") else float(value or "nan")
            for column, value in row.items()
        }
        found[row["key"]] = KnownDwarf(**values)  # type: ignore[arg-type]
    return found


def find_dwarf(name: str) -> KnownDwarf:
    """Find a galaxy by key, name or abbreviation, whatever the case: ``fornax``, ``UMi``, ``Leo II``.

    Raises:
        GalrayError: No known galaxy has that name.
    """
    wanted = _plain(name)
    spellings: dict[str, KnownDwarf] = {}
    for dwarf in known_dwarfs().values():
        own = (dwarf.key, dwarf.name, dwarf.abbreviation, dwarf.key.removesuffix("_1"))
        spellings |= {_plain(text): dwarf for text in own}
    if wanted in spellings:
        return spellings[wanted]
    close = difflib.get_close_matches(wanted, spellings, 1)
    hint = f"did you mean '{spellings[close[0]].key}'? " if close else ""
    raise GalrayError(
        f"'{name}': no such galaxy in the table", f"{hint}`galray dwarf list` prints all; or give its numbers"
    )


def _plain(name: str) -> str:
    words = re.split(r"[\s_-]+", name.strip().lower())
    return "".join(_ROMAN.get(word, word) for word in words)


def _reference(code: str) -> str:
    match = _ADS.match(code)
    return f"{match['author']} {match['code'][:4]} ({match['code']})" if match else code
