"""What a user of projgd writes, for `mypy --strict` (`make check`): an `ignore` that nothing needs is an error there.

`test_package.py` runs it.
"""

from collections.abc import Callable
from typing import Any, assert_type

import torch
from torch import nn

import projgd
from projgd import MaxNorm, RelativeUpdate
from projgd.torch import (
    Projected,
    ProjectedAdam,
    ProjectedMuon,
    ProjectedSGD,
    hyperball,
    param_groups,
    project_after_step,
    projected,
)


class Mine(ProjectedAdam):
    """A class of the user's own."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


class Top(projgd.ProjectedSGD):
    """From the name at the top of the package."""


class Module(nn.Module):
    optimizer: ProjectedMuon


def rate(optimizer: ProjectedAdam) -> float:
    return float(optimizer.param_groups[0]["lr"])


def main() -> None:
    model = nn.Linear(4, 3)
    adam = Mine(model.parameters(), lr=1e-3, c=4, axis=0, without_grad=True)
    rate(adam)
    plain: torch.optim.Adam = adam
    stock: torch.optim.Optimizer = Top(param_groups(model, {"weight": MaxNorm(3), "bias": None}), lr=0.1)
    assert_type(projected(torch.optim.Adam), type[Projected])
    assert_type(hyperball(torch.optim.Adam)(model.parameters(), lr=0.1), Projected)
    project_after_step(plain, MaxNorm(4)).remove()
    ProjectedSGD(model.parameters(), c=torch.tensor(4.0), update=RelativeUpdate(), metric="euclidean")
    tried: list[Callable[[], object]] = [
        lambda: ProjectedSGD(model.parameters(), c="4"),  # type: ignore[arg-type]
        lambda: ProjectedSGD(model.parameters(), c=4.0, axis=0.5),  # type: ignore[arg-type]
        lambda: ProjectedSGD(model.parameters(), constraint=4.0),  # type: ignore[arg-type]
        lambda: ProjectedSGD(model.parameters(), metric="odd"),  # type: ignore[arg-type]
        lambda: rate(stock),  # type: ignore[arg-type]
    ]
    for wrong in tried[:-1]:
        try:
            wrong()
        except (TypeError, ValueError):
            continue
        raise AssertionError("a type checker sees an error, and running finds none")


if __name__ == "__main__":
    main()
