"""Define sets that bound several tensors together, such as the norm of the product of two LoRA factors.

A set over several tensors names no tensor itself: `over` adds the members. The optimizer applies it after the
projections of the single parameters. Sums are taken in float64, or in the widest dtype that the library has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_jax_namespace, is_torch_array

from projgd import rules
from projgd.axes import Layout, Vectors
from projgd.config import Configured
from projgd.constraints import number, positive
from projgd.sums import FLOATS, Array, Scalar, float_type, norm_error, root, scale, tree_sum

TRIES = 4
"""How often the factors of a product are scaled again before the scale is chosen from the worst case of rounding."""

Named = Mapping[str, Array]
"""The members by name, in the order in which they were passed."""


@dataclass(frozen=True)
class Arithmetic:
    """Describe how a library computes; the fronts make one for each step.

    Attributes:
        xp: the array namespace.
        wide: the name of the dtype that sums are taken in, `"float64"` or `"float32"`.
        layout: how a matrix is stored, `"out_first"` for (out, in) or `"out_last"` for (in, out).
        shapes: the shapes of the members; of a sharded one, that of the whole tensor.
        store: store(i, y) returns the array y as it is read back after member i was set to it, rounding included.
        run_if: run_if(flag, f, *arrays) is f(*arrays), and may be the arrays if the flag is false.
        repeat: repeat(n, f, state) is f(n - 1, … f(1, f(0, state))), and may stop when the first of the state, a flag,
            is true.
        measure: returns for each array its largest magnitude r and the sum of squares of the whole tensor after
            division by r, as arrays of one dimension. Sharded tensors need one of their own.
    """

    xp: ModuleType
    wide: str
    layout: Layout
    shapes: Sequence[tuple[int, ...]]
    store: Callable[[int, Array], Array]
    run_if: Callable[..., Any]
    repeat: Callable[..., Any]
    measure: Callable[[Sequence[Array]], tuple[Array, Array]]

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> Arithmetic:
        """Return the arithmetic of the library of some arrays, which are stored by rounding to their dtypes."""
        xp = array_namespace(*arrays)
        in_jax = is_jax_namespace(xp)
        wide = str(xp.zeros(()).dtype) if in_jax else "float64"  # JAX has no float64 unless the user asks for it
        return cls(
            xp,
            wide,
            "out_first" if is_torch_array(arrays[0]) else "out_last",
            [tuple(x.shape) for x in arrays],
            lambda i, y: xp.astype(y, arrays[i].dtype),
            run_always if in_jax else run_if_true,
            repeat_always if in_jax else repeat_until_true,
            lambda members: measure_all(members, wide, xp),
        )

    def widen(self, x: Array) -> Array:
        """Return an array in the dtype that sums are taken in."""
        return self.xp.astype(x, getattr(self.xp, self.wide), copy=False)


@dataclass(frozen=True)
class JointSet(Configured, ABC):
    """Describe a set for several tensors together. This is the base class; make one of its subclasses.

    Attributes:
        takes_logits: whether the set needs the largest attention logits of the last forward passes.

    >>> ProductMaxNorm(1.5).over("q.lora_A.weight", "q.lora_B.weight").members
    ('q.lora_A.weight', 'q.lora_B.weight')
    """

    @property
    def takes_logits(self) -> bool:
        """Return whether the set needs the largest attention logits of the last forward passes."""
        return False

    def over(self, *members: Any) -> Joint:
        """Return this set together with its members.

        Args:
            *members: names of parameters, or tensors; see the class for their number and order. `TreeBall` takes glob
                patterns, too, and none at all for every parameter.

        Returns:
            What an optimizer takes in `joint=[…]`, and `joint_projection([…])` in JAX.

        Raises:
            ValueError: the same member twice.

        >>> QKClip(100.0, heads=8).over("q.weight", "k.weight").set.tau
        100.0
        """
        if len({m if isinstance(m, str) else id(m) for m in members}) < len(members):
            raise ValueError(f"{self}.over(…) has one member twice: {_names(members)}")
        return Joint(self, members)

    @abstractmethod
    def check(self, members: Named, layout: Layout) -> None:
        """Raise an error that names the members if the set cannot be applied to them.

        Args:
            members: the members by name.
            layout: `"out_first"` for matrices (out, in), `"out_last"` for (in, out).

        Raises:
            TypeError: a member of a dtype that is not floating-point.
            ValueError: another number of members, or shapes that do not fit.
        """

    def check_logits(self, logits: Array, name: str) -> None:
        """Raise an error that names W_q for logits that are not one number per query head.

        Args:
            logits: what the training loop handed in.
            name: the name of W_q.

        Raises:
            ValueError: another shape, or a set that takes no logits.
        """
        raise ValueError(f"{self} takes no logits")

    @abstractmethod
    def onto(self, members: Sequence[Array], by: Arithmetic, logits: Array | None = None) -> list[Array]:
        """Return the members, moved into the set; `project` chooses the arithmetic itself.

        Args:
            members: arrays for which `check` passes.
            by: how the library computes.
            logits: for a set with `takes_logits` the largest logit of every head; None leaves the members.

        Returns:
            One array for each member: as stored, and bit for bit where the set moves nothing.
        """

    def norm_by(self, members: Sequence[Array], by: Arithmetic) -> Array:
        """Return the norm that the set bounds; NaN for a set that bounds none.

        Args:
            members: arrays for which `check` passes.
            by: how the library computes.
        """
        return math.nan

    def norm(self, *members: Array) -> Array:
        """Return the norm that the set bounds, such as ‖scale · B A‖; NaN for a set that bounds none.

        Args:
            *members: as in `project`.

        Returns:
            A 0-d array of the dtype that sums are taken in.

        >>> import numpy as np
        >>> float(TreeBall(1.0).norm(np.asarray([3.0]), np.asarray([4.0])))
        5.0
        >>> float(ProductMaxNorm(1.0, scale=2.0).norm(np.asarray([[3.0], [4.0]]), np.asarray([[1.0]])))
        10.0
        """
        return self.norm_by(members, Arithmetic.of(members))

    def project(self, *members: Array, logits: Array | None = None) -> list[Array]:
        """Return the members, moved into the set.

        Args:
            *members: arrays of NumPy, PyTorch or JAX. PyTorch's are read as (out, in), the others as (in, out).
            logits: for `QKClip` the largest logit of every head.

        Returns:
            One array for each member: same library, dtype, shape and device.

        Raises:
            TypeError, ValueError: as `check`.

        >>> import numpy as np
        >>> a, b = ProductMaxNorm(1.0).project(np.asarray([[2.0], [0.0]]), np.asarray([[2.0, 0.0]]))
        >>> (a @ b).round(3)
        array([[1., 0.],
               [0., 0.]])
        """
        by = Arithmetic.of(members)
        self.check({f"member {i}": x for i, x in enumerate(members)}, by.layout)
        return self.onto(members, by, logits)


@dataclass(frozen=True)
class Joint:
    """Hold a set over several tensors together with its members; `JointSet.over` makes it.

    Attributes:
        set: the set.
        members: names or tensors; empty for all parameters of the optimizer.
    """

    set: JointSet
    members: tuple[Any, ...]

    def find(self, names: Sequence[str], arrays: Sequence[Any]) -> tuple[int, ...]:
        """Return the positions of the members among all parameters; empty if they are all.

        Args:
            names: the names of all parameters.
            arrays: the parameters themselves, in the same order.

        Raises:
            ValueError: a name that no parameter has, or a tensor that is none of the parameters.
        """
        found: list[int] = []
        for member in self.members:
            if not isinstance(member, str):
                places = [i for i, x in enumerate(arrays) if x is member]
                if not places:
                    shape = tuple(getattr(member, "shape", ()))
                    raise ValueError(
                        f"{self.set} is over a {type(member).__name__} of shape {shape}, which the optimizer does not "
                        "have: pass one of its parameters, or a name"
                    )
            else:
                places = [i for i, name in enumerate(names) if name == member]
                if not places and isinstance(self.set, TreeBall):
                    places = [i for i, name in enumerate(names) if rules.matches(member, name)]
                if not places:
                    raise ValueError(
                        f"{self.set} is over {member!r}, which no parameter is called"
                        f"{rules.nearest_name(member, names)}"
                    )
            found += places
        if self.members and len(set(found)) < len(found) and not isinstance(self.set, TreeBall):
            raise ValueError(f"{self.set} has one parameter twice: {_names(self.members)}")
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class ProductMaxNorm(JointSet):
    """Hold the Frobenius norm of a product of two factors: ‖scale · B A‖ ≤ c, for layers out = B A x.

    (A, B) ← (f A, f B), f = min(1, √(c / ‖scale · B A‖)). The product is never formed: ‖B A‖² = tr((BᵀB)(AAᵀ)), which
    costs r² (in + out) for factors of rank r.

    `over(A, B)` takes the factor that is applied first, A, first. PyTorch: A (r, in, *kernel), B (out, r), as in peft's
    `lora_A.weight` and `lora_B.weight`. JAX and NumPy: A (in, r), B (r, out), for out = x A B.

    Attributes:
        c: the bound, a positive number. In JAX it may be traced.
        scale: what the layer multiplies the product by, such as LoRA's alpha / r; default 1.

    Raises:
        TypeError: a `c` or a `scale` that is not a number.
        ValueError: a `c` or a `scale` that is not positive and finite.

    >>> import numpy as np
    >>> pair = np.full((4, 2), 3.0), np.full((2, 5), 2.0)
    >>> a, b = ProductMaxNorm(1.5, scale=2.0).project(*pair)
    >>> float(np.linalg.norm(2.0 * a @ b).round(6)), float((a[0, 0] / b[0, 0]).round(6))
    (1.5, 1.5)

    References:
        E. Hu and others, *LoRA: low-rank adaptation of large language models*, 2021, arXiv 2106.09685.
        kohya-ss, *sd-scripts*, 2023, `scale_weight_norms` (a max-norm of LoRA products).
    """

    c: Scalar
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", positive("c", self.c))
        object.__setattr__(self, "scale", positive("scale", self.scale))

    def check(self, members: Named, layout: Layout) -> None:
        if len(members) != 2:
            raise ValueError(f"{self} is over {len(members)} tensors: pass two, over(A, B)")
        (a_name, a), (b_name, b) = members.items()
        shapes = f"{a_name} of shape {tuple(a.shape)} and {b_name} of shape {tuple(b.shape)}"
        first = layout == "out_first"
        wanted = "A (r, in) and B (out, r)" if first else "A (in, r) and B (r, out)"
        if a.ndim < 2 or b.ndim < 2:
            raise ValueError(f"{self} is over {shapes}: pass two matrices, {wanted}")
        ranks = (a.shape[0], math.prod(b.shape[1:])) if first else (a.shape[-1], b.shape[0])
        if ranks[0] != ranks[1]:
            raise ValueError(f"{self} is over {shapes}, whose ranks {ranks[0]} and {ranks[1]} differ: pass {wanted}")
        for name, x in members.items():
            coarse = math.sqrt(math.prod(x.shape)) * float_type(x, name).tiny
            if isinstance(self.c, float) and math.sqrt(self.c / self.scale) < 8 * coarse:
                raise ValueError(f"c={self.c} is too small for {name} of dtype {x.dtype}: its entries would become 0")

    def norm_by(self, members: Sequence[Array], by: Arithmetic) -> Array:
        product = _Product.of(members, by)
        return self.scale * product.size * product.size * root(product.square, by.xp)

    def onto(self, members: Sequence[Array], by: Arithmetic, logits: Array | None = None) -> list[Array]:
        """Scale both factors by f, measure what is stored, and scale again until that is inside.

        Where B A is much smaller than B and A, rounding moves its norm by more than its own size. So the result is
        measured as it is stored, and the upper end of the measure's error counts.
        """
        if any(0 in x.shape for x in members):
            return list(members)
        xp, unit, stored = by.xp, FLOATS[by.wide].unit, max(float_type(x).unit for x in members)
        bound = by.widen(xp.sqrt(self.c / self.scale)) if hasattr(self.c, "dtype") else math.sqrt(self.c / self.scale)
        product = _Product.of(members, by)
        # A bound that is NaN, from a traced c that is not positive, must show: so not `>`.
        moves = xp.isfinite(product.square) & ~(product.upper(xp) <= bound * (1 - 8 * unit))
        start = bound * (1 - 32 * unit) / xp.where(moves, product.upper(xp, 3), 1.0)
        safe = start / xp.sqrt(1 + 4 * stored * product.spread(xp, 1 / unit))
        wide = [by.widen(x) for x in members]

        def attempt(k: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
            held, factor, *old = state
            factor = xp.where(held, factor, xp.where(xp.asarray(k == TRIES), safe, factor))
            new = [by.store(i, x * factor) for i, x in enumerate(wide)]
            upper = _Product.of(new, by).upper(xp, 3)
            kept = [xp.where(held, x, y) for x, y in zip(old, new, strict=True)]
            factor = factor * bound / xp.where(upper > bound, upper, bound) * (1 - 2.0 ** (k - 2) * stored - 64 * unit)
            return held | (upper <= bound * (1 - 16 * unit)), factor, *kept

        def scaled(moves: Array, *old: Array) -> tuple[Array, ...]:
            held, _, *new = by.repeat(TRIES + 1, attempt, (~moves, start, *old))
            lost = xp.where(xp.isnan(start), xp.full_like(start, math.nan), xp.zeros_like(start))
            return moves, *(xp.where(held, x, xp.astype(lost, x.dtype)) for x in new)

        return list(by.run_if(moves, scaled, moves, *members)[1:])


class _Product(NamedTuple):
    """Hold a measure of B A: ‖B A‖ = size² √square, and size² · reach is the sum of the norms of rank-one products.

    Attributes:
        square, reach, size: as above.
        error: the error of `square` is below error · reach².
    """

    square: Array
    reach: Array
    size: Array
    error: float

    @classmethod
    def of(cls, members: Sequence[Array], by: Arithmetic) -> _Product:
        """Measure two factors; every row of A and column of B is divided by its own size, so that nothing overflows."""
        xp, (a, b) = by.xp, members
        if by.layout == "out_first":
            rank = a.shape[0]
            rows = [xp.reshape(a, (rank, -1)), xp.matrix_transpose(xp.reshape(b, (-1, rank)))]
        else:
            rank = a.shape[-1]
            rows = [xp.matrix_transpose(xp.reshape(a, (-1, rank))), xp.reshape(b, (rank, -1))]
        (za, ra), (zb, rb) = (scale(by.widen(x), (1,), xp) for x in rows)
        size = xp.sqrt(ra) * xp.sqrt(rb)
        size = xp.where(xp.isfinite(size), size, xp.full_like(size, math.nan))
        largest = xp.max(size)
        share = (size / xp.where(largest > 0, largest, xp.ones_like(largest))) ** 2
        exact = {"precision": "highest"} if is_jax_namespace(xp) else {}
        ga, gb = (xp.matmul(z, xp.matrix_transpose(z), **exact) for z in (za, zb))
        square = xp.sum(xp.sum(ga * gb * (share * xp.matrix_transpose(share)), axis=1))
        own = xp.sqrt(xp.sum(za * za, axis=1, keepdims=True) * xp.sum(zb * zb, axis=1, keepdims=True))
        error = (rows[0].shape[1] + rows[1].shape[1] + 2 * rank + 32) * FLOATS[by.wide].unit
        return cls(xp.where(square < 0, xp.zeros_like(square), square), xp.sum(share * own), largest, error)

    def upper(self, xp: ModuleType, times: int = 1) -> Array:
        """Return the root of the largest norm that `square` may stand for, its error counted so many times."""
        return self.size * xp.sqrt(root(self.square + times * self.error * self.reach * self.reach, xp))

    def spread(self, xp: ModuleType, most: float) -> Array:
        """Return how much larger the rank-one products are than their sum; `most` if the sum is 0."""
        nonzero = self.square > 0
        return xp.where(nonzero, self.reach / xp.sqrt(xp.where(nonzero, self.square, 1.0)), most)


@dataclass(frozen=True)
class QKClip(JointSet):
    """Hold attention logits down: scale the query and key weights of every head whose largest logit S is above tau.

    W_q ← W_q · (tau / S)^alpha and W_k ← W_k · (tau / S)^(1 - alpha), head by head, where S > tau. The training loop
    hands in S, the largest logit q·k / √d of every head over the last batch: `optimizer.observe(…)` in PyTorch, the
    argument `max_logits` of `update` in JAX. A step uses it up. With data-parallel training reduce S to its maximum
    over all ranks first, or the ranks' weights drift apart (under `jit` JAX does that).

    `over(W_q, W_k)` takes the two weights; `over(W_q, W_k, b_q, b_k)` their biases, too. PyTorch: (heads · d, in). JAX:
    (in, heads · d), or (in, heads, d) as flax's attention has it.

    Supported are multi-head attention, and multi-query and grouped-query attention with `k_heads` fewer key heads: a
    key head takes the largest S of the query heads that share it, which are neighbours. Rotary position embeddings on
    q and k change nothing, because a rotation keeps the scale. Not supported are multi-head latent attention (MLA),
    whose rotary key part all heads share, one weight for q, k and v together, and norms on q and k, which undo a scale.

    Attributes:
        tau: the largest logit that stays, a positive number; 100 in Kimi K2.
        alpha: the share of the scale that W_q takes, from 0 to 1; default 0.5.
        heads: the number of query heads.
        k_heads: the number of key heads; default None, as many as query heads.

    Raises:
        TypeError: a number of heads that is not an integer.
        ValueError: a `tau` that is not positive, an `alpha` outside of [0, 1], or heads that `k_heads` does not divide.

    >>> import numpy as np
    >>> q, k = QKClip(50.0, heads=2).project(np.ones((1, 4)), np.ones((1, 4)), logits=np.asarray([10.0, 200.0]))
    >>> q, k
    (array([[1. , 1. , 0.5, 0.5]]), array([[1. , 1. , 0.5, 0.5]]))

    References:
        Kimi Team, *Kimi K2: open agentic intelligence*, 2025, arXiv 2507.20534, section 2.1 (MuonClip).
    """

    tau: Scalar
    alpha: float = 0.5
    heads: int = field(kw_only=True)
    k_heads: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", positive("tau", self.tau))
        object.__setattr__(self, "alpha", number("alpha", self.alpha))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is a share of the scale: pass a number from 0 to 1")
        for name, n in (("heads", self.heads), ("k_heads", self._k_heads)):
            if not isinstance(n, int) or isinstance(n, bool):
                raise TypeError(f"{name}={n!r} is not a number of heads: pass an integer such as {name}=8")
            if n < 1:
                raise ValueError(f"{name}={n} is not a number of heads: pass 1 or more")
        if self.heads % self._k_heads:
            raise ValueError(f"heads={self.heads} query heads cannot share k_heads={self.k_heads} key heads evenly")

    @property
    def takes_logits(self) -> bool:
        return True

    @property
    def _k_heads(self) -> int:
        return self.heads if self.k_heads is None else self.k_heads

    def check(self, members: Named, layout: Layout) -> None:
        if len(members) not in (2, 4):
            raise ValueError(
                f"{self} is over {len(members)} tensors: pass over(W_q, W_k), or over(W_q, W_k, b_q, b_k) with biases"
            )
        sizes = []
        for i, (name, x) in enumerate(members.items()):
            float_type(x, name)
            shape, heads = tuple(x.shape), (self.heads, self._k_heads)[i % 2]
            axis = _head_axis(shape, i > 1, layout)
            has_own = layout == "out_last" and len(shape) > (1 if i > 1 else 2)
            if axis is None or (shape[axis] != heads if has_own else shape[axis] % heads):
                wanted = "(heads * d, in)" if layout == "out_first" else "(in, heads * d) or (in, heads, d)"
                what = "bias" if i > 1 else "weight"
                raise ValueError(
                    f"{name} has shape {shape}, which is no {what} of {heads} heads in the layout {wanted}"
                )
            sizes.append(math.prod(shape[axis:] if layout == "out_last" else shape[:1]) // heads)
        if len(set(sizes)) > 1:
            raise ValueError(f"{self} is over {', '.join(members)}, whose heads have the sizes {sizes}: check k_heads")

    def check_logits(self, logits: Array, name: str) -> None:
        shape = tuple(getattr(logits, "shape", ("no array",)))
        if shape != (self.heads,):
            raise ValueError(
                f"the logits for {name} have shape {shape}: pass the largest logit of every head, of shape "
                f"({self.heads},), such as logits.amax((0, 2, 3)) of logits (batch, heads, queries, keys)"
            )

    def onto(self, members: Sequence[Array], by: Arithmetic, logits: Array | None = None) -> list[Array]:
        if logits is None:
            return list(members)
        self.check_logits(logits, "W_q")
        xp = by.xp
        largest = by.widen(logits)
        shared = xp.max(xp.reshape(largest, (self._k_heads, -1)), axis=1)
        moved = []
        for i, x in enumerate(members):
            found = (largest, shared)[i % 2]
            high = (found > self.tau) & xp.isfinite(found)
            power = (self.alpha, 1 - self.alpha)[i % 2]
            factor = xp.where(high, self.tau / xp.where(high, found, xp.ones_like(found)), xp.ones_like(found)) ** power
            axis = _head_axis(tuple(x.shape), i > 1, by.layout) or 0
            repeated = _repeat(factor, x.shape[axis] // factor.shape[0], xp)
            repeated = xp.reshape(repeated, tuple(n if a == axis else 1 for a, n in enumerate(x.shape)))
            wide = by.widen(x)
            finite = xp.isfinite(wide)
            moved.append(xp.where((repeated == 1) | ~finite, x, by.store(i, wide * repeated)))
        return moved


@dataclass(frozen=True)
class TreeBall(JointSet):
    """Hold the norm of all parameters together at most at c: θ ← θ · min(1, c / ‖θ‖₂), one vector for the whole model.

    `over()` or no `over` takes every parameter of the optimizer, `over("encoder.*", "head.weight")` those that a name
    or a pattern matches. Members may be sharded: the ranks exchange one number per parameter in one all-reduce (float64
    needs two).

    Attributes:
        c: the bound, a positive number. In JAX it may be traced.

    Raises:
        TypeError: a `c` that is not a number.
        ValueError: a `c` that is not positive and finite.

    >>> import numpy as np
    >>> [x.tolist() for x in TreeBall(1.0).project(np.asarray([3.0, 0.0]), np.asarray([[4.0]]))]  # doctest: +ELLIPSIS
    [[0.59..., 0.0], [[0.79...]]]

    References:
        L. Berrada, A. Zisserman, M. P. Kumar, *Training neural networks for and by interpolation*, ICML 2020, arXiv
        1906.05661, section 3 (ALI-G with a ball around the weights).
    """

    c: Scalar

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", positive("c", self.c))

    def check(self, members: Named, layout: Layout) -> None:
        if not members:
            raise ValueError(f"{self} is over no parameter")
        coarse = _coarse({name: (x, math.prod(x.shape)) for name, x in members.items()})
        if isinstance(self.c, float) and self.c < 8 * coarse:
            raise ValueError(f"c={self.c} is too small for {', '.join(members)}: all entries would become 0")

    def norm_by(self, members: Sequence[Array], by: Arithmetic) -> Array:
        largest, length = _total(members, by)
        return largest * length

    def onto(self, members: Sequence[Array], by: Arithmetic, logits: Array | None = None) -> list[Array]:
        xp, kind = by.xp, FLOATS[by.wide]
        error = max(norm_error(kind, Vectors(s, tuple(range(len(s))))) for s in by.shapes)
        error += (len(members) + 8) * kind.unit
        coarse = _coarse({str(i): (x, math.prod(s)) for i, (x, s) in enumerate(zip(members, by.shapes, strict=True))})
        unit = max(float_type(x).unit for x in members)
        c = by.widen(xp.where(self.c > 0, self.c, math.nan)) if hasattr(self.c, "dtype") else self.c
        largest, length = _total(members, by)
        far = 2.0**500 if by.wide == "float64" else 2.0**60
        shift = xp.where(largest > far, xp.full_like(largest, 1 / far), xp.ones_like(largest))  # c / largest is normal
        moves = xp.isfinite(length) & xp.isfinite(largest) & ~(largest * shift * length <= c * (1 - error) * shift)
        goal = (c * (1 - 3 * error) - coarse) / (1 + unit)
        factor = goal / xp.where(moves, largest * shift, 1.0) / xp.where(moves, length, 1.0)

        def scaled(*arrays: Array) -> tuple[Array, ...]:
            return tuple(xp.where(moves, by.store(i, by.widen(x) * shift * factor), x) for i, x in enumerate(arrays))

        return list(by.run_if(moves, scaled, *members))


def run_always(flag: Array, f: Callable[..., Any], *arrays: Array) -> Any:
    """Return f(*arrays), because reading the flag would take longer, or cannot be done."""
    return f(*arrays)


def repeat_until_true(times: int, f: Callable[..., Any], state: Any) -> Any:
    """Return the state after so many calls of f, or when its first entry, a flag that can be read, is true."""
    for k in range(times):
        if bool(state[0]):
            break
        state = f(k, state)
    return state


def repeat_always(times: int, f: Callable[..., Any], state: Any) -> Any:
    """Return the state after so many calls of f."""
    for k in range(times):
        state = f(k, state)
    return state


def run_if_true(flag: Array, f: Callable[..., Any], *arrays: Array) -> Any:
    """Return f(*arrays) if a flag that can be read is true, and the arrays otherwise."""
    return f(*arrays) if bool(flag) else arrays


def measure_all(members: Sequence[Array], wide: str, xp: ModuleType) -> tuple[Array, Array]:
    """Return the largest magnitude r of every array, and the sum of squares of the array after division by r.

    Args:
        members: arrays of any shapes.
        wide: the name of the dtype that sums are taken in.
        xp: the array namespace.

    Returns:
        Two arrays with one number for each member. Both are NaN or infinite for an array that holds NaN or infinity.
    """
    largest, sums = [], []
    for x in members:
        x = xp.astype(xp.reshape(x, (1,)) if x.ndim == 0 else x, getattr(xp, wide), copy=False)
        if 0 in x.shape:
            x = xp.zeros_like(xp.sum(xp.reshape(x, (-1,)), keepdims=True))
        axes = tuple(range(x.ndim))
        z, r = scale(x, axes, xp)
        largest.append(xp.reshape(r, (1,)))
        sums.append(xp.reshape(tree_sum(z * z, axes, xp), (1,)))
    return xp.concat(largest), xp.concat(sums)


def _total(members: Sequence[Array], by: Arithmetic) -> tuple[Array, Array]:
    """Return two numbers whose product is the norm of all members together, the largest magnitude first."""
    xp = by.xp
    r, squares = by.measure(members)
    r = xp.where(xp.isfinite(r), r, xp.full_like(r, math.nan))
    largest = xp.max(r)
    share = r / xp.where(largest > 0, largest, xp.ones_like(largest))
    return largest, root(xp.sum(share * share * squares), xp)


def _coarse(members: Mapping[str, tuple[Array, int]]) -> float:
    """Return the error near zero of rounding all entries of arrays with so many entries."""
    return math.sqrt(sum(n * float_type(x, name).tiny ** 2 for name, (x, n) in members.items()))


def _head_axis(shape: tuple[int, ...], is_bias: bool, layout: Layout) -> int | None:
    """Return the axis of a query or key weight that counts heads, or heads · d; None for another number of axes."""
    ndim = len(shape)
    if layout == "out_first":
        return 0 if ndim == (1 if is_bias else 2) else None
    if ndim == (1 if is_bias else 2):
        return ndim - 1
    return ndim - 2 if ndim == (2 if is_bias else 3) else None


def _repeat(factor: Array, times: int, xp: ModuleType) -> Array:
    """Return every number so many times in a row."""
    return xp.reshape(xp.broadcast_to(factor[:, None], (factor.shape[0], times)), (-1,))


def _names(members: Iterable[Any]) -> str:
    """Return members as text: a name as it is, a tensor by its shape."""
    return ", ".join(m if isinstance(m, str) else f"a tensor of shape {tuple(m.shape)}" for m in members)
