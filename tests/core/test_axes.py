"""What an axis setting means in an array of a shape, and which settings are errors."""

import numpy as np
import pytest
import torch

from projgd import MaxNorm, NonNegative, Split
from projgd.axes import Vectors, check, resolve


@pytest.mark.parametrize(
    ("axis", "shape", "layout", "wanted"),
    [
        ("fan_in", (4, 3), "out_first", Vectors((4, 3), (1,))),
        ("fan_in", (4, 3), "out_last", Vectors((4, 3), (0,))),
        ("fan_in", (4, 3, 5, 5), "out_first", Vectors((4, 3, 5, 5), (1, 2, 3))),
        ("fan_in", (5, 5, 3, 4), "out_last", Vectors((5, 5, 3, 4), (0, 1, 2))),
        ("fan_in", (4,), "out_first", None),
        ("fan_in", (), "out_last", None),
        ("matrix", (4,), "out_first", None),
        ("matrix", (4, 3, 2), "out_first", Vectors((4, 3, 2), (0, 1, 2))),
        ("entries", (4, 3), "out_first", Vectors((4, 3), ())),
        (None, (), "out_first", Vectors((1,), (0,))),
        (None, (4, 3), "out_last", Vectors((4, 3), (0, 1))),
        (-1, (4, 3), "out_last", Vectors((4, 3), (1,))),
        ((1, -3), (4, 3, 2), "out_first", Vectors((4, 3, 2), (0, 1))),
        (Split(0, 2, (1, 2)), (4, 3), "out_first", Vectors((2, 2, 3), (1, 2))),
        (Split(-1, 3, (-1,)), (4, 6), "out_first", Vectors((4, 3, 2), (2,))),
    ],
)
def test_the_vectors_of_an_axis(axis, shape, layout, wanted):
    assert resolve(axis, shape, layout) == wanted


def test_a_vector_has_as_many_entries_as_its_axes():
    assert Vectors((4, 3, 5), (1, 2)).length == 15
    assert Vectors((4, 3), ()).length == 1


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("fan_in", "fan_in"),
        ("matrix", "matrix"),
        (None, None),
        (np.int64(1), 1),
        ([0, np.int32(1)], (0, 1)),
        (range(1, 3), (1, 2)),
        ({"dim": 0, "parts": 2, "over": [1, 2]}, Split(0, 2, (1, 2))),  # after a way through JSON
    ],
)
def test_an_axis_has_one_form(given, canonical):
    assert check(given) == canonical
    assert type(check(given)) is type(canonical)


@pytest.mark.parametrize("axis", [1.5, True, (0, 1.5), (0, True), object(), {1, 2}])
def test_what_is_no_axis_is_a_type_error(axis):
    with pytest.raises(TypeError, match="is not an axis"):
        check(axis)


@pytest.mark.parametrize(
    ("axis", "says"), [("fan_out", "is not known"), ((), "names no axis"), ("entries", "is not known")]
)
def test_an_axis_of_no_array_is_a_value_error(axis, says):
    with pytest.raises(ValueError, match=says):
        check(axis)


@pytest.mark.parametrize(
    ("axis", "says"),
    [
        (2, r"axis 2 is out of range for head with shape \(4, 6\), which has 2 axes"),
        (-3, r"axis -3 is out of range for head"),
        ((0, -2), r"axis=\(0, -2\) names an axis of head with shape \(4, 6\) twice"),
        (Split(0, 3, (1,)), r"cannot cut axis 0 of head with shape \(4, 6\) into 3 equal blocks"),
        (Split(0, 0, (1,)), "cannot cut axis 0"),
        (Split(2, 2, (1,)), "axis 2 is out of range"),
        (Split(0, 2, (3,)), r"axis 3 is out of range for head with shape \(2, 2, 6\)"),
        ("rows", "axis='rows' is not known"),
    ],
)
def test_an_axis_that_an_array_does_not_have_is_an_error_that_names_it(axis, says):
    with pytest.raises(ValueError, match=says):
        resolve(axis, (4, 6), "out_first", "head")


def test_bare_arrays_are_read_in_the_layout_of_their_library():
    assert MaxNorm(1.0).vectors(np.zeros((2, 3))) == Vectors((2, 3), (0,))
    assert MaxNorm(1.0).vectors(torch.zeros(2, 3)) == Vectors((2, 3), (1,))
    assert NonNegative().vectors(torch.zeros(2, 3)) == Vectors((2, 3), ())
