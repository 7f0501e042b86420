"""Calibration: statistics on exact claims, mocks and their cache, what a run does with the result."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from galray.calibration import LEVELS, CalibrationSettings, Claims, PriorSettings, coverage, fit_inflation
from galray.calibration.inflation import inflate, read_calibration
from galray.calibration.mocks import cache_place, check, differences, draw, galaxy_config, mock_config
from galray.calibration.run import FEWEST, Calibration, calibrate, judge
from galray.calibration.tables import write_tables
from galray.catalog.mirror import SCRATCH, Mirror, Place
from galray.config import load_config, overrides_of
from galray.ensemble import Estimate, Term, student_factor, welch_satterthwaite
from galray.errors import GalrayError
from galray.pipeline import Pipeline
from galray.results import HEADLINE
from galray.tables import read_table
from tests.chain_config import FOUR_MOCKS, write_config
from tests.waiting import wait_for

ALONE = ['methods=["moments"]', "cluster.enabled=false", "tracking.enabled=false"]


def config_of(folder, *overrides, name="tiny"):
    folder.mkdir(exist_ok=True)
    path = write_config(folder, name=name, num_stars=4000, extra=FOUR_MOCKS)
    return load_config(path, [*ALONE, *overrides])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for all tests of this file, as calibrations share one."""
    return tmp_path_factory.mktemp("cache")


def claims_of(number, *, dof=np.inf, wrong=1.0, shift=0.0, seed=0):
    """Claims whose errors are `wrong` times too small, and whose values are `shift` errors too large."""
    rng = np.random.default_rng(seed)
    freedom = np.full(number, float(dof))
    noise = rng.standard_normal(number) if np.isinf(dof) else rng.standard_t(dof, number)
    scale = rng.uniform(1.0, 3.0, number)
    truth = rng.uniform(-5, 5, number)
    error = scale * student_factor(freedom)
    return Claims(truth + wrong * scale * noise + shift * error, error, truth, freedom, np.arange(number))


# Statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dof", [np.inf, 5.0, 1.0])
def test_right_claims_hold_what_they_claim(dof):
    claims = claims_of(4000, dof=dof)
    found = coverage(claims)
    for level, part, error in zip(LEVELS, found.fractions, found.errors, strict=True):
        assert abs(part - level) < 4 * error
    assert stats.kstest(claims.pit, "uniform").pvalue > 1e-3
    assert found.width == pytest.approx(1.0, abs=5 * found.width_error)
    assert abs(found.mean_pull) < 4 / math.sqrt(4000)
    # the band of 68 % is the value and its error, whatever stands behind it
    inside = np.abs(claims.value - claims.truth) <= claims.error
    np.testing.assert_array_equal(inside, claims.factors(2 * stats.norm.cdf(1) - 1) <= 1 + 1e-9)


def test_the_binomial_error_is_that_of_repeated_calibrations():
    parts = [coverage(claims_of(50, seed=seed)).fractions for seed in range(400)]
    expected = coverage(claims_of(50)).errors
    np.testing.assert_allclose(np.std(parts, axis=0), expected, rtol=0.15)


def test_bias_and_its_sign():
    found = coverage(claims_of(2000, shift=0.5))
    assert found.bias > 10 * found.bias_error
    assert found.mean_pull == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("dof", [np.inf, 3.0])
def test_the_inflation_of_errors_that_are_too_small(dof):
    claims = claims_of(3000, dof=dof, wrong=1.6)
    factor, error = fit_inflation(claims)
    assert abs(factor - 1.6) < 4 * error
    assert error < 0.06
    mended = coverage(claims_of(3000, dof=dof, wrong=1.6, seed=1).inflated(factor))
    assert mended.width == pytest.approx(1.0, abs=0.08)
    assert mended.fractions[1] == pytest.approx(0.68, abs=0.04)


def test_one_wild_measurement_does_not_rule_the_inflation():
    claims = claims_of(200)
    value = claims.value.copy()
    value[0] += 1e4
    wild = Claims(value, claims.error, claims.truth, claims.dof, claims.mock)
    assert fit_inflation(wild)[0] == pytest.approx(fit_inflation(claims)[0], rel=0.05)


