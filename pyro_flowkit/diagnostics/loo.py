r"""Leave-one-out cross-validation of a model that was fitted by variational inference.

``elpd_loo = sum_i log p(y_i | y_-i)`` asks how well each datum is foretold by the others. The
posterior without datum i is proportional to ``p(y, z) / p(y_i | z)``, so that draws ``z_s`` of a
guide have the weights (Magnusson, Andersen, Jonasson and Vehtari 2019, ICML, equation 7)

    r_is = p(y, z_s) / (q(z_s) p(y_i | z_s)),
    log p(y_i | y_-i)  ~  log sum_s r_is p(y_i | z_s) - log sum_s r_is,

with ``r`` smoothed by PSIS for each datum. ``az.loo`` leaves ``p(y, z) / q(z)`` out: it takes the
draws for posterior draws, scores a guide that is too narrow as a model that knows too much, and its
pareto k, that of ``1 / p(y_i | z)``, does not see it.

The Monte Carlo standard error is that of ratios of means by the delta method. All data share the
draws, so their errors do not average out: with ``v_is = r_is / sum_t r_it``,

    mcse^2 = sum_s (sum_i c_i v_is (p(y_i | z_s) / p(y_i | y_-i) - 1))^2,

where ``c_i >= 1`` makes up for weights of infinite variance (``psis.error_factor``).
"""

import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_flowkit.diagnostics.reweighting import guide_weights
from pyro_flowkit.diagnostics.schema import DRAWS, arviz_generation, as_result
from pyro_flowkit.diagnostics.tails import Tail
from pyro_flowkit.ops.psis import error_factor, psis
from pyro_flowkit.warning import warn

_DATA_AT_ONCE = 256


def loo_approximate_posterior(
    tree: xr.DataTree, *, var_name: str | None = None, pointwise: bool = True
) -> Any:
    """PSIS-LOO from the draws of a guide, corrected for the guide not being the posterior.

    The name is that of ArviZ 1 and of R's loo; ``az.compare`` and ``az.plot_khat`` take the result.

    Args:
        tree: the result of ``from_svi``, with the groups ``sample_stats`` and ``log_likelihood``. The
            draws of all of its chains are one pool.
        var_name: the observed site, where there is more than one.
        pointwise: whether to keep the values per datum, which ``az.compare`` of ArviZ 0.23 and
            ``az.plot_khat`` need.

    Returns:
        ArviZ's own ``ELPDData`` (``ELPDDataLOO`` from ArviZ 1.3 on) of the installed version, in
        nats: the sum over data, its standard error over data, the effective number of parameters,
        ``warning`` and ``good_k``, and with ``pointwise`` the values and pareto k per datum. Beyond
        ArviZ's own it has ``mcse``, the Monte Carlo standard error of the sum from the finite
        number of draws. The effective number of parameters comes from weighted draws, unlike that
        of ``az.loo_approximate_posterior``, whose first half is of the guide's draws as they are.
        Masked data, whose log-likelihood is zero in all draws, have values per datum of zero and
        count neither as data points nor in the standard error.

    Warns:
        UserWarning: if pareto k of a datum is above ``min(1 - 1 / log10(S), 0.7)``, or that of the
            guide's own weights is not surely below: neither the values nor ``mcse`` can then be
            trusted. ``warning`` of the result says the same.

    Raises:
        ValueError: if ``tree`` has no weights (it was reweighted: use ``az.loo``), no
            log-likelihood, several observed sites and no ``var_name``, or a log-likelihood that is
            not finite.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import from_svi, loo_approximate_posterior
        >>> y = torch.tensor([0.5, 1.0, 1.5])
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     with pyro.plate("row", 3):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide():  # the exact posterior
        ...     pyro.sample("mu", dist.Normal(3.0 / 3.25, 3.25**-0.5))
        >>> loo_approximate_posterior(from_svi(model, guide, num_samples=1000, seed=0)).pareto_k.shape
        (3,)
    """
    tree = as_result(tree)
    log_weight = guide_weights(tree)
    likelihood = _log_likelihood(tree, var_name, tuple(log_weight.shape))
    data_dims = [dim for dim in likelihood.dims if dim not in DRAWS]
    data_shape = [likelihood.sizes[dim] for dim in data_dims]
    values = np.array(likelihood.transpose(*data_dims, *DRAWS), dtype=np.float64)
    rows = torch.as_tensor(values).reshape(math.prod(data_shape), log_weight.numel())
    elpd_i, lpd_i, pareto_k, mcse, guide = _loo(rows, log_weight.flatten())

    above = int((~(pareto_k <= guide.threshold)).sum())
    if above or not guide.is_light:
        warn(
            f"At {guide.num_samples} draws pareto k can be trusted up to {guide.threshold:.2f}; it "
            f"is above for {above} of {len(rows)} data (largest {float(pareto_k.max()):.2f}), and "
            f"{guide.pareto_k:.2f} +- {guide.error:.2f} for the guide itself: leave-one-out "
            "values and their mcse may be off. "
            + (
                "These data move the posterior a lot: refit without them, or integrate local "
                "latents out."
                if guide.is_light
                else "The guide may miss a part of the posterior: take more draws, a more flexible "
                "guide, or NUTS."
            )
        )
    scored = (rows != 0).any(-1)
    template = likelihood.isel(chain=0, draw=0, drop=True)

    def per_datum(name: str, value: Tensor) -> xr.DataArray:
        array = template.transpose(*data_dims).copy(data=value.numpy().reshape(data_shape))
        return array.rename(name).drop_attrs()

    return _elpd_data(
        elpd=float(elpd_i.sum()),
        se=math.sqrt(int(scored.sum())) * float(elpd_i[scored].std(correction=0)),
        p=float((lpd_i - elpd_i).sum()),
        n_samples=guide.num_samples,
        n_data_points=int(scored.sum()),
        warning=above > 0 or not guide.is_light,
        elpd_i=per_datum("loo_i", elpd_i) if pointwise else None,
        pareto_k=per_datum("pareto_k", pareto_k) if pointwise else None,
        scale="log",
        good_k=guide.threshold,
        mcse=mcse,
    )


