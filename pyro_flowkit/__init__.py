"""Rational-quadratic spline flows for Pyro: densities, guides, VAE priors and posteriors, and honest bounds."""

from pyro_flowkit import diagnostics, guides, objectives, transforms
from pyro_flowkit.continuous import ContinuousFlow
from pyro_flowkit.environment import show_versions
from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.preprocessing import dequantize, inverse_logit, logit
from pyro_flowkit.training import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "ContinuousFlow",
    "FitResult",
    "FlowDistribution",
    "SplineFlow",
    "dequantize",
    "diagnostics",
    "fit",
    "guides",
    "inverse_logit",
    "logit",
    "objectives",
    "show_versions",
    "transforms",
]