def test_places_of_one_galaxy_are_not_independent():
    one = claims_of(60)
    names = ("value", "error", "truth", "dof", "mock")
    copies = Claims(*(np.tile(getattr(one, name), 5) for name in names))
    assert fit_inflation(copies)[1] == pytest.approx(fit_inflation(one)[1], rel=0.25)


# Judgements ---------------------------------------------------------------------------------------------


def records_of(number, wrong=2.0, where=("Sun", "z=+1 kpc")):
    """Records as of measured mocks: errors of ρ_DM and a_R `wrong` times too small, a_φ exact."""
    rng = np.random.default_rng(3)

    def row(name, place, truth, error, size):
        value = truth + size * error * rng.standard_normal()
        return {
            "name": name, "label": name, "where": place, "unit": "km2 / (s2 kpc)", "value": value,
            "error": error, "truth": truth, "dof": None, "terms": {}, "dofs": {},
        }  # fmt: skip

    records = {}
    for index in range(number):
        rows = [row("a_R", place, -6000.0, 50.0, wrong) for place in where]
        rows += [row("a_phi", "Sun", 0.0, 80.0, 0.0), row(HEADLINE, "here", 0.01, 0.002, wrong)]
        both = [one | {"method": method} for one in rows for method in ("moments", "combined")]
        records[index] = {"quantities": both, "stars": 5000 + index, "cpu_seconds": [1.0, 2.0]}
    return records


def test_judgements():
    found = judge(records_of(200))
    assert {(j.method, j.name, j.where) for j in found} == {
        ("moments", "a_R", "Sun"), ("moments", "a_R", "z=+1 kpc"), ("moments", HEADLINE, "here"),
    }  # fmt: skip
    for j in found:
        assert j.raw.number == 200
        assert j.raw.width == pytest.approx(2.0, rel=0.2)
        assert j.inflation == pytest.approx(2.0, abs=5 * j.inflation_error)
        assert j.tested is not None
        assert j.tested.number == 100
        assert j.tested.width == pytest.approx(1.0, abs=0.3)
    assert found[0].inflation == found[1].inflation  # one factor for the places of a quantity


@pytest.mark.parametrize("dof", [1.0, 8.0, None])
def test_terms_that_the_mocks_do_not_exercise_are_not_judged(dof):
    """Right errors of few degrees of freedom, and a term as large that no mock has anything of."""
    rng, free = np.random.default_rng(5), np.inf if dof is None else dof
    records = {}
    for index in range(4000):
        scale = 1.0 if dof is None else math.sqrt(rng.chisquare(dof) / dof)
        variances, names, dofs = np.array([scale**2, 1.0]), ["statistics", "disequilibrium"], [free, np.inf]
        total = welch_satterthwaite([np.array(v) for v in variances], [np.array(d) for d in dofs])
        factor = float(student_factor(total))
        row = {
            "name": "a_R", "label": "a_R", "where": "Sun", "unit": "km2 / (s2 kpc)", "method": "moments",
            "value": rng.standard_normal(), "truth": 0.0, "error": factor * math.sqrt(variances.sum()),
            "dof": float(total) if np.isfinite(total) else None,
            "terms": {n: factor * math.sqrt(v) for n, v in zip(names, variances, strict=True)},
            "dofs": {n: d if np.isfinite(d) else None for n, d in zip(names, dofs, strict=True)},
        }  # fmt: skip
        records[index] = {"quantities": [row], "stars": 1, "cpu_seconds": [1.0, 1.0]}
    (with_it,), (without,) = judge(records), judge(records, ["disequilibrium", "systematics"])
    assert with_it.raw.width < 0.85
    assert without.raw.fractions == pytest.approx(LEVELS, abs=0.03)
    assert without.raw.width == pytest.approx(1.0, abs=0.05)


def test_inflation_is_never_below_one_and_needs_mocks():
    for j in judge(records_of(100, wrong=0.5)):
        assert j.inflation == 1.0
        assert j.fitted < 0.8
    for j in judge(records_of(FEWEST - 1)):
        assert math.isnan(j.inflation)
        assert j.tested is None


# Mock galaxies ------------------------------------------------------------------------------------------


