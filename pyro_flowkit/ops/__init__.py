"""Pure functions on tensors: the spline, by a fused kernel or in PyTorch, and Pareto-smoothed importance sampling."""

from pyro_flowkit.ops.backend import backend, use_compiled, use_reference
from pyro_flowkit.ops.columns import Columns
from pyro_flowkit.ops.psis import psis
from pyro_flowkit.ops.rational_quadratic import (
    rational_quadratic_forward,
    rational_quadratic_inverse,
    spline_columns,
    spline_elements,
)
from pyro_flowkit.ops.settings import SplineSettings, Tails, num_spline_params

__all__ = [
    "Columns",
    "SplineSettings",
    "Tails",
    "backend",
    "num_spline_params",
    "psis",
    "rational_quadratic_forward",
    "rational_quadratic_inverse",
    "spline_columns",
    "spline_elements",
    "use_compiled",
    "use_reference",
]
