r"""The inclusive divergence KL(p(z | x) || q), by self-normalised importance sampling from the guide itself.

With K draws z_k of the guide, taken as given, w = p(x, z) / q(z) and v_k = w_k / sum_j w_j:

    d_phi   KL(p || q)  =  -E_p[d_phi log q(z)]      ~  -sum_k v_k d_phi log q(z_k)
    d_theta -log p(x)   =  -E_p[d_theta log p(x, z)] ~  -sum_k v_k d_theta log p(x, z_k)
    KL(p || q)          =   E_p[log w] - log p(x)    ~   sum_k v_k log w_k - log (1/K) sum_k w_k
                                                      =   sum_k v_k log (K v_k)

This is the wake phase of both networks in reweighted wake-sleep (Bornschein & Bengio 2015). The estimates are biased by
O(1/K) towards q, consistently so, and good only while several weights count.

References:
    Jorg Bornschein, Yoshua Bengio. Reweighted Wake-Sleep. ICLR 2015.

    Tuan Anh Le, Adam Kosiorek, N. Siddharth, Yee Whye Teh, Frank Wood. Revisiting Reweighted Wake-Sleep for Models with
    Stochastic Control Flow. UAI 2019.
"""

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flowkit.objectives.base import WeightedObjective
from pyro_flowkit.objectives.draws import Detached
from pyro_flowkit.objectives.weights import LogWeights, Run
from pyro_flowkit.programs.sites import is_point_mass


class ForwardKL(WeightedObjective):
    r"""KL(posterior || guide), mass-covering, for ``SVI`` and :func:`pyro_flowkit.fit`.

    A guide that it trains spreads over all modes and tails it knows of, rather wide than narrow, where the ELBO settles
    in one; good for a proposal, or before a fit by ELBO. It needs no ``rsample``: discrete guide sites are fine.

    The loss is the self-normalised estimate of the divergence (see :mod:`pyro_flowkit.objectives.forward_kl`) in nats,
    summed over the data, the log evidence included: 0 where all weights are equal, and never above ``log K`` per datum,
    however large the divergence. ``K exp(-loss)`` of one datum is the number of its particles that count; near 1 the
    gradient follows a single draw, and more particles or a better start (an ELBO fit, a wider guide) are needed. The
    loss says nothing about parameters of the model; these get the gradient of the importance-weighted bound.

    Args:
        num_particles: number K of draws per datum, at least 2.
        plate: name of the plate over the data, which then must be around all sites of model and guide. None takes all
            plates that are; without any, one weight per particle (:mod:`pyro_flowkit.objectives.weights`).
        max_plate_nesting: as in ``pyro.infer.ELBO``.
        vectorize_particles: run the particles in one plate to the left of the model's own.
        strict_enumeration_warning: warn about guide sites that are marked for enumeration.
        retain_graph: as in ``pyro.infer.ELBO``.

    Raises:
        TypeError: if num_particles is no int, or plate is no name.
        ValueError: for num_particles < 2; when it is used, for a guide site that is a parameter (a Delta has no
            density to fit), a latent without guide site, a plate that is not around all sites, and a subsampled plate
            that is not around all sites, and for guides whose transforms have no inverse (planar, radial,
            block-autoregressive).

    Warns:
        UserWarning: as :class:`AlphaDivergence`.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.guides import AutoSplineFlow
        >>> from pyro_flowkit.objectives import ForwardKL
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> guide = AutoSplineFlow(model).setup()
        >>> objective = ForwardKL(num_particles=10)
        >>> loss = objective.differentiable_loss(model, guide)
        >>> loss.backward()
    """

    takes_draws_as_given = True
    _remedy_without_inverse = (
        "takes draws as given, and needs one. Train by Trace_ELBO, or by ImportanceWeightedELBO with "
        "doubly_reparameterized=False."
    )
    _least_particles = 2

    def _handler(self) -> Messenger:
        return Detached()

    def _check_draws(self, run: Run) -> None:
        for name, site in run.guide_trace.nodes.items():
            if (
                site["type"] == "sample"
                and is_point_mass(site["fn"])
                and site["value"].requires_grad
            ):
                raise ValueError(
                    f"Expected guide sites with a density, got a Delta at {name!r} whose place is learned: at a "
                    "given value it has no density to fit. Use a distribution there, or Trace_ELBO."
                )

    def _value(self, weights: LogWeights) -> Tensor:
        normalized = torch.softmax(weights.log_w, 0)
        divergence = torch.special.xlogy(normalized, len(normalized) * normalized).sum(0)
        return (weights.scale * divergence).sum()

    def _surrogate(self, weights: LogWeights, runs: list[Run]) -> Tensor:
        for name, site in runs[0].guide_trace.nodes.items():
            if site["type"] == "sample" and not weights.counts_once(site):
                raise ValueError(
                    f"Expected all guide sites to have one scale with the model's, got {site['scale']} at {name!r}: "
                    "weights with a power of q are no importance weights. To anneal, scale sites of the model."
                )
        normalized = torch.softmax(weights.log_w.detach(), 0)
        joint = weights.log_p + weights.log_q
        joint = torch.where(normalized == 0, 0.0, joint)
        return -(weights.scale * normalized * joint).sum()
