"""Run SGD, Adam and AdamW with the projection on a CPU, in one numba kernel for all tensors of a group.

This file decides what the kernel takes, and collects what it reads. The kernel is in `cpu_kernel`, which is imported at
the first step, because importing numba takes half a second.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from projgd import metrics
from projgd.axes import Vectors
from projgd.bands import Band
from projgd.constraints import Constraint
from projgd.torch.engines.base import (
    Engine,
    Job,
    add_missing_states,
    betas_of,
    is_alike,
    reasons_not_to_step,
    rows_in_memory,
    state_names,
)
from projgd.torch.metrics import OfStep

if TYPE_CHECKING:
    from projgd.torch.engines.cpu_tables import ShapedTables, Tables

_address, _stride = Tensor.data_ptr, Tensor.stride  # `map` calls methods faster than lambdas


class Cpu(Engine):
    """Update and project on a CPU in one call.

    It is not for every tensor on a CPU: it needs `fused=True` and numba. Without them `eager` takes the tensor.
    """

    name = "cpu"
    steps = True

    def refuses(self, job: Job, p: Tensor) -> str | None:
        return next((reason for is_refused, reason in _reasons(job, p) if is_refused), None)

    def prepare(self, job: Job, params: Sequence[Tensor]) -> _Prepared:
        from projgd.torch.engines.cpu_tables import ShapedTables, Tables

        _hyperparameters(job)  # an error about them must come before a state is added
        names = state_names(job)
        states = [job.optimizer.state[p] for p in params] if names else []
        starting = [k for k, s in enumerate(states) if job.inner is SGD and s.get("momentum_buffer") is None]
        if names:
            for p in params:
                add_missing_states(job, p)
        read = {name: [state[name] for state in states] for name in names}
        # Updates that are shaped go to spare memory first. Row 1 is written at every step. Missing states repeat the
        # last row, so that row 4 is always Adam's v.
        written = [p if job.vectors_of_update(p) is None else torch.empty_like(p) for p in params]
        table = [list(map(_address, x)) for x in (written, params, *(read[k] for k in names if k != "step"))]
        table += [*table[-1:] * (5 - len(table)), list(map(_address, params))]
        sources, bands, rows = _lay_out(job, params)
        counters, update = list(map(_address, read.get("step", []))), job.group.get("update")
        tables: Tables | ShapedTables = (
            Tables(table, counters, rows, bands)
            if update is None
            else ShapedTables(table, counters, rows, bands, update)
        )
        return _Prepared(tables, sources, job.constraint, starting, [read, written, *job.radii.values()])

    def run(self, prepared: _Prepared, job: Job, params: Sequence[Tensor]) -> None:
        if job.skip is not None and job.skip.item() > 0:
            for k in prepared.starting:
                job.optimizer.state[params[k]].pop("momentum_buffer", None)  # it holds no momentum yet
            return
        grads = job.gradients(params)
        scale = getattr(job.optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else float(scale)
        unsettled = prepared.step(job, list(map(_address, grads)), scale)
        torch.autograd.graph.increment_version(params if scale == 1 else [*params, *grads])
        for k in unsettled:
            _project_unsettled(params[k], job)

    def memory(self, job: Job, params: Sequence[Tensor]) -> Any:
        """Return the addresses of parameters and states, and the forms of parameters and gradients.

        None where a state or a gradient is missing, a gradient is sparse, or the process was forked.
        """
        if _forked:
            return None
        names, state, grads = state_names(job), job.optimizer.state, job.gradients(params)
        try:
            found: list[Any] = [list(map(_stride, params)), list(map(_stride, grads)), list(map(_address, params))]
            if names:  # looking up a parameter in a dict runs Python code, so this avoids it if the orders agree
                in_order = len(state) == len(params) and all(map(operator.is_, state, params))
                states: list[Any] = list(state.values()) if in_order else list(map(state.get, params))
                found += [list(map(_address, map(operator.itemgetter(name), states))) for name in names]
        except (KeyError, TypeError, RuntimeError):
            return None
        return names, list(map(id, job.radii.values())), found


def _reasons(job: Job, p: Tensor) -> Iterator[tuple[bool, str]]:
    """Yield pairs: whether the engine refuses a parameter for some reason, and the reason for the user."""
    yield p.device.type != "cpu", ""
    yield p.dtype != torch.float32, f"it takes float32, not {str(p.dtype).removeprefix('torch.')}"
    yield from reasons_not_to_step(job, p)
    yield any(job.group.get(k) for k in ("capturable", "differentiable")), "no graph can record its step"
    known = job.metric is None or (isinstance(job.metric, OfStep) and job.metric.diagonal.entrywise)
    yield not known, "it knows no other metric than √v + ε"
    yield not _is_installed(), 'numba is not installed: pip install "projgd[fast]"'
    yield _forked, "this process was forked from one in which numba's threads had been at work"
    yield not is_alike(p, p), "the parameter is not a dense tensor"
    vectors = job.vectors(p)
    yield (
        rows_in_memory(p, vectors or job.vectors_of_update(p)) is None,
        "the vectors do not lie in memory one after the other",
    )
    band = job.band(p, vectors)
    yield vectors is not None and band is None, f"{job.constraint} is not a set of norms"
    if band is not None and job.metric is not None:
        is_ball = band.pull == 1 and not isinstance(band.low, Tensor) and band.low <= 0
        yield not is_ball, f"in a metric it projects onto a ball, not onto {job.constraint}"


@functools.cache
def _is_installed() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("numba", "numpy"))


_forked = False


def _note_fork() -> None:
    """Note in the child of a fork that the threads of numba are missing.

    Waiting for them would never end.
    """
    global _forked
    numba: Any = sys.modules.get("numba")
    with contextlib.suppress(ValueError):  # numba raises this if it has started no threads
        _forked = _forked or (numba is not None and bool(numba.threading_layer()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@dataclass
class _Prepared:
    """Hold what the engine keeps from step to step.

    Attributes:
        tables: what the kernel reads.
        sources: for each run of bands, its rows in the table of bands, the parameter, and its vectors.
        constraint: the constraint that the bands were made from.
        starting: the parameters whose momentum starts with this step.
        kept: tensors and radii that are known by address or identity; keeping them here keeps both unique.
    """

    tables: Tables | ShapedTables
    sources: list[_Source]
    constraint: Constraint | None
    starting: list[int]
    kept: list[Any]

    def step(self, job: Job, grads: list[int], scale: float) -> list[int]:
        """Run the kernel on gradients at these addresses; return the parameters that need `_project_unsettled`."""
        tables = self.tables
        if job.constraint is not self.constraint:
            for rows, p, vectors in self.sources:
                tables.bands[rows] = _numbers(job.band(p, vectors), vectors)
            self.constraint = job.constraint
        read = _hyperparameters(job)
        if job.inner is SGD:
            *sgd, tables.rates[:, 0] = read
            tables.rates[self.starting, 0] = 1
            self.starting = []
            return tables.run(grads, (*sgd, scale), None, None)
        return tables.run(grads, None, (*read, scale), None if job.metric is None else float(job.group["eps"]))


def _hyperparameters(job: Job) -> tuple[float, ...]:
    """Return the hyperparameters as `cpu_kernel` reads them; for SGD last the share of a gradient in its momentum."""
    group = job.group
    lr, decay, sign = float(group["lr"]), float(group["weight_decay"]), -1.0 if group["maximize"] else 1.0
    if job.inner is SGD:
        return lr, float(group["momentum"]), decay, sign, float(group["nesterov"]), 1 - float(group["dampening"])
    kind = float(group.get("decoupled_weight_decay", job.inner is AdamW)), float(group["amsgrad"])
    return lr, *betas_of(group), float(group["eps"]), decay, sign, *kind


_EVERY_NORM = [(0.0, math.inf, 1.0, 1.0, 1.0)]
_Source = tuple[slice, Tensor, Vectors]


def _lay_out(job: Job, params: Sequence[Tensor]) -> tuple[list[_Source], list[Any], list[Any]]:
    """Return the sources of the bands, the bands, and the rows of each tensor as `cpu_kernel.cut_tiles` reads them."""
    sources: list[_Source] = []
    bands: list[Any] = []
    rows: list[Any] = []
    places: dict[Any, tuple[int, int]] = {}
    for p in params:
        vectors, shaped = job.vectors(p), job.vectors_of_update(p)
        count, length = rows_in_memory(p, vectors or shaped) or (0, 0)
        key: Any = vectors if shaped is None and p not in job.radii else id(p)
        if (vectors or shaped) is not None and key not in places:
            numbers = _EVERY_NORM if vectors is None else _numbers(job.band(p, vectors), vectors)
            if shaped is not None and len(numbers) < count:  # the update has numbers for each vector, too
                numbers = numbers * count
            places[key] = len(bands), int(len(numbers) > 1)
            if vectors is not None:
                sources.append((slice(len(bands), len(bands) + len(numbers)), p, vectors))
            bands += numbers
        rows.append((count, length, *places.get(key, (-1, 0))))
    return sources, bands, rows


def _numbers(band: Band | None, vectors: Vectors) -> list[tuple[float, ...]]:
    """Return the numbers of a band, or one row of numbers per vector, in the order of memory, if they differ."""
    assert band is not None
    numbers = band.low, band.high, band.up, band.down, band.pull
    if not any(isinstance(n, Tensor) for n in numbers):
        return [numbers]
    kept = [1 if a in vectors.axes else n for a, n in enumerate(vectors.shape)]
    columns = [torch.as_tensor(n, dtype=torch.float64).expand(kept).reshape(-1).tolist() for n in numbers]
    return list(zip(*columns, strict=True))


@torch.no_grad()
def _project_unsettled(p: Tensor, job: Job) -> None:
    """Project a parameter that the kernel could not, because its metric is out of range."""
    vectors, band = job.vectors(p), job.band(p)
    diagonal = None if job.metric is None else job.metric(p)
    if vectors is not None and band is not None and diagonal is not None:
        x, diagonal = (t.reshape(vectors.shape) for t in (p, diagonal))
        p.copy_(metrics.project_band(x, diagonal, band, vectors.axes).reshape(p.shape))
