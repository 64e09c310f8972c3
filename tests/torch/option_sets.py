"""Every set of options of SGD, Adam and AdamW that changes what a step computes."""

from itertools import product
from typing import Any

from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD

FLAGS = (False, True)
MOMENTUM: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
)
EVERY: list[tuple[Any, dict[str, Any]]] = [
    *(
        (ProjectedSGD, {"lr": 0.01, **momentum, "weight_decay": 0.1 * decay, "maximize": maximize})
        for momentum, decay, maximize in product(MOMENTUM, FLAGS, FLAGS)
    ),
    *(
        (cls, {"lr": 0.01, "amsgrad": amsgrad, "weight_decay": 0.1 * decay, "maximize": maximize})
        for cls, amsgrad, decay, maximize in product((ProjectedAdam, ProjectedAdamW), FLAGS, FLAGS, FLAGS)
    ),
]
IDS = ["-".join([cls.__name__, *(f"{k}={v}" for k, v in options.items() if v and k != "lr")]) for cls, options in EVERY]
