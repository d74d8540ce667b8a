"""Variational guides: spline flows in the place of Pyro's Gaussian autoguides."""

from pyro_flowkit.guides.amortized_spline_flow import AmortizedSplineFlow
from pyro_flowkit.guides.auto_spline_flow import AutoSplineFlow
from pyro_flowkit.recipe import Recipe

__all__ = ["AmortizedSplineFlow", "AutoSplineFlow", "Recipe"]
