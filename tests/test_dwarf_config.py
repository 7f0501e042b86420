"""Configurations of dwarf galaxies: ready ones, files by name, overrides, mistakes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from galray.catalog.mirror import SCRATCH
from galray.commands.dwarf import member_counts
from galray.config import to_toml
from galray.errors import GalrayError
from galray.galaxies.config import (
    DwarfConfig,
    GalaxySettings,
    MemberSettings,
    load_dwarf_config,
    ready_dwarf_configs,
    recognise,
)
from galray.galaxies.members import design, observe, variant_settings, variants


@pytest.mark.parametrize("name", sorted(ready_dwarf_configs()))
def test_ready_configurations_are_valid_and_describe_themselves(name: str) -> None:
    config = load_dwarf_config(name)
    assert config.name == name
    assert config.description
    assert config.mock is not None or config.galaxy.key
    assert DwarfConfig.model_validate(tomllib.loads(to_toml(config))) == config


def test_there_is_one_for_each_of_five_galaxies_and_a_mock() -> None:
    assert set(ready_dwarf_configs()) >= {"carina", "draco", "fornax", "sextans", "ursa_minor", "plumcoreom"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("galaxy.distanc=3", "galaxy.distanc: unknown key, did you mean 'distance'"),
        ("members.seeds=0", "members.seeds"),
        ("fit.anisotropy.kind=odd", "fit.anisotropy.kind"),
        ("products.radii=[3, 1]", "products.radii"),
        ("galaxy.ellipticity=1.2", "galaxy.ellipticity"),
        ("galaxy.ellipticity=0.92", "galaxy.ellipticity"),  # no fit could read it back
        ("galaxy.centre_error=-0.1", "galaxy.centre_error"),
        ("data.min_membership=1", "data.min_membership"),
        ("data.spectroscopy=x.dat", "leave it empty when"),
        ("name.x=1", "'name' is a value, not a section"),
        ("seeds", "not of the form a.b=value"),
    ],
)
def test_mistakes_are_named_by_their_key(override: str, message: str) -> None:
    with pytest.raises(GalrayError, match=message):
        load_dwarf_config("plumcoreom", [override])


def test_overrides_of_columns_and_tuples() -> None:
    config = load_dwarf_config(
        "fornax", ["data.columns.ra=RA", "products.angles=[0.2]", "members.anisotropies=isotropic"]
    )
    assert config.data.columns == {"ra": "RA"}
    assert config.products.angles == (0.2,)
    assert config.members.anisotropies == ("isotropic",)


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(GalrayError, match=r"'fornx': neither.*\n.*did you mean 'fornax'"):
        load_dwarf_config("fornx")
    broken = tmp_path / "a.toml"
    broken.write_text("name = \n")
    with pytest.raises(GalrayError, match="not a TOML file"):
        load_dwarf_config(broken)


def test_known_files_bring_their_galaxy_and_photometry(tmp_path: Path) -> None:
    spectra, light = tmp_path / "umi_justin1_spec.dat.gz", tmp_path / "umi_justin1_phot.dat.gz"
    spectra.touch()
    assert recognise(spectra) == {
        "name": "ursa-minor",
        "galaxy": {"key": "ursa_minor_1"},
        "data": {"spectroscopy": str(spectra), "format": "walker"},
    }
    light.touch()
    found = recognise(spectra)
    assert found is not None
    assert found["data"]["photometry"] == str(light)
    assert recognise(tmp_path / "xyz_justin1_spec.dat.gz") is None
    assert recognise(light) is None
    config = load_dwarf_config(spectra, ["seed=7"])
    assert (config.name, config.seed, config.galaxy.key) == ("ursa-minor", 7, "ursa_minor_1")
    own = tmp_path / "my stars.csv"
    own.touch()
    assert load_dwarf_config(own).name == "my-stars"


def test_the_galaxy_is_the_table_and_what_the_configuration_says() -> None:
    fornax = GalaxySettings(key="fornax", distance=140.0, pm_error=0.01).resolve("x")
    assert fornax.name == "Fornax"
    assert fornax.distance == 140.0
    assert fornax.ra == pytest.approx(39.9583)
    assert fornax.pmra_error == 0.01
    assert fornax.light is not None
    assert fornax.light[0] == "king"
    own = GalaxySettings(ra=10.0, dec=-3.0, distance=50.0, r_half=0.2, centre_error=0.01).resolve("mine")
    assert own.centre_error == 0.01
    assert (own.name, own.light) == ("mine", ("plummer", 0.2, 0.0))
    assert not own.has_proper_motion
    with pytest.raises(GalrayError, match="no such galaxy"):
        GalaxySettings(key="andromeda").resolve("x")


def test_the_hash_holds_what_changes_numbers_alone() -> None:
    config = load_dwarf_config("plumcoreom")
    for same in ("output=/tmp/x", "tracking.enabled=false", "members.concurrent=0", "description=other"):
        assert load_dwarf_config("plumcoreom", [same]).hash == config.hash
    for other in ("seed=2", "members.seeds=2", "fit.halo.monotone=true", "mock.num_stars=500"):
        assert load_dwarf_config("plumcoreom", [other]).hash != config.hash


@pytest.mark.parametrize("number", [1, 4, 5, 8, 20])
def test_a_number_of_members_is_dealt_out(number: int) -> None:
    config = load_dwarf_config("plumcoreom", [*member_counts(number), "mock.num_stars=60"])
    specs = design(config, observe(config))
    assert len(specs) == number
    assert specs[0].varied == "base"


def test_members_are_addressed_by_their_contents() -> None:
    config = load_dwarf_config("plumcoreom", ["mock.num_stars=60"])
    observation = observe(config)
    specs = design(config, observation)
    assert len(specs) == 8
    assert len({spec.id for spec in specs}) == 8
    more = load_dwarf_config("plumcoreom", ["mock.num_stars=60", "members.seeds=6"])
    assert {spec.id for spec in specs} < {spec.id for spec in design(more, observation)}
    other = load_dwarf_config("plumcoreom", ["mock.num_stars=60", "mock.seed=5"])
    assert not {spec.id for spec in specs} & {spec.id for spec in design(other, observe(other))}
    changed = load_dwarf_config("plumcoreom", ["mock.num_stars=60", "fit.halo.steepening=0.2"])
    assert not {spec.id for spec in specs} & {spec.id for spec in design(changed, observation)}


def test_variants_change_one_thing() -> None:
    config = load_dwarf_config("plumcoreom", ['members.anisotropies=["isotropic"]'])
    names = variants(config.members)
    assert names == ["velocities", "smoothness", "anisotropy isotropic"]
    base = config.fit
    for name in names:
        changed = variant_settings(base, name)
        sections = [s for s in type(base).model_fields if getattr(changed, s) != getattr(base, s)]
        assert len(sections) == 1
    assert variant_settings(base, "") == base
    assert variants(MemberSettings(velocities=False, smoothness=False)) == []
    with pytest.raises(ValueError, match="no variant 'odd'"):
        variant_settings(base, "odd")


def test_where_a_fit_lies_is_no_part_of_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv(SCRATCH, str(tmp_path))
    here = load_dwarf_config("plumcoreom", ["output=runs"])
    at_url = load_dwarf_config("plumcoreom", ["output=s3://bucket/runs", "storage.region=eu-west-1"])
    assert at_url.place.location == "s3://bucket/runs/plumcoreom"
    assert at_url.run_dir == tmp_path / "s3/bucket/runs/plumcoreom"
    assert at_url.hash == here.hash
    with pytest.raises(GalrayError, match="it holds a password"):
        load_dwarf_config("plumcoreom", ["output=s3://me:hunter2@bucket/runs"])
    with pytest.raises(
        GalrayError, match=r"(?s)which may name stars at a URL.*data\.spectroscopy=s3://b/stars\.dat"
    ):
        load_dwarf_config("s3://b/stars.dat")
