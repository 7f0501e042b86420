"""A look at a star file or a store: what it is, what is in it, what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from galray.catalog.columns import CORRELATIONS, ERRORS, OBSERVABLES, STATE
from galray.catalog.readers import SHORT_ROW, open_source
from galray.catalog.shards import MANIFEST, ShardStore
from galray.errors import GalrayError

__all__ = ["inspect"]


def inspect(path: Path | str, release: str = "dr3") -> dict[str, Any]:
    """Summarise a star file or a shard store in plain values.

    Arguments:
        path: A file of any form that an ingest reads, or a store's folder.
        release: Gaia release whose column types apply to a file.

    Returns:
        For a file: ``path, what, format, kind, bytes, rows, columns, missing`` (columns a 6D ingest lacks),
        ``absent_values`` (per column), ``problems`` (in words). For a store: ``path, what, kind, rows,
        shards, bytes, columns, account, ball, cuts, frame, hash, created, quarantined, problems``.

    Raises:
        GalrayError: There is no such file or store, or the file is of no known form.
    """
    path = Path(path)
    if path.is_dir() or path.name == MANIFEST:
        return _inspect_store(path if path.is_dir() else path.parent)
    return _inspect_file(path, release)


def _inspect_store(path: Path) -> dict[str, Any]:
    store = ShardStore(path)
    manifest = store.manifest
    summary = {name: manifest[name] for name in ("account", "ball", "cuts", "frame", "hash", "created")}
    problems = [f"{entry['path']}: {entry['reason']}" for entry in manifest["quarantined"]]
    try:
        store.verify()
    except GalrayError as error:
        problems.append(error.what)
    return {
        "path": str(path),
        "what": "store",
        "kind": manifest["kind"],
        "rows": store.num_rows,
        "shards": len(store.shards),
        "bytes": sum(entry["bytes"] for entry in manifest["shards"]),
        "columns": manifest["columns"],
        **summary,
        "quarantined": len(manifest["quarantined"]),
        "problems": problems,
    }


def _inspect_file(path: Path, release: str) -> dict[str, Any]:
    source = open_source(path, release)
    kind = source.kind()
    problems: list[str] = []
    expected = STATE if kind == "states" else (*OBSERVABLES, *ERRORS, *CORRELATIONS)
    missing = [name for name in expected if name not in source.names]
    if kind is None:
        problems.append("neither a Gaia source table nor a 6D table: name its columns with catalog.rename")
    elif missing:
        problems.append(
            f"{len(missing)} column(s) absent: {', '.join(missing[:4])}{' …' * (len(missing) > 4)}"
        )
    if "source_id" not in source.names:
        problems.append("no source_id: stars get one from the file's checksum and their row")
    wanted = [name for name in ("source_id", *expected) if name in source.names]
    wanted = wanted or list(source.names)[:1]
    rows = short = 0
    absent = dict.fromkeys(wanted, 0)
    try:
        for batch in source.batches(wanted):
            rows += batch.height
            for name, count in zip(wanted, batch.select(pl.col(wanted).null_count()).row(0), strict=True):
                absent[name] += count
            if SHORT_ROW in batch.columns:
                short += int(batch[SHORT_ROW].sum())
    except GalrayError as error:
        problems.append(error.what)
    if short:
        problems.append(f"{short:,} row(s) end before the last column")
    elif rows == 0 and not problems:
        problems.append("no rows")
    return {
        "path": str(path),
        "what": "file",
        "format": source.format,
        "kind": kind,
        "bytes": path.stat().st_size,
        "rows": rows,
        "columns": list(source.names),
        "missing": missing,
        "absent_values": {name: count for name, count in absent.items() if count},
        "problems": problems,
    }