def _loo(log_likelihood: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, float, Tail]:
    """Per datum elpd, log predictive density and pareto k; mcse of the sum; the guide's own tail.

    ``log_likelihood`` is (data, draws), ``log_weight`` (draws,).
    """
    smoothed, guide = Tail.of(log_weight)
    lpd = (log_likelihood + smoothed).logsumexp(-1) - smoothed.logsumexp(-1)
    elpd, pareto_k = [], []
    influence = torch.zeros_like(log_weight)
    for rows in log_likelihood.split(_DATA_AT_ONCE):
        ratios, k = psis(log_weight - rows)
        ratios = ratios - ratios.logsumexp(-1, keepdim=True)
        value = (ratios + rows).logsumexp(-1)
        factor = error_factor(k, len(log_weight)).unsqueeze(-1)
        influence += (factor * ratios.exp() * torch.expm1(rows - value.unsqueeze(-1))).sum(0)
        elpd.append(value)
        pareto_k.append(k)
    return torch.cat(elpd), lpd, torch.cat(pareto_k), float(influence.norm()), guide


def _log_likelihood(
    tree: xr.DataTree, var_name: str | None, draws: tuple[int, ...]
) -> xr.DataArray:
    if "log_likelihood" not in tree.children:
        raise ValueError(f"Expected a group log_likelihood, got {sorted(tree.children)}")
    group = tree["log_likelihood"].to_dataset()
    names = sorted(map(str, group.data_vars))
    if var_name is None and len(names) != 1:
        raise ValueError(f"Expected var_name, one of the observed sites {names}, got None")
    name = names[0] if var_name is None else var_name
    if name not in names:
        raise ValueError(f"Expected var_name to be one of {names}, got '{name}'")
    likelihood = group[name]
    shape = tuple(likelihood.sizes.get(dim, 0) for dim in DRAWS)
    if shape != draws:
        raise ValueError(
            f"Expected log_likelihood of '{name}' with (chain, draw) of {draws}, got {shape}"
        )
    bad = int((~np.isfinite(likelihood)).sum())
    if bad:
        raise ValueError(
            f"Expected a finite log_likelihood of '{name}', got {bad} of {likelihood.size} values "
            "that are not: a draw that one datum excludes says nothing about the others"
        )
    return likelihood


def _elpd_data(*, mcse: float, **values: Any) -> Any:
    """ArviZ's container of the result: a pandas Series in 0.23, a dataclass from 1.0 on."""
    import arviz

    container: Any = arviz.ELPDData
    if arviz_generation() < 1:
        names = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
        kept = {names.get(key, key): value for key, value in values.items() if value is not None}
        return container(data=[*kept.values(), mcse], index=[*kept, "mcse"])
    if hasattr(arviz, "ELPDDataLOO"):  # 1.3 on
        result = arviz.ELPDDataLOO(approx_posterior=True, **values)
    else:
        result = container(kind="loo", approx_posterior=True, **values)
    result.mcse = mcse
    return result
