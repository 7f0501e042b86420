"""Published local densities: read from `data/published.toml`, converted to both units."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from galray.errors import GalrayError
from galray.units import GEV_PER_CM3

__all__ = ["HOW_KNOWN", "PublishedValue", "published"]

HOW_KNOWN = {
    "abstract": "stated in the paper's abstract",
    "talk": "shown in a talk by the paper's authors",
    "second-hand": "quoted by others; the paper itself was not checked",
}
"""How each value is known, in words."""


@dataclass(frozen=True)
class PublishedValue:
    """One published density.

    Arguments:
        quantity: ``rho_dm`` or ``rho`` (all mass).
        label: Authors and year.
        where: The place or region it holds for.
        low: Lower end of the 1σ interval or of the range, in Msun/pc³.
        high: Upper end, in Msun/pc³.
        value: Central value in Msun/pc³; None for a range.
        quoted: Value as printed in the source, with its unit.
        reference: Such as ``arXiv:1509.05334``.
        how: A key of `HOW_KNOWN`.
        note: A remark on data and method.
    """

    quantity: str
    label: str
    where: str
    low: float
    high: float
    value: float | None
    quoted: str
    reference: str
    how: str
    note: str

    @property
    def url(self) -> str:
        """Where the paper can be read; empty when the reference is not on arXiv."""
        number = self.reference.removeprefix("arXiv:")
        return f"https://arxiv.org/abs/{number}" if number != self.reference else ""


def _parse(entry: dict) -> PublishedValue:
    unit = entry["unit"]
    scale = {"Msun/pc3": 1.0, "GeV/cm3": 1.0 / GEV_PER_CM3}[unit]
    shown = {"Msun/pc3": "M☉/pc³", "GeV/cm3": "GeV/cm³"}[unit]
    value: float | None
    if "log10" in entry:
        centre, width = entry["log10"], entry["log10_error"]
        low, value, high = (10.0 ** (centre + k * width) for k in (-1, 0, 1))
        quoted = f"log₁₀ = {centre} ± {width}".replace("-", "−")
    elif "value" in entry:
        value = entry["value"]
        low, high = value - entry["error"], value + entry["error"]
        decimals = len(str(value).partition(".")[2])
        quoted = f"{value} ± {entry['error']:.{decimals}f} {shown}"
    else:
        value, low, high = None, entry["low"], entry["high"]
        quoted = f"{low} to {high} {shown}"
    if entry["how"] not in HOW_KNOWN:
        raise KeyError(f"how = {entry['how']!r}")
    return PublishedValue(
        quantity=entry["quantity"],
        label=entry["label"],
        where=entry["where"],
        low=low * scale,
        high=high * scale,
        value=None if value is None else value * scale,
        quoted=entry.get("quoted", quoted),
        reference=entry["reference"],
        how=entry["how"],
        note=entry.get("note", ""),
    )


@cache
def _load() -> tuple[PublishedValue, ...]:
    resource = files("galray.report") / "data" / "published.toml"
    try:
        return tuple(_parse(entry) for entry in tomllib.loads(resource.read_text("utf-8"))["values"])
    except (KeyError, ValueError) as error:
        raise GalrayError(f"{resource}: {error}", "reinstall galray; its data file is damaged") from error


def published(quantity: str = "rho_dm") -> list[PublishedValue]:
    """The published values of one quantity, in the order of the data file (by year).

    Arguments:
        quantity: ``rho_dm`` for dark matter, ``rho`` for all mass in the midplane.
    """
    return [value for value in _load() if value.quantity == quantity]
