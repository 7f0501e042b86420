"""Whatever the files hold, every row has exactly one fate, and every kept star is in exactly one shard."""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from galray.catalog import CatalogSettings, ShardStore, ingest, verify, write_gaia_source
from galray.catalog.columns import CORRELATIONS, ERRORS, OBSERVABLES
from galray.errors import GalrayError
from tests.catalog_stars import stars

NUMBERS = (*OBSERVABLES, *ERRORS, *CORRELATIONS, "phot_g_mean_mag", "bp_rp", "grvs_mag", "ruwe")
ODD = (None, math.nan, math.inf, -math.inf, 0.0, -1.0, 1e308, -1e-300, 90.0, 361.0, 1e6)
"""Values that no instrument gives, and missing ones."""


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    """Up to 60 stars with odd values here and there, columns missing, and ids that come twice."""
    number = draw(st.integers(0, 60))
    frame = stars(max(number, 1), seed=draw(st.integers(0, 3)), rv_fraction=0.7).head(number)
    frame = frame.with_columns(pl.col("radial_velocity", "radial_velocity_error").fill_nan(None))
    cells = st.tuples(st.sampled_from(NUMBERS), st.integers(0, 59), st.sampled_from(ODD))
    for name, row, value in draw(st.lists(cells, max_size=12)):
        if row < number:
            values = frame[name].to_list()
            values[row] = value
            frame = frame.with_columns(pl.Series(name, values, dtype=pl.Float64))
    if number and draw(st.booleans()):
        frame = pl.concat([frame, frame.sample(min(5, number), seed=draw(st.integers(0, 9)))])
    optional = [name for name in frame.columns if name not in OBSERVABLES[:5]]
    dropped = draw(st.lists(st.sampled_from(optional), max_size=4, unique=True))
    if draw(st.integers(0, 9)) == 0:
        dropped.append("parallax")  # not a Gaia table any more
    return frame.drop(dropped)


@st.composite
def files(draw: st.DrawFn) -> list[tuple[pl.DataFrame, str, str, int]]:
    """Tables with the form that each is written in, what is done to its bytes, and where."""
    form = st.sampled_from(["csv", "csv.gz", "parquet", "bulk"])
    harm = st.sampled_from(["", "", "", "", "text", "short", "cut", "empty", "same"])
    return draw(st.lists(st.tuples(tables(), form, harm, st.integers(0, 10**6)), min_size=1, max_size=4))


def write(
    folder: Path, number: int, table: pl.DataFrame, form: str, harm: str, place: int
) -> dict[Path, int]:
    """Write one table; gives the files and their rows as they were before any harm."""
    path = folder / f"{number}.{form}"
    if form == "bulk" and (table.height == 0 or "source_id" not in table.columns):
        form, path = "csv", folder / f"{number}.csv"
    if form == "bulk":
        written = write_gaia_source(table, folder / str(number), rows_per_file=40)
        rows = {p: pl.read_csv(p, comment_prefix="#", infer_schema=False).height for p in written}
    elif form == "parquet":
        table.write_parquet(path, row_group_size=17)
        rows = {path: table.height}
    else:
        content = table.write_csv(null_value=["", "null"][place % 2]).encode()
        path.write_bytes(gzip.compress(content) if form == "csv.gz" else content)
        rows = {path: table.height}
    spoil(next(iter(rows)), harm, place)
    if harm == "same":  # the same stars in a second file
        first = next(iter(rows))
        copy = first.with_name(f"again-{number}-{first.name}")
        copy.write_bytes(first.read_bytes())
        rows[copy] = rows[first]
    return rows


def spoil(path: Path, harm: str, place: int) -> None:
    """Put text into a number, cut a row short, cut the file, or empty it."""
    raw = path.read_bytes()
    packed = raw[:2] == b"\x1f\x8b"
    if harm == "empty":
        path.write_bytes(b"")
    elif harm == "cut":
        path.write_bytes(raw[: place % len(raw)])
    elif harm in ("text", "short") and raw[:4] != b"PAR1":
        lines = (gzip.decompress(raw) if packed else raw).split(b"\n")
        header = next(i for i, line in enumerate(lines) if not line.startswith(b"#"))
        rows = [i for i in range(header + 1, len(lines)) if lines[i]]
        if not rows:
            return
        cells = lines[rows[place % len(rows)]].split(b",")
        column = place % len(cells)
        if harm == "text":
            cells[column] = b"much"
        elif column > 0:
            del cells[column:]
        lines[rows[place % len(rows)]] = b",".join(cells)
        content = b"\n".join(lines)
        path.write_bytes(gzip.compress(content) if packed else content)


