"""What of a checkout travels with a job: the files that git tracks, as they lie there now, and no others."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from galray.errors import GalrayError

__all__ = ["MOST_BYTES", "pack_source"]

MOST_BYTES = 50 << 20
"""More than that is data, which lies where all nodes reach it."""

_SECRET_NAME = re.compile(
    r"(^|/)(\.env(\..*)?|\.netrc|\.pgpass|auth_token|credentials(\.json)?|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|p12|key))$"
)
_SECRET_TEXT = re.compile(rb"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----")


def pack_source(folder: Path, source: Path) -> int:
    """Copy the source of an installation into a folder.

    Of a git checkout these are the tracked files with the changes that are not committed; of an installed
    package, which has no git, the package alone.

    Arguments:
        folder: Where they go.
        source: The package's folder, ``galray``.

    Returns:
        Number of files.

    Raises:
        GalrayError: A file looks like a secret, leads out of the checkout, or there is too much.
    """
    top = source.parent
    names = _tracked(top)
    if names is None:
        names = [
            str(path.relative_to(top))
            for path in sorted(source.rglob("*"))
            if "__pycache__" not in path.parts
        ]
    paths = {name: top / name for name in names if (top / name).is_file()}
    for name, path in paths.items():
        if not path.resolve().is_relative_to(top.resolve()):
            raise GalrayError(f"{path}: a link that leads out of {top}", "take it out of the checkout")
        if _SECRET_NAME.search(name) or _SECRET_TEXT.search(path.read_bytes()):
            raise GalrayError(
                f"{path}: looks like a secret, and a job's files are open to all who may look",
                "take it out of git, and give the nodes a role or a secret of the cluster",
            )
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise GalrayError(
            f"{top}: {sum(sizes.values()) >> 20} MiB of tracked files, at most {MOST_BYTES >> 20} travel; "
            f"the largest is {largest}",
            "keep data out of git, where all nodes reach it",
        )
    for name, path in paths.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return len(paths)


def _tracked(top: Path) -> list[str] | None:
    """Names of the files that git tracks in a checkout; None where it is none."""
    if not (top / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(top), "ls-files", "-z"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise GalrayError(f"{top}: git does not list its files: {error}", "install git") from None
    return [name for name in done.stdout.decode().split("\0") if name]
