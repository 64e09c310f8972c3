"""Sets over several arrays as an optax gradient transformation, the last of a chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from projgd.axes import Layout
from projgd.joint import Arithmetic, Joint, JointSet, TreeBall, measure_all, repeat_until_true, run_if_true
from projgd.optax import tree
from projgd.optax.tree import Transformation, is_absent
from projgd.optax.xla import add_update, round_to_dtype, store_update, take_difference

_jax: Any = jax
_enable_x64 = _jax.enable_x64 if hasattr(jax, "enable_x64") else _jax.experimental.enable_x64

Joints = Sequence[Joint | JointSet] | Callable[[Any], Sequence[Joint | JointSet]]
"""Sets over several arrays; or a function from the step (0, 1, …; traced) to them."""


class JointState(NamedTuple):
    """State of `joint_projection` with a function of the step.

    Attributes:
        count: the number of updates so far.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax's own states


def joint_projection(joint: Joints) -> Transformation:
    """Change updates so that several arrays are in a set together after `optax.apply_updates`. Put it last in a chain.

    Sums are taken in float64, whether or not the user has enabled it. Sharded arrays work under `jit`, not inside
    `jax.shard_map`.

    Args:
        joint: sets with members, such as `[ProductMaxNorm(1.5).over("q/lora_a", "q/lora_b")]`, applied in their order;
            or a function from the step (0, 1, …; traced) to such a list. Names are joined by `/`.

    Returns:
        An optax transformation. Its `update` needs the parameters; for `QKClip` also `max_logits={W_q: logits}`, with
        the largest logit of every head (or the logits alone if there is one `QKClip`).

    Raises:
        TypeError: what is no list of sets.
        ValueError: at `init`, a name that no parameter has, or members that do not fit; at `update`, missing logits or
            logits of another shape.

    >>> import jax.numpy as jnp, optax
    >>> from projgd import ProductMaxNorm
    >>> params = {"q": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 3))}}
    >>> tx = optax.chain(optax.sgd(1.0), joint_projection([ProductMaxNorm(1.5).over("q/lora_a", "q/lora_b")]))
    >>> updates, _ = tx.update(jax.tree.map(lambda p: -jnp.ones_like(p), params), tx.init(params), params)
    >>> q = optax.apply_updates(params, updates)["q"]
    >>> round(float(jnp.linalg.norm(q["lora_a"] @ q["lora_b"])), 3)
    1.5
    """
    if not callable(joint):
        _check_list(joint)

    def init(params: Any) -> Any:
        count = jnp.zeros((), jnp.int32)
        _place(joint(count) if callable(joint) else joint, params)
        return JointState(count) if callable(joint) else optax.EmptyState()

    def update(
        updates: Any, state: Any, params: Any = None, *, max_logits: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("a projection needs the parameters: call tx.update(grads, state, params)")
        tree.check_structure(updates, params)
        now = joint(state.count) if callable(joint) else joint
        old = jax.tree.leaves(params, is_leaf=is_absent)
        new = jax.tree.leaves(updates, is_leaf=is_absent)
        placed = _place(now, params)
        members = {i for one in placed for i in one.places if not is_absent(new[i])}
        points = [add_update(p, store_update(new[i])) if i in members else None for i, p in enumerate(old)]
        dtypes = {i: jnp.promote_types(new[i].dtype, old[i].dtype) for i in members}

        def reach(i: int, q: jax.Array) -> jax.Array:
            return add_update(old[i], _shrink(old[i], q, dtypes[i]))

        for i, (before, q) in _move(placed, points, max_logits, reach).items():
            same = new[i].astype(dtypes[i])
            new[i] = jnp.where(q == before, same, _shrink(old[i], q, dtypes[i]))
        after = JointState(optax.safe_increment(state.count)) if callable(joint) else state
        return tree.find_structure(updates).unflatten(new), after

    return Transformation(init, update)


def _shrink(p: jax.Array, q: jax.Array, dtype: Any) -> jax.Array:
    """Return the update from p to q, or to a point beside q that is nearer to 0."""
    return take_difference(q, p, -jnp.abs(q), jnp.abs(q), dtype)


def project_jointly(params: Any, joint: Sequence[Joint | JointSet], max_logits: Any = None) -> Any:
    """Return parameters, moved into sets over several arrays.

    Args:
        params: a tree of parameters.
        joint: sets with members, as in `joint_projection`.
        max_logits: the largest logits for `QKClip`, as in `joint_projection`.

    Returns:
        A tree like `params`.

    Raises:
        TypeError, ValueError: as `joint_projection`.

    >>> import jax.numpy as jnp
    >>> from projgd import TreeBall
    >>> project_jointly({"w": jnp.asarray([3.0]), "v": jnp.asarray([4.0])}, [TreeBall(1.0)])["w"].round(3)
    Array([0.6], dtype=float32)
    """
    leaves = jax.tree.leaves(params, is_leaf=is_absent)
    moved = _move(_place(joint, params), leaves, max_logits)
    return tree.find_structure(params).unflatten([moved[i][1] if i in moved else p for i, p in enumerate(leaves)])


@dataclass(frozen=True)
class _Placed:
    """Hold a set, the positions of its members among the leaves, the name of the first, and how matrices are stored."""

    set: JointSet
    places: tuple[int, ...]
    name: str
    layout: Layout


def _check_list(joint: Any) -> None:
    """Raise TypeError for what is no list of sets over several arrays."""
    if isinstance(joint, (str, Joint, JointSet)) or not isinstance(joint, Sequence):
        raise TypeError(f"joint={joint!r} is not a list: pass one such as [TreeBall(4.0)]")
    for each in joint:
        if not isinstance(each, (Joint, TreeBall)):
            raise TypeError(f"joint= has {each!r}: pass sets with members, such as ProductMaxNorm(1.5).over(a, b)")


def _place(joint: Sequence[Joint | JointSet], params: Any) -> list[_Placed]:
    """Find the members of every set in a tree, and raise an error that names those that do not fit."""
    _check_list(joint)
    leaves = {i: leaf for i, leaf in enumerate(tree.find_leaves(params)) if leaf}
    at, names = list(leaves), [leaf.name for leaf in leaves.values()]
    placed = []
    for each in joint:
        found = (each if isinstance(each, Joint) else each.over()).find(names, [leaf.array for leaf in leaves.values()])
        made = each.set if isinstance(each, Joint) else each
        floats = (i for i in at if jnp.issubdtype(jnp.asarray(leaves[i].array).dtype, jnp.floating))
        places = tuple(at[k] for k in found) or tuple(floats)
        # Matrices of equinox modules are (out, in).
        layout: Layout = "out_first" if places and leaves[places[0]].fan_in == (-1,) else "out_last"
        made.check({leaves[i].name: leaves[i].array for i in places}, layout)
        placed.append(_Placed(made, places, leaves[places[0]].name, layout))
    return placed


def _move(
    placed: list[_Placed], points: list[Any], max_logits: Any, reach: Callable[[int, Any], Any] | None = None
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """Return every member before and after the sets, by the position of the leaf.

    Args:
        placed: the sets.
        points: the leaves, after the step.
        max_logits: as in `joint_projection`.
        reach: reach(i, y) is what leaf i becomes when it is to be y; default None, y itself.
    """
    moved: dict[int, tuple[jax.Array, jax.Array]] = {}
    logits = _logits_of(placed, max_logits)
    for one in placed:
        places = [i for i in one.places if not is_absent(points[i])]
        if len(places) < len(one.places) and not isinstance(one.set, TreeBall):
            continue
        arrays = [moved[i][1] if i in moved else jnp.asarray(points[i]) for i in places]

        def store(k: int, y: jax.Array, places: list[int] = places, arrays: list[Any] = arrays) -> jax.Array:
            q = round_to_dtype(y.astype(arrays[k].dtype))
            return reach(places[k], q) if reach else q

        for i, x, y in zip(places, arrays, _onto(one, arrays, store, logits.get(one.name)), strict=True):
            moved[i] = (moved[i][0] if i in moved else x, y)
    return moved


def _onto(one: _Placed, arrays: list[Any], store: Callable[[int, Any], Any], logits: Any) -> list[Any]:
    """Move arrays into a set, with sums in float64.

    Under tracing the scaling is a branch on a CPU; elsewhere a branch would make the device wait for the host.
    """
    if not arrays:
        return []

    def run_if(flag: Any, f: Callable[..., Any], *same: Any) -> Any:
        branch = partial(jax.lax.cond, flag, f, lambda *same: same)
        return jax.lax.platform_dependent(*same, cpu=branch, default=f)

    def repeat(times: int, f: Callable[..., Any], state: Any) -> Any:
        return jax.lax.fori_loop(0, times, f, state)

    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((arrays, logits, vars(one.set))))
    shapes = [tuple(x.shape) for x in arrays]
    control = (run_if, repeat) if is_traced else (run_if_true, repeat_until_true)
    measure = partial(measure_all, wide="float64", xp=jnp)
    with _enable_x64(True):
        by = Arithmetic(jnp, "float64", one.layout, shapes, store, *control, measure)
        return one.set.onto(arrays, by, None if logits is None else jnp.asarray(logits))


def _logits_of(placed: list[_Placed], max_logits: Any) -> dict[str, Any]:
    """Return the logits of every `QKClip` by the name of its W_q."""
    names = [one.name for one in placed if one.set.takes_logits]
    if max_logits is None and not names:
        return {}
    if not isinstance(max_logits, Mapping):
        max_logits = {} if max_logits is None else dict.fromkeys(names, max_logits) if len(names) == 1 else max_logits
    if not isinstance(max_logits, Mapping) or max_logits.keys() != set(names):
        given = ", ".join(max_logits) if isinstance(max_logits, Mapping) else "one array"
        raise ValueError(
            f"max_logits has logits for {given or 'nothing'}: pass {{W_q: largest logit of every head}} for "
            f"{', '.join(names) or 'nothing'}"
        )
    for one in placed:
        if one.set.takes_logits:
            one.set.check_logits(max_logits[one.name], one.name)
    return dict(max_logits)
