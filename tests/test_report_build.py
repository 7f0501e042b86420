"""The report page: complete, self-contained, escaped, true to the summary, whole or part of a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from galray.errors import GalrayError
from galray.report import build
from galray.units import GEV_PER_CM3
from tests.test_report_run import write_run

NASTY = "<script>alert('x')</script> & \"q\" $\\frac{"


def write_vertical_run(folder: Path) -> Path:
    """A run on real stars: one vertical inversion, no networks, no truth, comparisons and notes."""
    (folder / "results").mkdir(parents=True)
    heights = [0.05, 0.1, 0.2, 0.3]
    unit = "km2 / (s2 kpc)"
    quantities = [
        {
            "name": "a_z", "label": "a_z", "where": f"z=+{z:g} kpc", "x": [-8.122, 0.0, z],
            "method": "vertical",
            "value": -4300.0 * z, "error": 90.0 + 300 * z, "truth": None, "pull": None, "unit": unit,
        }
        for z in heights
    ]  # fmt: skip
    density = {
        "name": "rho", "label": "total midplane density", "where": "midplane at the Sun", "x": [-8.122, 0, 0],
        "method": "vertical", "value": 0.0871, "error": 0.0123, "truth": None, "pull": None,
        "unit": "solMass / pc3",
    }  # fmt: skip
    summary = {
        "run": {"name": "gaia_dr2_local", "created": "2026-07-03T08:00:00+00:00", "seconds": 42.5, "seed": 1},
        "headline": {
            **density, "unit": "Msun/pc3", "value_gev": 0.0871 * GEV_PER_CM3,
            "error_gev": 0.0123 * GEV_PER_CM3,
            "kernel_kpc": None,
            "terms": [
                {"term": "statistics", "error": 0.006, "count": 40},
                {"term": "selection", "error": 0.0107, "count": 6},
            ],
        },
        "quantities": [*quantities, density],
        "comparisons": [
            {
                "label": "K_z at 1.1 kpc", "value": 67.0, "error": 6.0, "unit": "Msun/pc2",
                "source": "Bovy & Rix 2013, arXiv:1309.0809",
            },
            {
                "label": "Oort limit <i>", "value": 0.1, "error": 0.01, "unit": "Msun/pc3", "quantity": "rho",
                "source": "javascript:alert(1)",
            },
            {
                "label": "McKee et al. 2015", "value": 0.097, "error": 0.013, "unit": "Msun/pc3",
                "source": "arXiv:1509.05334",
            },
        ],
        "estimators": [
            {
                "name": name, "rho0": 0.0871 + shift, "error": 0.008, "mean_100pc": 0.08,
                "mean_100pc_error": 0.004, "chi2": 31.2, "dof": 28,
                **({"check": True} if shift < -0.02 else {}),
            }
            for name, shift in (("moments", 0.0), ("moments, north", 0.006), ("area ignored <u>", -0.03))
        ],
        "halo": [
            {
                "method": "combined", "profile": "gnfw", "chi2": 21.4, "dof": 24.6, "positions": 27,
                "parameters": [
                    {
                        "parameter": "density", "symbol": "ρ(R₀)", "value": 0.0102, "error": 0.0021,
                        "unit": "solMass / pc3", "prior": None, "prior_error": None, "learned": 1.0,
                        "truth": 0.0105,
                    },
                    {
                        "parameter": "slope", "symbol": "γ", "value": 1.1, "error": 0.45, "unit": "",
                        "prior": 1.0, "prior_error": 0.5, "learned": 0.19, "truth": None,
                    },
                ],
            },
            {"method": "score", "profile": "<nfw>", "chi2": None, "dof": None, "parameters": "broken"},
        ],
        "groups": [{"name": "0.5 < G_BP − G_RP < 0.7", "rho0": 0.09, "error": 0.02, "stars": 41_203}],
        "notes": ["The value lies low because of the selection.", NASTY],
        "catalog": {"rows_in": 268_545, "kept": 237_536, "fate": {"kept": 237_536, "cut:no_rv": 31_009}},
        "warnings": [],
    }  # fmt: skip
    (folder / "results" / "summary.json").write_text(json.dumps(summary))
    z = np.linspace(-0.3, 0.3, 13)
    pl.DataFrame(
        {
            "profile": "vertical", "coordinate": z, "quantity": "K_z", "method": "vertical",
            "value": 120.0 * np.abs(z), "error": 2.0 + 8 * np.abs(z),
            "truth": pl.Series([None] * 13, dtype=pl.Float64),
        }
    ).write_parquet(folder / "results" / "profiles.parquet")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def mock_run(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("report") / "demo", stars=4000)
    build(folder)
    return folder


class _Page(HTMLParser):
    """Collects what a browser would load, the links, the data values, and whether tags close."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.values: dict[str, str] = {}
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        for name in ("src", "srcset", "poster", "data", "background"):
            if name in given:
                self.loads.append(given[name])
        if tag == "a":
            self.links.append(given["href"])
        elif "href" in given or "xlink:href" in given:
            self.loads.append(given.get("href") or given["xlink:href"])
        assert not any(name.startswith("on") for name in given), f"an event handler on {tag}"
        self._datum = given.get("value") if tag == "data" else None

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if getattr(self, "_datum", None) is not None:
            self.values[self._datum] = data
            self._datum = None