def test_galaxies_are_drawn_from_the_prior_and_shared(tmp_path):
    config = config_of(tmp_path)
    runs = [mock_config(config, index) for index in range(3)]
    assert len({run.name for run in runs}) == 3
    prior = config.calibration.prior
    for run in runs:
        numbers = draw(prior, run.seed)
        for name, (low, high) in prior:
            assert low <= numbers[name] <= high
        galaxy = run.mock.galaxy
        assert galaxy.potential.halo_flattening == numbers["halo_flattening"]
        assert galaxy.thin_disc.fraction == numbers["thin_disc_fraction"]
        assert galaxy.ball_radius_kpc > config.catalog.ball.radius_kpc
        assert run.gravity.moments == config.gravity.moments
    other = [config_of(tmp_path, "gravity.kernel.widths_kpc=[0.4,0.4,0.2]"), config_of(tmp_path, "seed=4")]
    same, new = (mock_config(one, 0) for one in other)
    assert same.name != runs[0].name
    assert galaxy_config(same).name == galaxy_config(runs[0]).name
    assert galaxy_config(new).name != galaxy_config(runs[0]).name
    assert mock_config(config, 1).name == runs[1].name


def test_baryons_are_known_no_better_than_the_run_says(tmp_path):
    config = config_of(tmp_path, "gravity.baryons.relative_error=0.1")
    factors = []
    for index in range(200):
        run = mock_config(config, index)
        assumed = run.gravity.baryons.potential["components"]["stellar_disc"]["m_tot"]
        factors.append(math.log(run.mock.galaxy.potential.stellar_disc_mass / assumed))
    assert np.std(factors) == pytest.approx(0.1, rel=0.2)
    assert mock_config(config_of(tmp_path), 0).gravity.baryons.potential is None


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({"halo_flattening": [0.5, 1.0]}, "halo_flattening: 0.5 to 1 reaches beyond 0.8 to 1.25"),
        ({"halo_density_msun_pc3": [0.02, 0.01]}, "lower end"),
        ({"thin_disc_fraction": [0.5, 0.95]}, "leaves nothing"),
        ({"halo_densty": [0.01, 0.02]}, "unknown key, did you mean 'halo_density_msun_pc3'"),
    ],
)
def test_priors_beyond_what_mocks_can_be(tmp_path, prior, message):
    key, value = next(iter(prior.items()))
    with pytest.raises(GalrayError, match=message):
        config_of(tmp_path, f"calibration.prior.{key}={value}")


def test_what_cannot_be_calibrated(tmp_path, s3_storage):
    reached = overrides_of({"catalog.storage": s3_storage.model_dump(exclude_defaults=True)})
    for key in ("output", "calibration.cache"):
        with pytest.raises(GalrayError, match=r"s3://nowhere/x.*: The specified bucket does not exist"):
            calibrate(config_of(tmp_path, *reached, f"{key}=s3://nowhere/x"))
    with pytest.raises(GalrayError, match="balls up to"):
        check(config_of(tmp_path, "catalog.ball.radius_kpc=5.9"))
    with pytest.raises(GalrayError, match=r"calibration\.mocks"):
        config_of(tmp_path, "calibration.mocks=3")
    assert CalibrationSettings().prior == PriorSettings()


def test_differences_name_the_keys():
    first = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert differences(first, first) == []
    assert differences(first, {"a": {"b": 2, "c": [1, 2]}, "e": 1}) == ["a.b", "d", "e"]


