"""Ensembles through Ray Tune: what it costs beside bare training, what a death costs, what a search finds.

    python -m benchmarks.ensembles [--only members death tune] [--quick]

24 members of a small score network on the disc mock, two at a time; the shorter a member, the more Tune's own
time tells, so members of a minute do better than these of seconds. Bare training is the same members, one
after another in two processes without Ray. On a machine that does other work at the same time both are
slower, by different amounts: the rows of CPU time are free of that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import Bench, main
from galray.provenance import file_hash

FOLDER = Path("runs") / "benchmarks" / "ensembles"
GROUPS = ("members", "death", "tune")
MEMBERS = 24
CPUS = 2

CONFIG = """
name = "{name}"
seed = 5
output = "{output}"
methods = ["score"]

[mock.galaxy]
num_stars = {stars}
ball_radius_kpc = 4.2
mixing_periods = 3
energy_tolerance = 1e-3

[catalog]
num_shards = 4
ball = {{ radius_kpc = 4.0 }}
cuts = {{ parallax_snr = 5.0 }}

[gravity]
baryons = {{ model = "potential" }}
potential = {{ basis = "spline", base = "Rz", base_splines = [5, 7] }}
kernel = {{ radial_nodes = 3, polar_nodes = 8, azimuthal_nodes = 6 }}

[places]
num_profile_points = 5
num_map_points = 5

[score]
coordinates = "cylindrical"
hidden = [32, 32]
base = {{ components = 2, hidden = [16], star_passes = 4e4, batch_size = 512 }}

[training.score]
epochs = {epochs}
batch_size = 512
learning_rate = {rate}

[ensemble]
score = {{ seeds = {seeds}, bootstraps = {others}, draws = {others} }}

[cluster]
num_cpus = 2
object_store_mb = 200

[tracking]
enabled = false
"""


def _config(name: str, quick: bool, *, rate: float = 3e-3, extra: str = "") -> Path:
    """Write a configuration, in a folder named by its content: what was measured before is found again."""
    size = {"stars": 12_000, "epochs": 3} if quick else {"stars": 30_000, "epochs": 100}
    others = MEMBERS // 4
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = CONFIG.format(
        name=name, output=FOLDER.resolve(), seeds=MEMBERS - 2 * others, others=others, rate=rate, **size
    )
    path = FOLDER / f"{name}.toml"
    path.write_text(text + extra)
    return path


def _start(*words: str, log: Path) -> subprocess.Popen[bytes]:
    """One of the works of `_ensemble_work` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as stream:
        command = [sys.executable, "-m", "benchmarks._ensemble_work", *words]
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)


def _end(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"see {log}:\n{log.read_text()[-2000:]}")


def _prepare(name: str, quick: bool) -> tuple[Path, Path, Path]:
    """The configuration with its stars made; configuration, run directory, log."""
    from galray.config import load_config
    from galray.pipeline import Pipeline

    path = _config(name, quick)
    pipeline = Pipeline(load_config(path, ["cluster.enabled=false"]), overwrite=True)
    pipeline.run(until="catalog")
    return path, pipeline.folder, FOLDER / f"{name}.log"


def _bare(path: Path, folder: Path, log: Path) -> list[dict[str, float]]:
    """Seconds and CPU seconds of every member without Ray, two processes side by side."""
    found = sorted((folder / "bare").glob("[0-9]*.json"))
    if len(found) < MEMBERS:
        for process in [_start("bare", str(path), str(k), str(CPUS), log=log) for k in range(CPUS)]:
            _end(process, log)
        found = sorted((folder / "bare").glob("[0-9]*.json"))
    return [json.loads(file.read_text()) for file in found]


def _name(name: str, quick: bool) -> str:
    return f"{name}-quick" if quick else name


def _members(bench: Bench) -> None:
    path, folder, log = _prepare(_name("members", bench.quick), bench.quick)
    bare = _bare(path, folder, log)
    if not (folder / "driven.json").is_file():
        shutil.rmtree(folder / "members", ignore_errors=True)
        _end(_start("drive", str(path), log=log), log)
    driven = json.loads((folder / "driven.json").read_text())
    rows = driven["rows"]
    total = sum(one["seconds"] for one in bare)
    cpu = sum(one["cpu_seconds"] for one in bare)
    tuned = sum(row["cpu_seconds"] for row in rows)
    what = f"{MEMBERS} members of {cpu / MEMBERS:.1f} CPU-s on {CPUS} cores"
    bench.row(
        f"{what}: wall / (bare / {CPUS})", driven["members"] / (total / CPUS), bar=1.3, cpu_seconds=tuned
    )
    bench.row(f"{what}: CPU of the members / bare", tuned / cpu, cpu_seconds=tuned)
    bench.row(f"{what}: wall, Ray running", driven["members"], "s", cpu_seconds=tuned)
    bench.row(f"{what}: sum of bare training / {CPUS}", total / CPUS, "s", cpu_seconds=cpu)
    bench.row(f"{what}: start of Ray and of the driver", driven["start"], "s", cpu_seconds=0)
    bench.row(f"{what}: processes that ran them", len({row["pid"] for row in rows}), bar=CPUS, cpu_seconds=0)
    bench.row(f"{what}: finished", sum(r["status"] == "finished" for r in rows), bar=MEMBERS, at_least=True)
    same = [_hash(folder / "bare", k) == _hash(folder / "members", k) for k in range(MEMBERS)]
    bench.row(f"{what}: same numbers as bare", sum(same), bar=MEMBERS, at_least=True, cpu_seconds=0)