def parse(folder: Path) -> _Page:
    page = _Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_page_is_complete_and_figures_are_saved(mock_run):
    page = parse(mock_run)
    sections = {
        "result", "budget", "inversions", "halo", "profiles", "maps", "stars", "training", "equilibrium",
        "checks", "catalogue", "members", "provenance",
    }  # fmt: skip
    assert sections <= set(page.ids)
    saved = {p.stem for p in (mock_run / "figures").glob("*.svg")}
    assert {
        "result", "budget", "budget-flow", "profile-vertical-a-z", "profile-radial-a-R",
        "profile-vertical-rho-dm", "profile-radial-dm-rho-dm",
        "map-x-z-rho", "sky", "stars-x-z", "stars-x-y", "velocities", "plane-z-vz", "training-flow",
        "training-score", "rows",
    } <= saved  # fmt: skip
    assert page.tags.count("svg") == len(saved)
    text = (mock_run / "report.html").read_text()
    assert "Not in this run" not in text
    assert "is absent" not in text
    assert "steady state" in text


def test_a_model_that_fails_its_checks_is_flagged_in_plain_words(mock_run):
    words = " ".join(" ".join(parse(mock_run).text).split())
    flag = (
        "the model of the stars fails 1 of 3 checks that need no truth (how far the score is from a gradient"
    )
    assert flag in words
    assert "instead of 0 ± 0.075" in words
    assert "Do not trust the gravity from it" in words
    assert "a correct model fails any of them once in a hundred runs" in words

    from galray.report import diagnostics
    from galray.report.run import RunFolder

    run = RunFolder(mock_run, {"checks": {"score": {"E[s_vx]": {"value": 0.0, "error": 0.1, "ok": True}}}})
    assert diagnostics.check_warnings(diagnostics.checks(run)) == []
    row = {"value": 0.4, "error": 0.01, "expected": 0.0, "allowed": 0.33, "ok": False}
    pair = RunFolder(mock_run, {"checks": {"flow and score": {"difference of the scores": row}}})
    (sentence,) = diagnostics.check_warnings(diagnostics.checks(pair))
    assert sentence == (
        "flow and score: median relative difference of the two scores on stars neither has seen: "
        "0.400 ± 0.010 instead of 0 ± 0.33. At least one of the two models is wrong."
    )


def test_nothing_is_loaded_from_outside(mock_run):
    page = parse(mock_run)
    for source in page.loads:
        assert source.startswith(("data:", "#")), source
    assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags)
    text = (mock_run / "report.html").read_text()
    sheet = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in sheet
    assert "url(" not in sheet
    assert {link for link in page.links if not link.startswith("#")} == {
        link for link in page.links if link.startswith("https://arxiv.org/abs/")
    }
    for svg in (mock_run / "figures").glob("*.svg"):
        links = re.findall(r'(?:href|src)="([^"]{0,40})', svg.read_text())
        assert all(link.startswith(("#", "data:image/png")) for link in links), svg


def test_figures_of_one_page_do_not_share_identifiers(mock_run):
    page = parse(mock_run)
    assert len(page.ids) == len(set(page.ids))
    used = {source[1:] for source in page.loads if source.startswith("#")}
    text = (mock_run / "report.html").read_text()
    used |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert used
    assert used <= set(page.ids)


def test_palette_becomes_css_variables(mock_run):
    from galray.report.style import DARK, LIGHT

    text = (mock_run / "report.html").read_text()
    body = text[text.index("</style>") :]
    assert set(LIGHT) == set(DARK)
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert "var(--flow)" in body
    for value in LIGHT.values():
        assert value not in body
    assert "prefers-color-scheme: dark" in text
    assert LIGHT["flow"] in (mock_run / "figures" / "profile-vertical-a-z.svg").read_text()


