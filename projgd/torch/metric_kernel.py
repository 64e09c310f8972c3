"""The secular equation of a ball, row by row, compiled by numba: a row, its D and the temporaries stay in cache."""

from __future__ import annotations

import numba
import numpy as np

BLOCK = 1024  # squares are summed in float32 within a block, and in float64 from there on


@numba.njit(cache=True, fastmath=True, nogil=True, error_model="numpy")
def solve(y, d, out, radius, close, steps):  # type: ignore[no-untyped-def]
    """Write the rows of norm `radius` nearest to y in the metric d into `out`. All finite, d > 0 with maximum 1.

    Used up: d. As `metric_ball._solve`, which is the same without numba.
    """
    rows, n = y.shape
    one = np.float32(1)
    inverse_radius = np.float32(1 / radius)
    for row in range(rows):
        yr, dr, u = y[row], d[row], out[row]
        total = np.float64(0)
        low = np.float32(0)
        for start in range(0, n, BLOCK):
            part = np.float32(0)
            for i in range(start, min(start + BLOCK, n)):
                u[i] = yr[i] * dr[i] * inverse_radius
                part += u[i] * u[i]
                low = max(low, abs(u[i]) - dr[i])
            total += part
        high = np.float32(np.sqrt(total))
        nu = max(low, high - one)
        for _ in range(steps):
            square, slope = np.float64(0), np.float64(0)
            for start in range(0, n, BLOCK):
                s, p = np.float32(0), np.float32(0)
                for i in range(start, min(start + BLOCK, n)):
                    inverse = one / (dr[i] + nu)
                    h = u[i] * inverse
                    h = h * h
                    s += h
                    p += h * inverse
                square += s
                slope += p
            excess = np.sqrt(square) - 1
            nu = np.float32(min(max(nu + excess * square / slope, 0.0), high))
            if abs(excess) <= close:
                break
        scale = np.float32(radius)
        for i in range(n):
            u[i] = scale * u[i] / (dr[i] + nu)
