r"""Rows with heavy tails: a centre and a scale that outliers do not move, and degrees of freedom for each column.

Where single rows decide about mean and covariance, these say nothing of the rest. With w_i = (2 + D) / (2 + d_i^2) and
the Mahalanobis distances d_i, the means and covariances of rows weighted by w are those of maximum likelihood under a
multivariate t of two degrees of freedom (Lange, Little, Taylor. Robust Statistical Modeling Using the t Distribution.
JASA 1989), iterated. Of the columns whitened by them each has its own Student's t, of maximum likelihood, too.
"""

import numpy as np

DEGREES = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0, 30.0)
HEAVY = 2.5  # degrees of freedom: of 2 and fewer the variance is infinite
MOST_OF_ONE = 0.1  # of a column's variance, by one row
MOST_ROWS = 20_000
ROUNDS = 50


def has_heavy_tails(rows: np.ndarray) -> bool:
    """Whether a single row has a tenth of a column's variance, in rows of shape ``(N, D)``."""
    squares = (rows - rows.mean(0)) ** 2
    return bool((squares.max(0) > MOST_OF_ONE * squares.sum(0)).any())


def robust_scale(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre of shape ``(D,)``, scale_tril of shape ``(D, D)`` and degrees of freedom of shape ``(D,)`` of rows.

    Args:
        rows: shape ``(N, D)``, in random order; more than 20,000 are left out.
    """
    rows = rows[:MOST_ROWS]
    loc = np.median(rows, axis=0)
    spread = np.median(np.abs(rows - loc), axis=0)
    spread = np.where(spread > 0, spread, rows.std(0))
    scaled = (rows - loc) / spread
    centre, scatter = np.zeros_like(loc), np.eye(len(loc))
    for _ in range(ROUNDS):
        factor = np.linalg.cholesky(scatter)
        distance = (np.linalg.solve(factor, (scaled - centre).T) ** 2).sum(0)
        weight = (2.0 + len(loc)) / (2.0 + distance)
        centre = weight @ scaled / weight.sum()
        centred = scaled - centre
        scatter = (weight[:, None] * centred).T @ centred / len(rows)
    factor = np.linalg.cholesky(scatter)
    whitened = np.linalg.solve(factor, (scaled - centre).T)
    degrees, scales = np.array([student_t(column) for column in whitened]).T
    return loc + spread * centre, spread[:, None] * factor * scales, degrees


def student_t(column: np.ndarray) -> tuple[float, float]:
    """Degrees of freedom and scale of maximum likelihood, around 0."""
    from scipy import stats  # its import adds to the filters of warnings

    best = (-np.inf, 1.0, 1.0)
    for df in DEGREES:
        variance = float(np.median(column**2)) or 1.0
        for _ in range(ROUNDS):
            weight = (df + 1.0) / (df + column**2 / variance)
            variance = float((weight * column**2).mean())
        value = float(stats.t.logpdf(column, df, scale=variance**0.5).sum())
        best = max(best, (value, df, variance**0.5))
    return best[1], best[2]
