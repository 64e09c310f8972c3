"""Define what an engine is, the job that it gets, and the engine that takes everything: `Reference`.

An engine applies the constraint of a param group to parameters in place. An engine with `steps` also runs the
optimizer's update. `projgd.torch.routing` has the table of engines, best first, and chooses among them.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from projgd import metrics
from projgd.axes import Vectors
from projgd.bands import Band
from projgd.constraints import Constraint
from projgd.entries import EntrySet
from projgd.projections import project_interval
from projgd.sums import FLOATS, FloatType
from projgd.torch.metrics import Metric
from projgd.updates import Update
from projgd.values import Values

PLAIN = (Tensor, torch.nn.Parameter)
"""The classes of plain tensors, which are neither sharded nor wrapped."""


def has_numbers(p: Tensor) -> bool:
    """Return whether a tensor has numbers to project: it has entries, and is no meta or fake tensor without memory."""
    return p.numel() > 0 and not p.is_meta and not isinstance(p, FakeTensor)


_address, _stride = Tensor.data_ptr, Tensor.stride


@dataclass(frozen=True)
class Job:
    """Describe what an engine has to do for one param group at one step.

    Attributes:
        optimizer: the optimizer that steps; engines read its state.
        inner: its class, without the projection.
        group: the param group, with the current hyperparameters.
        constraint: the set that is projected onto; None for a free group.
        metric: the diagonal metric of the step; None for the Euclidean one.
        radii: the initial norms that a set has taken, by parameter.
        skip: GradScaler's count of gradients with inf or NaN: if it is positive, the step changes nothing. None without
            a GradScaler.
        forced: the name of the engine that the user names; None for the best one.
        compiled: whether torch.compile traces the step.
        params: the parameters of the job: those of the group, or some of them.
        shared: the ids of parameters that share memory with another one. Each of them is projected by itself, after all
            have been updated.
    """

    optimizer: Optimizer
    inner: type[Optimizer]
    group: Mapping[str, Any]
    constraint: Constraint | None
    metric: Metric | None = None
    radii: Mapping[Tensor, Tensor] = field(default_factory=dict)
    skip: Tensor | None = None
    forced: str | None = None
    compiled: bool = False
    params: Sequence[Tensor] = ()
    shared: frozenset[int] = frozenset()
    _gradients: dict[int, list[Any]] = field(default_factory=dict, repr=False)

    def gradients(self, params: Sequence[Tensor]) -> list[Any]:
        """Return the gradients of parameters.

        One list of parameters is read only once, because reading the gradients of many small tensors takes time.

        Args:
            params: some of the parameters, in the same list at every call.

        Returns:
            One gradient or None for each parameter.
        """
        if id(params) not in self._gradients:
            self._gradients[id(params)] = [p.grad for p in params]
        return self._gradients[id(params)]

    def vectors(self, p: Tensor) -> Vectors | None:
        """Return the vectors of a parameter that the constraint applies to; None for a parameter that is free."""
        return None if self.constraint is None else self.constraint.resolve(tuple(p.shape), "out_first")

    def vectors_of_update(self, p: Tensor) -> Vectors | None:
        """Return the vectors along which the update of a parameter is shaped; None for one that stays as it is."""
        update: Update | None = self.group.get("update")
        return None if update is None else update.resolve(tuple(p.shape), "out_first", beside=self.constraint)

    def bound(self, p: Tensor) -> Constraint:
        """Return the constraint of a parameter, with the radii that were taken from it."""
        assert self.constraint is not None
        return self.constraint.bind(self.radii[p]) if p in self.radii else self.constraint

    def band(self, p: Tensor, vectors: Vectors | None = None) -> Band | None:
        """Return the band of a parameter whose weights a step has just moved.

        Args:
            p: the parameter.
            vectors: its vectors; default None, which looks them up.

        Returns:
            The band; None for a free parameter and for a set that is not a set of norms.
        """
        vectors = vectors or self.vectors(p)
        if self.constraint is None or vectors is None:
            return None
        if p in self.radii:
            return self.bound(p).band(float_kind(p.dtype), vectors, moved=True)
        return band_of(self.constraint, p.dtype, vectors)


class Engine(ABC):
    """Apply a constraint to parameters in place.

    An engine has no state. What it keeps from step to step is what `prepare` returns.

    Attributes:
        name: its name in `optimizer.routes()` and `engine=`.
        steps: whether it runs the optimizer's update, too.
    """

    name: ClassVar[str]
    steps: ClassVar[bool] = False

    @abstractmethod
    def refuses(self, job: Job, p: Tensor) -> str | None:
        """Return why this engine cannot take a parameter; None if it can.

        Args:
            job: the job of the param group.
            p: one of its parameters.

        Returns:
            A sentence for the user; an empty one if the engine is for other situations, which the user need not read
            about.
        """

    def prepare(self, job: Job, params: Sequence[Tensor]) -> Any:
        """Return what the engine keeps from step to step.

        Args:
            job: the job of the param group.
            params: parameters that the engine does not refuse.

        Returns:
            Any object; default None.
        """
        return None

    @abstractmethod
    def run(self, prepared: Any, job: Job, params: Sequence[Tensor]) -> None:
        """Update (if the engine `steps`) and project parameters in place.

        Args:
            prepared: what `prepare` returned for the same parameters.
            job: the job of the param group.
            params: the parameters.
        """

    def memory(self, job: Job, params: Sequence[Tensor]) -> Any:
        """Return what has to be the same at the next step for `prepared` to stay valid; None if it never stays valid.

        The default is the addresses and the forms of the parameters, and the forms of their gradients.

        Args:
            job: the job of the param group.
            params: the parameters.

        Returns:
            An object to compare, or None.
        """
        forms = form_of_gradients(job.gradients(params))
        if all(type(p) in PLAIN for p in params):
            return forms, list(map(_address, params)), list(map(_stride, params)), [p.shape for p in params]
        return forms, [(type(p), p.shape, (p.data_ptr(), p.stride()) if type(p) in PLAIN else None) for p in params]


class Reference(Engine):
    """Project with the functions of the core, one parameter after the other."""

    name = "reference"

    def refuses(self, job: Job, p: Tensor) -> str | None:
        return None

    def run(self, prepared: None, job: Job, params: Sequence[Tensor]) -> None:
        small = [p for p in params if p.numel() <= SMALL] if _clamps_alike(job) else []
        kinds = {p.dtype for p in small if _can_clamp(p, job)}
        for kind in kinds:
            some = [p for p in small if p.dtype == kind and _can_clamp(p, job)]
            assert isinstance(job.constraint, EntrySet)
            least, most = job.constraint.interval(some[0], (), xp)
            if least != -math.inf:
                torch._foreach_clamp_min_(some, least)
            if most != math.inf:
                torch._foreach_clamp_max_(some, most)
        for p in params:
            if p.dtype not in kinds or p.numel() > SMALL or not _can_clamp(p, job):
                project_by_reference(p, job)


SMALL = 2**14
"""Parameters with so many entries are clamped in one call for all: one call for each would take longer."""


def _clamps_alike(job: Job) -> bool:
    """Return whether the set of a job is one interval of two numbers for all entries of a dtype."""
    constraint = job.constraint
    arrays = [getattr(constraint, key) for key in constraint.arrays] if constraint is not None else []
    is_alike = isinstance(constraint, EntrySet) and constraint.axis == "entries" and not constraint.takes_initial
    return is_alike and not any(isinstance(end, Values) for end in arrays)


def project_by_reference(p: Tensor, job: Job) -> None:
    """Project `p` in place, unless GradScaler skips the step."""
    vectors = job.vectors(p)
    if vectors is None:
        return
    constraint = job.bound(p)
    if isinstance(constraint, EntrySet) and _can_clamp(p, job):
        clamp_(p, job, vectors)
        return
    w = p.clone() if torch.is_grad_enabled() else p  # autograd needs the value before the projection
    x = w.reshape(vectors.shape)
    projection = constraint.onto(x, vectors.axes, xp, moved=True)
    if job.metric is not None and not (_can_look(x) and bool((projection == x).logical_or_(x != x).all())):
        # Vectors that the Euclidean projection does not move are in the set, in every metric.
        diagonal = job.metric(p)
        if diagonal is not None:
            repeat = _until_done if _can_look(x) else None
            projection = constraint.onto_in(diagonal.reshape(vectors.shape), x, vectors.axes, xp, repeat)
    projection = projection.reshape(p.shape)
    if job.skip is not None:  # `where` runs on the device; reading `skip` would wait for it
        projection = torch.where(job.skip.to(p.device) > 0, p, projection)
    p.copy_(projection)


def _can_clamp(p: Tensor, job: Job) -> bool:
    """Return whether no graph follows the projection, and no flag decides about it."""
    is_plain = type(p) in PLAIN and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return is_plain and job.skip is None


PIECE = 2**17
"""This many entries, with their bounds, stay in a cache."""


def clamp_(p: Tensor, job: Job, vectors: Vectors) -> None:
    """Project a tensor onto a set of entries in place, without a second array of its size.

    Args:
        p: the tensor.
        job: the job, whose constraint is an `EntrySet`.
        vectors: the vectors of the tensor.
    """
    constraint, initial = job.bound(p), job.radii.get(p)
    assert isinstance(constraint, EntrySet)
    ends: tuple[Any, Any] = (None, None)
    if initial is None:
        ends = least, most = constraint.interval(p.reshape(vectors.shape), vectors.axes, xp)
        if isinstance(least, float) and isinstance(most, float):
            p.clamp_(None if least == -math.inf else least, None if most == math.inf else most)
            return
    if not p.ndim or tuple(p.shape) != vectors.shape:
        p.copy_(constraint.onto(p.reshape(vectors.shape), vectors.axes, xp).reshape(p.shape))
        return
    height = max(1, PIECE * len(p) // p.numel())
    for start in range(0, len(p), height):
        rows = slice(start, start + height)
        if initial is None:
            least, most = (t[rows] if isinstance(t, Tensor) and t.ndim == p.ndim and len(t) > 1 else t for t in ends)
            if isinstance(least, Tensor) and isinstance(most, Tensor) and not _has_zero(constraint):
                torch.clamp(p[rows], least, most, out=p[rows])
                continue
            q = project_interval(p[rows], least, most, xp)
        else:
            q = constraint.bind(initial.reshape(_kept(p, constraint, vectors))[rows]).onto(p[rows], vectors.axes, xp)
        p[rows].copy_(q)


@functools.lru_cache(maxsize=256)
def _has_zero(constraint: Constraint) -> bool:
    """Return whether some bound is 0, or so small that it is rounded to 0: `torch.clamp` may then change its sign."""
    ends = [getattr(constraint, key) for key in constraint.arrays]
    arrays = [torch.frombuffer(bytearray(e.data), dtype=torch.float64) for e in ends if isinstance(e, Values)]
    numbers = [torch.tensor(end, dtype=torch.float64, device="cpu") for end in ends if isinstance(end, float)]
    return any(bool((n.abs() < FLOATS["float16"].smallest).any()) for n in arrays + numbers if n.numel())


def _kept(p: Tensor, constraint: Constraint, vectors: Vectors) -> list[int]:
    """Return the shape of what a set has taken from the initial weights."""
    return [1 if a in vectors.axes and not constraint.keeps_entries else n for a, n in enumerate(p.shape)]


def _can_look(x: Tensor) -> bool:
    """Return whether reading a number back is free: an accelerator would wait, and a graph cannot read it."""
    return type(x.data) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _until_done(body: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """Run steps until one is done, or `STEPS` of them."""
    nu = start
    for _ in range(metrics.STEPS):
        nu, done = body(nu)
        if bool(done):
            break
    return nu


def form_of_gradients(grads: Sequence[Tensor | None]) -> list[Any]:
    """Return the strides or layouts of gradients, on which engines decide whether they take a parameter."""
    return [g if g is None else g.stride() if g.layout is torch.strided else g.layout for g in grads]


STEPPED = (SGD, Adam, AdamW)
"""Optimizers whose update some engine runs."""


def reasons_not_to_step(job: Job, p: Tensor) -> Iterator[tuple[bool, str]]:
    """Yield what keeps any engine from stepping a parameter, each with a sentence for the user."""
    yield job.inner not in STEPPED, f"it runs SGD, Adam and AdamW, not {job.inner.__name__}"
    yield job.group.get("gradient") is not None, "it takes the gradient as it comes"
    yield type(p) not in PLAIN or not p.numel(), f"the parameter is a {type(p).__name__} of {p.numel()} entries"
    yield id(p) in job.shared, "the parameter shares memory with another one"
    yield job.compiled, "torch.compile makes a graph of its own"
    yield not job.group.get("fused"), "fused=True was not passed"
    yield p.grad is not None and p.grad.layout != torch.strided, "the gradient is sparse"
    yield p.grad is not None and not is_alike(p.grad, p), "the gradient does not lie in memory as the parameter does"
    reason = reason_of_states(job, p)
    yield bool(reason), reason


def reason_of_states(job: Job, p: Tensor) -> str:
    """Return why no engine can step a parameter with the states that it has; an empty string if one can."""
    state, names = job.optimizer.state.get(p, {}), state_names(job)
    found = {k: state[k] for k in names if state.get(k) is not None}
    if len(found) not in (0, len(names)):
        return f"the optimizer's state has only {', '.join(found)}"
    count = found.pop("step", None)
    is_usual = isinstance(count, Tensor) and (count.dtype, count.device, count.shape) == (torch.float32, p.device, ())
    if count is not None and not is_usual:
        return "the step count is not a float32 tensor, as that of fused=True is"
    return "" if all(is_alike(t, p) for t in found.values()) else "a state does not lie in memory as the parameter does"


def state_names(job: Job) -> list[str]:
    """Return the names of the states that engines step with, in the order in which kernels read them."""
    if job.inner is SGD:
        return ["momentum_buffer"] if job.group["momentum"] != 0 else []
    return ["step", "exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(job.group["amsgrad"])


def betas_of(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return Adam's betas as floats; raise ValueError for another number of them."""
    if len(group["betas"]) != 2:
        raise ValueError(f"betas={group['betas']!r}: pass two numbers, such as (0.9, 0.999)")
    first, second = group["betas"]
    return float(first), float(second)