def test_a_calibration_end_to_end_and_what_the_next_one_reuses(tmp_path, cache):
    config = config_of(tmp_path, f"calibration.cache={cache}")
    found = calibrate(config)
    assert found.new == 4
    assert not found.failed
    assert sorted(p.name for p in found.folder.iterdir()) == [
        "calibration.ecsv", "config.toml", "figures", "mocks.ecsv", "report.html",
    ]  # fmt: skip
    judged = read_table(found.table)
    assert set(judged["quantity"]) >= {HEADLINE, "a_R", "a_z"}
    assert (judged["mocks"] == 4).all()
    mocks = read_table(found.folder / "mocks.ecsv")
    assert len(mocks) == 4 * len(judged)
    headline = mocks[mocks["quantity"] == HEADLINE]
    # truth is that of each galaxy's own halo, about as dense here as at the Sun
    np.testing.assert_allclose(headline["truth"], headline["halo_density_msun_pc3"], rtol=0.15)
    assert np.isfinite(mocks["error"]).all()

    with pytest.raises(GalrayError, match="0 of 4 mocks were measured"):
        calibrate(config_of(tmp_path, f"calibration.cache={cache / 'empty'}", name="empty"), known=True)
    again = calibrate(config)
    assert again.new == 0
    assert again.judgements[0].raw == found.judgements[0].raw

    galaxies = sorted((cache / "galaxies").iterdir())
    before = [p.stat().st_mtime_ns for g in galaxies for p in (g / "mock").iterdir()]
    assert len(galaxies) == 4
    changes = [f"calibration.cache={cache}", "gravity.moments.penalty=0.01", "ensemble.moments.draws=0"]
    other = calibrate(config_of(tmp_path, *changes, name="other"))
    assert other.new == 4
    assert sorted((cache / "galaxies").iterdir()) == galaxies
    assert [p.stat().st_mtime_ns for g in galaxies for p in (g / "mock").iterdir()] == before
    with pytest.raises(GalrayError, match="4 mocks are too few"):
        read_calibration(config_of(tmp_path, f"calibration.apply={found.table}"))


def test_a_calibration_at_a_url_goes_on_on_another_node(tmp_path, s3_storage, monkeypatch, cache):
    reached = overrides_of({"catalog.storage": s3_storage.model_dump(exclude_defaults=True)})
    config = config_of(tmp_path, "output=s3://galray/calibrated", *reached)
    simulated, measured = [], []
    simulate, measure = Pipeline._make_mock, Pipeline._make_measure

    def count(self, advance):
        simulated.append(self.config.name)
        return simulate(self, advance)

    def until_killed(self, store):
        if len(measured) == kill_after:
            raise KeyboardInterrupt
        measured.append(self.config.name)
        return measure(self, store)

    monkeypatch.setattr(Pipeline, "_make_mock", count)
    monkeypatch.setattr(Pipeline, "_make_measure", until_killed)
    kill_after = 2
    with pytest.raises(KeyboardInterrupt):
        calibrate(config)
    kill_after = -1
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    found = calibrate(config)
    assert found.new == 2
    assert len(simulated) == len(set(simulated)) == 4, "a galaxy is simulated once"
    assert measured == [mock_config(config, index).name for index in range(4)]

    # What lies at the URL, and what is left on the node.
    kept = Mirror("s3://galray/calibrated", s3_storage).sizes()
    galaxies = {f"calibration-cache/galaxies/{name}" for name in simulated}
    records = {f"calibration-cache/measurements/{name}.json" for name in measured}
    page = {f"tiny-calibration/{name}" for name in ("calibration.ecsv", "config.toml", "report.html")}
    assert kept.keys() > records | page | {f"{galaxy}/truth.json" for galaxy in galaxies}
    assert {name for name in kept if name.startswith("calibration-cache/measurements/")} == records
    assert not list((tmp_path / "node2").rglob("*.csv.gz"))

    # The same as in a folder; and a third node reads the table.
    alone = calibrate(config_of(tmp_path / "alone", f"calibration.cache={cache}"))
    for one, other in zip(alone.judgements, found.judgements, strict=True):
        np.testing.assert_array_equal(one.claims.value, other.claims.value)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node3"))
    apply = f"calibration.apply={found.place.location}/calibration.ecsv"
    with pytest.raises(GalrayError, match=r"apply: s3://galray/calibrated/tiny-calib.*: 4 mocks are too few"):
        read_calibration(config_of(tmp_path, *reached, apply))
    for url, message in (
        ("s3://galray/calibrated/no.ecsv", r"no\.ecsv: no such object"),
        ("s3://galray", "s3://galray: not the URL of a file"),
        ("s3://galray/calibrated/", "calibrated/: not the URL of a file"),
    ):
        with pytest.raises(GalrayError, match=message):
            read_calibration(config_of(tmp_path, *reached, f"calibration.apply={url}"))