def _hash(folder: Path, number: int) -> str:
    return file_hash(folder / f"{number:03d}" / "evaluation.safetensors")


def _marks(folder: Path) -> int:
    """Members that came to their end."""
    return len(list((folder / "members").glob("[0-9][0-9][0-9]/result.json")))


def _death(bench: Bench) -> None:
    """One member's process killed, then the driver; started again, it ends with the members of no death.

    Short members: what is looked at is who runs twice, and whether the numbers are the same.
    """
    path, folder, log = _prepare("death", quick=True)
    _bare(path, folder, log)
    for name in ("members", "starts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    process = _start("drive", str(path), log=log)
    while _marks(folder) < 3:
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.2)
    running = [mark for mark in (folder / "starts").iterdir() if not mark.suffix and _open(mark)]
    os.kill(int(running[0].read_text().split()[-1]), signal.SIGKILL)
    while _marks(folder) < 10:
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.2)
    process.kill()
    process.wait()
    before = _marks(folder)
    time.sleep(5)  # what the driver had started ends by itself
    _end(_start("drive", str(path), log=log), log)
    rows = json.loads((folder / "driven.json").read_text())["rows"]
    starts = [len(mark.read_text().split()) for mark in (folder / "starts").iterdir() if not mark.suffix]
    same = [_hash(folder / "bare", k) == _hash(folder / "members", k) for k in range(MEMBERS)]
    what = "a member's process and the driver killed"
    bench.row(f"{what}: members in the end", len(rows), bar=MEMBERS, at_least=True)
    bench.row(
        f"{what}: finished before, found again", sum(row["reused"] for row in rows), bar=before, at_least=True
    )
    bench.row(f"{what}: finished before, and run again", _run_again(folder, rows), bar=0)
    bench.row(f"{what}: starts beyond one a member", sum(starts) - MEMBERS, bar=1 + CPUS)
    bench.row(f"{what}: members with the numbers of no death", sum(same), bar=MEMBERS, at_least=True)


def _run_again(folder: Path, rows: list[dict[str, object]]) -> int:
    """Members found finished by the second driver that one of its processes started all the same."""
    second = {str(row["pid"]) for row in rows if not row["reused"]}
    found = (folder / "starts" / str(row["id"]) for row in rows if row["reused"])
    return sum(bool(second & set(mark.read_text().split())) for mark in found)


def _open(mark: Path) -> bool:
    return not mark.with_name(f"{mark.name}.done").is_file()


def _tune(bench: Bench) -> None:
    """A search from a learning rate that learns nothing, beside the best of a grid over the same range."""
    from galray.config import load_config
    from galray.tuning import tune

    low, high, trials = 1e-6, 5e-2, 8
    key = "training.score.learning_rate"
    search = {"low": low, "high": high, "log": "true"}
    values = ", ".join(f"{name} = {value}" for name, value in search.items())
    grid = np.geomspace(3e-4, high, 8).round(6).tolist()
    losses = {}
    for name, space in (("search", f"{{ {values} }}"), ("grid", grid)):
        extra = (
            f'\n[tune]\ntrials = {trials}\nasha = false\nsearch = "optuna"\n[tune.space]\n"{key}" = {space}\n'
        )
        rate = low if name == "search" else grid[0]
        path = _config(_name(f"tune-{name}", bench.quick), True, rate=rate, extra=extra)
        losses[name] = tune(load_config(path), overwrite=True)
    found, best = losses["search"], losses["grid"].trials[0]
    mine, theirs = (np.load(trial.folder / "held_out.npy") for trial in (found.trials[0], best))
    difference = float(np.mean(mine - theirs))
    error = float(np.std(mine - theirs, ddof=1) / np.sqrt(len(mine)))
    what = f"search of {trials} trials from {key.split('.')[-1]} = {low:g}"
    bench.row(f"{what}: held-out loss gained", found.gain, cpu_seconds=0)
    bench.row(
        f"{what}: above the best of a grid, in standard errors", difference / error, bar=2.0, cpu_seconds=0
    )
    bench.row(
        f"{what}: seconds of training", sum(trial.seconds for trial in found.trials), "s", cpu_seconds=0
    )


def measure(bench: Bench) -> None:
    chosen = bench.options.only or GROUPS
    bench.keep_others()
    for group in chosen:
        {"members": _members, "death": _death, "tune": _tune}[group](bench)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="these groups alone")


if __name__ == "__main__":
    main("ensembles", measure, add_options)
