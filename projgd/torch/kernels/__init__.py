"""Kernels that update and project in one pass; `projgd.torch.path` chooses them."""
