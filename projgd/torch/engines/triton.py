"""STUB: a colleague is writing this file; overwrite it."""

from projgd.torch.engines.base import Engine


class Triton(Engine):
    name = "triton"
    steps = True

    def refuses(self, job, p):
        return "not there yet"

    def run(self, prepared, job, params):
        raise AssertionError
