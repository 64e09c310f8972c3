"""What an optimizer's update is asked for, as the kernels read it: numbers, in this order."""

from __future__ import annotations

from typing import Any, NamedTuple


class Sgd(NamedTuple):
    """What torch.optim.SGD is asked for."""

    lr: Any  # a number; on a GPU it may be a tensor there
    momentum: float
    undamped: float  # 1 - dampening
    decay: float
    sign: float
    nesterov: float


class Adam(NamedTuple):
    """What torch.optim.Adam and AdamW are asked for."""

    lr: Any
    beta1: float
    beta2: float
    eps: float
    decay: float
    sign: float
    decoupled: float
    amsgrad: float


Rule = Sgd | Adam
