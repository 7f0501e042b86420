"""Numbers, units and names as a reader wants to see them: rounded by their error, in plain words."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

__all__ = [
    "METHODS",
    "count",
    "duration",
    "finite",
    "humanise",
    "measurement",
    "method_label",
    "method_order",
    "number",
    "pull_level",
    "quantity_html",
    "quantity_math",
    "quantity_plain",
    "quantity_words",
    "signed",
    "unit_key",
    "unit_math",
    "unit_text",
    "where_html",
]

MINUS = "−"
DASH = "–"

METHODS: dict[str, tuple[str, str]] = {
    "flow": ("flow", "normalizing flow, potential fitted to its score over the stars"),
    "score": ("score", "score network, potential fitted over the stars"),
    "moments": ("moments", "weak-form moments, splines, no network"),
    "vertical": ("vertical", "vertical Jeans equation in one dimension"),
    "combined": ("combined", "all inversions together"),
}
"""Label and description of each inversion, in the order in which they are shown."""

# name: (mathtext, HTML, plain, words). The HTML strings are constants of this module, never file content.
_QUANTITIES: dict[str, tuple[str, str, str, str]] = {
    "a_R": ("a_R", "<i>a<sub>R</sub></i>", "a_R", "radial acceleration"),
    "a_phi": (r"a_\varphi", "<i>a<sub>φ</sub></i>", "a_φ", "azimuthal acceleration"),
    "a_z": ("a_z", "<i>a<sub>z</sub></i>", "a_z", "vertical acceleration"),
    "a_x": ("a_x", "<i>a<sub>x</sub></i>", "a_x", "acceleration along x"),
    "a_y": ("a_y", "<i>a<sub>y</sub></i>", "a_y", "acceleration along y"),
    "K_z": (
        r"|K_z|/2\pi G",
        "|<i>K<sub>z</sub></i>|/2π<i>G</i>",
        "|K_z|/2πG",
        "vertical force, as the mass per area that would pull as much",
    ),
    "rho": (r"\rho", "<i>ρ</i>", "ρ", "total mass density"),
    "rho_dm": (r"\rho_\mathrm{DM}", "<i>ρ</i><sub>DM</sub>", "ρ_DM", "dark matter density"),
    "rho_dm_average": (r"\rho_\mathrm{DM}", "<i>ρ</i><sub>DM</sub>", "ρ_DM", "dark matter density, mean"),
    "rho_dm_sphere": (
        r"\rho_\mathrm{DM}",
        "<i>ρ</i><sub>DM</sub>",
        "ρ_DM",
        "dark matter density, mean over a sphere about the centre",
    ),
    "rho_baryons": (r"\rho_\mathrm{b}", "<i>ρ</i><sub>b</sub>", "ρ_b", "density of stars and gas"),
    "v_c": ("v_c", "<i>v<sub>c</sub></i>", "v_c", "circular speed"),
    "sigma": (r"\Sigma", "<i>Σ</i>", "Σ", "surface density"),
    "residual": (r"\delta", "<i>δ</i>", "δ", "Boltzmann residual"),
}

_UNITS: dict[str, tuple[str, str]] = {
    "msun/pc3": ("M☉/pc³", r"M_\odot\,\mathrm{pc}^{-3}"),
    "msun/kpc3": ("M☉/kpc³", r"M_\odot\,\mathrm{kpc}^{-3}"),
    "msun/pc2": ("M☉/pc²", r"M_\odot\,\mathrm{pc}^{-2}"),
    "gev/cm3": ("GeV/cm³", r"\mathrm{GeV\,cm}^{-3}"),
    "km2/s2/kpc": ("km²/s²/kpc", r"\mathrm{km^2\,s^{-2}\,kpc^{-1}}"),
    "km2/s2/pc": ("km²/s²/pc", r"\mathrm{km^2\,s^{-2}\,pc^{-1}}"),
    "km/s": ("km/s", r"\mathrm{km\,s^{-1}}"),
    "km/s/kpc": ("km/s/kpc", r"\mathrm{km\,s^{-1}\,kpc^{-1}}"),
    "km2/s2": ("km²/s²", r"\mathrm{km^2\,s^{-2}}"),
    "kpc": ("kpc", r"\mathrm{kpc}"),
    "": ("", ""),
}


# The null byte keeps the underscore of a symbol while the others become spaces.
_SYMBOLS = [
    ("a_phi", "a\0φ"),
    ("a_R", "a\0R"),
    ("a_z", "a\0z"),
    ("rho_dm", "ρ\0DM"),
    ("rho", "ρ"),
    ("chi2", "χ²"),
    ("z_sun", "z\0☉"),
]


def finite(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number (booleans are not numbers here)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def unit_key(unit: Any) -> str:
    """One spelling for the ways a unit is written: ``solMass / pc3`` and ``Msun/pc3`` are the same."""
    key = re.sub(r"[\s^*]", "", str(unit or "").lower()).replace("(km/s)2", "km2/s2")
    key = re.sub(r"/\((\w+)\.?kpc\)", r"/\1/kpc", key.replace("s2kpc", "s2.kpc"))
    return key.replace("solmass", "msun").replace("m_sun", "msun")


def unit_text(unit: Any) -> str:
    """A unit such as ``Msun/pc3`` in plain Unicode; an unknown one as it stands."""
    return _UNITS.get(unit_key(unit), (str(unit or ""), ""))[0]


def unit_math(unit: Any) -> str:
    """A unit as mathtext without the dollars; an unknown one as escaped roman text."""
    known = _UNITS.get(unit_key(unit))
    return known[1] if known else r"\mathrm{" + re.sub(r"[^\w/.\- ]", "", str(unit)).replace("_", " ") + "}"


def quantity_math(name: str) -> str:
    """A quantity's symbol as mathtext without the dollars."""
    if name in _QUANTITIES:
        return _QUANTITIES[name][0]
    return r"\mathrm{" + re.sub(r"[^\w ]", "", str(name)).replace("_", r"\ ") + "}"


