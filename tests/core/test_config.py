"""Sets and shapings as plain JSON types, and back."""

import json
import pickle

import numpy as np
import pytest

from projgd import (
    Constraint,
    MaxNorm,
    MaxUpdate,
    MinMaxNorm,
    ProductMaxNorm,
    QKClip,
    RadialBrake,
    RelativeUpdate,
    Sphere,
    Split,
    TangentUpdate,
    TreeBall,
    UnitNorm,
    from_config,
)
from projgd.config import Configured
from tests.sets import SETS as TABLE

SETS = [MaxNorm(3.0, (0, 1)), MinMaxNorm(1, 2, 0.5, 0), Sphere("initial", None), Sphere(2.0, "matrix"), UnitNorm(0)]
SETS += [case.make() for case in TABLE.values()]
JOINT = [ProductMaxNorm(1.5, 2.0), QKClip(100, 0.3, heads=8, k_heads=2), TreeBall(4)]
SHAPINGS = [
    RelativeUpdate(),
    TangentUpdate("fan_in"),
    RadialBrake(0.1, 0.2, (0, 1)),
    MaxUpdate(0.1, 0.01, Split(0, 2, (1,))),
]


def test_every_kind_is_here():
    made = {type(thing).__name__ for thing in SETS + SHAPINGS + JOINT}
    assert made == {
        name
        for name, cls in Configured.kinds.items()
        if cls.__module__.startswith("projgd") and not cls.__abstractmethods__
    }


@pytest.mark.parametrize("thing", SETS + SHAPINGS + JOINT, ids=str)
def test_a_config_survives_json(thing):
    config = json.loads(json.dumps(thing.config()))
    again = from_config(config)
    assert again == thing
    assert type(again) is type(thing)
    assert hash(again) == hash(thing)
    assert pickle.loads(pickle.dumps(thing)) == thing


def test_what_a_config_says():
    assert MinMaxNorm(1, 2).config() == {"kind": "MinMaxNorm", "low": 1.0, "high": 2.0, "rate": 1.0, "axis": "fan_in"}
    assert UnitNorm().config() == {"kind": "UnitNorm", "axis": "fan_in"}
    assert MaxNorm(np.float32(2), Split(0, 2, (1,))).config()["axis"] == {"dim": 0, "parts": 2, "over": (1,)}


@pytest.mark.parametrize("constraint", SETS, ids=str)
def test_a_constraint_from_a_config(constraint):
    assert Constraint.from_config(constraint.config()) == constraint


def test_the_config_of_something_else_is_refused():
    with pytest.raises(TypeError, match=r"describes TangentUpdate.*, which is not a constraint: use projgd"):
        Constraint.from_config(TangentUpdate().config())
    for kind in ("MaxNrom", None, "NormSet"):  # a slip, none at all, an abstract class
        with pytest.raises(ValueError, match=f"config names the kind {kind!r}; known are .*Box, .*MaxNorm, MaxUpdate"):
            from_config({"kind": kind})
    with pytest.raises(TypeError, match="radius"):
        from_config({"kind": "UnitNorm", "radius": 2.0})
