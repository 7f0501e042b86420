"""Broken configurations, manifests, headers of tables and of weights, made from whole ones at random."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from galray.errors import GalrayError

__all__ = ["KINDS", "Fuzz"]

WILD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 2**63, -(2**70), 1e308, float("nan"), float("inf"), "", "x", "\x00", "../../x",
    "/etc/passwd", "~nobody/x", "s3://bucket/../x", "s3://", "a" * 5000, "\ud7ff\u202e", "${HOME}", "{{7*7}}",
    "__import__('os').system('false')", [], [[]], {}, {"x": 1}, [1, "a", None], [0.5, 2.0], "1e9",
)  # fmt: skip
"""What is put in place of a value."""

KINDS = ("configuration", "manifest", "table header", "weights header")


class Fuzz:
    """Makes one broken input after another and has galray read it.

    Arguments:
        folder: Scratch folder; nothing outside it may be written.
        seed: Of the cases.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        from galray.config import load_config, to_toml

        self.folder = folder
        self.random = random.Random(seed)
        (folder / "inside").mkdir(parents=True)
        self._config = tomllib.loads(to_toml(load_config("demo")))
        self._store = self._write_store(folder / "whole" / "store")
        self._whole_manifest = json.loads((self._store / "manifest.json").read_text())
        self._table = (folder / "whole" / "stars.csv").read_bytes()
        self._weights = self._write_weights(folder / "whole" / "model")

    def _write_store(self, path: Path) -> Path:
        from galray.catalog import CatalogSettings, ingest
        from galray.catalog.columns import CORRELATIONS, ERRORS

        path.parent.mkdir(parents=True)
        rng = np.random.default_rng(1)
        names = ("source_id", "ra", "dec", "parallax", "pmra", "pmdec", "radial_velocity")
        rows = [",".join((*names, *ERRORS, *CORRELATIONS))]
        rest = (*(0.01 for _ in ERRORS), *(0.0 for _ in CORRELATIONS))
        for number in range(60):
            values = (rng.uniform(0, 360), rng.uniform(-80, 80), 1.0, 2.0, -3.0, 10 * rng.standard_normal())
            rows.append(",".join(map(str, (number + 1, *values, *rest))))
        (path.parent / "stars.csv").write_text("\n".join(rows) + "\n")
        ingest(CatalogSettings(files=(str(path.parent / "stars.csv"),), num_shards=2), path)
        return path

    def _write_weights(self, path: Path) -> bytes:
        import torch

        from galray.phasespace import Ball, ScoreSettings, build_model, save_model

        stars = torch.randn(300, 6, generator=torch.Generator().manual_seed(1)) * 0.1
        settings = ScoreSettings(hidden=(4,), base={"components": 1, "hidden": (4,), "star_passes": 300})  # type: ignore[arg-type]
        save_model(build_model("score", settings, Ball((0.0, 0.0, 0.0), 4.0), stars, seed=1), path)
        return (path / "model.safetensors").read_bytes()

    def case(self, kind: str) -> str:
        """Make a case, have it read, and tell how that ended: ``read`` or ``refused``.

        Raises:
            Exception: Whatever was raised that is no `GalrayError`; that is a fault of galray.
        """
        make: Callable[[], None] = getattr(self, f"_read_{kind.replace(' ', '_')}")
        try:
            make()
        except GalrayError:
            return "refused"
        return "read"

    def outside(self) -> list[Path]:
        """Files that have appeared outside the folders in which cases are read."""
        return [p for p in self.folder.iterdir() if p.name not in ("inside", "whole")]

    # Cases -------------------------------------------------------------------------------------------------

    def _read_configuration(self) -> None:
        import tomli_w

        from galray.config import load_config, to_toml
        from galray.rundir import RunDirectory

        content = json.loads(json.dumps(self._config))
        content["output"] = str(self.folder / "inside" / "runs")
        for _ in range(self.random.choice((1, 1, 2, 4))):
            self._mutate(content)
        path = self.folder / "inside" / "case.toml"
        try:
            text = tomli_w.dumps(content).encode("utf-8", errors="surrogatepass")
        except (TypeError, ValueError):
            text = tomli_w.dumps(self._config).encode()
        path.write_bytes(self._bent(text) if self.random.random() < 0.3 else text)
        config = load_config(path)
        assert load_config(self._rewritten(path, to_toml(config))).hash == config.hash
        RunDirectory(config).check()

    def _rewritten(self, path: Path, text: str) -> Path:
        path.write_text(text, encoding="utf-8")
        return path

    def _read_manifest(self) -> None:
        from galray.catalog import ShardStore, sky, verify

        content = json.loads(json.dumps(self._whole_manifest))
        for _ in range(self.random.choice((1, 1, 2, 4))):
            self._mutate(content)
        text = json.dumps(content).encode(errors="surrogatepass")
        store = self.folder / "inside" / "store"
        if not store.is_dir():
            shutil.copytree(self._store, store)
        (store / "manifest.json").write_bytes(self._bent(text) if self.random.random() < 0.2 else text)
        opened = ShardStore(store)
        verify(opened, checksums=False)
        assert opened.ball is None or opened.ball.radius > 0
        assert opened.frame.sun_radius > 0
        assert opened.row_account is not None
        opened.states()
        opened.draw_states(1)
        sky.compute(sky.counts(opened))

    def _read_table_header(self) -> None:
        from galray.catalog import open_source

        head, _, rest = self._table.partition(b"\n")
        names = head.split(b",")
        choice = self.random.random()
        if choice < 0.3:
            names[self.random.randrange(len(names))] = self.random.choice(
                (b"", b"source_id", b'"', b'"a""b"', b"\xff\xfe", b"a" * 3000, b"null", b"\x00", b"ra;dec")
            )
        elif choice < 0.5:
            self.random.shuffle(names)
            names = names[: self.random.randrange(len(names) + 1)]
        text = b",".join(names) + b"\n" + rest
        if choice > 0.4:
            yaml = (
                b"# %ECSV 1.0\n# ---\n# delimiter: ','\n# datatype:\n# - {name: source_id, datatype: int64}\n"
            )
            text = (self._bent(yaml) if choice > 0.7 else yaml) + text
        path = self.folder / "inside" / self.random.choice(("case.csv", "case.ecsv", "case.csv.gz"))
        path.write_bytes(self._bent(text) if self.random.random() < 0.4 else text)
        source = open_source(path)
        for _ in source.batches([name for name in ("source_id", "ra") if name in source.names]):
            pass

    def _read_weights_header(self) -> None:
        from galray.phasespace import load_model
        from galray.training.store import FILE, load_checkpoint

        broken = self.random.choice(("weights", "weights", "description", "both"))
        content = self._weights if broken == "description" else self._broken_weights()
        folder = self.folder / "inside" / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "whole" / "model", folder)
        (folder / "model.safetensors").write_bytes(content)
        if broken != "weights":
            described = json.loads((folder / "model.json").read_text())
            self._mutate(described)
            (folder / "model.json").write_text(json.dumps(described))
        (folder / FILE).write_bytes(content)
        with contextlib.suppress(GalrayError):
            load_checkpoint(folder)
        load_model(folder)

    def _broken_weights(self) -> bytes:
        size = struct.unpack("<Q", self._weights[:8])[0]
        header, body = json.loads(self._weights[8 : 8 + size]), self._weights[8 + size :]
        for _ in range(self.random.choice((1, 1, 3))):
            self._mutate(header)
        text = json.dumps(header).encode(errors="surrogatepass")
        length = size if self.random.random() < 0.1 else len(text)
        content = struct.pack("<Q", length) + text + body
        return self._bent(content) if self.random.random() < 0.3 else content

    # Mutations ---------------------------------------------------------------------------------------------

    def _mutate(self, content: Any) -> None:
        """Change one thing somewhere in nested lists and dictionaries."""
        while True:
            keys = list(content) if isinstance(content, dict) else list(range(len(content)))
            if not keys:
                return
            key = self.random.choice(keys)
            inner = content[key]
            if isinstance(inner, (dict, list)) and inner and self.random.random() < 0.85:
                content = inner
                continue
            break
        how = self.random.random()
        if how < 0.15:
            del content[key]
        elif how < 0.3 and isinstance(content, dict):
            content[self.random.choice((f"{key}x", "__proto__", "../x", str(key).upper()))] = content.pop(key)
        elif how < 0.4 and isinstance(inner, (int, float)) and not isinstance(inner, bool):
            content[key] = self.random.choice((-inner, inner * 1e-9, inner + 0.5, str(inner)))
        else:
            content[key] = copy.deepcopy(self.random.choice(WILD))

    def _bent(self, text: bytes) -> bytes:
        """Some bytes changed, cut off, doubled or put in."""
        changed = bytearray(text)
        for _ in range(self.random.choice((1, 2, 8))):
            place = self.random.randrange(len(changed) + 1)
            how = self.random.random()
            if how < 0.4 and place < len(changed):
                changed[place] = self.random.randrange(256)
            elif how < 0.6:
                del changed[place:]
            elif how < 0.8:
                changed[place:place] = self.random.choice(
                    (b"\x00", b"\xff\xff", b"\n\n", b'"', b"[[[[", b"{")
                )
            else:
                changed[place:place] = changed[: self.random.randrange(60)]
        return bytes(changed)