def quantity_html(name: str) -> Any:
    """A quantity's symbol as safe HTML (markupsafe.Markup)."""
    from markupsafe import Markup, escape

    return Markup(_QUANTITIES[name][1]) if name in _QUANTITIES else escape(str(name))


def quantity_plain(name: str) -> str:
    """A quantity's symbol for a terminal."""
    return _QUANTITIES[name][2] if name in _QUANTITIES else str(name)


def quantity_words(name: str) -> str:
    """What a quantity is, in words."""
    return _QUANTITIES[name][3] if name in _QUANTITIES else humanise(name)


def method_label(method: str) -> str:
    """The name of an inversion as it is shown."""
    return METHODS[method][0] if method in METHODS else str(method)


def method_order(methods: Any) -> list[str]:
    """Distinct methods, the known ones first and in their fixed order, the truth last."""
    found = [str(m) for m in dict.fromkeys(methods) if m is not None]
    known = list(METHODS)
    rank = {m: known.index(m) if m in known else len(known) for m in found}
    return sorted(found, key=lambda m: (m == "truth", rank[m]))


def humanise(name: Any) -> str:
    """An identifier as words: underscores become spaces, known symbols are written as such."""
    text = str(name)
    for pattern, symbol in _SYMBOLS:
        text = re.sub(rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])", symbol, text)
    return re.sub(r"[_\s]+", " ", text).replace("\0", "_").strip()


def _group(text: str) -> str:
    """Narrow spaces between thousands of a plain decimal with five or more integer digits."""
    match = re.fullmatch(r"(-?)(\d{5,})(\.\d+)?", text)
    if match:
        digits = f"{int(match[2]):,}".replace(",", "\u202f")
        text = match[1] + digits + (match[3] or "")
    return text.replace("-", MINUS)


def _fixed(value: float, decimals: int) -> str:
    rounded = round(value, decimals)
    if rounded == 0:
        rounded = 0.0  # no minus zero
    return _group(f"{rounded:.{max(decimals, 0)}f}")


def number(value: Any, digits: int = 4) -> str:
    """A lone number with that many significant digits; a dash when there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not finite(value):
        return DASH
    if value == 0:
        return "0"
    if isinstance(value, int):
        return _group(str(value))
    magnitude = math.floor(math.log10(abs(value)))
    if -5 < magnitude < 7:
        text = _fixed(value, max(digits - 1 - magnitude, 0))
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa = _fixed(value / 10**magnitude, digits - 1).rstrip("0").rstrip(".")
    return f"{mantissa}×10{_superscript(magnitude)}"


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def measurement(value: Any, error: Any = None, digits: int = 2) -> tuple[str, str]:
    """A value and its error with the decimals that the error's leading digits justify.

    Arguments:
        value: The value.
        error: Its standard error, same unit, or None.
        digits: Significant digits of the error.

    Returns:
        The two strings; the error's is empty without a positive finite error. Very small or very large
        numbers carry the same power of ten in both.
    """
    if not finite(value):
        return DASH, ""
    if not finite(error) or error <= 0:
        return number(value), ""
    decimals = digits - 1 - math.floor(math.log10(error))
    # 0.0996 rounds to 0.10 with one decimal fewer than 0.0996 alone suggests.
    decimals = digits - 1 - math.floor(math.log10(round(error, decimals)))
    power = math.floor(math.log10(max(abs(value), error)))
    if -5 <= power < 7:
        return _fixed(value, decimals), _fixed(error, decimals)
    scale = 10.0**power
    suffix = f"×10{_superscript(power)}"
    return _fixed(value / scale, decimals + power) + suffix, _fixed(error / scale, decimals + power) + suffix


def signed(value: Any, digits: int = 1) -> str:
    """A number with its sign and a fixed count of decimals, for pulls; a dash when there is none."""
    if not finite(value):
        return DASH
    text = _fixed(float(value), digits)
    return text if text.startswith(MINUS) else f"+{text}"


def pull_level(pull: Any) -> str:
    """``ok`` within ±2, ``warn`` within ±3, ``fail`` beyond, ``none`` without a pull."""
    if not finite(pull):
        return "none"
    return "ok" if abs(pull) <= 2 else "warn" if abs(pull) <= 3 else "fail"


def count(value: Any) -> str:
    """A count of things with narrow spaces between thousands."""
    return _group(str(round(value))) if finite(value) else DASH


def duration(seconds: Any) -> str:
    """Seconds as a reader says them: ``48 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if not finite(seconds):
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def where_html(where: Any) -> str:
    """A place as plain text with a true minus sign."""
    return re.sub(r"(?<=[=\s(])-(?=\d)", MINUS, str(where or ""))
