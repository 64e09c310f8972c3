"""Projections as optax gradient transformations."""

from projgd.optax.projection import ProjectionState, maxnorm_projection, projection

__all__ = ["ProjectionState", "maxnorm_projection", "projection"]
