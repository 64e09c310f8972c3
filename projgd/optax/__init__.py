"""Projections as optax gradient transformations."""

from projgd.optax.adaptive import ProjectedState, projected
from projgd.optax.projection import ProjectionState, maxnorm_projection, projection

__all__ = ["ProjectedState", "ProjectionState", "maxnorm_projection", "projected", "projection"]
