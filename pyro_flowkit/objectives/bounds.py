r"""Bounds on the log evidence from K importance weights, with doubly reparameterised gradients.

For alpha >= 0, with s = 1 - alpha and draws z_1, ..., z_K of the guide (the VR-IWAE bound, Daudel et al. 2023):

    L_alpha = E[ 1/s log (1/K) sum_k w_k^s ],   w = p(x, z) / q(z)
              alpha = 0: IWAE (Burda et al. 2016),   alpha -> 1 or K = 1: ELBO,   all of them <= log p(x)

With the normalised weights v_k = w_k^s / sum_j w_j^s its gradient by reparameterisation is sum_k v_k d log w_k. For the
guide's parameters phi, that has a part through the draws and a part through the parameters of log q beside them, the
score, whose noise grows with K beyond the gradient itself. Reparameterising once more trades the score for a part
through the draws (Tucker et al. 2019; for any alpha Daudel et al. 2023):

    d_theta = sum_k v_k d_theta log p(x, z_k)
    d_phi   = sum_k [ alpha v_k + (1 - alpha) v_k^2 ] (d log w_k / d z_k) (d z_k / d phi)

It is unbiased for d L_alpha, as the first one is; at alpha = 1 it is the path gradient of Roeder et al. (2017). Draws
that depend on each other are treated one by one (Bauer & Mnih 2021), each with ``d log w / d z`` in which later draws
follow. What is learned beside the draws, the parameters of the model and the place of a Delta, gets v_k; a guide that
draws without parameters and learns how Deltas transform that (Pyro's AutoStructured) has the ordinary gradient. Where
log q counts with a factor beta in log w, by annealing, the bracket is ``v - beta (1 - alpha) v (1 - v)``.

References:
    Yuri Burda, Roger Grosse, Ruslan Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016.

    Yingzhen Li, Richard Turner. Renyi Divergence Variational Inference. NeurIPS 2016.

    Tom Rainforth et al. Tighter Variational Bounds are Not Necessarily Better. ICML 2018 (how the plain
    gradient's noise grows).

    George Tucker, Dieterich Lawson, Shixiang Gu, Chris Maddison. Doubly Reparameterized Gradient Estimators for Monte
    Carlo Objectives. ICLR 2019.

    Matthias Bauer, Andriy Mnih. Generalized Doubly Reparameterized Gradient Estimators. ICML 2021.

    Kamelia Daudel, Joe Benton, Yuyang Shi, Arnaud Doucet. Alpha-divergence Variational Inference Meets Importance
    Weighted Auto-Encoders: Methodology and Asymptotics. JMLR 2023.
"""

import math

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flowkit.objectives.base import WeightedObjective
from pyro_flowkit.objectives.draws import Gated
from pyro_flowkit.objectives.weights import LogWeights, Run
from pyro_flowkit.programs.sites import is_point_mass


