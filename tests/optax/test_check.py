"""check_last finds the projections that are not last."""

import jax.numpy as jnp
import optax
import pytest
from optax import contrib

from projgd import MaxNorm
from projgd.optax import check_last, maxnorm_projection

pytestmark = pytest.mark.usefixtures("quick_compilation")

C = 0.8
LAST = optax.chain(optax.adam(0.3), maxnorm_projection(C))
PARAMS = {"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, "none": None}


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(maxnorm_projection(C), optax.adam(0.3)),
        optax.chain(LAST, optax.scale(2.0)),
        optax.chain(LAST, optax.trace(0.9)),
        optax.adam(0.3),
    ],
)
def test_a_projection_that_is_not_last_is_found_out(tx):
    with pytest.raises(ValueError, match=r"Dense_0/kernel is outside MaxNorm.* after step \d: put the projection last"):
        check_last(tx, PARAMS, MaxNorm(C))


def test_a_projection_inside_of_schedule_free_is_found_out():
    """Its first steps are inside: the wrapper is recognised, in a chain too."""
    inside = contrib.schedule_free(LAST, 0.3)
    for tx in (inside, optax.chain(optax.clip(1.0), inside)):
        with pytest.raises(ValueError, match=r"chain\(schedule_free\(\.\.\.\), projection"):
            check_last(tx, PARAMS, MaxNorm(C))


def test_what_holds_passes():
    masked = optax.masked(maxnorm_projection(C), {"Dense_0": {"kernel": True, "bias": False}, "none": None})
    outside = optax.chain(contrib.schedule_free_sgd(0.3), maxnorm_projection(C))
    for tx in (optax.MultiSteps(LAST, 2).gradient_transformation(), optax.chain(optax.sgd(0.1), masked), outside):
        check_last(tx, PARAMS, MaxNorm(C), steps=2)
