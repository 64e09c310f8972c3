"""What the first fused step costs: python -m benchmarks.first_call

A process that compiles the kernels, and one that finds them on disk. Each takes one `ProjectedSGD(fused=True)` step,
one of `ProjectedAdam`, and each of them once more.
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
for cls in (ProjectedSGD, ProjectedAdam):
    p = torch.ones(64, 64, requires_grad=True)
    p.grad = -torch.ones(64, 64)
    optimizer = cls([p], lr=1e-3, c=1.0, fused=True)
    for _ in range(2):
        start = time.perf_counter()
        optimizer.step()
        took.append(time.perf_counter() - start)
print(json.dumps(took))
"""


def main() -> None:
    lines = ["| | first step of SGD | second | first step of Adam | second |", "|---" * 5 + "|"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        for what in ("nothing on disk", "kernels on disk"):
            done = subprocess.run([sys.executable, "-c", STEPS], env=environment, stdout=subprocess.PIPE, check=True)
            cells = [f"{1e3 * s:.3g} ms" if s < 1 else f"{s:.1f} s" for s in json.loads(done.stdout)]
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    print(text)
    record.RESULTS.mkdir(exist_ok=True)
    machine = record.described(record.machine(torch.get_num_threads()))
    (record.RESULTS / "first_call.md").write_text(f"{text}\n\n{machine}\n")


if __name__ == "__main__":
    main()
