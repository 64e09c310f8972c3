"""Where there is no GPU, Triton's kernels are interpreted: that must be said before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
