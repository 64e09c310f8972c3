"""Suggest a bound for every layer, from the norms that its vectors have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from projgd.axes import Axis
from projgd.constraints import Constraint, MaxNorm, RelativeMaxNorm
from projgd.report import Row, report
from projgd.rules import Rules


@dataclass(frozen=True)
class Suggestion:
    """Hold a bound for every parameter; `print` shows it as rules to paste.

    Attributes:
        share: the share of the vectors of each parameter that would be on its bound.
        rules: `MaxNorm` for each parameter, by name.
        relative: the same bounds as multiples of the initial norms: `MaxNorm.relative` for each parameter whose vectors
            have an initial norm.
    """

    share: float
    rules: dict[str, Constraint]
    relative: dict[str, Constraint]

    def __str__(self) -> str:
        def block(name: str, rules: Mapping[str, Constraint]) -> str:
            lines = "".join(f'    "{key}": {_call(own)},\n' for key, own in rules.items())
            return f"{name} = {{\n{lines}}}"

        bound = f"# {self.share:.0%} of the neurons of each layer would be on the bound"
        return f"{bound}\n{block('rules', self.rules)}\n# the same as multiples of the initial norms\n" + block(
            "relative", self.relative
        )

    __repr__ = __str__


def _call(own: Constraint) -> str:
    """Return the code that makes a set of this module, with four digits and without defaults."""
    assert isinstance(own, MaxNorm)
    axis = "" if own.axis == "fan_in" else f", axis={own.axis!r}"
    if isinstance(own, RelativeMaxNorm):
        return f'MaxNorm.relative({own.c:.4g}{axis}, per="{own.per}")'
    return f"MaxNorm({own.c:.4g}{axis})"


def suggest(
    params: Any, share: float = 0.1, *, constraint: Constraint | Rules | None = None, initial: Any = None
) -> Suggestion:
    """Return, for every layer, the c at which a share of its neurons would be on the bound.

    Take it from the weights of a run without a bound: a bound that a tenth of the neurons reach changes the run, and
    leaves the other neurons alone.

    Args:
        params: what `projgd.report` reads: a model, or a tree of arrays.
        share: the share of the neurons, above 0 and below 1; default 0.1.
        constraint: which vectors to measure: one set, such as `MaxNorm(1.0, axis=0)`, or rules; its c does not matter.
            Default None, which is `MaxNorm` along each layer's fan-in.
        initial: the weights that training began with, of the same form as `params`; default None, which takes `params`
            themselves. The multiples are those of the root of the mean square of the initial norms of each parameter.

    Returns:
        A `Suggestion`; its `rules` can be passed as `constraint=`.

    Raises:
        TypeError: an object without parameters, or a share that is not a number.
        ValueError: a share that is not between 0 and 1, vectors that hold NaN or infinity, other parameters in
            `initial`.

    >>> import numpy as np
    >>> w = np.arange(1.0, 11.0)[None, :]  # ten neurons with one weight each
    >>> print(suggest({"hidden": w}, share=0.2))
    # 20% of the neurons of each layer would be on the bound
    rules = {
        "hidden": MaxNorm(8),
    }
    # the same as multiples of the initial norms
    relative = {
        "hidden": MaxNorm.relative(1.289, per="tensor"),
    }
    """
    import numpy as np

    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"share={share!r} is not a number: pass the share of the neurons, such as share=0.1")
    if not 0 < share < 1:
        raise ValueError(f"share={share} is not between 0 and 1: pass the share of the neurons, such as share=0.1")
    read = MaxNorm(1.0) if constraint is None else constraint
    rows = [row for row in report(params, read).rows if row.norms.size]
    starts = rows if initial is None else [row for row in report(initial, read).rows if row.norms.size]
    if [row.name for row in rows] != [row.name for row in starts]:
        raise ValueError("initial has other parameters than params: pass the weights that the same model began with")
    if broken := [row.name for row in rows if row.nonfinite]:
        raise ValueError(f"{broken[0]} holds NaN or infinity: take the weights from before the run broke")
    rules: dict[str, Constraint] = {}
    relative: dict[str, Constraint] = {}
    for row, start in zip(rows, starts, strict=True):
        c = float(np.quantile(row.norms, 1 - share, method="inverted_cdf"))
        usual = float(np.sqrt(np.mean(np.square(start.norms))))
        if c > 0:
            rules[row.name] = MaxNorm(c, _axis_of(row))
        if c > 0 and 0 < usual < np.inf:
            relative[row.name] = MaxNorm.relative(c / usual, _axis_of(row), per="tensor")
    return Suggestion(float(share), rules, relative)


def _axis_of(row: Row) -> Axis:
    """Return the axis of a row; that of a set of entries is no axis of vectors."""
    if row.constraint.axis == "entries":
        raise ValueError(
            f"{row.name}: {row.constraint} bounds entries, which have no norm: pass a set such as MaxNorm(1.0)"
        )
    return row.constraint.axis
