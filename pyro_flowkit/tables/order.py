r"""Which column comes first: the one that the others say most about.

A flow factorises a density one way or another, and any way will do in theory. In practice a column that is nearly a
function of the others is best learned as just that, before couplings of other columns have mixed it with them. How much
of column j the others explain is the held-out R^2 of a ridge regression,

    x_j  ~  beta' phi(x_rest),      phi(x) = (cos(W x + b), x, x^2, 1)

on random cosines (Rahimi and Recht. Random Features for Large-Scale Kernel Machines. NeurIPS 2007).
"""

import torch
from torch import Tensor

FEATURES = 400
ROWS = 8000
RIDGE = 1e-3
MOST_COLUMNS = 200  # more would take longer to order than is gained
REACH = 4.0  # standard deviations; what lies beyond counts as this


def order_columns(w: Tensor, *, seed: int = 0) -> tuple[int, ...]:
    """Numbers of the columns of whitened rows, the best explained one last; more than 200 columns stay as they are.

    Args:
        w: shape ``(N, D)``.
        seed: of the rows and the features that are drawn.
    """
    if w.shape[1] > MOST_COLUMNS:
        return tuple(range(w.shape[1]))
    explained = torch.tensor([_explained(w, j, seed) for j in range(w.shape[1])])
    return tuple(explained.argsort(stable=True).tolist())


def _explained(w: Tensor, column: int, seed: int) -> float:
    """Held-out share of the variance of a column that the others explain; may be negative."""
    generator = torch.Generator().manual_seed(seed)
    rows = w[torch.randperm(len(w), generator=generator)[:ROWS]].double().clamp(-REACH, REACH)
    half = len(rows) // 2
    rest = torch.cat([rows[:, :column], rows[:, column + 1 :]], dim=1)
    if not rest.shape[1]:
        return 0.0
    scale = rest.shape[1] ** -0.5
    weight = scale * torch.randn(rest.shape[1], FEATURES, generator=generator, dtype=torch.float64)
    phase = 2.0 * torch.pi * torch.rand(FEATURES, generator=generator, dtype=torch.float64)
    cosines = torch.cos(rest @ weight + phase) * (2.0 / FEATURES) ** 0.5
    features = torch.cat([cosines, rest, rest.square(), torch.ones_like(rest[:, :1])], dim=1)
    fitted, y = features[:half], rows[:half, column]
    gram = fitted.mT @ fitted
    ridge = RIDGE * half / FEATURES * torch.eye(len(gram), dtype=torch.float64)
    beta = torch.linalg.solve(gram + ridge, fitted.mT @ y)
    left = rows[half:, column] - features[half:] @ beta
    return 1.0 - float(left.var() / rows[half:, column].var())
