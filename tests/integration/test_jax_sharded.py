"""Eight devices of JAX's own making: sharded steps are the unsharded ones, and no weight travels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sets import SETS


@pytest.fixture(scope="module")
def report():
    flags = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
    )
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("jax_sharded_steps.py")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


LAYOUTS = ("first", "second")
SPLIT = ("chain", "apply_updates", "sphere")  # what shard_map can split
CASES = [f"jit, {layout}, {name}" for layout in LAYOUTS for name in (*SPLIT, "hyperball")]
CASES += [f"shard_map, {layout}, {name}" for layout in LAYOUTS for name in SPLIT]
CASES += [f"explicit, {name}" for name in (*SPLIT, "hyperball")] + ["jit, adaptive"]
CASES += [f"sets, {name}" for name in SETS if name not in ("box of arrays", "intersection along two axes")]


@pytest.mark.parametrize("case", CASES)
def test_sharded_steps(report, case):
    found = report[case]
    assert found["error"] <= (1e-5 if "adaptive" in case else 1e-6)
    assert found["sharding kept"]
    assert found["gathers"] == []
    if "chain" in case or "apply_updates" in case:
        assert found["largest norm"] <= 0.9
        assert found["least largest norm"] >= 0.9 * (1 - 1e-5)  # the bound binds in every parameter


def test_every_case_was_tried(report):
    assert sorted(report) == sorted(CASES)
