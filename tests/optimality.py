"""What optimal means: a residual, and a problem whose constrained optimum is known. For the tests of every part."""

import numpy as np


def residual(x, y, d):
    """‖D(y - x) - λx‖∞ for the best λ, relative to the largest of D|y| and D|x|; and that λ. Row by row, in float64."""
    x, y, d = (np.asarray(a, dtype=np.float64) for a in (x, y, d))
    d = d / d.max(-1, keepdims=True)
    pull = d * (y - x)
    multiplier = (x * pull).sum(-1, keepdims=True) / (x * x).sum(-1, keepdims=True)
    scale = np.maximum(d * abs(y), d * abs(x)).max(-1)
    return abs(pull - multiplier * x).max(-1) / scale, multiplier[..., 0]


class LeastSquares:
    """min ½‖Ax - b‖²/n over ‖x‖ ≤ 1, features scaled 0.1 to 10; the optimum comes from the secular equation.

    Gradient `hessian @ x - linear`; `best` is the constrained optimum, `optimum` its value."""

    def __init__(self, rows: int = 2000, columns: int = 20, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        scales = rng.permutation(np.logspace(-1, 1, columns))
        a = rng.standard_normal((rows, columns)) * scales
        b = a @ (3 * rng.standard_normal(columns) / np.sqrt(scales)) + rng.standard_normal(rows)
        self.hessian, self.linear, self.constant = a.T @ a / rows, a.T @ b / rows, b @ b / rows / 2
        values, vectors = np.linalg.eigh(self.hessian)
        turned = vectors.T @ self.linear
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.linalg.norm(turned / (values + middle)) > 1 else (low, middle)
        self.best = vectors @ (turned / (values + high))
        self.optimum = self(self.best)

    def __call__(self, x: np.ndarray) -> float:
        return float(x @ self.hessian @ x / 2 - self.linear @ x + self.constant)
