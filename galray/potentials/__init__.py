"""Analytic gravitational potentials in torch float64: Φ, a = −∇Φ and ρ to round-off."""

from galray.potentials.bars import LongMuraliBar
from galray.potentials.base import Composite, Potential, from_dict
from galray.potentials.discs import MiyamotoNagai
from galray.potentials.spheres import NFW, DoublePowerLaw, Hernquist, Isochrone, Plummer
from galray.potentials.spheroids import FlattenedNFW

__all__ = [
    "NFW",
    "Composite",
    "DoublePowerLaw",
    "FlattenedNFW",
    "Hernquist",
    "Isochrone",
    "LongMuraliBar",
    "MiyamotoNagai",
    "Plummer",
    "Potential",
    "from_dict",
]