def test_numbers_are_those_of_the_summary(mock_run):
    summary = json.loads((mock_run / "results" / "summary.json").read_text())
    page = parse(mock_run)

    def shown(value: float, error: float | None = None) -> None:
        assert str(value) in page.values, value
        text = page.values[str(value)].replace("−", "-").replace("\u202f", "").lstrip("+")
        assert abs(float(text) - value) <= 0.5 * 10.0 ** -len(text.partition(".")[2]) * 1.001 or (
            error is not None and abs(float(text) - value) <= 0.06 * error
        )

    top = summary["headline"]
    for key in ("value", "error", "value_gev", "error_gev", "truth", "pull"):
        shown(top[key], top["error"] if key == "value" else abs(top[key]))
    for term in top["terms"]:
        shown(term["error"], term["error"])
    for entry in summary["quantities"]:
        shown(entry["value"], entry["error"])
        shown(entry["error"], entry["error"])
        shown(entry["truth"], entry["error"])
        shown(entry["pull"])
    for entry in summary["budget"]:
        shown(entry["value"], entry["value"])
    for rows in (summary["catalog"]["rows_in"], summary["catalog"]["kept"]):
        shown(rows)


def test_mock_is_not_compared_with_the_real_galaxy(mock_run):
    text = (mock_run / "report.html").read_text()
    assert "this run − source" not in text
    assert "mock galaxy with a density of its own" in text


def test_real_run_with_a_vertical_inversion(tmp_path):
    folder = write_vertical_run(tmp_path / "real")
    build(folder)
    page = parse(folder)
    words = " ".join(page.text)
    assert "real stars" in words
    assert "this run − source" in words
    assert "Oort limit <i>" in words  # as text, not as a tag
    assert "0.0871" in page.values
    assert "https://arxiv.org/abs/1309.0809" in page.links
    assert not any("javascript" in link for link in page.links)
    # The published values beside a total density are total densities.
    assert "Kalda & Green 2025" in words
    assert "Karukes" not in words
    assert words.count("arXiv:1509.05334") == 1  # once, though the summary compares with it too
    assert "area ignored <u>" in words
    assert str(0.0871 + 0.006) in page.values
    assert (folder / "figures" / "variants.svg").is_file()
    # (0.0871 - 0.1) / hypot(0.0123, 0.01)
    assert "−0.8 σ" in words
    for missing in (
        "No maps",
        "No pictures of the stars",
        "No training curves",
        "no error budget",
        "No ensemble members",
    ):
        assert missing in words or missing == "no error budget"
    assert (folder / "figures" / "profile-vertical-K-z.svg").is_file()
    assert "The value lies low because of the selection." in words


def test_halo_fits_show_priors_and_what_was_learned(tmp_path):
    page = build(write_vertical_run(tmp_path / "real")).read_text()
    part = page[page.index('<section id="halo">') :]
    part = part[: part.index("</section>")]
    assert "0.0102 ± 0.0021" in part
    assert "no prior" in part
    assert "prior 1.00 ± 0.50" in part
    assert "19 % learned" in part
    assert "truth 0.0105" in part
    assert "&lt;nfw&gt;" in part, "a broken fit stands as its name alone, escaped"
    assert 'href="#halo"' in page


def test_everything_from_files_is_escaped(tmp_path):
    folder = write_run(tmp_path / "run", stars=300, maps=False)
    path = folder / "results" / "summary.json"
    summary = json.loads(path.read_text())
    summary["run"].update(name=NASTY, created=NASTY, git=NASTY)
    summary["headline"].update(label=NASTY, where=NASTY)
    summary["headline"]["terms"][0]["term"] = NASTY
    summary["warnings"] = [NASTY]
    summary["notes"] = [NASTY]
    summary["equilibrium"] = {"verdict": NASTY, "level": NASTY, "numbers": {NASTY: NASTY}}
    summary["checks"] = {NASTY: {NASTY: {"value": 1.0, "expected": NASTY, "ok": False}}}
    summary["catalog"]["fate"][f"cut:{NASTY}"] = 3
    summary["catalog"]["rows_in"] += 3
    for entry in summary["quantities"]:
        if entry["method"] == "flow":
            entry["method"] = NASTY
        if entry["name"] == "a_z":
            entry.update(name=NASTY, where=NASTY, unit=NASTY)
    for entry in summary["budget"]:
        entry["quantity"] = NASTY
        entry["unit"] = NASTY
    for entry in summary["members"]:
        entry["status"] = NASTY
    path.write_text(json.dumps(summary))
    (folder / "members" / "000" / "spec.json").write_text(json.dumps({"family": NASTY}))
    (folder / "provenance.json").write_text(json.dumps({NASTY: {"a": NASTY}}))
    (folder / "config.toml").write_text(f"# {NASTY}\n")
    profiles = pl.read_parquet(folder / "results" / "profiles.parquet").filter(pl.col("profile") == "radial")
    profiles = profiles.with_columns(profile=pl.lit(NASTY), method=pl.lit(NASTY), quantity=pl.lit(NASTY))
    profiles.write_parquet(folder / "results" / "profiles.parquet")
    build(folder)
    page = parse(folder)
    assert not {"script", "frac"} & set(page.tags)
    assert "<script>" not in (folder / "report.html").read_text()
    assert NASTY in "".join(page.text)
    for svg in (folder / "figures").glob("*.svg"):
        assert "<script" not in svg.read_text()


