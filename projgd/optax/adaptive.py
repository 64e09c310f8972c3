"""An optax optimizer with a projection in its own metric.

An optimizer that steps by x - α D⁻¹ m keeps in its state the second moment that D is made of, but not the decay, the
bias correction and the ε that make it. So D is not computed here: the optimizer is asked. Its update is evaluated
again, from a state whose second moment is set so that it becomes what it has just become, whose momentum is zero, at
zero parameters, for a tiny gradient. What comes out is that gradient times α D⁻¹, whatever the formula is, and wherever
in a chain the scaling stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from projgd import metrics
from projgd.optax.layouts import absent
from projgd.optax.projection import ProjectionState, bind, map_leaves, projection
from projgd.optax.tree import Constraints, LeafConstraint, resolve
from projgd.optax.xla import add, as_stored, difference, rounded

Diagonal = Callable[[Any, Any], Any]
"""`(state after the step, parameters) -> D`, a tree like the parameters: for an optimizer that is not known here."""

PROBE = 2.0**-60  # its square is a normal float32 and far below every second moment that is not 0


class Recipe(NamedTuple):
    """What to do with a state before asking for D."""

    restored: tuple[str, ...]  # fields that D is made of
    cleared: tuple[str, ...]  # fields that the update adds to the gradient's part


# By the names of the states, which are not all in every version of optax.
RECIPES = {
    "ScaleByAdamState": Recipe(("nu",), ("mu",)),  # also of scale_by_adamax, scale_by_yogi, scale_by_radam
    "ScaleByAmsgradState": Recipe(("nu_max",), ("mu", "nu")),
    "ScaleByBeliefState": Recipe(("nu",), ("mu",)),
    "ScaleByNovogradState": Recipe(("nu",), ("mu",)),
    "ScaleByAdanState": Recipe(("n",), ("m", "v", "g")),
    "ScaleByAdemamixState": Recipe(("nu",), ("m1", "m2")),
    "ScaleBySimplifiedAdEMAMixState": Recipe(("n",), ("m",)),
    "ScaleByRmsState": Recipe(("nu",), ()),
    "ScaleByRmsWithCountState": Recipe(("nu",), ()),
    "ScaleByRssState": Recipe(("sum_of_squares",), ()),
    "ScaleByRStdDevState": Recipe(("mu", "nu"), ()),
    "ScaleByRStdDevWithCountState": Recipe(("mu", "nu"), ()),
    "ScaleByAdaDeltaState": Recipe(("e_g",), ()),
    "TraceState": Recipe((), ("trace",)),
    "EmaState": Recipe((), ("ema",)),
    "MultiStepsState": Recipe((), ("acc_grads",)),
}


class ProjectedState(NamedTuple):
    """State of `projected(..., metric="adaptive")`: the optimizer's own, and the projection's."""

    inner: Any
    projection: ProjectionState


def projected(
    tx: optax.GradientTransformation,
    constraint: Constraints | Callable[[Any], Constraints],
    metric: str | Diagonal = "euclidean",
) -> optax.GradientTransformationExtraArgs:
    """The optimizer `tx` with a projection after every update.

    Args:
        tx: a whole optimizer, learning rate included.
        constraint: as in `projection`.
        metric: `"euclidean"` is `optax.chain(tx, projection(constraint))`. `"adaptive"` is nearest in the norm
            Σ D_i w_i² of the diagonal D that `tx` divides its step by, without which projected Adam does not end at the
            constrained optimum (Duchi, Hazan & Singer, JMLR 2011; Reddi, Kale & Kumar, ICLR 2018, algorithm 2). D is
            found for Adam, AdamW, NAdam, RAdam, Adamax, AMSGrad, Yogi, AdaBelief, Adan, AdEMAMix, NovoGrad, RMSprop,
            Adagrad and Adadelta, also inside chain, masked, partition, inject_hyperparams and MultiSteps. Or a function
            `(state of tx after the step, parameters) -> D`, a tree like the parameters; one positive factor per array
            does not matter.

    What stands before the scaling must hand a tiny gradient on in proportion, as clipping and weight decay do;
    centralisation and normalisation do not. Second-moment decays of 0 have no memory to read D from.

    Raises:
        TypeError: `tx` is no optimizer.
        ValueError: an unknown metric; at `init`, a constrained parameter without a second moment in the state of `tx`,
            or a set without a projection in this metric.

    >>> import jax.numpy as jnp, optax
    >>> from projgd import MaxNorm
    >>> tx = projected(optax.adam(0.1), MaxNorm(1.0), metric="adaptive")
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"kernel": jnp.asarray([[3.0], [1.0]])}, state, params)
    >>> optax.apply_updates(params, updates)["kernel"].round(2)  # the Euclidean projection: 0.71, 0.71
    Array([[0.78],
           [0.62]], dtype=float32)
    """
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise TypeError(f"projected() takes an optax optimizer such as optax.adam(1e-3), not {tx!r}")
    last = projection(constraint)
    if metric == "euclidean":
        return optax.chain(tx, last)
    if not callable(metric) and metric != "adaptive":
        raise ValueError(f'metric={metric!r} is not known: pass "euclidean", "adaptive", or a function to D')
    inner: Any = optax.with_extra_args_support(tx)
    at = constraint if callable(constraint) else lambda count: constraint

    def init(params: Any) -> ProjectedState:
        state = inner.init(params)
        projecting = last.init(params)
        constraints = resolve(at(projecting.count), params)
        for leaf in constraints:
            if leaf:
                leaf.constraint.check_metric("adaptive")
        if not callable(metric):
            _check_found(state, params, constraints)
        return ProjectedState(state, projecting)

    def update(updates: Any, state: ProjectedState, params: Any = None, **extra: Any) -> tuple[Any, ProjectedState]:
        if params is None:
            raise ValueError("a projection needs the parameters: call tx.update(grads, state, params)")
        moved, after = inner.update(updates, state.inner, params, **extra)
        constraints = bind(resolve(at(state.projection.count), params), params, state.projection)
        euclidean, projecting = last.update(moved, state.projection, params)
        outside = []

        def in_metric() -> Any:
            tree = (
                metric(after, params) if callable(metric) else _ask(inner, state.inner, after, updates, params, extra)
            )
            found = zip(constraints, jax.tree.leaves(tree, is_leaf=absent), strict=True)
            of = {leaf.name: d for leaf, d in found if leaf}
            project = lambda u, p, leaf: _project_update(u, p, leaf, of[leaf.name])  # noqa: E731
            return map_leaves(project, moved, params, constraints)

        trees = (jax.tree.leaves(tree, is_leaf=absent) for tree in (moved, params, euclidean))
        for u, p, projected, leaf in zip(*trees, constraints, strict=True):
            if leaf and not absent(u):
                point = add(p, as_stored(u))
                outside.append(jnp.any((add(p, projected) != point) & ~jnp.isnan(point)))
        if outside:  # what the Euclidean projection leaves alone is in the set, in whatever metric
            euclidean = jax.lax.cond(jnp.any(jnp.stack(outside)), in_metric, lambda: euclidean)
        return euclidean, ProjectedState(after, projecting)

    return optax.GradientTransformationExtraArgs(init, update)


def _project_update(u: jax.Array, p: jax.Array, leaf: LeafConstraint, metric: jax.Array) -> jax.Array:
    """The update that `optax.apply_updates` takes from p to the projection of p + u in the metric."""
    shape, axes = leaf.vectors.shape, leaf.vectors.axes
    point = add(p, as_stored(u))
    d = jnp.broadcast_to(metric, p.shape).reshape(shape)
    q = leaf.constraint.onto_in(d, point.reshape(shape), axes, jnp, _loop)
    return difference(rounded(q.reshape(p.shape)), p, jnp.promote_types(u.dtype, p.dtype))


def _loop(body: Callable[[Any], tuple[Any, Any]], start: Any) -> Any:
    def step(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        nu, _, steps = state
        return *body(nu), steps + 1

    going = jax.lax.while_loop(lambda s: ~s[1] & (s[2] < metrics.STEPS), step, (start, jnp.asarray(False), 0))
    return going[0]


def _ask(tx: Any, before: Any, after: Any, updates: Any, params: Any, extra: Any) -> Any:
    """D of the update that led from the state `before` to `after`, a tree like the parameters."""
    tiny = jax.tree.map(lambda u: jnp.full_like(u, PROBE, dtype=_wide(u.dtype)), updates)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def reached(state: Any) -> Any:
        return tx.update(tiny, _prepared(before, state), zeros, **extra)[1]

    # An update decays what it finds, and may add to it: f·v + a. Two tries say from where it comes to be `after`.
    there = reached(after)
    nearer = jax.tree.map(_in_proportion, after, there)
    start = jax.tree.map(_secant, after, after, there, nearer, reached(nearer))
    response, _ = tx.update(tiny, _prepared(before, start), zeros, **extra)
    return jax.tree.map(lambda r: 1 / jnp.abs(r), response)


def _prepared(before: Any, wanted: Any) -> Any:
    """The state `before`, its fields cleared and restored as `RECIPES` say, the latter from `wanted`."""

    def one(b: Any, w: Any) -> Any:
        if not _known(b):
            return b
        restored, cleared = RECIPES[type(b).__name__]
        fields = {}
        for name in b._fields:
            old, new = getattr(b, name), getattr(w, name)
            if name in cleared:
                fields[name] = jax.tree.map(lambda a: jnp.zeros_like(a, dtype=_wide(a.dtype)), old)
            elif name in restored:
                fields[name] = jax.tree.map(lambda a: a.astype(_wide(a.dtype)), new)
            else:
                fields[name] = _prepared(old, new)
        return type(b)(**fields)

    return jax.tree.map(one, before, wanted, is_leaf=_known)


def _in_proportion(wanted: Any, reached: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(wanted), jnp.floating):
        return wanted
    wanted = wanted.astype(_wide(wanted.dtype))
    return jnp.where(reached == 0, wanted, wanted * (wanted / jnp.where(reached == 0, 1, reached)))


def _secant(wanted: Any, x0: Any, y0: Any, x1: Any, y1: Any) -> Any:
    """The x at which the line through (x0, y0) and (x1, y1) is as `wanted`, but not on the other side of 0."""
    if not jnp.issubdtype(jnp.result_type(wanted), jnp.floating):
        return wanted
    slope = (y1 - y0) / jnp.where(x1 == x0, 1, x1 - x0)
    better = x1 + (wanted - y1) / jnp.where(slope == 0, 1, slope)
    return jnp.where((x1 == x0) | (slope == 0), x1, jnp.where(better * x1 < 0, 0, better))


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _known(node: Any) -> bool:
    return type(node).__name__ in RECIPES


def _nodes(state: Any) -> list[Any]:
    """The states in a tree of them that have a recipe, outer ones before those inside them."""
    found = [node for node in jax.tree.leaves(state, is_leaf=_known) if _known(node)]
    return found + [inner for node in found for field in node for inner in _nodes(field)]


def _check_found(state: Any, params: Any, constraints: list[LeafConstraint | None]) -> None:
    structure: Any = jax.tree.structure(params, is_leaf=absent)
    found = [False] * len(constraints)
    nodes = _nodes(state)
    for node in nodes:
        for name in RECIPES[type(node).__name__].restored:
            moment = getattr(node, name)
            if jax.tree.structure(moment, is_leaf=absent) == structure:
                leaves = jax.tree.leaves(moment, is_leaf=absent)
                found = [seen or not absent(leaf) for seen, leaf in zip(found, leaves, strict=True)]
    missing = [leaf.name for leaf, seen in zip(constraints, found, strict=True) if leaf and not seen]
    if missing:
        has = ", ".join(dict.fromkeys(type(node).__name__ for node in nodes)) or "no second moment that is known here"
        raise ValueError(
            f'metric="adaptive": the state of the optimizer has no second moment for {", ".join(missing[:5])} (it has '
            f'{has}). Leave these parameters free, use an optimizer such as optax.adam, pass metric="euclidean" (for '
            "optax.sgd it is the same), or as metric a function (state, params) -> D"
        )