def test_a_mock_that_fails_is_counted(tmp_path, monkeypatch, cache):
    from galray.calibration import run as module

    whole = module.measure_mock

    def spoilt(values):
        return {"error": "no luck", "traceback": "..."} if values["name"] == bad else whole(values)

    config = config_of(tmp_path, "calibration.mocks=5", f"calibration.cache={cache}", "places.heights=[0.9]")
    bad = mock_config(config, 2).name
    monkeypatch.setattr(module, "measure_mock", spoilt)
    found = calibrate(config)
    assert found.failed == {2: "no luck"}
    assert sorted(found.records) == [0, 1, 3, 4]
    assert (found.folder / "failed-0002.txt").read_text() == "..."
    assert "mock 2: no luck" in found.page.read_text()


def test_tasks_of_ray_measure_the_same(tmp_path, ray_session, cache):
    alone = calibrate(config_of(tmp_path / "alone", f"calibration.cache={cache}"))
    shared = calibrate(config_of(tmp_path / "ray", "cluster.enabled=true"))
    assert shared.new == 4
    for one, other in zip(alone.judgements, shared.judgements, strict=True):
        np.testing.assert_allclose(one.claims.value, other.claims.value, rtol=1e-9)
        np.testing.assert_allclose(one.claims.error, other.claims.error, rtol=1e-9)


@pytest.mark.cluster
@pytest.mark.parametrize("at", ["folder", "s3"])
def test_a_killed_calibration_goes_on(tmp_path, s3_storage, at):
    reached = overrides_of({"catalog.storage": s3_storage.model_dump(exclude_defaults=True)})
    where = [] if at == "folder" else ["output=s3://galray/killed", *reached]
    config = config_of(tmp_path, *where)
    command = [sys.executable, "-m", "galray.cli", "calibrate", str(tmp_path / "tiny.toml"), "--quiet"]
    for text in ('methods=["moments"]', "cluster.num_cpus=1", "tracking.enabled=false", *where):
        command += ["--set", text]
    place = cache_place(config).below("measurements")

    def records():
        """Each finished measurement, which tells when it was made."""
        names = [name for name in place.sizes() if "/" not in name and name.endswith(".json")]
        return {name: place.read(name) for name in names}

    process = subprocess.Popen(command)
    wait_for(records, "the first measurement", process, every=0.1)
    process.kill()
    process.wait()
    done = records()
    assert 1 <= len(done) < 4
    subprocess.run(command, check=True)
    assert len(records()) == 4
    assert records().items() >= done.items()
    assert calibrate(config).new == 0


# What a run does with it -------------------------------------------------------------------------------


@pytest.fixture
def calibrated(tmp_path):
    """The table of a calibration that found errors to be half of what they should be."""
    config = config_of(tmp_path)
    folder = tmp_path / "tiny-calibration"
    records = records_of(200)
    write_tables(Calibration(config, Place(folder), records, {}, judge(records)))
    return folder / "calibration.ecsv"


def test_a_run_applies_it_and_says_so(tmp_path, calibrated):
    plain = Pipeline(config_of(tmp_path)).run()
    before = plain.summary
    ingested = (plain.folder / "shards" / "manifest.json").stat().st_mtime_ns
    assert before["calibration"] == {}
    run = Pipeline(config_of(tmp_path, f"calibration.apply={calibrated}")).run()
    after = run.summary
    record = after["calibration"]
    assert record["file"] == str(calibrated)
    assert record["mocks"] == 200
    factors = {row["quantity"]: row["factor"] for row in record["factors"] if row["method"] == "moments"}
    assert factors.keys() == {"a_R", HEADLINE}
    assert min(factors.values()) > 1.5
    for old, new in zip(before["quantities"], after["quantities"], strict=True):
        assert new["value"] == old["value"]
        if old["error"] is not None:
            # so few stars that nothing is said of disturbances: every term is calibrated
            assert new["error"] == pytest.approx(old["error"] * factors.get(old["name"], 1.0), rel=1e-9)
    terms = {term["term"]: term for term in after["headline"]["terms"]}
    assert terms.keys() >= {"statistics", "measurement", "penalty"}
    assert terms["penalty"]["error"] > 0
    assert record["outside"] == ["disequilibrium", "non_axisymmetric", "systematics", "baryons"]
    assert "left as they are: disequilibrium" in record["sentence"]
    squares = sum(term["error"] ** 2 for term in after["headline"]["terms"])
    assert math.sqrt(squares) == pytest.approx(after["headline"]["error"], rel=1e-6)
    page = (run.folder / "report.html").read_text()
    assert "Errors are calibrated" in page
    assert record["sha256"][:12] in page
    assert plain.stage_seconds.keys() == run.stage_seconds.keys()
    # only the last two stages were done again
    assert (run.folder / "shards" / "manifest.json").stat().st_mtime_ns == ingested


