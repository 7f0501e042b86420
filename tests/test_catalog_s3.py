"""Stars in a bucket: a small S3 service of the tests' own."""

import itertools
import sys

import boto3
import polars as pl
import pytest
from moto.server import ThreadedMotoServer
from pydantic import ValidationError

from galray import cli
from galray.catalog import (
    CatalogSettings,
    InputUnit,
    ingest,
    input_units,
    inspect,
    open_source,
    write_gaia_source,
)
from galray.catalog.readers import open_unit
from galray.catalog.storage import StorageSettings
from galray.config import load_config
from galray.errors import GalrayError
from tests.catalog_stars import stars
from tests.test_catalog_hats import write_hats


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket with every form of file, and the endpoint that serves it."""
    folder = tmp_path_factory.mktemp("bucket")
    for seed, name in enumerate("ab"):
        (folder / "tables").mkdir(exist_ok=True)
        stars(300, seed=seed).write_parquet(folder / "tables" / f"{name}.parquet", row_group_size=100)
    write_gaia_source(stars(400, seed=5), folder / "bulk")
    write_hats(folder / "hats", stars(600, seed=6), order=0)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        endpoint = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="gaia")
        for path in folder.rglob("*"):
            if path.is_file():
                name = f"dr3/{path.relative_to(folder)}"
                client.upload_file(str(path), "gaia", name, ExtraArgs={"ACL": "public-read"})
        stars(10).write_parquet(folder / "private.parquet")
        client.upload_file(str(folder / "private.parquet"), "gaia", "private.parquet")
        yield folder, endpoint
    server.stop()


def settings(bucket, *files, **more):
    storage = {"endpoint": bucket[1], "region": "us-east-1", "skip_signature": True}
    return CatalogSettings(files=files, storage=storage, num_shards=2, **more)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("s3://gaia/dr3/tables/*.parquet", "tables"),
        ("s3://gaia/dr3/tables", "tables"),
        ("s3://gaia/dr3/bulk/", "bulk"),
        ("s3://gaia/dr3/hats", "hats"),
    ],
)
def test_a_bucket_gives_the_stars_of_the_folder(bucket, tmp_path, url, local):
    there = settings(bucket, url)
    units = input_units(there)
    assert all(unit.path.startswith("s3://gaia/dr3/") and unit.size > 0 and unit.version for unit in units)
    assert len(units) == len(input_units(CatalogSettings(files=(str(bucket[0] / local),))))
    columns = ["source_id", "x", "vz", "parallax"]
    store = ingest(there, tmp_path / "there")
    here = ingest(CatalogSettings(files=(str(bucket[0] / local),), num_shards=2), tmp_path / "here")
    assert store.row_account == here.row_account
    assert store.table(columns).sort("source_id").equals(here.table(columns).sort("source_id"))
    again = ingest(there, tmp_path / "there")
    assert again.manifest["created"] == store.manifest["created"]


def test_row_groups_of_an_object(bucket):
    there = settings(bucket, "s3://gaia/dr3/tables/a.parquet", unit_megabytes=0.001)
    units = input_units(there)
    assert [unit.row_groups for unit in units] == [(0, 1), (1, 2), (2, 3)]
    read = [pl.concat(open_unit(unit, there).batches(["ra"])) for unit in units]
    assert pl.concat(read)["ra"].equals(stars(300)["ra"])


def test_with_credentials_of_the_environment(bucket):
    storage = StorageSettings(endpoint=bucket[1])
    source = open_source("s3://gaia/dr3/tables/b.parquet", storage=storage)
    assert pl.concat(source.batches(["ra"]))["ra"].equals(stars(300, seed=1)["ra"])


def test_mistakes_are_named(bucket):
    with pytest.raises(GalrayError, match=r"s3://gaia/dr3/nothing/\*\.csv' matches no file"):
        input_units(settings(bucket, "s3://gaia/dr3/nothing/*.csv"))
    private = InputUnit("s3://gaia/private.parquet", 1, "")
    with pytest.raises(GalrayError, match=r"s3://gaia/private\.parquet: access denied"):
        open_unit(private, settings(bucket))
    with pytest.raises(GalrayError, match=r"s3://gaia/none\.parquet: no such file or object"):
        open_source("s3://gaia/none.parquet", storage=StorageSettings(endpoint=bucket[1]))
    with pytest.raises(GalrayError, match="holds a user or key"):
        input_units(settings(bucket, "s3://me:hidden@gaia/dr3"))
    with pytest.raises(GalrayError, match="nowhere://x/y"):
        input_units(settings(bucket, "nowhere://x/y"))


def test_inspect_by_url(bucket):
    storage = StorageSettings(endpoint=bucket[1], region="us-east-1", skip_signature=True)
    for name, quick in itertools.product(("tables/a.parquet", "hats", "bulk"), (True, False)):
        here = bucket[0] / name
        url = f"s3://gaia/dr3/{name}"
        if name == "bulk":
            here = min(here.iterdir())
            url += f"/{here.name}"
        there = inspect(url, storage=storage, quick=quick)
        local = inspect(here, quick=quick)
        assert there["path"] == url
        assert {**there, "path": "", "columns": 0} == {**local, "path": "", "columns": 0}
    with pytest.raises(GalrayError, match=r"none\.parquet: no such file or object"):
        inspect("s3://gaia/none.parquet", storage=storage)


@pytest.mark.parametrize("word", ["plain", "anonymous"])
def test_inspect_command_on_a_truncated_object(bucket, tmp_path, monkeypatch, capsys, word):
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((bucket[0] / "tables" / "a.parquet").read_bytes()[:-300])
    client = boto3.client("s3", endpoint_url=bucket[1], region_name="us-east-1")
    gz = min((bucket[0] / "bulk").iterdir()).read_bytes()[:-4000]
    client.put_object(Bucket="gaia", Key="cut.csv.gz", Body=gz, ACL="public-read")
    client.put_object(Bucket="gaia", Key="cut.parquet", Body=cut.read_bytes(), ACL="public-read")
    monkeypatch.delenv("GALRAY_DEBUG", raising=False)
    how = ["--endpoint", bucket[1], *(["--anonymous"] if word == "anonymous" else [])]
    for name, code in (("cut.csv.gz", 1), ("cut.parquet", 2), ("dr3/tables/a.parquet", 0)):
        monkeypatch.setattr(sys, "argv", ["galray", "catalog", "inspect", f"s3://gaia/{name}", *how])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        assert int(stopped.value.code or 0) == code
        assert ("truncated" in captured.out + captured.err) == (code > 0)


@pytest.mark.parametrize(
    "given", [{"aws_secret_access_key": "x"}, {"options": {"aws_access_key_id": "x"}}, {"token": "x"}]
)
def test_secrets_in_the_configuration_are_refused(given):
    with pytest.raises(ValidationError, match=r"looks like a credential.*environment"):
        CatalogSettings(storage=given)
    with pytest.raises(GalrayError, match="holds a user or password") as caught:
        load_config("quickstart", ["catalog.storage.endpoint=http://me:hidden@host"])
    assert "hidden" not in caught.value.what
