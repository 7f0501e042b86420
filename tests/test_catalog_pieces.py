"""Pieces and their index: each shard finds its own rows, in the order of the input."""

import numpy as np
import polars as pl

from galray.catalog.counting import counted, first_of_runs
from galray.catalog.pieces import PieceIndex, PieceWriter, read_batches
from galray.catalog.selection import SHARD


def test_each_shard_finds_its_rows_in_the_order_of_the_input(tmp_path, monkeypatch):
    monkeypatch.setattr("galray.catalog.pieces.FLUSH_ROWS", 500)
    rng = np.random.default_rng(3)
    tables = []
    for name in ("b.arrow", "a.arrow"):  # the order is that of the input, not of the names
        table = pl.DataFrame(
            {
                "source_id": rng.integers(1 << 60, size=1700),
                SHARD: pl.Series(rng.choice([0, 2, 3, 7], 1700), dtype=pl.UInt16),
            }
        )
        writer = PieceWriter(tmp_path / name)
        for part in table.iter_slices(130):
            writer.add(part)
        assert writer.close() == 1700
        tables.append(table)
    PieceIndex.of(tmp_path, ["b.arrow", "a.arrow"]).save(tmp_path / "index.npy")
    whole = pl.concat(tables)
    for shard in range(9):
        index = PieceIndex.load(tmp_path / "index.npy", shard)
        assert (index.entries[:, 2] == shard).all()
        found = [frame["source_id"] for frame in read_batches(tmp_path, index)]
        wanted = whole.filter(pl.col(SHARD) == shard)["source_id"]
        assert (pl.concat(found).to_list() if found else []) == wanted.to_list()
        for _, _, _, rows, least, greatest in index.entries.tolist():
            assert rows > 0
            assert wanted.is_in([least, greatest]).sum() >= 1


def test_values_are_counted_in_place_or_by_sorting():
    rng = np.random.default_rng(4)
    for values in (
        rng.integers(-50, 50, 1000),
        rng.integers(-(1 << 60), 1 << 60, 1000).repeat(2),
        np.array([7, 7, -(1 << 62), 1 << 62]),
        rng.integers(0, 1 << 20, 300_000).astype(np.int32),
        np.zeros(0, dtype=np.int32),
    ):
        found, numbers = counted(values)
        wanted = np.unique(values, return_counts=True)
        assert found.dtype == values.dtype
        assert np.array_equal(found, wanted[0])
        assert np.array_equal(numbers, wanted[1])


def test_runs_begin_where_the_value_changes():
    assert first_of_runs(np.array([3, 3, 5, 9, 9, 9])).tolist() == [0, 2, 3]
    assert first_of_runs(np.zeros(0)).tolist() == []
