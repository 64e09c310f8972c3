"""Assign settings to parameters by glob patterns over their full names, and tell the user what has no effect."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from projgd.constraints import Constraint

T = TypeVar("T")

PACKAGE = Path(__file__).parent

Rules = Mapping[str, Constraint | None]
"""`{pattern: constraint or None}`. The first pattern that matches a name wins; a name that none matches is free."""


def assign(rules: Rules, names: Iterable[str]) -> dict[str, Constraint | None]:
    """Return the constraint of every name, from the first pattern that matches it.

    Args:
        rules: constraints, or None for free parameters, by pattern. `*` matches any run of characters, dots and slashes
            included.
        names: the full names of the parameters.

    Returns:
        The constraint of every name; None for a name that no pattern matches.

    Raises:
        TypeError: a value that is neither a constraint nor None.
        ValueError: no rules; a pattern that matches no name (the error lists the nearest ones), or only names that
            earlier patterns match.

    >>> from projgd import MaxNorm
    >>> assign({"head.*": None, "*.weight": MaxNorm(3.0)}, ["conv.weight", "conv.bias", "head.weight"])
    {'conv.weight': MaxNorm(c=3.0, axis='fan_in'), 'conv.bias': None, 'head.weight': None}
    """
    if not rules:
        raise ValueError('there are no rules, so nothing would be held: pass some, such as {"*.weight": MaxNorm(4.0)}')
    for pattern, constraint in rules.items():
        if constraint is not None and not isinstance(constraint, Constraint):
            raise TypeError(
                f"the rule {pattern!r} holds {constraint!r}: pass a constraint such as MaxNorm(4.0), or None"
            )
    return first_match(rules, names)


def first_match(rules: Mapping[str, T], names: Iterable[str]) -> dict[str, T | None]:
    """Return the value of the first pattern that matches each name.

    Args:
        rules: any values, by pattern.
        names: the full names of the parameters.

    Returns:
        One value per name; None for a name that no pattern matches.

    Raises:
        ValueError: a pattern that matches no name (the error lists the nearest ones), or only names that earlier
            patterns match. `"*"`, the rest, is exempt: the earlier patterns may match every name.
    """
    names = list(names)
    first = _first(rules, names)
    for pattern in rules:
        matched = [name for name in names if matches(pattern, name)]
        if not matched:
            below = next((sep for sep in "./" if any(name.startswith(pattern + sep) for name in names)), None)
            meant = f"did you mean {pattern + below + '*'!r}? The" if below else "the"
            near = ", ".join(difflib.get_close_matches(pattern, names, n=5, cutoff=0.0))
            raise ValueError(f"the rule {pattern!r} matches no parameter; {meant} nearest names are {near}")
        if pattern != "*" and pattern not in first.values():
            before = ", ".join(dict.fromkeys(repr(first[name]) for name in matched))
            raise ValueError(
                f"the rule {pattern!r} has no effect: the first match wins, and {before} before it takes all that it "
                f"matches, such as {matched[0]!r}. Put it first, or leave it out"
            )
    return {name: None if pattern is None else rules[pattern] for name, pattern in first.items()}


def refuse_idle(rules: Rules, held: Mapping[str, bool]) -> None:
    """Raise an error for a rule whose constraint holds nothing.

    Args:
        rules: constraints, or None for free parameters, by pattern.
        held: for each name, whether the parameter has vectors that a constraint can hold.

    Raises:
        ValueError: a rule that is the first match only of parameters without such vectors.
    """
    owned = own_names(rules, held)
    for pattern, constraint in rules.items():
        own = owned[pattern]
        rest = pattern == "*" and len(rules) > 1
        if constraint is not None and own and not rest and not any(held[name] for name in own):
            raise ValueError(
                f"the rule {pattern!r} applies only to parameters without a fan-in, such as {own[0]!r}: "
                "give its constraint an explicit axis (None: the whole array is one vector), or leave it out"
            )


def own_names(rules: Mapping[str, T], names: Iterable[str]) -> dict[str, list[str]]:
    """Return for each pattern the names of which it is the first match."""
    first = _first(rules, names)
    return {pattern: [name for name, found in first.items() if found == pattern] for pattern in rules}


def warn(message: str) -> None:
    """Warn, at the line of the caller's code that led here, however deep in projgd the reason is found."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def nearest_name(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a question that names the known word nearest to `word`; an empty string if none is near."""
    near = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=cutoff)
    return f": did you mean {near[0]!r}?" if near and abs(len(word) - len(near[0])) < 5 else ""


def matches(pattern: str, name: str) -> bool:
    """Return whether a rule's pattern matches a full name."""
    return fnmatchcase(name, pattern)


def _first(rules: Mapping[str, T], names: Iterable[str]) -> dict[str, str | None]:
    """Return the first pattern that matches each name; None where none does."""
    return {name: next((pattern for pattern in rules if matches(pattern, name)), None) for name in names}