def add_missing_states(job: Job, p: Tensor) -> None:
    """Add the states that the optimizer would make; a momentum of -0.0, to which the first gradient adds exactly."""
    state, count = job.optimizer.state[p], torch.empty((), dtype=torch.float32, device=p.device)
    for name in state_names(job):
        if state.get(name) is None:
            value = -0.0 if name == "momentum_buffer" else 0.0
            state[name] = torch.full_like(count if name == "step" else p, value)


def first_that_takes(engines: Sequence[Engine], job: Job, p: Tensor) -> tuple[Engine | None, dict[str, str]]:
    """Return the first engine that does not refuse a parameter, and why those before it do.

    Args:
        engines: the engines, best first.
        job: the job of the param group.
        p: the parameter.

    Returns:
        The engine, or None if all refuse it; and the reasons by the engine's name.
    """
    refusals: dict[str, str] = {}
    for engine in engines:
        reason = engine.refuses(job, p)
        if reason is None:
            return engine, refusals
        refusals[engine.name] = reason
    return None, refusals


def project_with(engines: Sequence[Engine], job: Job, params: Sequence[Tensor]) -> None:
    """Project tensors that are parts of parameters, each with the first engine that takes it.

    Args:
        engines: the engines, best first.
        job: the job of the param group.
        params: the tensors.
    """
    taken: dict[str, tuple[Engine, list[Tensor]]] = {}
    for p in params:
        engine, refusals = first_that_takes(engines, job, p)
        assert engine is not None, refusals
        taken.setdefault(engine.name, (engine, []))[1].append(p)
    for engine, some in taken.values():
        engine.run(engine.prepare(job, some), job, some)


