"""Pure functions on tensors: the spline kernel and Pareto-smoothed importance sampling."""

from pyro_flowkit.ops.psis import psis
from pyro_flowkit.ops.rational_quadratic import (
    num_spline_params,
    rational_quadratic_forward,
    rational_quadratic_inverse,
    validate_spline,
)

__all__ = [
    "num_spline_params",
    "psis",
    "rational_quadratic_forward",
    "rational_quadratic_inverse",
    "validate_spline",
]
