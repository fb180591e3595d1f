"""Scaling laws: loss (nats a token) as a function of parameters N and tokens D, with their published constants, what is optimal for a budget, and a fit to one's own runs.

Legend: N parameters, D tokens, C = 6 N D FLOPs.
"""
from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence

import numpy as np

from llmjax.core import ConfigError

PF_DAY = 8.64e19                       # FLOPs


@dc.dataclass(frozen=True)
class Kaplan:
    """L = ((Nc / N)^(αN / αD) + Dc / D)^αD (Kaplan et al. 2020, arXiv:2001.08361, eq. 1.5, table 2). N leaves embeddings out; its tokens are GPT-2's, its text WebText2.
    The optimum (eq. 1.7 and 1.8, figure 14, table 6): N = 1.3e9 · C^0.73 and D = 2e10 · C^0.27, C the least compute in PF-days."""
    n_c: float = 6.4e13
    d_c: float = 1.8e13
    alpha_n: float = 0.076
    alpha_d: float = 0.103

    def loss(self, n: float, d: float) -> float:
        return ((self.n_c / n) ** (self.alpha_n / self.alpha_d) + self.d_c / d) ** self.alpha_d

    def optimum(self, flops: float) -> tuple[float, float]:
        """-> (N, D) for a budget."""
        days = flops / PF_DAY
        return 1.3e9 * days ** 0.73, 2e10 * days ** 0.27


@dc.dataclass(frozen=True)
class Chinchilla:
    """L = E + A / N^α + B / D^β (Hoffmann et al. 2022, arXiv:2203.15556, eq. 2); the optimum for C = 6 N D is eq. 4."""
    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, n, d):
        return self.e + self.a / n ** self.alpha + self.b / d ** self.beta

    @property
    def exponents(self) -> tuple[float, float]:
        """(a, b): N grows as C^a, D as C^b."""
        return self.beta / (self.alpha + self.beta), self.alpha / (self.alpha + self.beta)

    def optimum(self, flops: float) -> tuple[float, float]:
        """-> (N, D) for a budget."""
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        a, b = self.exponents
        return g * (flops / 6) ** a, (flops / 6) ** b / g


PUBLISHED: dict[str, Kaplan | Chinchilla] = {
    "kaplan-2020": Kaplan(),
    "hoffmann-2022": Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28),                # approach 3, as printed
    "besiroglu-2024": Chinchilla(1.8172, 482.01, 2085.43, 0.3478, 0.3658),      # the same data fitted to the end (arXiv:2404.10102, table 1)
}


@dc.dataclass(frozen=True)
class Fit:
    """law: the fit to all points. low, high: the ends of the confidence intervals of its constants and of the exponent a, by name, from `samples` bootstrap fits."""
    law: Chinchilla
    low: dict[str, float]
    high: dict[str, float]
    samples: tuple[Chinchilla, ...]
    error: float                       # root mean square of log loss


HUBER = 1e-3                           # the paper's delta, on log loss (section 3.3)
NAMES = ("a", "b", "e", "alpha", "beta")


def fit(n: Sequence[float], d: Sequence[float], loss: Sequence[float], *, bootstrap: int = 200, confidence: float = 0.9, seed: int = 0) -> Fit:
    """E, A, B, α, β of the Chinchilla form by Hoffmann's method: Huber loss on log L, its sum (not its mean: a mean lets L-BFGS stop early, which is what Besiroglu et al. found) minimised
    by L-BFGS from the best points of the paper's grid. Confidence: the runs drawn again with replacement. Raises ConfigError for fewer than six points or too few different N or D."""
    given = np.asarray([n, d, loss], float)
    if not (np.isfinite(given).all() and (given > 0).all()):
        raise ConfigError("scaling law: parameters, tokens and losses must be numbers above 0")
    points = np.log(given)
    if points.shape[1] < 6 or min(len(np.unique(points[i].round(6))) for i in (0, 1)) < 3:
        raise ConfigError(f"scaling law: {points.shape[1]} runs of {len(np.unique(points[0].round(6)))} sizes and {len(np.unique(points[1].round(6)))} lengths; five constants want at least "
                          "six runs of three sizes and three lengths")
    best = minimise(points, starts(points))
    draw = np.random.default_rng(seed)
    again: list[np.ndarray] = []
    while len(again) < bootstrap:
        chosen = points[:, draw.integers(points.shape[1], size=points.shape[1])]
        if min(len(np.unique(chosen[i].round(6))) for i in (0, 1)) >= 2:
            again.append(minimise(chosen, [best], 500))
    laws = tuple(as_law(x) for x in again)
    rows = [told(law) for law in laws]
    low, high = ({name: float(np.quantile([row[name] for row in rows], q)) for name in rows[0]} if rows else {} for q in ((1 - confidence) / 2, (1 + confidence) / 2))
    residual = predict(best, points) - points[2]
    return Fit(as_law(best), low, high, laws, float(np.sqrt(np.mean(residual ** 2))))


def told(law: Chinchilla) -> dict[str, float]:
    return {**dc.asdict(law), "exponent_n": law.exponents[0], "exponent_d": law.exponents[1]}


def as_law(x: np.ndarray) -> Chinchilla:
    a, b, e, alpha, beta = (float(v) for v in x)
    return Chinchilla(math.exp(e), math.exp(a), math.exp(b), alpha, beta)


def terms(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    """log of A / N^α, B / D^β and E: [3, points]."""
    a, b, e, alpha, beta = x
    return np.stack([a - alpha * points[0], b - beta * points[1], np.full_like(points[0], e)])


def predict(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    parts = terms(x, points)
    top = parts.max(0)
    return top + np.log(np.exp(parts - top).sum(0))


def objective(x: np.ndarray, points: np.ndarray) -> tuple[float, np.ndarray]:
    """-> (sum of Huber losses in units of HUBER², its gradient)."""
    total = predict(x, points)
    share = np.exp(terms(x, points) - total)
    r = (total - points[2]) / HUBER
    value = np.where(np.abs(r) <= 1, 0.5 * r ** 2, np.abs(r) - 0.5).sum()
    slope = np.clip(r, -1, 1) / HUBER * share
    return float(value), np.array([slope[0].sum(), slope[1].sum(), slope[2].sum(), -(slope[0] * points[0]).sum(), -(slope[1] * points[1]).sum()])


def starts(points: np.ndarray, keep: int = 8) -> list[np.ndarray]:
    """The best points of the paper's grid (section D.3), and the published laws."""
    grid = [np.array([a, b, e, alpha, beta]) for a in range(0, 26, 5) for b in range(0, 26, 5) for e in (-1, -0.5, 0, 0.5, 1) for alpha in (0, 0.5, 1, 1.5, 2) for beta in (0, 0.5, 1, 1.5, 2)]
    grid += [np.array([math.log(law.a), math.log(law.b), math.log(law.e), law.alpha, law.beta]) for law in PUBLISHED.values() if isinstance(law, Chinchilla)]
    return sorted(grid, key=lambda x: objective(x, points)[0])[:keep] + grid[-2:]


def minimise(points: np.ndarray, begin: list[np.ndarray], iterations: int = 5000) -> np.ndarray:
    from scipy.optimize import minimize
    bounds = [(-10, 60), (-10, 60), (-10, 5), (1e-3, 4), (1e-3, 4)]
    found = [minimize(objective, x, args=(points,), jac=True, method="L-BFGS-B", bounds=bounds, options=dict(maxiter=iterations, maxfun=4 * iterations, ftol=1e-14, gtol=1e-9)) for x in begin]
    return min(found, key=lambda r: r.fun).x
