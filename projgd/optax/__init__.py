"""Projections, and shapings of the update before them, as optax gradient transformations."""

from projgd.optax.adaptive import Diagonal, ProjectedState, projected
from projgd.optax.check import check_last
from projgd.optax.declare import constrain, with_constraint
from projgd.optax.joint import JointState, joint_projection, project_jointly
from projgd.optax.projection import ProjectionState, apply_updates, maxnorm_projection, project, projection
from projgd.optax.shaping import ShapingState, hyperball, max_update, radial_brake, relative_update, tangent_update
from projgd.optax.tree import Constraints, Leaf, Schedule, SplitOver, declared, find_leaves

__all__ = [
    "Constraints",
    "Diagonal",
    "JointState",
    "Leaf",
    "ProjectedState",
    "ProjectionState",
    "Schedule",
    "ShapingState",
    "SplitOver",
    "apply_updates",
    "check_last",
    "constrain",
    "declared",
    "find_leaves",
    "hyperball",
    "joint_projection",
    "max_update",
    "maxnorm_projection",
    "project",
    "project_jointly",
    "projected",
    "projection",
    "radial_brake",
    "relative_update",
    "tangent_update",
    "with_constraint",
]