@pytest.mark.parametrize(
    "absent",
    [
        ["headline"], ["quantities", "budget"], ["catalog", "equilibrium", "checks"], ["members"],
        ["run", "warnings"],
        ["run", "headline", "quantities", "budget", "catalog", "equilibrium", "checks", "members"],
    ],
    ids=lambda keys: "+".join(keys[:2]),
)  # fmt: skip
def test_missing_parts_of_the_summary(tmp_path, absent):
    folder = write_run(tmp_path / "run", stars=0, maps=False, families=())
    (folder / "results" / "profiles.parquet").unlink()
    (folder / "provenance.json").unlink()
    (folder / "config.toml").unlink()
    path = folder / "results" / "summary.json"
    summary = json.loads(path.read_text())
    for key in absent:
        del summary[key]
    path.write_text(json.dumps(summary))
    build(folder)
    words = " ".join(parse(folder).text)
    for sentence in (
        "No profiles",
        "No maps",
        "No pictures of the stars",
        "No training curves",
        "config.toml is absent",
    ):
        assert sentence in words
    if "headline" in absent:
        assert "no headline value" in words


def test_nulls_and_nans_are_dashes(tmp_path):
    folder = write_run(tmp_path / "run", stars=300, families=("score",))
    path = folder / "results" / "summary.json"
    summary = json.loads(path.read_text())
    for i, entry in enumerate(summary["quantities"]):
        entry.update({"value": None} if i % 3 == 0 else {"error": None, "pull": float("nan")})
    summary["headline"].update(error=None, error_gev=None, pull=None, kernel_kpc=None, terms=None)
    for entry in summary["budget"]:
        entry.update(value=None, count=None)
    path.write_text(json.dumps(summary))
    for name in ("profiles", "maps"):
        table = folder / "results" / f"{name}.parquet"
        frame = pl.read_parquet(table)
        edge = pl.int_range(pl.len()) % 4 == 0
        frame = frame.with_columns(
            value=pl.when(edge).then(None).otherwise(pl.col("value")), error=pl.lit(float("nan"))
        )
        frame.write_parquet(table)
    build(folder)
    page = parse(folder)
    assert "nan" not in " ".join(page.text).lower().replace("provenance", "").split()
    assert "None" not in " ".join(page.text)


def test_profiles_in_either_density_unit_look_the_same(tmp_path):
    from galray.report import profiles, style

    folder = write_run(tmp_path / "run", stars=0, maps=False, families=())
    frame = pl.read_parquet(folder / "results" / "profiles.parquet")
    small = frame.with_columns(pl.col("value", "error", "truth") * 1e-9)
    told = frame.with_columns(unit=pl.lit("Msun/kpc3"))
    with style.theme():
        drawn = [style.standalone_svg(profiles.profile(f, "radial", "rho")) for f in (frame, small, told)]
    numbers = [[round(float(n), 2) for n in re.findall(r"\d+\.\d+", svg)] for svg in drawn]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02)
    assert drawn[0] == drawn[2]


def test_row_account_that_does_not_add_up_is_told(tmp_path):
    folder = write_run(tmp_path / "run", stars=0, maps=False, families=())
    (folder / "results" / "profiles.parquet").unlink()
    path = folder / "results" / "summary.json"
    summary = json.loads(path.read_text())
    summary["catalog"]["rows_in"] += 17
    path.write_text(json.dumps(summary))
    build(folder)
    assert "does not add up: 17 rows" in (folder / "report.html").read_text()


def test_rebuild_is_identical(tmp_path):
    folder = write_run(tmp_path / "run", stars=500, maps=False, families=())
    (folder / "results" / "profiles.parquet").unlink()
    first = build(folder).read_bytes()
    assert build(folder).read_bytes() == first
    assert not list(folder.rglob("*.part"))


def test_unfinished_run_is_refused(tmp_path):
    with pytest.raises(GalrayError, match=r"summary\.json"):
        build(tmp_path)
    assert not (tmp_path / "figures").exists()
