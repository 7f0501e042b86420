"""Run every benchmark, one process each: ``python -m benchmarks [--quick]``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
codes = {name: subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]) for name in names}
print("\n".join(f"{name:<20} {'bars hold' if code == 0 else f'exit {code}'}" for name, code in codes.items()))
sys.exit(max(codes.values(), default=0))
