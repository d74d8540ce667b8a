"""How loose is the bound, how good is the guide: numbers with standard errors, as ArviZ data.

ArviZ's own pictures and tables are one line each. With ``tree`` from ``from_svi``, ``data =
to_arviz(tree)``, ``corrected = to_arviz(reweight(tree))``, ``elpds`` the results of
``loo_approximate_posterior`` by the name of the model, and ``sbc`` from
``simulation_based_calibration``; at the end of a line the ArviZ that has the function::

    az.summary(data, kind="stats")  # 0.23 and 1: means and intervals; R-hat and ESS judge no guide
    az.plot_forest(data)  # 0.23 and 1: intervals of all latents
    az.plot_posterior(data)  # 0.23: marginals
    az.plot_dist(data)  # 1: marginals
    az.plot_pair(data)  # 0.23 and 1: pairs; plot_guides has several guides over a reference
    az.summary(corrected, kind="stats")  # 0.23 and 1: of the posterior, as far as the guide reaches
    az.plot_forest([data, corrected], model_names=["guide", "corrected"])  # 0.23: before and after
    az.plot_forest({"guide": data, "corrected": corrected})  # 1: before and after
    az.plot_khat(loo_approximate_posterior(tree))  # 0.23 and 1: data that move the posterior
    az.compare(elpds)  # 0.23 and 1: models by leave-one-out
    az.plot_compare(az.compare(elpds))  # 0.23 and 1: models by leave-one-out
    az.plot_ecdf_pit(sbc)  # 1: calibration, uniform where the guide is right
    az.plot_ecdf(sbc["prior_sbc"]["beta"].to_numpy().ravel(), cdf=lambda u: u)  # 0.23: calibration

and of the group ``posterior_predictive``, here with the observed site "y"::

    az.plot_ppc(data)  # 0.23: predictions of the guide over the data
    az.plot_ppc_dist(data)  # 1: predictions of the guide over the data
    az.plot_loo_pit(corrected, y="y")  # 0.23: is each datum where the others foretell it?
    az.plot_loo_pit(corrected)  # 1: is each datum where the others foretell it?
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_flowkit.ops.psis import pareto_k_threshold, psis

if TYPE_CHECKING:
    from pyro_flowkit.diagnostics.bounds import evidence_bounds
    from pyro_flowkit.diagnostics.calibration import simulation_based_calibration
    from pyro_flowkit.diagnostics.compare import compare_densities, compare_guides
    from pyro_flowkit.diagnostics.convergence import iterate_convergence
    from pyro_flowkit.diagnostics.diagnosis import diagnose
    from pyro_flowkit.diagnostics.gaps import inference_gaps
    from pyro_flowkit.diagnostics.guide_plots import plot_guides
    from pyro_flowkit.diagnostics.latents import latent_usage
    from pyro_flowkit.diagnostics.loo import loo_approximate_posterior
    from pyro_flowkit.diagnostics.plots import plot_bounds, plot_elbo, plot_gap, plot_pareto_k
    from pyro_flowkit.diagnostics.pointwise import heldout_log_prob, pointwise_bounds
    from pyro_flowkit.diagnostics.probe import probe_modes
    from pyro_flowkit.diagnostics.restarts import compare_restarts
    from pyro_flowkit.diagnostics.reweighting import reweight
    from pyro_flowkit.diagnostics.tree import from_svi, to_arviz
    from pyro_flowkit.diagnostics.uniformity import calibration_tests
    from pyro_flowkit.diagnostics.verdict import Verdict


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
    "inference_gaps",
    "iterate_convergence",
    "latent_usage",
    "loo_approximate_posterior",
    "pareto_k_threshold",
    "plot_bounds",
    "plot_elbo",
    "plot_gap",
    "plot_guides",
    "plot_pareto_k",
    "pointwise_bounds",
    "probe_modes",
    "psis",
    "reweight",
    "simulation_based_calibration",
    "to_arviz",
]

# Imported where they are first used: flows, guides and fit do without the xarray and pandas of most of them.
_HOMES = {
    "Verdict": "verdict",
    "calibration_tests": "uniformity",
    "compare_densities": "compare",
    "compare_guides": "compare",
    "compare_restarts": "restarts",
    "diagnose": "diagnosis",
    "evidence_bounds": "bounds",
    "from_svi": "tree",
    "heldout_log_prob": "pointwise",
    "inference_gaps": "gaps",
    "iterate_convergence": "convergence",
    "latent_usage": "latents",
    "loo_approximate_posterior": "loo",
    "plot_bounds": "plots",
    "plot_elbo": "plots",
    "plot_gap": "plots",
    "plot_guides": "guide_plots",
    "plot_pareto_k": "plots",
    "pointwise_bounds": "pointwise",
    "probe_modes": "probe",
    "reweight": "reweighting",
    "simulation_based_calibration": "calibration",
    "to_arviz": "tree",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
