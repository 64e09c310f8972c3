"""Time all steps in turns, once per round, so that a slow minute of the machine slows them all.

The order changes from round to round, because the previous step decides what is in the cache.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Name = TypeVar("Name")


@dataclass(frozen=True)
class Time:
    """Hold the milliseconds of one step: the median, and half the distance between the quartiles."""

    median: float
    spread: float


def interleaved(
    steps: Mapping[Name, Callable[[], object]],
    seconds: float,
    rounds: tuple[int, int] = (5, 200),
    before: Callable[[], object] = lambda: None,
) -> dict[Name, list[float]]:
    """Return the milliseconds of every step by round, for about `seconds` in all, without the first calls.

    `before` is called before every step and is not timed.
    """
    for step in steps.values():
        step()
        step()
    taken: dict[Name, list[float]] = {name: [] for name in steps}
    order, dice = list(steps), random.Random(0)
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        while len(next(iter(taken.values()))) < rounds[1]:
            dice.shuffle(order)
            for name in order:
                before()
                t = time.perf_counter()
                steps[name]()
                taken[name].append(1e3 * (time.perf_counter() - t))
            if len(taken[name]) >= rounds[0] and time.perf_counter() - start > seconds:
                break
    finally:
        gc.enable()
    return taken


def summary(values: list[float]) -> Time:
    low, mid, high = np.percentile(values, [25, 50, 75])
    return Time(float(mid), float(high - low) / 2)


def ratio(values: list[float], base: list[float]) -> Time:
    """Return median and spread of the round-by-round quotients, in which common disturbances cancel."""
    return summary([a / b for a, b in zip(values, base, strict=True)])
