"""STUB: a colleague is writing this file; overwrite it."""

from projgd.torch.engines.base import Engine


class Cpu(Engine):
    name = "cpu"
    steps = True

    def refuses(self, job, p):
        return "not there yet"

    def run(self, prepared, job, params):
        raise AssertionError