rules = st.fixed_dictionaries(
    {
        "cuts": st.sampled_from(
            [
                {},
                {"parallax_snr": 20.0},
                {"near": "parallax > 0.8", "red": "bp_rp > 1"},
                {"slow": "abs(vx) < 40", "bright": "phot_g_mean_mag < 12"},
            ]
        ),
        "ball": st.sampled_from(
            [None, {"radius_kpc": 5.0}, {"radius_kpc": 8.0, "center_kpc": (0.0, 0.0, 0.0)}]
        ),
        "require_rv": st.booleans(),
        "sample": st.sampled_from([1.0, 1.0, 0.5]),
        "num_shards": st.integers(1, 7),
        "parallax_zero_point": st.sampled_from([0.0, -0.03]),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(files(), rules)
def test_every_row_has_one_fate(given_files, rule) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows: dict[str, int] = {}
        for number, (table, form, harm, place) in enumerate(given_files):
            written = write(folder, number, table, form, harm, place)
            rows |= {str(path.resolve()): count for path, count in written.items()}
        catalog = CatalogSettings(files=tuple(rows), allow_bad=len(rows), **rule)
        failure = None
        try:
            store = ingest(catalog, folder / "store")
        except GalrayError as error:
            failure = error.what
        if failure is not None:
            event("no star left")
            assert "no star is left of" in failure
            assert not (folder / "store" / "manifest.json").exists()
            return
        event(f"quarantined {len(store.manifest['quarantined'])}")
        check(store, rows, given_files, catalog)


def check(store: ShardStore, rows: dict[str, int], given_files, catalog: CatalogSettings) -> None:
    account = store.row_account
    quarantined = {entry["path"] for entry in store.manifest["quarantined"]}
    read = {entry["path"]: entry["rows"] for entry in store.manifest["inputs"]}
    assert quarantined | set(read) == set(rows), "every file was read or is named"
    assert not quarantined & set(read)
    harmed = {str(i) for i, (_, _, harm, _) in enumerate(given_files) if harm in ("text", "cut", "empty")}
    for path, count in rows.items():
        # A file that no harm was done to is read to its last row; a cut one is never read in part.
        if path in read and not harmed & {Path(path).name.split(".")[0], Path(path).parent.name}:
            assert read[path] == count, path
    # rows in = rows kept + rows cut by each rule + rows rejected
    assert account["rows_in"] == sum(read.values())
    fates = Counter(account)
    del fates["rows_in"]
    assert all(count >= 0 for count in fates.values())
    known = ("cut:", "rejected:")
    assert all(fate in ("kept", "kept_no_rv") or fate.startswith(known) for fate in fates), fates
    assert account["rows_in"] == sum(fates.values())
    # Every kept star is in exactly one shard, and obeys the cuts.
    others = store.no_rv
    assert account["kept"] == store.num_rows
    assert account.get("kept_no_rv", 0) == (others.num_rows if others else 0)
    for part in (store, others) if others else (store,):
        ids = [part.table(["source_id"], [shard])["source_id"].to_list() for shard in range(len(part.shards))]
        every = [star for shard in ids for star in shard]
        assert len(every) == len(set(every)) == part.num_rows
        assert len(part.shards) == catalog.num_shards
    table = store.table()
    assert np.isfinite(store.states()).all()
    assert table["radial_velocity"].is_not_null().all()
    if "red" in catalog.cuts:
        assert table.filter((pl.col("parallax") <= 0.8) | (pl.col("bp_rp") <= 1 - 1e-6)).height == 0
    if catalog.ball is not None:
        offset = store.states(dtype=np.float64)[:, :3] - np.array(catalog.ball_center())
        assert (np.linalg.norm(offset, axis=1) < catalog.ball.radius_kpc).all()
    assert verify(store).problems == ()
    assert json.loads((store.path / "manifest.json").read_text())["account"] == account


def test_the_property_can_fail(tmp_path) -> None:
    """An account that hides one row is found out."""
    stars(50).write_parquet(tmp_path / "t.parquet")
    path = str((tmp_path / "t.parquet").resolve())
    settings = CatalogSettings(files=(path,), num_shards=2)
    store = ingest(settings, tmp_path / "store")
    check(store, {path: 50}, [(stars(50), "parquet", "", 0)], settings)
    store.manifest["account"]["kept"] -= 1
    with pytest.raises(AssertionError):
        check(store, {path: 50}, [(stars(50), "parquet", "", 0)], settings)
