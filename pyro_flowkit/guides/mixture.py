r"""The posterior of a guide with several components, each a flow of its own: one for every mode.

.. math:: q(u) = \sum_k \pi_k \, q_k(u)

Which component a draw comes from is no latent of the guide: it is summed out in log q, and so the ELBO is that of the
mixture. No gradient passes through the choice.

*The components* get theirs through their own draws. For a draw of component k the entropy term has the derivative of
the whole mixture along the draw, ``sum_j r_j d log q_j / du`` with ``r_j = pi_j q_j(u) / q(u)``: the one of component k
as :mod:`pyro_flowkit.guides.posterior` has it, path gradient or not, and what the others add to it where they overlap,
with their parameters held fixed. What is left out are scores, whose mean over the draws is zero.

*The weights* get, with f = log p - log q,

.. math:: \nabla E_q[f] = E_q[f \, \nabla \log q(u)] = E_q\Big[\sum_k r_k f \, \nabla \log \pi_k\Big]

less a baseline b_k for every component, a running mean of f, whose part is known exactly: ``sum_k r_k (f - b_k) grad
log pi_k + sum_k b_k grad pi_k``, in which what does not vary within a component makes no noise. It is unbiased, but for
f more than :data:`MAX_SURPRISE` nats off the baseline, as on the way to the posterior, which counts as that many.
:func:`pyro_flowkit.fit` draws from every component at every step and weighs the draws by pi, so that the gradient of pi
is exact given the draws.

Reference:
    Warren Morningstar et al. Automatic Differentiation Variational Inference with Mixtures. AISTATS 2021 (draws from
    every component).
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_flowkit.guides.posterior import GuidePosterior
from pyro_flowkit.ops.eager import is_transformed
from pyro_flowkit.ops.shapes import broadcast_shapes

MAX_SURPRISE = 10.0  # nats
MEMORY = 0.9  # of the baselines, for a draw
MIN_SHARE = 1e-6  # of a component in the density at a draw of another one, that its derivative is computed for


class MixtureWeights(nn.Module):
    """Learned weights of components, equal at first, and the baselines of their gradient.

    Args:
        count: number of components.
        like: device and dtype.
    """

    _baseline: Tensor

    def __init__(self, count: int, like: Tensor):
        super().__init__()
        self.logits = nn.Parameter(like.detach().new_zeros(count))
        # how training went, not what was learned: no part of the state_dict, but of checkpoints
        self.register_buffer("_baseline", like.detach().new_zeros(2, count), persistent=False)

    @property
    def log_weights(self) -> Tensor:
        """log pi, shape ``(K,)``."""
        return self.logits.log_softmax(-1)

    @torch.no_grad()
    def restart(self, log_masses: Iterable[float]) -> None:
        """Be in proportion to these masses, given by their logarithms; equal where all are zero."""
        logits = torch.tensor([max(mass, -1e30) for mass in log_masses], dtype=torch.float64)
        self.logits.copy_(logits - logits.mean())

    def baseline(self) -> Tensor | None:
        """Running means of f, ``(K,)``, a component that was not drawn yet having that of the others; None at first."""
        sums, counts = self._baseline
        if not bool(counts.any()):
            return None
        return torch.where(counts > 0, sums / counts, sums.sum() / counts.sum())

    def take_in(self, f: Tensor, responsibilities: Tensor) -> None:
        """Let the baselines follow f, shape ``(n,)``, of draws that are the components' by ``(n, K)``."""
        f = torch.where(f.isfinite(), f, 0.0)
        mass = responsibilities.sum(0)
        mean = (responsibilities * f[:, None]).sum(0) / mass.clamp(min=1e-30)
        kept = MEMORY**mass
        self._baseline.mul_(kept).add_((1 - kept) * torch.stack([mean, torch.ones_like(mean)]))


class _Scored(NamedTuple):
    """Of draws: log q, what the gradient of log q goes through, and whose they are; ``(n,)``, ``(n,)``, ``(n, K)``."""

    log_prob: Tensor
    entropy_term: Tensor
    responsibilities: Tensor


class _Draw(NamedTuple):
    """The last draw: the tensor, the components' own draws, and where each row of it is among those."""

    value: "weakref.ref[Tensor]"
    pieces: list[tuple[int, Tensor]]
    rows: Tensor


