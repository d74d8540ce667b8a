r"""The correlations of few rows: shrunk by as much as held-out rows gain by.

The Gaussian of maximum likelihood follows the noise of its rows once there are not many more of them than columns.
Shrunk correlations,

    R(s) = (1 - s) R + s I,

cost little where R is right and gain much where it is not; s is that of the largest likelihood in five folds, if that
exceeds the likelihood of s = 0 by two standard errors and on most rows: a few outliers are not to decide.
"""

import numpy as np

MANY_ROWS = 20  # for each column: beyond, nothing is to be gained
FOLDS = 5
SHARES = (0.0, *np.logspace(-10, -2, 9), *np.linspace(0.05, 1.0, 20))
LEAST = 1e-14  # variance of a direction


def shrinkage(rows: np.ndarray) -> float:
    """The share s for standardised rows of shape ``(N, D)`` in random order; 0 where the gain is not sure."""
    count, columns = rows.shape
    if columns <= 1 or count >= MANY_ROWS * columns or count < 2 * FOLDS:
        return 0.0
    found = np.empty((len(SHARES), count))
    for fold in range(FOLDS):
        held_out = np.arange(count) % FOLDS == fold
        rest = rows[~held_out]
        values, vectors = np.linalg.eigh(rest.T @ rest / len(rest))
        squares = (rows[held_out] @ vectors) ** 2
        for i, share in enumerate(SHARES):
            variance = (1.0 - share) * np.maximum(values, LEAST) + share
            found[i, held_out] = -0.5 * (squares / variance + np.log(variance)).sum(1)
    best = int(found.mean(1).argmax())
    gain = found[best] - found[0]
    is_sure = gain.mean() > 2.0 * gain.std() / count**0.5 and np.median(gain) > 0.0
    return float(SHARES[best]) if is_sure else 0.0
