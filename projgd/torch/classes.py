"""Define the projected classes of torch.optim by name, so that a type checker sees them.

Each class is what `projected` returns for the class that follows `Projected` in its bases.
"""

from torch import optim

from projgd.torch.optimizers import Projected


class ProjectedAdadelta(Projected, optim.Adadelta):
    """Run `torch.optim.Adadelta`, then project the parameters.

    The constructor takes what `torch.optim.Adadelta` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdadelta(layer.parameters(), lr=1.0, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdafactor(Projected, optim.Adafactor):
    """Run `torch.optim.Adafactor`, then project the parameters.

    The constructor takes what `torch.optim.Adafactor` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdafactor(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdagrad(Projected, optim.Adagrad):
    """Run `torch.optim.Adagrad`, then project the parameters.

    The constructor takes what `torch.optim.Adagrad` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdagrad(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdam(Projected, optim.Adam):
    """Run `torch.optim.Adam`, then project the parameters.

    The constructor takes what `torch.optim.Adam` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdam(layer.parameters(), lr=1e-3, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdamW(Projected, optim.AdamW):
    """Run `torch.optim.AdamW`, then project the parameters.

    The constructor takes what `torch.optim.AdamW` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdamW(layer.parameters(), lr=1e-3, weight_decay=0.1, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdamax(Projected, optim.Adamax):
    """Run `torch.optim.Adamax`, then project the parameters.

    The constructor takes what `torch.optim.Adamax` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdamax(layer.parameters(), lr=2e-3, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedASGD(Projected, optim.ASGD):
    """Run `torch.optim.ASGD`, then project the parameters.

    The constructor takes what `torch.optim.ASGD` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedASGD(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedLBFGS(Projected, optim.LBFGS):
    """Run `torch.optim.LBFGS`, then project the parameters.

    The line search evaluates points outside of the set; only the end of the step is projected.

    The constructor takes what `torch.optim.LBFGS` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedLBFGS(layer.parameters(), lr=0.5, c=0.1)
    >>> def closure():
    ...     opt.zero_grad()
    ...     loss = layer(torch.ones(1, 3)).square().sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = opt.step(closure)
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedMuon(Projected, optim.Muon):
    """Run `torch.optim.Muon`, then project the parameters.

    Muon takes matrices only.

    The constructor takes what `torch.optim.Muon` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedMuon([layer.weight], lr=0.02, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedNAdam(Projected, optim.NAdam):
    """Run `torch.optim.NAdam`, then project the parameters.

    The constructor takes what `torch.optim.NAdam` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedNAdam(layer.parameters(), lr=2e-3, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedRAdam(Projected, optim.RAdam):
    """Run `torch.optim.RAdam`, then project the parameters.

    The constructor takes what `torch.optim.RAdam` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedRAdam(layer.parameters(), lr=1e-3, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedRMSprop(Projected, optim.RMSprop):
    """Run `torch.optim.RMSprop`, then project the parameters.

    The constructor takes what `torch.optim.RMSprop` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedRMSprop(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedRprop(Projected, optim.Rprop):
    """Run `torch.optim.Rprop`, then project the parameters.

    The constructor takes what `torch.optim.Rprop` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedRprop(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedSGD(Projected, optim.SGD):
    """Run `torch.optim.SGD`, then project the parameters.

    The constructor takes what `torch.optim.SGD` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedSGD(layer.parameters(), lr=0.1, momentum=0.9, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedSparseAdam(Projected, optim.SparseAdam):
    """Run `torch.optim.SparseAdam`, then project the parameters.

    The first step projects the whole table, later steps only the rows that they move.

    The constructor takes what `torch.optim.SparseAdam` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad` and `engine`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Embedding(10, 3, sparse=True)
    >>> opt = ProjectedSparseAdam(layer.parameters(), lr=1e-3, c=0.1)
    >>> layer(torch.tensor([1, 2])).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """
