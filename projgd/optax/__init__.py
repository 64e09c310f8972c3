"""Projections, and shapings of the update before them, as optax gradient transformations."""

from projgd.optax.adaptive import ProjectedState, projected
from projgd.optax.projection import ProjectionState, maxnorm_projection, projection
from projgd.optax.shaping import ShapingState, hyperball, max_update, radial_brake, relative_update, tangent_update

__all__ = [
    "ProjectedState",
    "ProjectionState",
    "ShapingState",
    "hyperball",
    "max_update",
    "maxnorm_projection",
    "projected",
    "projection",
    "radial_brake",
    "relative_update",
    "tangent_update",
]
