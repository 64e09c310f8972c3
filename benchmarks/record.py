"""Keep figures on disk: `benchmarks/results/NAME.json`, and the table and the plot made from it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numba", "triton", "jax", "optax", "keras", "numpy")
Row = dict[str, Any]


def machine(threads: int) -> dict[str, object]:
    """Return what the figures depend on: processor, threads and how they wait, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names) or None,
        "threads": threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def described(machine: dict[str, object], rows: Sequence[Row]) -> str:
    """Return the machine in one line, and how busy it was; the runs themselves keep `threads` cores busy."""
    versions = ", ".join(f"{k} {machine[k]}" for k in ("python", *PACKAGES) if machine[k])
    loads = sorted(row["load"] for row in rows)
    load = f"Load average {loads[0]:.0f} to {loads[-1]:.0f}, median {loads[len(loads) // 2]:.0f}"
    threads = f"{machine['threads']} threads, OMP_WAIT_POLICY {machine['OMP_WAIT_POLICY']}"
    return f"{machine['processor']}, {machine['cores']} cores, {threads}; {versions}. {load}."


def merged(path: Path, here: dict[str, object], rows: list[Row], key: Sequence[str]) -> list[Row]:
    """Return `rows` with those on disk that have another `key`, if the same machine and versions made them.

    The result is written to disk, too. Each row says how busy the machine was, as a load average over the last minute.
    """
    rows = [{**row, "load": round(os.getloadavg()[0], 1)} for row in rows]
    kept = []
    if path.exists():
        record = json.loads(path.read_text())
        new = {tuple(row[k] for k in key) for row in rows}
        if record["machine"] == here:
            kept = [row for row in record["rows"] if tuple(row[k] for k in key) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in kept + rows)
    path.write_text(f'{{"machine": {json.dumps(here)},\n "rows": [\n  {lines}\n]}}\n')
    return kept + rows
