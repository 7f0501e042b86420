"""The last step of an ingest: shards and tiles go to their place, and the manifest makes them a store."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galray.catalog.inputs import InputUnit
from galray.catalog.lease import LEASE
from galray.catalog.mirror import Place
from galray.catalog.quality import parse_cuts
from galray.catalog.quarantine import LOST, write_lost
from galray.catalog.settings import CatalogSettings
from galray.catalog.shards import MANIFEST, SIDE_VIEWS, ShardStore
from galray.errors import GalrayError
from galray.provenance import library_versions, now, write_atomic

__all__ = ["STORE_FORMAT", "describe_settings", "finished_store", "publish"]

STORE_FORMAT = 3

SIDE_FILES = ("shard_ranges.parquet", "shard_histograms.parquet")
"""Range of every column, and counts of every histogram, shard by shard."""


def describe_settings(settings: CatalogSettings, kind: str) -> dict[str, Any]:
    """What a manifest says of where its stars come from.

    Arguments:
        settings: The catalogue's settings.
        kind: ``gaia`` or ``states``.
    """
    from galray import __version__

    ball = settings.ball
    return {
        "format": STORE_FORMAT,
        "galray": __version__,
        "created": now(),
        "source": kind,
        "settings": settings.model_dump(mode="json"),
        "frame": settings.frame.build().as_dict(),
        "parallax_zero_point": settings.parallax_zero_point,
        "distance": settings.distance,
        "ball": ball and {"center_kpc": list(settings.ball_center()), "radius_kpc": ball.radius_kpc},
        "cuts": {cut.name: cut.sql for cut in parse_cuts(settings.cuts)},
        "versions": library_versions(),
    }


def publish(store: Place, work: Place, name: str, views: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Put the shards in place and write the manifest, which makes them a store.

    Until the manifest is there, and from the moment that an older one is taken away, the folder is no store.

    Arguments:
        store: The store's place.
        work: The ingest's own place in it, which is removed at the end.
        name: Of the folder in it with the views' finished files.
        views: Each view's part of the manifest.
        about: What the views have in common: settings, account, inputs.
    """
    target, out = store.folder, work.folder / name
    work.pull(prefix=name)
    store.remove(MANIFEST)
    (target / MANIFEST).unlink(missing_ok=True)
    for old in target.glob("shard-*.parquet"):
        old.unlink()
    for name in (*SIDE_VIEWS, "sky", "selection"):
        shutil.rmtree(target / name, ignore_errors=True)
    (target / LOST).unlink(missing_ok=True)
    write_lost(sorted(work.folder.glob("piece-*.lost.parquet")), target / LOST)
    _place(out / "6d", target)
    if about["selection"] is not None:
        (out / "selection").replace(target / "selection")
    present = {name: name in views for name in SIDE_VIEWS}
    for name in (name for name in SIDE_VIEWS if present[name]):
        _place(out / name, target / name)
        # In its own account the 6D stars are a fate like any other, so that it too adds up.
        account = {**about["account"], "kept_6d": about["account"]["kept"], "kept": views[name]["num_rows"]}
        account.pop(f"kept_{name}")
        write_atomic(target / name / MANIFEST, {**about, **views[name], "account": account})
    write_atomic(target / MANIFEST, {**about, **views["6d"], **present})
    shutil.rmtree(work.folder, ignore_errors=True)
    here = {LEASE, *(str(path.relative_to(target)) for path in target.rglob("*"))}
    store.push(last=[MANIFEST])
    store.remove(*(name for name in store.sizes() if name not in here))


def _place(source: Path, target: Path) -> None:
    """Move a view's files: shards, statistics, tiles."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.glob("shard-*.parquet")):
        path.replace(target / path.name)
    for name in (*SIDE_FILES, "sky"):
        if (source / name).exists():
            (source / name).replace(target / name)


def finished_store(place: Place, key: str, units: list[InputUnit], allow_bad: int) -> ShardStore | None:
    """The store that is there, if it is of these settings and files and whole.

    Arguments:
        place: Its place.
        key: Hash of the settings.
        units: The input.
        allow_bad: Number of bad files that may be missing in it.
    """
    try:
        store = ShardStore.at(place)
    except GalrayError:
        return None
    manifest = store.manifest
    bad = {entry["path"] for entry in manifest["quarantined"]}
    if manifest.get("settings_hash") != key or len(bad) > allow_bad:
        return None
    entries = (*manifest["inputs"], *manifest["quarantined"])
    known = {InputUnit.from_state(entry).name: entry for entry in entries}
    if sorted(known) != sorted(unit.name for unit in units):
        return None
    for unit in units:
        entry = known[unit.name]
        # A file written again with the same content, as by copying, is the same file.
        if InputUnit.from_state(entry) != unit and (
            entry["size"] != unit.size or entry.get("xxh128") != unit.checksum()
        ):
            return None
    sizes = place.sizes()
    views = {"": manifest}
    for name in SIDE_VIEWS:
        try:
            side = store.side(name)
        except GalrayError:
            return None
        if side is not None:
            views[f"{name}/"] = side.manifest
    wanted = {
        f"selection/{name}": sizes.get(f"selection/{name}", -1) for name in manifest.get("selection") or ()
    }
    for folder, view in views.items():
        wanted |= {folder + entry["file"]: entry["bytes"] for entry in view["shards"]}
        tiles = view.get("tiles") or {"files": []}
        wanted |= {f"{folder}sky/{entry['file']}": entry["bytes"] for entry in tiles["files"]}
    return store if wanted.items() <= sizes.items() else None
