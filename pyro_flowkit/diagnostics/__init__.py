"""How loose is the bound, how good is the guide: numbers with standard errors, as ArviZ data."""

from pyro_flowkit.diagnostics.bounds import evidence_bounds
from pyro_flowkit.diagnostics.calibration import simulation_based_calibration
from pyro_flowkit.diagnostics.compare import compare_densities, compare_guides
from pyro_flowkit.diagnostics.convergence import compare_restarts, iterate_convergence
from pyro_flowkit.diagnostics.plots import plot_bounds, plot_elbo, plot_pareto_k
from pyro_flowkit.diagnostics.pointwise import heldout_log_prob, pointwise_bounds
from pyro_flowkit.diagnostics.tree import from_svi, to_arviz
from pyro_flowkit.diagnostics.uniformity import calibration_tests, symmetry_tests, verdict_of
from pyro_flowkit.diagnostics.verdict import Verdict, diagnose
from pyro_flowkit.ops.psis import pareto_k_threshold, psis

__all__ = [
    "Verdict",
    "calibration_tests",
    "compare_densities",
    "compare_guides",
    "compare_restarts",
    "diagnose",
    "evidence_bounds",
    "from_svi",
    "heldout_log_prob",
    "iterate_convergence",
    "pareto_k_threshold",
    "plot_bounds",
    "plot_elbo",
    "plot_pareto_k",
    "pointwise_bounds",
    "psis",
    "simulation_based_calibration",
    "symmetry_tests",
    "to_arviz",
    "verdict_of",
]
