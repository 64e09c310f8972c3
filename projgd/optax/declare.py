"""Declare constraints where a model is defined, so that they travel with its parameters.

In flax.nnx the metadata of a `Variable` holds the constraint, as it holds the names for sharding; in flax.linen a box
around the parameter does, as `nn.Partitioned` does for sharding. An equinox module has bare arrays, so its class says
them in an attribute `constraints`. `projgd.optax.declared` reads all three.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from projgd.constraints import Constraint
from projgd.optax.tree import DECLARED

T = TypeVar("T")


def constrain(module: T, constraint: Constraint | None, name: str = "kernel") -> T:
    """Declare the constraint of a parameter of an nnx module; `projection(declared)` reads it.

    While a layer is made, flax's own `nnx.with_metadata` does the same:
    `nnx.Linear(3, 2, kernel_init=nnx.with_metadata(init, constraint=MaxNorm(1.0)), rngs=rngs)`.

    Args:
        module: a flax.nnx module.
        constraint: the set; None declares that the parameter is free.
        name: the parameter's name in the module, such as `"kernel"` (the default) or `"linear/kernel"`.

    Returns:
        The module.

    Raises:
        TypeError: an object that is not a constraint.
        ValueError: a name that is not a variable of the module, or another constraint that was declared before.

    >>> from flax import nnx
    >>> from projgd import MaxNorm
    >>> from projgd.optax import declared
    >>> layer = constrain(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), MaxNorm(1.0))
    >>> declared(layer)
    {'kernel': MaxNorm(c=1.0, axis='fan_in')}
    """
    _check(constraint)
    variable: Any = module
    for part in name.split("/"):
        variable = getattr(variable, part, None)
    if not hasattr(variable, "set_metadata"):
        known = [k for k, v in getattr(module, "__dict__", {}).items() if hasattr(v, "set_metadata")]
        raise ValueError(f"{type(module).__name__} has no variable {name!r}; it has {', '.join(known) or 'none'}")
    known_as = variable.get_metadata().get(DECLARED, constraint)
    if known_as != constraint:
        raise ValueError(f"{name} of {type(module).__name__} has {known_as} already, and {constraint} is another set")
    variable.set_metadata(**{DECLARED: constraint})
    return module


def with_constraint(init: Callable[..., Any], constraint: Constraint | None) -> Callable[..., Any]:
    """Return an initializer for flax.linen whose parameter carries its constraint, as `nn.with_partitioning` does.

    Args:
        init: an initializer, such as `nn.initializers.lecun_normal()`.
        constraint: the set; None declares that the parameter is free.

    Returns:
        An initializer. `Module.init` then returns the parameter in a box, which `Module.apply` opens; optax sees the
        array in it.

    Raises:
        TypeError: an object that is not a constraint.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from projgd import MaxNorm
    >>> from projgd.optax import declared
    >>> layer = nn.Dense(2, kernel_init=with_constraint(nn.initializers.lecun_normal(), MaxNorm(1.0)))
    >>> declared(layer.init(jax.random.key(0), jnp.ones((1, 3))))
    {'params/kernel': MaxNorm(c=1.0, axis='fan_in')}
    """
    _check(constraint)

    @functools.wraps(init)
    def boxed(*args: Any, **kwargs: Any) -> Any:
        return _box()(init(*args, **kwargs), constraint)

    return boxed


@functools.cache
def _box() -> Any:
    """Return the class of the box; flax is imported only if somebody wants one."""
    from flax.core.meta import AxisMetadata

    @functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[DECLARED])
    class Constrained(AxisMetadata[Any]):
        """Hold a parameter and its constraint."""

        def __init__(self, value: Any, constraint: Constraint | None) -> None:
            self.value, self.constraint = value, constraint

        def unbox(self) -> Any:
            return self.value

        def replace_boxed(self, value: Any) -> Any:
            return Constrained(value, self.constraint)

        def add_axis(self, index: int, params: Any) -> Any:
            return self

        def remove_axis(self, index: int, params: Any) -> Any:
            return self

    return Constrained


def _check(constraint: Any) -> None:
    if constraint is not None and not isinstance(constraint, Constraint):
        raise TypeError(f"{constraint!r} is not a constraint: pass one such as MaxNorm(4.0), or None for a free one")
