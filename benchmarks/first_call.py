"""Measure the cost of the first projected steps: python -m benchmarks.first_call

One process compiles the kernels, and one finds them on disk. Each takes two steps of `ProjectedSGD`, which compiles
nothing, two with `fused=True`, and two of `ProjectedAdam(fused=True)`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import torch

from benchmarks import record

STEPS = """
import json, time, torch
from projgd.torch import ProjectedAdam, ProjectedSGD
took = []
for cls, fused in ((ProjectedSGD, False), (ProjectedSGD, True), (ProjectedAdam, True)):
    p = torch.ones(64, 64, requires_grad=True)
    p.grad = -torch.ones(64, 64)
    optimizer = cls([p], lr=1e-3, c=1.0, fused=fused)
    for _ in range(2):
        start = time.perf_counter()
        optimizer.step()
        took.append(time.perf_counter() - start)
print(json.dumps(took))
"""


def main() -> None:
    ways = ("SGD, default", "SGD, fused", "Adam, fused")
    lines = ["| | " + " | ".join(f"{way}: first step | second" for way in ways) + " |", "|---" * 7 + "|"]
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        for what in ("nothing on disk", "kernels on disk"):
            done = subprocess.run([sys.executable, "-c", STEPS], env=environment, stdout=subprocess.PIPE, check=True)
            rows.append({"what": what, "seconds": json.loads(done.stdout)})
            cells = [f"{1e3 * s:.3g} ms" if s < 1 else f"{s:.1f} s" for s in rows[-1]["seconds"]]
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    print(text)
    here, out = record.machine(torch.get_num_threads()), record.RESULTS / "first_call"
    rows = record.merged(out.with_suffix(".json"), here, rows, ("what",))
    out.with_suffix(".md").write_text(f"{text}\n\n{record.described(here, rows)}\n")


if __name__ == "__main__":
    main()