def float_kind(dtype: torch.dtype) -> FloatType:
    """Return the `FloatType` of a dtype."""
    return FLOATS[str(dtype).removeprefix("torch.")]


@functools.lru_cache(maxsize=4096)
def band_of(constraint: Constraint, dtype: torch.dtype, vectors: Vectors) -> Band | None:
    """Return `constraint.band` for weights that a step has just moved, from a cache."""
    return constraint.band(float_kind(dtype), vectors, moved=True)


def rows_in_memory(p: Tensor, vectors: Vectors | None) -> tuple[int, int] | None:
    """Return (count, length) if the memory of `p` is `count` vectors one after the other, each one contiguous run.

    Convolutions in channels-last memory are such rows, too.

    Args:
        p: a tensor.
        vectors: its vectors; None makes it one run.

    Returns:
        Two ints; None for memory with gaps, and for vectors that are not contiguous.
    """
    if vectors is not None and vectors.shape != tuple(p.shape):  # a `Split` has cut an axis
        if not p.is_contiguous():
            return None
        shape, stride = vectors.shape, _strides(vectors.shape)
    else:
        shape, stride = tuple(p.shape), p.stride()
    return rows_of(shape, stride, tuple(range(len(shape))) if vectors is None else vectors.axes)


def rows_of(shape: Sequence[int], stride: Sequence[int], axes: tuple[int, ...]) -> tuple[int, int] | None:
    """Return (count, length) if the slices along `axes` are rows in memory, in the order of their indices.

    Args:
        shape: the shape of a tensor.
        stride: its strides, in entries.
        axes: the non-negative axes of one row.

    Returns:
        Two ints; None for other memory.
    """
    expected, length, is_along, kept = 1, 1, True, []
    for a in sorted((a for a in range(len(shape)) if shape[a] != 1), key=lambda a: stride[a]):
        if stride[a] != expected or (a in axes and not is_along):
            return None
        expected *= shape[a]
        if a in axes:
            length *= shape[a]
        else:
            is_along = False
            kept.append(a)
    return (expected // max(length, 1), length) if 0 not in shape and kept == sorted(kept, reverse=True) else None


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides)) if shape else ()


def is_alike(a: Any, p: Tensor) -> bool:
    """Return whether a gradient or a state has the dtype, device, shape and memory layout of `p`."""
    return (
        type(a) in PLAIN
        and a.layout == torch.strided
        and (a.dtype, a.device, a.shape, a.stride()) == (p.dtype, p.device, p.shape, p.stride())
        and not a.is_neg()
    )
