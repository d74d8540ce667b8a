"""A small table and the shortest command that trains on it."""

import numpy as np
import pandas as pd

FIT = ["--steps", "5", "--width", "8", "--layers", "2"]


def small_table(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    """Three columns far from unit scale, the last of them counts."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=rows)
    return pd.DataFrame(
        {
            "height": 170.0 + 10.0 * z,
            "bent": 1e-3 * (np.sin(2.0 * z) + 0.2 * rng.normal(size=rows)),
            "visits": rng.poisson(np.exp(1.0 + 0.5 * z)),
        }
    )
