"""What only the tests of Triton need."""

import numpy as np
import pytest

from tests.contract import NUMPY


@pytest.fixture
def rounds_to_bfloat16(monkeypatch):
    """Triton's interpreter cuts off what a GPU rounds to nearest."""
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, to):
        if (source.dtype.scalar.name, to.scalar.name) != ("fp32", "bf16"):
            return cast(self, source, to)
        with np.errstate(invalid="ignore"):
            return interpreter.TensorHandle(source.data.astype(NUMPY["bfloat16"]).view(np.uint16), to.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)
