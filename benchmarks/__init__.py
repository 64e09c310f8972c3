"""Measure the cost of a projected step against the plain one: `python -m benchmarks`."""
