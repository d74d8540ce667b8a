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


def table_with_holes() -> pd.DataFrame:
    """The small table, of which rows 0, 5, 10, ... lack one value."""
    table = small_table()
    table["visits"] = table["visits"].astype(float)
    for i in range(0, 400, 5):
        table.iloc[i, i % 3] = np.nan
    return table
