"""How the report writes numbers, units, published values and the console table."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from galray.report import published, table
from galray.report.diagnostics import check_words
from galray.report.published import HOW_KNOWN
from galray.report.sections import Cell
from galray.report.text import (
    count,
    duration,
    humanise,
    measurement,
    method_order,
    number,
    pull_level,
    signed,
    unit_text,
)
from galray.units import GEV_PER_CM3
from tests.test_report_run import write_run


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.010312, 0.00141, ("0.0103", "0.0014")),
        (-6456.7, 84.2, ("−6457", "84")),
        (-6720.3, 318.0, ("−6720", "320")),
        (0.0, 0.5, ("0.00", "0.50")),
        (-0.0001, 0.05, ("0.000", "0.050")),
        (0.5, 0.0996, ("0.50", "0.10")),
        (123456.0, 1234.0, ("123\u202f500", "1200")),
        (1.5e-8, 2.4e-9, ("1.50×10⁻⁸", "0.24×10⁻⁸")),
        (3.2e9, 1.1e8, ("3.20×10⁹", "0.11×10⁹")),
        (0.0124, None, ("0.0124", "")),
        (0.0124, 0.0, ("0.0124", "")),
        (None, 0.1, ("–", "")),
        (math.nan, 0.1, ("–", "")),
    ],
)
def test_measurement_rounds_by_its_error(value, error, expected):
    assert measurement(value, error) == expected


def test_plain_numbers():
    assert number(0.97) == "0.97"
    assert number(-12.5) == "−12.5"
    assert number(5_812_345) == "5\u202f812\u202f345"
    assert number(2.5e-7) == "2.5×10⁻⁷"
    assert number(None) == "–"
    assert number(True) == "yes"
    assert count(401_939) == "401\u202f939"
    assert count(7904) == "7904"
    assert signed(0.04) == "+0.0"
    assert signed(-0.04) == "+0.0"
    assert signed(-2.26) == "−2.3"
    assert duration(611.3) == "10 min 11 s"
    assert duration(3.21) == "3.2 s"
    assert duration(7512) == "2 h 5 min"


def test_units_have_one_spelling():
    for spelling in ("Msun/pc3", "solMass / pc3", "Msun/pc^3", "M_sun / pc**3"):
        assert unit_text(spelling) == "M☉/pc³"
    for spelling in ("km2/s2/kpc", "km2 / (s2 kpc)", "(km/s)^2/kpc"):
        assert unit_text(spelling) == "km²/s²/kpc"
    assert unit_text("furlong") == "furlong"


def test_identifiers_become_words():
    assert humanise("north_south_chi2") == "north south χ²"
    assert humanise("a_phi_over_a_R") == "a_φ over a_R"
    assert humanise("radial_velocity") == "radial velocity"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("E[s_vy]", "the score along v_y averages to zero (Stein)"),
        ("E[v_x s_vx]", "v_x times its own score averages to −1 (Stein)"),
        ("E[v_x s_vz]", "v_x and the score along v_z are uncorrelated (Stein)"),
        ("E[h s_z + dh/dz]", "the score along z averages to zero, edge weighted (Stein)"),
        ("held-out NLL", "NLL on held-out stars"),
        ("my_own_check", "my own check"),
    ],
)
def test_checks_in_words(name, words):
    assert check_words(name) == words


def test_pulls_and_methods():
    assert [pull_level(p) for p in (0.0, -2.0, 2.5, -3.1, None)] == ["ok", "ok", "warn", "fail", "none"]
    assert method_order(["truth", "combined", "new", "moments", "flow"]) == [
        "flow",
        "moments",
        "combined",
        "new",
        "truth",
    ]
    cell = Cell.of({"value": 1.2, "error": 0.1, "truth": 1.0})
    assert cell.pull == pytest.approx(2.0)
    assert cell.offset == "+20.0 % of the truth"


def test_published_values_carry_their_source():
    values = published("rho_dm")
    assert len(values) >= 10
    for value in [*values, *published("rho")]:
        assert value.how in HOW_KNOWN
        assert value.reference.startswith("arXiv:")
        assert value.url.startswith("https://arxiv.org/abs/")
        assert value.low < value.high
        assert 0 < (value.value or value.low) < 0.2
        assert any(year in value.label for year in ("2015", "2019", "2021", "2023", "2024", "2025", "2026"))
    by_label = {v.label: v for v in values}
    lim = by_label["Lim et al. 2023, Solar radius"]
    assert lim.value * GEV_PER_CM3 == pytest.approx(0.47)
    assert (lim.high - lim.low) * GEV_PER_CM3 == pytest.approx(0.10)
    assert by_label["ClearPotential 2025"].how == "second-hand"
    wang = by_label["Wang et al. 2026, NFW"]
    assert wang.value * GEV_PER_CM3 == pytest.approx(10**-0.38)
    assert {v.label for v in published("rho")} == {"McKee et al. 2015", "Kalda & Green 2025"}


def _printed(summary: dict, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table(summary))
    return stream.getvalue()


def test_console_table(tmp_path):
    folder = write_run(tmp_path / "run", stars=0, maps=False)
    summary = json.loads((folder / "results" / "summary.json").read_text())
    text = _printed(summary, 120)
    for word in ("a_R", "a_z", "ρ_DM", "flow", "score", "moments", "combined", "truth", "pull", "GeV/cm³"):
        assert word in text
    for entry in summary["quantities"]:
        cell = Cell.of(entry)
        assert f"{cell.value_text} ± {cell.error_text}" in text
    assert max(map(len, _printed(summary, 80).splitlines())) <= 80


def test_console_table_without_truth_and_with_markup():
    entry = {
        "name": "a_z",
        "where": "[red]z=1",
        "method": "vertical",
        "value": -1.0,
        "error": 0.1,
        "unit": "km/s",
    }
    text = _printed({"quantities": [entry, {"name": "rho"}, "junk"], "headline": None}, 100)
    assert "[red]z=1" in text
    assert "pull" not in text
    assert "−1.00 ± 0.10" in text


def test_console_table_picks_heights_evenly():
    quantities = [
        {
            "name": "a_z", "where": f"z={z:+g}", "x": [-8.1, 0, z], "method": "moments", "value": -z,
            "error": 0.1, "unit": "km2/s2/kpc",
        }
        for z in (0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0)
    ]  # fmt: skip
    text = _printed({"quantities": quantities}, 100)
    assert [where in text for where in ("z=+0.5", "z=+2")] == [True, True]
    assert "z=−" not in text
    assert sum(line.count("moments") for line in text.splitlines()) == 3
