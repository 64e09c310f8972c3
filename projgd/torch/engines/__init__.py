"""Engines: the ways to apply a constraint to the parameters of a step. `projgd.torch.routing` chooses among them."""
