"""Projected optimizers for PyTorch."""

from projgd.torch.optimizers import Projected, ProjectedAdam, ProjectedAdamW, ProjectedSGD, projected

__all__ = ["Projected", "ProjectedAdam", "ProjectedAdamW", "ProjectedSGD", "projected"]
