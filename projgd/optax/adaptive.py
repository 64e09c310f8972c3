"""An optax optimizer with a projection in its own metric.

An optimizer that steps by x - α D⁻¹ m keeps in its state the second moment that D is made of, but not the decay, the
bias correction and the ε that make it. So D is not computed here, but measured. The optimizer's update is evaluated
again, at zero parameters, for a tiny gradient, from a state with two changes: its momentum is zero, and its second
moment is set so that the update makes it what it has just become. The result is that gradient times α D⁻¹, whatever the
formula is, and wherever in a chain the scaling stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from projgd import metrics
from projgd.optax.projection import ProjectionState, make_projection, project_update, projection, resolve_at
from projgd.optax.tree import (
    Constraints,
    LeafConstraint,
    Schedule,
    Transformation,
    find_structure,
    is_absent,
    map_leaves,
)
from projgd.optax.xla import add_update, project_leaf, store_update

Diagonal = Callable[[Any, Any], Any]
"""`(state after the step, parameters) -> D`, a tree like the parameters: for an optimizer that is not known here."""

PROBE = 2.0**-60  # its square is a normal float32 and far below every second moment that is not 0


class Recipe(NamedTuple):
    """How to change a state before D is measured.

    Attributes:
        restored: the fields that D is made of.
        cleared: the fields that the update adds to the gradient's part.
    """

    restored: tuple[str, ...]
    cleared: tuple[str, ...]


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
    """State of `projected(..., metric="adaptive")`.

    Attributes:
        inner: the optimizer's own state.
        projection: the projection's state.
    """

    inner: Any
    projection: ProjectionState


def projected(
    tx: optax.GradientTransformation,
    constraint: Constraints | Schedule,
    metric: str | Diagonal = "euclidean",
) -> Transformation:
    """Return the optimizer `tx` with a projection after every update.

    w ← argmin over the set of Σ D_i (w_i - y_i)², where y are the weights after the update of `tx`.

    Args:
        tx: a whole optimizer, learning rate included.
        constraint: as in `projection`.
        metric: `"euclidean"`, the default, is `optax.chain(tx, projection(constraint))`: D = 1. `"adaptive"` takes the
            diagonal D that `tx` divides its step by, without which projected Adam does not end at the constrained
            optimum. D is found for Adam, AdamW, NAdam, RAdam, Adamax, AMSGrad, Yogi, AdaBelief, Adan, AdEMAMix,
            NovoGrad, RMSprop, Adagrad and Adadelta, also inside chain, masked, partition, inject_hyperparams and
            MultiSteps. Or a function `(state of tx after the step, parameters) -> D`, a tree like the parameters; one
            positive factor per array does not matter.

    Transformations before the scaling must hand a tiny gradient on in proportion, as clipping and weight decay do;
    centralisation and normalisation do not. Second-moment decays of 0 have no memory to read D from.

    Returns:
        An optax transformation. Its `update` needs the parameters.

    Raises:
        TypeError: `tx` is no optimizer.
        ValueError: an unknown metric; at `init`, a constrained parameter without a second moment in the state of `tx`.

    >>> import jax.numpy as jnp, optax
    >>> from projgd import MaxNorm
    >>> tx = projected(optax.adam(0.1), MaxNorm(1.0), metric="adaptive")
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"kernel": jnp.asarray([[3.0], [1.0]])}, state, params)
    >>> optax.apply_updates(params, updates)["kernel"].round(2)  # the Euclidean projection: 0.71, 0.71
    Array([[0.78],
           [0.62]], dtype=float32)

    References:
        J. Duchi, E. Hazan, Y. Singer, *Adaptive subgradient methods*, JMLR 12, 2011, section 1; S. Reddi, S. Kale,
        S. Kumar, *On the convergence of Adam and beyond*, ICLR 2018, algorithm 2.
    """
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise TypeError(f"projected() takes an optax optimizer such as optax.adam(1e-3), not {tx!r}")
    if metric == "euclidean":
        return optax.chain(tx, projection(constraint))
    if not callable(metric) and metric != "adaptive":
        raise ValueError(f'metric={metric!r} is not known: pass "euclidean", "adaptive", or a function to D')
    inner: Any = optax.with_extra_args_support(tx)
    last = make_projection(_move, constraint)

    def init(params: Any) -> ProjectedState:
        state = ProjectedState(inner.init(params), last.init(params))
        if not callable(metric) and jax.tree.leaves(params):  # `optax.tree_map_params` asks without parameters
            _check_found(state.inner, params, resolve_at(constraint, params, state.projection))
        return state

    def update(updates: Any, state: ProjectedState, params: Any = None, **extra: Any) -> tuple[Any, ProjectedState]:
        updates = jax.tree.map(jnp.asarray, updates)  # Python numbers have no dtype
        moved, after = inner.update(updates, state.inner, params, **extra)

        def diagonal() -> Any:
            if callable(metric):
                return metric(after, params)
            return _measure(inner, state.inner, after, updates, params, extra)

        projected, projecting = last.update(moved, state.projection, params, diagonal=diagonal)
        return projected, ProjectedState(after, projecting)

    return Transformation(init, update)


def _move(updates: Any, params: Any, leaves: list[LeafConstraint | None], diagonal: Callable[[], Any]) -> Any:
    """Change the updates so that they end in the set, at the nearest points in the metric of a diagonal.

    What the Euclidean projection does not move is in the set, and then no diagonal is needed.
    """
    outside = []

    def look(u: jax.Array, p: jax.Array, leaf: LeafConstraint) -> jax.Array:
        u = store_update(u)
        point = add_update(p, u)
        outside.append(jnp.any((project_leaf(point, leaf, moved=False)[0] != point) & ~jnp.isnan(point)))
        return u.astype(jnp.promote_types(u.dtype, p.dtype))

    def in_metric() -> Any:
        found = zip(leaves, jax.tree.leaves(diagonal(), is_leaf=is_absent), strict=True)
        metric = {leaf.name: d for leaf, d in found if leaf}

        def project(x: jax.Array, leaf: LeafConstraint) -> jax.Array:
            d = leaf.view(jnp.broadcast_to(metric[leaf.name], x.shape))
            q: jax.Array = leaf.constraint.onto_in(d, leaf.view(x), leaf.vectors.axes, jnp, _loop)
            return q.reshape(x.shape)

        return map_leaves(lambda u, p, leaf: project_update(u, p, leaf, project), updates, params, leaves)

    free = map_leaves(look, updates, params, leaves)
    return jax.lax.cond(jnp.any(jnp.stack(outside)), in_metric, lambda: free) if outside else free


def _loop(body: Callable[[Any], tuple[Any, Any]], start: Any) -> Any:
    def step(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        nu, _, steps = state
        return *body(nu), steps + 1

    going = jax.lax.while_loop(lambda s: ~s[1] & (s[2] < metrics.STEPS), step, (start, jnp.asarray(False), 0))
    return going[0]


def _measure(tx: Any, before: Any, after: Any, updates: Any, params: Any, extra: Any) -> Any:
    """Return the D of the update that led from the state `before` to `after`, a tree like the parameters."""
    tiny = jax.tree.map(lambda u: jnp.full_like(u, PROBE, dtype=_wide(u.dtype)), updates)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def next_state(state: Any) -> Any:
        return tx.update(tiny, _prepare(before, state), zeros, **extra)[1]

    # An update decays the moment v, and may add to it: f·v + a. Two tries tell from which v it comes to be `after`.
    first = next_state(after)
    nearer = jax.tree.map(_scale_in_proportion, after, first)
    start = jax.tree.map(_secant, after, after, first, nearer, next_state(nearer))
    response, _ = tx.update(tiny, _prepare(before, start), zeros, **extra)
    return jax.tree.map(lambda r: 1 / jnp.abs(r), response)


def _prepare(before: Any, wanted: Any) -> Any:
    """Return the state `before` with the fields that `RECIPES` name cleared, or restored from `wanted`."""

    def one(b: Any, w: Any) -> Any:
        if not _has_recipe(b):
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
                fields[name] = _prepare(old, new)
        return type(b)(**fields)

    return jax.tree.map(one, before, wanted, is_leaf=_has_recipe)


def _scale_in_proportion(wanted: Any, reached: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(wanted), jnp.floating):
        return wanted
    wanted = wanted.astype(_wide(wanted.dtype))
    return jnp.where(reached == 0, wanted, wanted * (wanted / jnp.where(reached == 0, 1, reached)))


def _secant(wanted: Any, x0: Any, y0: Any, x1: Any, y1: Any) -> Any:
    """Return the x at which the line through (x0, y0) and (x1, y1) reaches `wanted`, or 0 if that has another sign."""
    if not jnp.issubdtype(jnp.result_type(wanted), jnp.floating):
        return wanted
    slope = (y1 - y0) / jnp.where(x1 == x0, 1, x1 - x0)
    better = x1 + (wanted - y1) / jnp.where(slope == 0, 1, slope)
    return jnp.where((x1 == x0) | (slope == 0), x1, jnp.where(better * x1 < 0, 0, better))


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _has_recipe(node: Any) -> bool:
    return type(node).__name__ in RECIPES


def _find_known(state: Any) -> list[Any]:
    """Return the states that have a recipe in a tree of states, outer ones before those inside them."""
    found = [node for node in jax.tree.leaves(state, is_leaf=_has_recipe) if _has_recipe(node)]
    return found + [inner for node in found for field in node for inner in _find_known(field)]


def _check_found(state: Any, params: Any, leaves: list[LeafConstraint | None]) -> None:
    """Raise ValueError for a constrained parameter without a second moment in the optimizer's state."""
    has_moment = [False] * len(leaves)
    nodes = _find_known(state)
    for node in nodes:
        for name in RECIPES[type(node).__name__].restored:
            moment = getattr(node, name)
            if find_structure(moment) == find_structure(params):
                moments = jax.tree.leaves(moment, is_leaf=is_absent)
                has_moment = [has or not is_absent(m) for has, m in zip(has_moment, moments, strict=True)]
    missing = [leaf.name for leaf, has in zip(leaves, has_moment, strict=True) if leaf and not has]
    if missing:
        known = ", ".join(dict.fromkeys(type(node).__name__ for node in nodes)) or "none that is known here"
        raise ValueError(
            f'metric="adaptive": the state of the optimizer has no second moment for {", ".join(missing[:5])} (its '
            f"states: {known}). Leave these parameters free, use an optimizer such as optax.adam, pass "
            'metric="euclidean" (for optax.sgd it is the same), or as metric a function (state, params) -> D'
        )