class MixturePosterior(TorchDistribution):
    """A mixture of :class:`GuidePosterior`, with ``rsample`` and a gradient for its weights under ``Trace_ELBO``.

    Args:
        components: distributions of one event shape ``(D,)``, without batch shape.
        weights: of the components.

    Shapes: with batch shape B ``rsample(S)`` is ``S + B + (D,)`` and ``log_prob`` of it ``S + B``, in nats.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, components: Sequence[GuidePosterior], weights: MixtureWeights):
        self.components, self.weights = list(components), weights
        self._draw: _Draw | None = None
        super().__init__(torch.Size(), components[0].event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "MixturePosterior":
        """A new distribution of this batch shape, with nothing remembered."""
        new: Any = self._get_checked_instance(MixturePosterior, _instance)
        MixturePosterior.__init__(new, self.components, self.weights)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, in which every component has its share to a fraction of one draw; their order is random."""
        shape = self._extended_shape(torch.Size(sample_shape))
        count = shape[:-1].numel()
        weights = self._probabilities()
        places = (torch.rand((), device=weights.device) + torch.arange(count).to(weights)) / count
        chosen = torch.searchsorted(weights.cumsum(-1)[:-1], places)
        return self._drawn(chosen[torch.randperm(count, device=chosen.device)], shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws."""
        shape = self._extended_shape(torch.Size(sample_shape))
        count = shape[:-1].numel()
        if not count:
            return self._probabilities().new_zeros(shape)
        chosen = torch.multinomial(self._probabilities(), count, replacement=True)
        return self._drawn(chosen, shape)

    def _probabilities(self) -> Tensor:
        if is_transformed():
            raise RuntimeError(
                "Expected a guide with several components outside of torch.jit and torch.func, got it inside: a trace "
                "would keep the number of draws of each. Use Trace_ELBO in the place of JitTrace_ELBO."
            )
        return self.weights.log_weights.detach().exp()

    def _drawn(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        counts = chosen.bincount(minlength=len(self.components)).tolist()
        pieces = [
            (k, self.components[k].rsample((count,))) for k, count in enumerate(counts) if count
        ]
        rows = torch.empty_like(chosen)
        rows[chosen.argsort(stable=True)] = torch.arange(len(chosen), device=chosen.device)
        value = torch.cat([draws for _, draws in pieces])[rows].reshape(shape)
        self._draw = _Draw(weakref.ref(value), pieces, rows)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (nats) of values of shape ``(*, D)``, shape ``(*,)``.

        At the last draw no gradient reaches the weights: that of log q is not the one of an expectation under q.
        """
        log_weights = self.weights.log_weights
        if self._draw is not None and self._draw.value() is value:
            log_weights = log_weights.detach()
        each = torch.stack([component.log_prob(value) for component in self.components], -1)
        log_prob = (each + log_weights).logsumexp(-1)
        return log_prob.expand(broadcast_shapes(log_prob.shape, self.batch_shape))

    def score_parts(self, value: Tensor) -> ScoreParts:
        draw, self._draw = self._draw, None
        if draw is None or draw.value() is not value:
            log_prob = self.log_prob(value)
            return ScoreParts(log_prob=log_prob, score_function=0, entropy_term=log_prob)
        log_prob, entropy_term, responsibilities = self._scored(draw.pieces)
        score_function, entropy_term = _GradientOfWeights.apply(
            self.weights.logits, entropy_term, log_prob, responsibilities, self.weights
        )
        shaped = [
            part[draw.rows].reshape(value.shape[:-1])
            for part in (log_prob, score_function, entropy_term)
        ]
        return ScoreParts(*shaped)

    def stratified(self, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As many draws from every component, at least one, for expectations that are weighted sums over them.

        Returns:
            Draws ``(n, D)``, log q in nats, the term of it that gradients go through, and weights that sum to one,
            through which the gradient of an expectation reaches those of the components; ``(n,)`` each.
        """
        counts = self._counts(num_samples)
        pieces = [(k, self.components[k].rsample((count,))) for k, count in enumerate(counts)]
        log_prob, entropy_term, _ = self._scored(pieces)
        shares = self.weights.log_weights.exp().unbind()
        weights = torch.cat([(w / n).expand(n) for w, n in zip(shares, counts, strict=True)])
        return torch.cat([draws for _, draws in pieces]), log_prob, entropy_term, weights

    def _counts(self, num_samples: int) -> list[int]:
        each, rest = divmod(num_samples, len(self.components))
        return [max(1, each + (k < rest)) for k in range(len(self.components))]

    def _scored(self, pieces: Sequence[tuple[int, Tensor]]) -> _Scored:
        log_weights = self.weights.log_weights.detach()
        scored = []
        for k, draws in pieces:
            own = self.components[k].score_parts(draws)
            with torch.no_grad():
                each = [
                    own.log_prob if j == k else component.log_prob(draws.detach())
                    for j, component in enumerate(self.components)
                ]
                shares = torch.stack(each, -1).nan_to_num(nan=-torch.inf) + log_weights
                log_prob = shares.logsumexp(-1)
                responsibilities = (shares - log_prob[:, None]).exp()
            # the value of log q, and its derivative along the draw
            term = own.entropy_term + (log_prob - own.log_prob).detach()
            tilt = self._tilt(k, draws.detach(), responsibilities)
            if tilt is not None:
                term = term + ((draws - draws.detach()) * tilt).sum(-1)
            scored.append(_Scored(log_prob, term, responsibilities))
        return _Scored(*(torch.cat(parts) for parts in zip(*scored, strict=True)))

    def _tilt(self, k: int, draws: Tensor, responsibilities: Tensor) -> Tensor | None:
        """What the others add to the derivative of log q at draws of component k; None where they are far away."""
        if not torch.is_grad_enabled() or float(responsibilities[:, k].min()) > 1 - MIN_SHARE:
            return None
        own = self.components[k].derivative(draws)
        total = torch.zeros_like(own)
        for j, component in enumerate(self.components):
            share = responsibilities[:, j, None]
            if j != k and float(share.max()) > MIN_SHARE:
                lean = share * (component.derivative(draws) - own)
                total = total + torch.where(share > MIN_SHARE, lean, 0.0)
        return total

    @torch.no_grad()
    def fixed_draws(self, num_pairs: int = 5000) -> Tensor:
        """The same draws at every call, those of every component in proportion to its weight: about 2 ``num_pairs``."""
        shares = (self._probabilities() * num_pairs).round().long().tolist()
        return torch.cat(
            [c.fixed_draws(n) for c, n in zip(self.components, shares, strict=True) if n]
        )

    @property
    def mean(self) -> Tensor:
        """Mean of :meth:`fixed_draws`, an estimate, shape ``(D,)``."""
        return self.fixed_draws().mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance of :meth:`fixed_draws`, an estimate, shape ``(D,)``."""
        return self.fixed_draws().var(0)


class _GradientOfWeights(torch.autograd.Function):
    """Hands on a score function and an entropy term; what comes back to them says what the gradient of the weights is.

    An objective with ``L = -c (sum_i log_r_i score_i - entropy_i)`` sends ``-c log_r`` and c. Pyro's log_r is without
    the log q of an auxiliary site, which is added here. An objective that knows no score functions sends nothing to the
    first, and the weights stay as they are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        entropy_term: Tensor,
        log_prob: Tensor,
        responsibilities: Tensor,
        weights: MixtureWeights,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.weights = weights
        ctx.save_for_backward(logits, log_prob, responsibilities)
        return torch.zeros_like(entropy_term), entropy_term.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_score: Tensor | None, of_entropy: Tensor | None) -> tuple:
        logits, log_prob, responsibilities = ctx.saved_tensors
        if of_score is None or of_entropy is None:
            return None, of_entropy, None, None, None
        f = -of_score / of_entropy - log_prob
        baseline = ctx.weights.baseline()
        gradient = torch.zeros_like(logits)
        if baseline is not None:
            weights = logits.softmax(-1)
            surprise = (f[:, None] - baseline).clamp(-MAX_SURPRISE, MAX_SURPRISE)
            parts = responsibilities * surprise.nan_to_num(nan=0.0)
            known = weights * (baseline - weights @ baseline)
            rows = parts - weights * parts.sum(-1, keepdim=True) + known
            gradient = -(of_entropy[:, None] * rows).sum(0)
        ctx.weights.take_in(f, responsibilities)
        return gradient, of_entropy, None, None, None