class AlphaDivergence(WeightedObjective):
    r"""Renyi's alpha-divergence from guide to posterior, for ``SVI`` and :func:`pyro_flowkit.fit`.

    The loss is ``-L_alpha`` (see :mod:`pyro_flowkit.objectives.bounds`) in nats, summed over the data. For many
    particles ``log p(x) - L_alpha`` is Renyi's divergence

        D_alpha(q || p) = 1 / (alpha - 1) log E_q[ (q(z) / p(z | x))^(alpha - 1) ]

    which falls with alpha:

    - alpha > 1: more mode-seeking than the ELBO;
    - alpha = 1: KL(q || p), exclusive and mode-seeking: the ELBO, with its path gradient;
    - alpha = 1/2: symmetric in q and p, ``-2 log`` of the overlap of their square roots;
    - alpha -> 0: ``D_alpha / alpha`` becomes KL(p || q), inclusive and mass-covering. D_0 itself is 0 for every guide
      that covers the posterior: with many particles there is little left to learn from. :class:`ForwardKL` is better.

    With few particles it lies between this and the ELBO, at one particle it is the ELBO.

    Unlike Pyro's ``RenyiELBO``, whose alpha is the same: the doubly reparameterised gradient, the scale of a subsampled
    plate outside of the weights, alpha = 1, and ``differentiable_loss``; no guide sites without ``rsample``.

    Args:
        alpha: order of the divergence, >= 0 and finite.
        num_particles: number K of draws per datum.
        doubly_reparameterized: False is the ordinary reparameterised gradient, which costs one backward pass less
            through model and guide and gets noisier, relative to its size, as K grows.
        plate: name of the plate over the data, which then must be around all sites of model and guide. None takes all
            plates that are; without any, one weight per particle (:mod:`pyro_flowkit.objectives.weights`).
        max_plate_nesting: as in ``pyro.infer.ELBO``.
        vectorize_particles: run the particles in one plate to the left of the model's own.
        strict_enumeration_warning: warn about guide sites that are marked for enumeration.
        retain_graph: as in ``pyro.infer.ELBO``.

    Raises:
        TypeError: if num_particles is no int, or plate is no name.
        ValueError: for num_particles < 1 or alpha < 0; when it is used, for a guide site without ``rsample``, a
            latent without guide site, a plate that is not around all sites, and a subsampled plate that is not around
            all sites (unless alpha or num_particles is 1), and for guides whose transforms have no inverse (planar,
            radial, block-autoregressive) unless ``doubly_reparameterized=False``.

    Warns:
        UserWarning: where a plate that could hold the data is sequential (``for i in pyro.plate(...)``).

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.guides import AutoSplineFlow
        >>> from pyro_flowkit.objectives import AlphaDivergence
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> guide = AutoSplineFlow(model).setup()
        >>> objective = AlphaDivergence(0.5, num_particles=10)
        >>> loss = objective.differentiable_loss(model, guide)
        >>> loss.backward()
    """

    _remedy_without_inverse = (
        "cuts the way back to a draw, and needs one. doubly_reparameterized=False takes the ordinary gradient, "
        "which does not."
    )

    def __init__(
        self,
        alpha: float,
        num_particles: int = 10,
        *,
        doubly_reparameterized: bool = True,
        plate: str | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
    ):
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ValueError(
                f"Expected a finite alpha >= 0, got {alpha}: below 0 there is no lower bound. ForwardKL is the "
                "mass-covering objective."
            )
        super().__init__(
            num_particles,
            plate=plate,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )
        self.alpha = float(alpha)
        self.doubly_reparameterized = doubly_reparameterized

    @property
    def _linear(self) -> bool:
        return self.alpha == 1.0 or self.num_particles == 1

    def _handler(self) -> Messenger:
        return Gated() if self.doubly_reparameterized else Messenger()

    def _check_draws(self, run: Run) -> None:
        for name, site in run.guide_trace.nodes.items():
            if site["type"] != "sample" or site["is_observed"] or is_point_mass(site["fn"]):
                continue
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"Expected guide sites with rsample, got {type(site['fn']).__name__} at {name!r}: "
                    f"{type(self).__name__} takes gradients through the draws. ForwardKL does not."
                )

    def _value(self, weights: LogWeights) -> Tensor:
        return -(weights.scale * self._bound(weights.log_w)).sum()

    def _bound(self, log_w: Tensor) -> Tensor:
        """Shape ``(*data)``, in nats, of log weights ``(particles, *data)``."""
        order = 1.0 - self.alpha
        if order == 0.0:
            return log_w.mean(0)
        return (torch.logsumexp(order * log_w, 0) - math.log(len(log_w))) / order

    def _surrogate(self, weights: LogWeights, runs: list[Run]) -> Tensor:
        if not self.doubly_reparameterized:
            return self._value(weights)
        log_w = weights.log_w
        order = 1.0 - self.alpha
        normalized = torch.softmax(order * log_w.detach(), 0)
        gated = [(index, draw) for index, run in enumerate(runs) for draw in run.draws]
        behind = [draw.behind for _, draw in gated]
        derivatives = (
            torch.autograd.grad(log_w.sum(), behind, retain_graph=True, allow_unused=True)
            if behind
            else ()
        )
        for run in runs:
            run.handler.shut()
        # From here on a draw's parameters are reached through the draw itself, all others directly.
        total = (weights.scale * _times(normalized, weights.log_p - weights.log_q_others)).sum()
        trade = order * normalized * (1.0 - normalized)
        for (index, draw), derivative in zip(gated, derivatives, strict=True):
            if derivative is None:
                continue
            factor = weights.of_draw(weights.scale * normalized, index, draw)
            share = weights.share_of_log_q(runs[index], draw)
            factor = factor - share * weights.of_draw(weights.scale * trade, index, draw)
            total = total + (_times(factor, derivative) * draw.before).sum()
        return -total


class ImportanceWeightedELBO(AlphaDivergence):
    r"""The importance-weighted bound per datum, IWAE-K, with doubly reparameterised (DReG) gradients.

    The loss is ``-sum_i E log (1/K) sum_k p(x_i, z_ik) / q(z_ik)``, in nats: at K = 1 the negative ELBO, and closer to
    ``-log p(x)`` with every particle. It is ``AlphaDivergence(0.0)``.

    A guide that is trained by it is no longer the closest approximation of the posterior but a good proposal for K
    draws: mode-seeking at K = 1, wider with more particles, as a proposal that misses mass costs more than one that
    wastes draws. For a model with parameters the bound is what counts, for a guide by itself more than some tens of
    particles bring little.

    Start from an ELBO fit. Far from the posterior one particle carries all of the weight, and the gradient, that of a
    single best draw, may leave a guide where it is: worse than the ELBO's, however many steps follow.

    Args:
        num_particles: number K of draws per datum.
        doubly_reparameterized: as in :class:`AlphaDivergence`. The signal-to-noise ratio of the ordinary gradient of
            the guide's parameters falls like 1 / sqrt(K) (Rainforth et al. 2018), that of DReG does not fall.
        plate: as in :class:`AlphaDivergence`, as are the others.
        max_plate_nesting: as in ``pyro.infer.ELBO``.
        vectorize_particles: run the particles in one plate to the left of the model's own.
        strict_enumeration_warning: warn about guide sites that are marked for enumeration.
        retain_graph: as in ``pyro.infer.ELBO``.

    Raises:
        TypeError: as :class:`AlphaDivergence`.
        ValueError: as :class:`AlphaDivergence`.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.guides import AutoSplineFlow
        >>> from pyro_flowkit.objectives import ImportanceWeightedELBO
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> guide = AutoSplineFlow(model).setup()
        >>> objective = ImportanceWeightedELBO(num_particles=10)
        >>> loss = objective.differentiable_loss(model, guide)
        >>> loss.backward()
    """

    def __init__(
        self,
        num_particles: int = 10,
        *,
        doubly_reparameterized: bool = True,
        plate: str | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
    ):
        super().__init__(
            0.0,
            num_particles,
            doubly_reparameterized=doubly_reparameterized,
            plate=plate,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """Their product, 0 where the weight is: what is impossible has -inf or NaN beside it."""
    return weight * torch.where(weight == 0, 0.0, value)
