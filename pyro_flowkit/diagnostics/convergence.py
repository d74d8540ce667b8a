r"""Has the training settled?

Under a constant learning rate the iterates of stochastic optimisation end in a stationary process
around the optimum. Dhaka et al. (2020) treat them as the draws of Markov chains: split R-hat of
their last part says whether they have settled, and the Monte Carlo standard error says how well
their mean, the averaged iterate, is known,

    R-hat = sqrt(((n - 1) / n W + B) / W),   MCSE = sd / sqrt(ESS),

with W the variance within and B that of the means between the halves of the chains, of n iterates.
These are numbers on the optimisation. Whether the optimum is any good, they do not say: that is the
business of pareto k and the gap.

References:
    Akash Kumar Dhaka, Alejandro Catalina, Michael Riis Andersen, Mans Magnusson, Jonathan Huggins,
    Aki Vehtari. Robust, Accurate Stochastic Optimization for Variational Inference. NeurIPS 2020.
"""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from pyro_flowkit.diagnostics.schema import schema_attrs
from pyro_flowkit.diagnostics.verdict import Verdict, with_verdict


def iterate_convergence(
    iterates: np.ndarray | Tensor,
    *,
    names: Sequence[str] | None = None,
    last: float = 0.5,
    scale: np.ndarray | Tensor | Sequence[float] | None = None,
    max_rhat: float = 1.1,
    max_mcse: float = 0.1,
) -> xr.Dataset:
    """Split R-hat and Monte Carlo standard error of the iterates of a fit.

    ===================================================================  ======
    R-hat above ``max_rhat`` for some parameter                          bad
    MCSE above ``max_mcse`` times ``scale``, where that is given         usable
    otherwise                                                            good
    ===================================================================  ======

    Args:
        iterates: parameters after every step, or every few, at one learning rate: shape
            ``(iterate, parameter)``, or ``(chain, iterate, parameter)`` for several trainings whose
            parameters have the same meaning.
        names: names of the parameters; "0", "1", ... by default.
        last: the part of the iterates that counts, in (0, 1]: the first ones are the way there.
        scale: what an error of each parameter is compared with, such as the guide's standard
            deviation for its location; shape ``(parameter,)`` or a number.
        max_rhat: the largest R-hat of a settled parameter.
        max_mcse: the largest standard error of the mean of the iterates, in units of ``scale``.

    Returns:
        Variables along ``parameter``: ``mean`` (the averaged iterate), ``rhat``, ``ess``, ``mcse``
        (in the units of the parameter). A parameter that does not move has R-hat 1, MCSE 0 and an
        ESS that is NaN.
        ``diagnose`` reads the verdict from the attributes.

    Raises:
        ValueError: if the shapes or settings do not fit, fewer than 8 iterates are left, or they are
            not finite.

    Example:
        >>> import torch
        >>> from pyro_flowkit.diagnostics import diagnose, iterate_convergence
        >>> drifting = torch.linspace(0.0, 1.0, 400)[:, None] + 0.01 * torch.randn(400, 1)
        >>> bool(diagnose(iterate_convergence(drifting)))
        False
    """
    kept = _kept(iterates, last)
    chains, n, count = kept.shape
    names = [str(i) for i in range(count)] if names is None else list(names)
    if len(names) != count:
        raise ValueError(f"Expected {count} names, got {len(names)}")
    halves = torch.cat([kept[:, : n // 2], kept[:, -(n // 2) :]])
    within = halves.var(1).mean(0)
    spread = halves.reshape(-1, count).std(0)
    moves = (within > 0).numpy()
    stuck = np.where(spread.numpy() > 0, np.inf, 1.0)  # chains at rest, apart or together
    rhat = np.where(moves, split_gelman_rubin(kept).reshape(-1).numpy(), stuck)
    ess = effective_sample_size(halves).reshape(-1).clamp(1.0, float(chains * n)).numpy()
    ess = np.where(moves, ess, np.nan)
    mcse = np.where(moves, spread.numpy() / np.sqrt(ess), 0.0)
    dataset = xr.Dataset(
        {
            "mean": ("parameter", kept.mean((0, 1)).numpy()),
            "rhat": ("parameter", rhat),
            "ess": ("parameter", ess),
            "mcse": ("parameter", mcse),
        },
        {"parameter": names},
        schema_attrs(num_chains=chains, num_iterates=n, max_rhat=max_rhat),
    )
    error = None
    if scale is not None:
        unit = np.broadcast_to(np.asarray(scale, dtype=np.float64), (count,))
        if not (unit > 0).all():
            raise ValueError(f"Expected a scale > 0, got {unit.min()}")
        error = mcse / unit
    verdict = _iterate_verdict(names, rhat, error, max_rhat, max_mcse, n)
    return with_verdict(dataset, verdict)


def _kept(iterates: np.ndarray | Tensor, last: float) -> Tensor:
    """The last part of the iterates in double precision, as (chain, iterate, parameter)."""
    values = torch.as_tensor(iterates).detach().double().cpu()
    if values.dim() == 2:
        values = values[None]
    if values.dim() != 3 or not values.numel():
        raise ValueError(
            "Expected iterates of shape (iterate, parameter) or (chain, iterate, parameter), got "
            f"{tuple(torch.as_tensor(iterates).shape)}"
        )
    if not 0 < last <= 1:
        raise ValueError(f"Expected 0 < last <= 1, got {last}")
    values = values[:, -max(1, round(last * values.shape[1])) :]
    if values.shape[1] < 8:
        raise ValueError(f"Expected at least 8 iterates in the last part, got {values.shape[1]}")
    if not torch.isfinite(values).all():
        raise ValueError(
            f"Expected finite iterates, got {int((~torch.isfinite(values)).sum())} others"
        )
    return values


def _iterate_verdict(
    names: Sequence[str],
    rhat: np.ndarray,
    error: np.ndarray | None,
    max_rhat: float,
    max_mcse: float,
    n: int,
) -> Verdict:
    worst, wrong = int(np.argmax(rhat)), int((rhat > max_rhat).sum())
    reason = f"R-hat of the last {n} iterates is at most {rhat[worst]:.3f} ({names[worst]})"
    if wrong:
        return Verdict(
            "bad",
            f"{wrong} of {len(names)} parameters have not settled: {reason}, above {max_rhat:g}",
            "Train longer, or at a smaller learning rate; if several chains disagree, compare "
            "them by compare_restarts.",
        )
    if error is not None and error.max() > max_mcse:
        loose = int(np.argmax(error))
        return Verdict(
            "usable",
            f"{reason}, but the mean of {names[loose]} is known to {error[loose]:.2g} of its scale "
            f"only, against {max_mcse:g}",
            "Average more iterates, or lower the learning rate.",
        )
    return Verdict(
        "good",
        reason,
        "The iterates have settled; use their mean.",
        "That does not say that the guide is good: see diagnose.",
    )