def test_a_calibration_of_something_else_is_refused(tmp_path, calibrated):
    apply = f"calibration.apply={calibrated}"
    for overrides, message in (
        (['methods=["score","moments"]'], "is of moments, the run of score, moments"),
        (["catalog.ball.radius_kpc=3.9"], r"other settings: catalog\.ball\.radius_kpc"),
        (["ensemble.moments.draws=2"], r"other settings: ensemble\.moments\.draws"),
        (["calibration.apply=nowhere.ecsv"], "no such file"),
    ):
        with pytest.raises(GalrayError, match=message):
            Pipeline(config_of(tmp_path, apply, *overrides)).run()
    other = tmp_path / "other.ecsv"
    other.write_text(calibrated.read_text().replace("galray_calibration", "something_else"))
    with pytest.raises(GalrayError, match="is no calibration"):
        read_calibration(config_of(tmp_path, f"calibration.apply={other}"))
    # where the stars come from, and baryons, are the run's own affair
    read_calibration(config_of(tmp_path, apply, "gravity.baryons.model=mckee2015", "seed=99"))


def test_inflated_covariances_keep_their_correlations(tmp_path, calibrated, s3_storage):
    from galray.gravity import Kernel
    from galray.results import Places

    url = "s3://galray/tables/calibration.ecsv"  # as well as in a folder
    Mirror("s3://galray/tables", s3_storage).write("calibration.ecsv", calibrated.read_bytes())
    reached = overrides_of({"catalog.storage": s3_storage.model_dump(exclude_defaults=True)})
    config = config_of(tmp_path, f"calibration.apply={url}", *reached)
    kernel = Kernel.from_settings(config.gravity.kernel)
    frame, center = config.catalog.frame.build(), config.catalog.ball_center()
    places = Places(config.places, frame, center, config.catalog.ball.radius_kpc, kernel.reach)
    number = places.num_values
    rng = np.random.default_rng(0)
    root = rng.standard_normal((number, 2 * number))
    term = Term(root @ root.T, 5, np.full(number, 9.0))
    estimates = {
        name: Estimate(name, np.zeros(number), {"statistics": term}) for name in ("moments", "combined")
    }
    out, record = inflate(config, places, estimates, 1000)
    grow = out["moments"].error / estimates["moments"].error
    names = [q.name for q in places.quantities]
    assert {name for name, g in zip(names, grow, strict=True) if g > 1.0001} == {"a_R", HEADLINE}
    np.testing.assert_allclose(out["combined"].error, out["moments"].error)

    def correlation(e):
        return e.covariance / np.outer(e.error, e.error)

    np.testing.assert_allclose(correlation(out["moments"]), correlation(estimates["moments"]), atol=1e-12)
    np.testing.assert_array_equal(out["moments"].dof, estimates["moments"].dof)
    assert "200 mock galaxies" in record["sentence"]
    assert url in record["sentence"]
    assert record["file"] == url
    # What no mock exercises does not grow.
    other = Term(np.eye(number), 0, np.full(number, np.inf))
    terms = {"statistics": term, "disequilibrium": other}
    both, _ = inflate(config, places, {"moments": Estimate("moments", np.zeros(number), terms)}, 1000)
    np.testing.assert_array_equal(both["moments"].terms["disequilibrium"].covariance, other.covariance)
    grown = both["moments"].terms["statistics"].covariance
    np.testing.assert_array_equal(grown, out["moments"].terms["statistics"].covariance)
