"""Projected optimizers for PyTorch."""

from projgd.torch.hooks import project_after_step
from projgd.torch.layers import param_groups
from projgd.torch.metrics import register_metric
from projgd.torch.optimizers import (
    Projected,
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
    projected,
)

__all__ = [
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
    "hyperball",
    "param_groups",
    "project_after_step",
    "projected",
    "register_metric",
]
