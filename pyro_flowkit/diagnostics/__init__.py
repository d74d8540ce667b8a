"""How loose is the bound, how good is the guide: numbers with standard errors, as ArviZ data."""

from pyro_flowkit.diagnostics.bounds import evidence_bounds
from pyro_flowkit.diagnostics.compare import compare_densities, compare_guides
from pyro_flowkit.diagnostics.plots import plot_bounds, plot_elbo, plot_pareto_k
from pyro_flowkit.diagnostics.pointwise import heldout_log_prob, pointwise_bounds
from pyro_flowkit.diagnostics.tree import from_svi, to_arviz
from pyro_flowkit.diagnostics.verdict import Verdict, diagnose
from pyro_flowkit.ops.psis import pareto_k_threshold, psis

__all__ = [
    "Verdict",
    "compare_densities",
    "compare_guides",
    "diagnose",
    "evidence_bounds",
    "from_svi",
    "heldout_log_prob",
    "pareto_k_threshold",
    "plot_bounds",
    "plot_elbo",
    "plot_pareto_k",
    "pointwise_bounds",
    "psis",
    "to_arviz",
]
