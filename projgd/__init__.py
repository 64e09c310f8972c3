"""Projected gradient descent for PyTorch and JAX.

Importing `projgd` imports neither framework: the optimizers are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from projgd.axes import Split, Stacked
from projgd.combined import Around, Intersection
from projgd.config import from_config
from projgd.constraints import Constraint, MaxNorm, MinMaxNorm, RelativeMaxNorm, Sphere, UnitNorm
from projgd.entries import Box, KeepSign, KeepZeros, NonNegative, NonPositive, RelativeBox, WeightClip
from projgd.joint import ProductMaxNorm, QKClip, TreeBall
from projgd.planes import AffineSet, BoxSection, HalfSpace, Hyperplane
from projgd.report import report
from projgd.simplices import GroupL1Ball, L1Ball, L1Sphere, Simplex, SparseSimplex, TopK
from projgd.suggestion import suggest
from projgd.updates import MaxUpdate, RadialBrake, RelativeUpdate, TangentUpdate, Update

if TYPE_CHECKING:
    from projgd.optax import maxnorm_projection
    from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD

__version__ = "0.1.0"

_LAZY = {
    "ProjectedSGD": "projgd.torch",
    "ProjectedAdam": "projgd.torch",
    "ProjectedAdamW": "projgd.torch",
    "maxnorm_projection": "projgd.optax",
}

__all__ = [
    "AffineSet",
    "Around",
    "Box",
    "BoxSection",
    "Constraint",
    "GroupL1Ball",
    "HalfSpace",
    "Hyperplane",
    "Intersection",
    "KeepSign",
    "KeepZeros",
    "L1Ball",
    "L1Sphere",
    "MaxNorm",
    "MaxUpdate",
    "MinMaxNorm",
    "NonNegative",
    "NonPositive",
    "ProductMaxNorm",
    "ProjectedAdam",
    "ProjectedAdamW",
    "ProjectedSGD",
    "QKClip",
    "RadialBrake",
    "RelativeBox",
    "RelativeMaxNorm",
    "RelativeUpdate",
    "Simplex",
    "SparseSimplex",
    "Sphere",
    "Split",
    "Stacked",
    "TangentUpdate",
    "TopK",
    "TreeBall",
    "UnitNorm",
    "Update",
    "WeightClip",
    "from_config",
    "maxnorm_projection",
    "report",
    "suggest",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'projgd' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
