"""Run configurations: what loads, what is refused and in which words."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from galray.config import RunConfig, load_config, ready_configs, to_toml
from galray.errors import GalrayError
from tests.chain_config import write_config


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def refusal(source: Path | str, *overrides: str) -> GalrayError:
    with pytest.raises(GalrayError) as caught:
        load_config(source, list(overrides))
    assert len(str(caught.value).splitlines()) == 2, "one line for the mistake, one for the remedy"
    return caught.value


@pytest.mark.parametrize("name", ["demo", "quickstart"])
def test_ready_configurations_load(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.mock is not None
    assert config.run_dir == Path("runs") / name


def test_every_shipped_configuration_is_named_after_its_file() -> None:
    assert {"demo", "quickstart", "gaia_dr2_local"} <= set(ready_configs())
    for name in ready_configs():
        assert load_config(name).name == name


def test_unknown_name_suggests_a_ready_one() -> None:
    error = refusal("quickstrat")
    assert "no configuration 'quickstrat'" in error.what
    assert "did you mean 'quickstart'?" in error.remedy


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sed=1", "sed: unknown key, did you mean 'seed'?"),
        ("catalog.bal.radius_kpc=1", "catalog.bal: unknown key, did you mean 'ball'?"),
        ("mock.galaxy.num_star=5", "mock.galaxy.num_star: unknown key, did you mean 'num_stars'?"),
        ("seed=one", "seed: input should be a valid integer"),
        ("seed=1.5", "seed: input should be a valid integer"),
        ("catalog.ball.radius_kpc=4 kpc", "catalog.ball.radius_kpc: input should be a valid number"),
        ("catalog.ball.radius_kpc=-4", "catalog.ball.radius_kpc: input should be greater than 0"),
        ("catalog.states.length_unit=furlong2", "catalog.states.length_unit: 'furlong2' cannot be converted"),
        ("catalog.states.speed_unit=kpc", "catalog.states.speed_unit: 'kpc' cannot be converted"),
        ("catalog.release=dr9", "catalog.release: unknown release 'dr9'"),
        ("methods=guess", "methods.0: input should be 'flow', 'score', 'moments' or 'vertical'"),
        ('methods=["moments", "moments"]', "each inversion may be named once"),
        ("methods=vertical", "'vertical' runs alone and needs a [vertical] section"),
        ("catalog.files=stars.csv", "leave it empty when [mock] generates the files"),
        ("name=../elsewhere", "name: string should match pattern"),
        ("places.average_heights=[2, 1]", "places: average_heights: need 0 <= low < high"),
        ("places.heights=[]", "places: heights: need one or more"),
        ("places.heights=[1, -1]", "places: heights: need one or more"),
        ("gravity.kernel.widths_kpc=[0.5, 0.5]", "gravity.kernel.widths_kpc.2: field required"),
        ("mock.galaxy.num_stars=nan", "mock.galaxy.num_stars"),
    ],
)
def test_mistakes_are_named_with_their_key(tiny: Path, override: str, words: str) -> None:
    error = refusal(tiny, override)
    assert words in error.what
    assert error.what.startswith(f"{tiny}: ")
    assert error.remedy


def test_many_mistakes_stay_on_one_line(tiny: Path) -> None:
    error = refusal(tiny, *(f"wrong_{i}=1" for i in range(7)))
    assert "(and 4 more)" in error.what


def test_no_input_and_no_ball(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text('name = "bare"\n[catalog]\nball = {radius_kpc = 4}\n')
    assert "catalog.files: no input" in refusal(path).what
    path.write_text('name = "bare"\n[catalog]\nfiles = ["a.csv"]\n')
    assert "catalog.ball: needed by flow, score and moments" in refusal(path).what


def test_a_run_needs_the_density_of_the_flow(tiny: Path) -> None:
    error = refusal(tiny, 'methods=["flow"]', "flow.conditional=true")
    assert "flow.conditional: the run's accelerations need n(x)" in error.what


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text('name = "x"\nseed = = 3\n')
    error = refusal(path)
    assert "not a TOML file" in error.what
    assert "line 2" in error.what


def test_binary_file_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "not a TOML file" in refusal(path).what


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=17", ("seed",), 17),
        (" seed = 17 ", ("seed",), 17),
        ("mock.galaxy.num_stars=1_000", ("mock", "galaxy", "num_stars"), 1000),
        ("catalog.ball.radius_kpc=3", ("catalog", "ball", "radius_kpc"), 3.0),
        ("cluster.enabled=false", ("cluster", "enabled"), False),
        ("description=two words = one", ("description",), "two words = one"),
        ('description="quoted # text"', ("description",), "quoted # text"),
        ("description=", ("description",), ""),
        ("name=2026-11-21", ("name",), "2026-11-21"),
        ("name=007", ("name",), "007"),
        ("output=/some/where", ("output",), "/some/where"),
        ("methods=moments", ("methods",), ("moments",)),
        ('methods=["flow", "score"]', ("methods",), ("flow", "score")),
        ("places.heights=[0.5, 1.5]", ("places", "heights"), (0.5, 1.5)),
        ("catalog.keep_columns=ruwe", ("catalog", "keep_columns"), ("ruwe",)),
        (
            "catalog.cuts.near=parallax > 0.5 AND ruwe < 1.4",
            ("catalog", "cuts"),
            {"parallax_snr": 5.0, "near": "parallax > 0.5 AND ruwe < 1.4"},
        ),
        ("catalog.cuts.ruwe=1.4", ("catalog", "cuts"), {"parallax_snr": 5.0, "ruwe": 1.4}),
        ("ensemble.moments={seeds = 1, draws = 3}", ("ensemble", "moments", "draws"), 3),
    ],
)
def test_set_takes_toml_and_bare_words(
    tiny: Path, override: str, key: tuple[str, ...], value: object
) -> None:
    found: object = load_config(tiny, [override])
    for part in key:
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_set_makes_sections_that_the_file_lacks(tmp_path: Path) -> None:
    path = tmp_path / "files.toml"
    path.write_text('name = "files"\nmethods = ["moments"]\n')
    config = load_config(path, ["catalog.files=stars.csv", "catalog.ball.radius_kpc=4"])
    assert config.catalog.files == ("stars.csv",)
    assert config.catalog.ball is not None
    assert config.catalog.ball.radius_kpc == 4.0


def test_later_set_wins(tiny: Path) -> None:
    assert load_config(tiny, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("key", ["output", "calibration.cache", "calibration.apply"])
def test_places_that_are_misspelt_or_hold_a_password(tiny: Path, key: str) -> None:
    assert f"{key}: 's3:/bucket/x' is neither a path nor a URL" in refusal(tiny, f"{key}=s3:/bucket/x").what
    refused = refusal(tiny, f"{key}=s3://me:hunter2@bucket/x")
    assert f"{key}: it holds a password" in refused.what
    assert "hunter2" not in str(refused)
    assert "names another machine" in refusal(tiny, f"{key}=file://host/x").what


def test_a_shared_file_system_by_url_is_its_folder(tiny: Path) -> None:
    config = load_config(tiny, ["output=file:///mnt/shared%20disk/runs"])
    assert config.place.location == "/mnt/shared disk/runs/tiny"
    assert config.hash == load_config(tiny).hash


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", ".=1", ""])
def test_set_without_key_or_sign_is_refused(tiny: Path, override: str) -> None:
    error = refusal(tiny, override)
    assert "not of the form a.b=value" in error.what


@pytest.mark.parametrize("override", ["seed.deep=1", "catalog.num_shards.x.y=1", "methods.first=flow"])
def test_set_below_a_value_is_refused(tiny: Path, override: str) -> None:
    assert "is a value, not a section" in refusal(tiny, override).what


def test_hash_holds_what_changes_a_number_and_nothing_else(tiny: Path) -> None:
    base = load_config(tiny).hash
    for same in (
        "name=other",
        "description=other",
        "output=/elsewhere",
        "tracking.enabled=false",
        "tracking.experiment=other",
        "cluster.num_cpus=7",
        "ensemble.concurrent=1",
        "ensemble.cpus_per_member=0.5",
        "cost.dollars_per_core_hour=1",
    ):
        assert load_config(tiny, [same]).hash == base, same
    for other in (
        "seed=4",
        "methods=moments",
        "catalog.ball.radius_kpc=3.9",
        "training.score.epochs=3",
        "gravity.kernel.truncate=1.9",
        "places.heights=[0.9]",
        "ensemble.score.seeds=3",
        "mock.galaxy.num_stars=7",
    ):
        assert load_config(tiny, [other]).hash != base, other


@pytest.mark.parametrize("name", sorted(ready_configs()))
def test_written_configuration_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    again = load_config(path)
    assert again == config
    assert again.hash == config.hash


def test_written_configuration_names_every_section() -> None:
    written = tomllib.loads(to_toml(load_config("demo")))
    absent = set(RunConfig.model_fields) - set(written)
    assert absent == {"vertical"}, "only what is None may be left out"


def test_configurations_are_frozen(tiny: Path) -> None:
    config = load_config(tiny)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 9  # type: ignore[misc]


def test_example_in_the_remedy_of_a_malformed_override_is_a_key_that_exists() -> None:
    with pytest.raises(GalrayError) as caught:
        load_config("quickstart", ["nonsense"])
    load_config("quickstart", [caught.value.remedy.split("--set ")[1]])
