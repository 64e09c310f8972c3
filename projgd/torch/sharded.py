"""Parameters whose weights live on several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(p: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether `p` is a DTensor; the half second that importing its module takes is not spent on others."""
    if not is_traceable_wrapper_subclass(p):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)
