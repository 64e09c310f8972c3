"""The projected classes of torch.optim by name, as classes that a type checker can see.

Each is what `projected` gives for the class after `Projected`.
"""

from torch import optim

from projgd.torch.optimizers import Projected


class ProjectedAdadelta(Projected, optim.Adadelta): ...


class ProjectedAdafactor(Projected, optim.Adafactor): ...


class ProjectedAdagrad(Projected, optim.Adagrad): ...


class ProjectedAdam(Projected, optim.Adam): ...


class ProjectedAdamW(Projected, optim.AdamW): ...


class ProjectedAdamax(Projected, optim.Adamax): ...


class ProjectedASGD(Projected, optim.ASGD): ...


class ProjectedLBFGS(Projected, optim.LBFGS): ...


class ProjectedMuon(Projected, optim.Muon): ...


class ProjectedNAdam(Projected, optim.NAdam): ...


class ProjectedRAdam(Projected, optim.RAdam): ...


class ProjectedRMSprop(Projected, optim.RMSprop): ...


class ProjectedRprop(Projected, optim.Rprop): ...


class ProjectedSGD(Projected, optim.SGD): ...


class ProjectedSparseAdam(Projected, optim.SparseAdam): ...
