"""Missing values: rows that lack some are left out, or filled in from rows like them, to train and for nothing else.

A row takes what it lacks from one of the five complete rows that are nearest in what it has, by standardised distance
(a hot deck: Andridge, Little. A Review of Hot Deck Imputation for Survey Non-response. International Statistical
Review 2010). So integers stay integers and atoms stay atoms. How good a density is only complete rows say.
"""

import numpy as np

MISSING = ("refuse", "drop", "impute")
DONORS, NEAREST = 1000, 5


def fill_in(rows: np.ndarray, donors: np.ndarray, *, seed: int) -> np.ndarray:
    """Rows of shape ``(M, D)`` without their NaN.

    Args:
        rows: with NaN.
        donors: complete rows of shape ``(N, D)`` in random order; the first thousand are asked.
        seed: of the choice among the nearest.
    """
    rng = np.random.default_rng(seed)
    pool = donors[:DONORS]
    spread = pool.std(0)
    scaled = pool / np.where(spread > 0, spread, 1.0)
    filled = rows.copy()
    for row in filled:
        lacks = np.isnan(row)
        own = row[~lacks] / np.where(spread > 0, spread, 1.0)[~lacks]
        distance = ((scaled[:, ~lacks] - own) ** 2).sum(1)
        nearest = np.argsort(distance, kind="stable")[:NEAREST]
        row[lacks] = pool[rng.choice(nearest), lacks]
    return filled
