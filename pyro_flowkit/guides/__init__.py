"""Variational guides: spline flows in the place of Pyro's Gaussian autoguides."""

from pyro_flowkit.guides.auto_spline_flow import AutoSplineFlow, Recipe

__all__ = ["AutoSplineFlow", "Recipe"]
