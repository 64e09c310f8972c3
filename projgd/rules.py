"""Which parameters: glob patterns over full names, one type of rules for both frameworks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from projgd.constraints import Constraint

T = TypeVar("T")

Rules = Mapping[str, Constraint | None]
"""`{pattern: constraint or None}`. The first pattern that matches a name wins; a name that none matches is free."""


def assign(rules: Rules, names: Iterable[str]) -> dict[str, Constraint | None]:
    """The constraint of every name. `*` matches any run of characters, dots and slashes included.

    Raises:
        TypeError: a value that is neither a constraint nor None.
        ValueError: a pattern that matches no name; it lists the nearest ones.

    >>> from projgd import MaxNorm
    >>> assign({"head.*": None, "*.weight": MaxNorm(3.0)}, ["conv.weight", "conv.bias", "head.weight"])
    {'conv.weight': MaxNorm(c=3.0, axis='fan_in'), 'conv.bias': None, 'head.weight': None}
    """
    for pattern, constraint in rules.items():
        if constraint is not None and not isinstance(constraint, Constraint):
            raise TypeError(
                f"the rule {pattern!r} holds {constraint!r}: pass a constraint such as MaxNorm(4.0), or None"
            )
    return first_match(rules, names)


def first_match(rules: Mapping[str, T], names: Iterable[str]) -> dict[str, T | None]:
    """What the first pattern that matches it says of every name; None where none matches.

    Raises:
        ValueError: a pattern that matches no name; it lists the nearest ones.
    """
    names = list(names)
    for pattern in rules:
        if not any(matches(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.0)
            raise ValueError(f"the rule {pattern!r} matches no parameter; the nearest names are {', '.join(near)}")
    return {name: next((rules[pattern] for pattern in rules if matches(pattern, name)), None) for name in names}


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's pattern matches a full name."""
    return fnmatchcase(name, pattern)
