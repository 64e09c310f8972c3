"""The fused step on a CPU: what `kernels.cpu` needs to know of an optimizer, gathered and checked at every step.

A `Plan` holds what stays from step to step. Addresses are read anew every time; a plan is made anew when anything but
the addresses of gradients has changed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import SGD

from projgd import projections
from projgd.axes import Vectors
from projgd.constraints import Constraint, MaxNorm
from projgd.torch import path
from projgd.torch.kernels import cpu, plan
from projgd.torch.optimizers import Projected
from projgd.torch.project import project_params
from projgd.torch.settings import constraint_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LIKE = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),  # numba has no bfloat16
}
_launch = threading.Lock()  # numba's simplest thread pool cannot be entered twice
_ready: set[torch.dtype] = set()


@dataclass
class Batch:
    """The tensors of a group that one kernel call takes: those of one dtype."""

    params: list[Tensor]
    places: list[int]  # of their gradients among those of the group
    states: list[dict[str, Tensor]]
    names: list[str]  # of the states that the kernel reads, one a row of the table from the third on
    addresses: list[list[int]]  # of these states
    shapes: list[Vectors | None]
    table: npt.NDArray[np.int64]
    counters: npt.NDArray[np.int64]
    layouts: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.int64]
    left: npt.NDArray[np.float64]
    factors: npt.NDArray[np.float64]
    limits: npt.NDArray[np.float64]
    ranges: npt.NDArray[np.int64]
    c: Any = None  # that the limits are for

    def in_place(self) -> bool:
        """Whether the states are where they were when the batch was made."""
        try:
            return self.addresses == [[s[name].data_ptr() for s in self.states] for name in self.names]
        except KeyError:
            return False


@dataclass
class Plan:
    """What is known of a group: valid while its `_key` is the same and the states have not moved."""

    key: tuple[Any, ...]
    batches: list[Batch]
    covered: set[int]  # ids of the parameters in the batches


def step(optimizer: Projected) -> list[dict[str, Any]]:
    """Step and project all that the kernels cover. Returns what is left for the eager path, as groups."""
    constraints = [constraint_of(group) for group in optimizer.param_groups]  # a bad c raises before the first write
    plans: list[Plan | None] = vars(optimizer).setdefault("_plans", [])
    plans += [None] * (len(constraints) - len(plans))
    work: list[tuple[dict[str, Any], Batch, list[Tensor]]] = []
    rest = []
    for i, (group, constraint) in enumerate(zip(optimizer.param_groups, constraints, strict=True)):
        known = None
        if path.of_group(group, constraint):
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            known = plans[i]
            key = _key(optimizer, group, constraint, params, grads)
            if known is None or known.key != key or not all(b.in_place() for b in known.batches):
                known = plans[i] = _plan(optimizer, group, constraint, params, grads)
            for batch in known.batches:
                _limit(batch, constraint)
                work.append((group, batch, [grads[j] for j in batch.places]))
        if known is None or len(known.covered) < len(group["params"]):
            rest.append(_without(group, known.covered if known else set()))
    for group, batch, grads in work:
        _run(optimizer, group, batch, grads)
    return [group for group in rest if group["without_grad"] or any(p.grad is not None for p in group["params"])]


def _key(
    optimizer: Projected,
    group: dict[str, Any],
    constraint: Constraint | None,
    params: list[Tensor],
    grads: list[Tensor],
) -> tuple[Any, ...]:
    return (
        constraint is None,
        getattr(constraint, "axis", None),
        group.get("momentum", 0) != 0,
        group.get("amsgrad"),
        list(map(id, optimizer.state.values())),
        list(map(id, params)),
        [p.data_ptr() for p in params],
        [g.stride() if g.layout is torch.strided else None for g in grads],
    )


def _plan(
    optimizer: Projected,
    group: dict[str, Any],
    constraint: Constraint | None,
    params: list[Tensor],
    grads: list[Tensor],
) -> Plan:
    sgd = optimizer.inner is SGD
    if sgd:
        names = ["momentum_buffer"] if group["momentum"] != 0 else []
    else:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
    places: dict[torch.dtype, list[int]] = {}
    for j, (p, g) in enumerate(zip(params, grads, strict=True)):
        if path.of_param(p, g, constraint) and _has_usual_state(optimizer, p, names):
            places.setdefault(p.dtype, []).append(j)
    batches = []
    for chosen in places.values():
        mine = [params[j] for j in chosen]
        fresh = [p for p in mine if not optimizer.state.get(p)]
        if names and fresh:  # the optimizer's own way to make a state
            inner: Any = optimizer
            inner._init_group({**group, "params": fresh}, *([] for _ in range(3 if sgd else 6)))
        starts = [False] * len(mine)
        if sgd and names:
            for i, (p, j) in enumerate(zip(mine, chosen, strict=True)):
                starts[i] = optimizer.state[p].get("momentum_buffer") is None
                if starts[i]:
                    optimizer.state[p]["momentum_buffer"] = torch.empty_like(grads[j])
        batches.append(_batch(optimizer, constraint, mine, chosen, names, starts))
    covered = {id(p) for batch in batches for p in batch.params}
    return Plan(_key(optimizer, group, constraint, params, grads), batches, covered)


def _batch(
    optimizer: Projected,
    constraint: Constraint | None,
    params: list[Tensor],
    places: list[int],
    names: list[str],
    starts: list[bool],
) -> Batch:
    shapes = [None if constraint is None else constraint.resolve(tuple(p.shape), "out_first") for p in params]
    layouts = [plan.layout_of(p, v) or (1, 1, 1, p.numel()) for p, v in zip(params, shapes, strict=True)]
    tiles, left = plan.tiles(layouts, [v is None for v in shapes])
    states = [optimizer.state[p] for p in params] if names else []
    addresses = [[s[name].data_ptr() for s in states] for name in names]
    weights = [p.data_ptr() for p in params]
    table = np.array([weights, weights, *addresses, *[weights] * (3 - len(names))], dtype=np.int64)
    counters = [s["step"].data_ptr() for s in states if "step" in s]
    factors = np.zeros((len(params), 2))
    factors[:, 0] = starts
    return Batch(
        params=params,
        places=places,
        states=states,
        names=names,
        addresses=addresses,
        shapes=shapes,
        table=table,
        counters=np.array(counters, dtype=np.int64),
        layouts=np.array(layouts, dtype=np.int64),
        tiles=tiles,
        left=np.empty(left),
        factors=factors,
        ranges=np.empty(0, dtype=np.int64),
        limits=np.full((len(params), 3), np.inf),
    )


def _has_usual_state(optimizer: Projected, p: Tensor, names: list[str]) -> bool:
    """Whether `p` has no state yet, or one that the optimizer would have made for it."""
    state = optimizer.state.get(p)
    if not names or not state:
        return True
    if "momentum_buffer" in names:
        buffer = state.get("momentum_buffer")
        return buffer is None or path.alike(buffer, p)
    counter = state.get("step")
    counted = isinstance(counter, Tensor) and (counter.dtype, counter.device.type) == (torch.float32, "cpu")
    return counted and all(name in state and path.alike(state[name], p) for name in names)


def _limit(batch: Batch, constraint: Constraint | None) -> None:
    """Bring the guard bands up to date with c."""
    if not isinstance(constraint, MaxNorm) or batch.c == constraint.c:
        return
    known: dict[Vectors, tuple[float, float, float]] = {}
    for k, (p, vectors) in enumerate(zip(batch.params, batch.shapes, strict=True)):
        if vectors is None:
            continue
        if vectors not in known:
            kind = projections.float_type(p)
            bands = projections.ball_limits(kind, vectors.shape, vectors.axes, float(constraint.c), np)
            known[vectors] = bands.threshold, bands.target, 0.0
        batch.limits[k] = known[vectors]
    batch.c = constraint.c


def _run(optimizer: Projected, group: dict[str, Any], batch: Batch, grads: list[Tensor]) -> None:
    batch.table[1] = [g.data_ptr() for g in grads]
    kind = cpu.SGD if optimizer.inner is SGD else cpu.ADAM
    h = np.array([float(x) for x in (_sgd_numbers(group) if kind == cpu.SGD else _adam_numbers(group))])
    dtype = batch.params[0].dtype
    first = contextlib.nullcontext() if dtype in _ready else _alone()
    with _launch, first, _threads() as threads:
        if len(batch.ranges) != threads + 1:
            batch.ranges = plan.ranges(batch.tiles, threads)
        cpu.run(
            kind,
            LIKE[dtype],
            batch.table,
            batch.counters,
            batch.layouts,
            batch.tiles,
            batch.ranges,
            batch.limits,
            h,
            batch.factors,
            batch.left,
        )
    _ready.add(dtype)
    if kind == cpu.SGD:
        batch.factors.fill(0)
    for k in np.flatnonzero(batch.limits[:, 2] == 1):
        batch.limits[k, 2] = 0
        project_params([batch.params[k]], constraint_of(group))
    torch.autograd.graph.increment_version(batch.params)


def _sgd_numbers(group: dict[str, Any]) -> tuple[Any, ...]:
    sign = -1 if group["maximize"] else 1
    undamped = 1 - group["dampening"]
    return group["lr"], group["momentum"], undamped, group["weight_decay"], sign, group["nesterov"]


def _adam_numbers(group: dict[str, Any]) -> tuple[Any, ...]:
    sign = -1 if group["maximize"] else 1
    ways = group["decoupled_weight_decay"], group["amsgrad"]
    return (group["lr"], *group["betas"], group["eps"], group["weight_decay"], sign, *ways)


def _without(group: dict[str, Any], covered: set[int]) -> dict[str, Any]:
    """A group without some of its parameters; on a CPU not for torch's own fused kernels, of which the one for SGD is
    wrong for bfloat16 (torch 2.13: by a tenth of the update)."""
    left = [j for j, p in enumerate(group["params"]) if id(p) not in covered]
    fused = group.get("fused") and any(group["params"][j].device.type != "cpu" for j in left)
    return {
        **group,
        "fused": fused,
        **{k: [group[k][j] for j in left] for k in ("params", "param_names") if k in group},
    }


@contextlib.contextmanager
def _threads() -> Iterator[int]:
    """As many threads as torch uses; numba's own setting is put back."""
    before = numba.get_num_threads()
    threads = min(torch.get_num_threads(), cast("Any", numba.config).NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    try:
        yield threads
    finally:
        numba.set_num_threads(before)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time compiles, and the others find the result: numba's index is not made for several writers."""
    directory = cpu.run.stats.cache_path
    if fcntl is None or directory is None:
        yield
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    with (Path(directory) / "projgd.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file releases the lock
