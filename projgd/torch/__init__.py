"""Projected optimizers for PyTorch."""

from projgd.torch.classes import (
    ProjectedAdadelta,
    ProjectedAdafactor,
    ProjectedAdagrad,
    ProjectedAdam,
    ProjectedAdamax,
    ProjectedAdamW,
    ProjectedASGD,
    ProjectedLBFGS,
    ProjectedMuon,
    ProjectedNAdam,
    ProjectedRAdam,
    ProjectedRMSprop,
    ProjectedRprop,
    ProjectedSGD,
    ProjectedSparseAdam,
    hyperball,
)
from projgd.torch.hooks import project_after_step
from projgd.torch.joint import lora_pairs
from projgd.torch.layers import constrain, declared, param_groups, unconstrain
from projgd.torch.metrics import register_metric
from projgd.torch.optimizers import Projected, projected
from projgd.torch.routing import Choice, Routes

__all__ = [
    "Choice",
    "Projected",
    "ProjectedASGD",
    "ProjectedAdadelta",
    "ProjectedAdafactor",
    "ProjectedAdagrad",
    "ProjectedAdam",
    "ProjectedAdamW",
    "ProjectedAdamax",
    "ProjectedLBFGS",
    "ProjectedMuon",
    "ProjectedNAdam",
    "ProjectedRAdam",
    "ProjectedRMSprop",
    "ProjectedRprop",
    "ProjectedSGD",
    "ProjectedSparseAdam",
    "Routes",
    "constrain",
    "declared",
    "hyperball",
    "lora_pairs",
    "param_groups",
    "project_after_step",
    "projected",
    "register_metric",
    "unconstrain",
]
