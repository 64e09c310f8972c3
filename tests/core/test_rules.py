"""Rules over names: what each name gets, and which rules are mistakes."""

import re

import pytest

from projgd import MaxNorm
from projgd.rules import assign, refuse_idle

NAMES = ["conv.weight", "conv.bias", "head.weight", "head.bias"]
SMALL, LARGE = MaxNorm(1.0), MaxNorm(4.0)


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ({"head.*": SMALL, "*": LARGE}, [LARGE, LARGE, SMALL, SMALL]),
        ({"head.*": None, "*.weight": LARGE}, [LARGE, None, None, None]),
        ({"*.weight": LARGE, "*.bias": None, "*": None}, [LARGE, None, LARGE, None]),  # the rest may be empty
        ({"conv.*": SMALL, "head.*": LARGE, "*": SMALL}, [SMALL, SMALL, LARGE, LARGE]),
        ({"*.bias": None, "conv.*": SMALL, "*t": LARGE}, [SMALL, None, LARGE, None]),  # each is left something
    ],
)
def test_the_first_match_wins(rules, wanted):
    assert assign(rules, NAMES) == dict(zip(NAMES, wanted, strict=True))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "there are no rules, so nothing would be held"),
        ({"conv.wieght": SMALL}, "'conv.wieght' matches no parameter; the nearest names are conv.weight"),
        ({"*": LARGE, "head.*": None}, r"'head.\*' has no effect: the first match wins, and '\*' before it takes all"),
        ({"conv.*": LARGE, "*.bias": None, "conv.bias": SMALL}, r"'conv.bias' has no effect: .*'conv.\*' before it"),
        ({"conv.*": LARGE, "head.*": None, "*.weight": SMALL}, r"'conv.\*', 'head.\*' before it takes all"),
        ({"*": 4.0}, "holds 4.0: pass a constraint"),
    ],
)
def test_rules_that_say_nothing_are_errors(rules, message):
    with pytest.raises((TypeError, ValueError), match=message):
        assign(rules, NAMES)


def test_a_rule_that_is_left_only_what_cannot_be_held_is_an_error():
    held = {name: name.endswith("weight") for name in NAMES}
    for fine in ({"*": LARGE}, {"head.*": SMALL, "*": LARGE}, {"*.weight": LARGE, "*": SMALL}, {"*.bias": None}):
        refuse_idle(fine, held)
    for idle in ({"*.bias": LARGE}, {"*.weight": LARGE, "head.*": SMALL}):
        with pytest.raises(ValueError, match="applies only to parameters without a fan-in, such as"):
            refuse_idle(idle, held)
    with pytest.raises(ValueError, match="applies only"):
        refuse_idle({"*": LARGE}, {"bias": False})


@pytest.mark.parametrize("sep", "./")
def test_the_name_of_a_layer_is_answered_with_a_rule_for_all_that_is_in_it(sep):
    with pytest.raises(ValueError, match=rf"'0' matches no parameter; did you mean '0{re.escape(sep)}\*'\?"):
        assign({"0": LARGE}, [f"0{sep}weight", f"1{sep}weight"])
