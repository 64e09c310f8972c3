"""What an optimizer's update is asked for, as the kernels read it: numbers, in this order."""

from __future__ import annotations

from typing import Any, NamedTuple


class Sgd(NamedTuple):
    """The update of torch.optim.SGD."""

    lr: Any  # a number, or for `gpu_batch` a tensor on the device
    momentum: float
    undamped: float  # 1 - dampening
    decay: float
    sign: float
    nesterov: float


class Adam(NamedTuple):
    """The update of torch.optim.Adam and AdamW."""

    lr: Any
    beta1: float
    beta2: float
    eps: float
    decay: float
    sign: float
    decoupled: float
    amsgrad: float


Rule = Sgd | Adam
