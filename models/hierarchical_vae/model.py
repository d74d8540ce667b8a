"""The hierarchical VAE as a Pyro module: model and guide."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from models.vae.model import VAE
from models.vae.networks import mlp
from models.vae.posterior import MIN_POSTERIOR_SCALE, FlowPosterior
from pyro_flowkit import SplineFlow

UNIT_SCALE = math.log(math.expm1(1.0 - MIN_POSTERIOR_SCALE))
"""The raw scale of a standard normal."""


class HierarchicalVAE(PyroModule):
    """Model and guide of a VAE with levels of latents.

    Sites are named from the data up: z1, z2, ...; the data's is x, its plate "data".

    Args:
        input_dim: size D of a datum.
        data_size: number N of training data, which a minibatch stands for.
        latent_dims: sizes of the levels from the data up, at least one; with one level it is a flat VAE with a flow as
            its prior and as its posterior.
        hidden_dims: widths of the encoder's hidden layers; the decoder has them in reverse.
        level_dim: size of what the encoder knows at each further level, and of the messages down; one layer each.
        num_transforms: couplings of each flow.
        flow_hidden_dims: widths of the flows' conditioners.
        count_bins: bins of the flows' splines.
        context_dim: size of the contexts of conditional flows, linear maps of features and messages.
        path_gradient: have the posterior's flows take the path gradient (see ``FlowDistribution``).
        dropout: probability of dropping a hidden unit of the networks while training.
        prior_dropout: that of the conditioners of the prior's flows.
        name: prefix of the parameters in Pyro's store; two VAEs alive at once need two names.
        options: further arguments of :class:`models.vae.VAE`, whose encoder, decoder and likelihood the data have:
            likelihood, levels (of grey), min_scale, networks, image_shape, channels.

    Raises:
        ValueError: if there is no level, or as :class:`models.vae.VAE`.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        data_size: int,
        latent_dims: Sequence[int] = (32, 16),
        hidden_dims: Sequence[int] = (256, 256),
        level_dim: int = 64,
        num_transforms: int = 2,
        flow_hidden_dims: Sequence[int] = (64, 64),
        count_bins: int = 8,
        context_dim: int = 64,
        path_gradient: bool = True,
        dropout: float = 0.0,
        prior_dropout: float = 0.0,
        name: str = "hierarchical_vae",
        **options: Any,
    ):
        super().__init__(name)
        if not latent_dims:
            raise ValueError("Expected at least one level of latents, got no latent_dims")
        self.latent_dims, self.data_size = tuple(latent_dims), data_size
        self.ends = VAE(
            input_dim,
            data_size=data_size,
            latent_dim=latent_dims[0],
            hidden_dims=hidden_dims,
            dropout=dropout,
            name=f"{name}.ends",
            **options,
        )
        widths = [hidden_dims[-1], *[level_dim] * (len(latent_dims) - 1)]
        lower, upper = latent_dims[:-1], latent_dims[1:]
        self.up = nn.ModuleList(
            mlp([below, level_dim], dropout, activate_last=True) for below in widths[:-1]
        )
        self.down = nn.ModuleList(
            mlp([size, level_dim], dropout, activate_last=True) for size in upper
        )
        self.up_heads = nn.ModuleList(nn.Linear(level_dim, 2 * size) for size in upper)
        self.down_heads = nn.ModuleList(_silent(level_dim, size) for size in lower)
        self.prior_heads = nn.ModuleList(_silent(level_dim, size, UNIT_SCALE) for size in lower)
        flow: dict[str, Any] = {
            "num_transforms": num_transforms,
            "hidden_dims": list(flow_hidden_dims),
            "count_bins": count_bins,
        }
        self.top_prior = SplineFlow(latent_dims[-1], dropout=prior_dropout, **flow)
        self.priors = nn.ModuleList(
            FlowPosterior(
                size, level_dim, context_dim, path_gradient=False, dropout=prior_dropout, **flow
            )
            for size in lower
        )
        inputs = [*(width + level_dim for width in widths[:-1]), widths[-1]]
        self.posteriors = nn.ModuleList(
            FlowPosterior(size, count, context_dim, path_gradient=path_gradient, **flow)
            for size, count in zip(latent_dims, inputs, strict=True)
        )

    @property
    def sites(self) -> list[str]:
        """Names of the levels, from the data up."""
        return [f"z{i + 1}" for i in range(len(self.latent_dims))]

    def standardize(self, data: Tensor, kind: Any = "columns") -> "HierarchicalVAE":
        """Fit the shift and scale between data and networks; see :meth:`models.vae.VAE.standardize`."""
        self.ends.standardize(data, kind)
        return self

    @pyro_method
    def model(self, x: Tensor) -> None:
        """p(x, z1, z2, ...) of data of shape ``(batch, D)``, which stand for ``data_size`` data in training."""
        with self.ends.plate(x):
            message = None
            for level, site in self._downwards():
                z = pyro.sample(site, self.p_z(level, message))
                message = self.message(level, z)
            pyro.sample("x", self.ends.p_x(z), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        """q(z1, z2, ... | x), drawn from the top down."""
        with self.ends.plate(x):
            features, message = self.features(x), None
            for level, site in self._downwards():
                z = pyro.sample(site, self.q_z(level, features[level], message))
                message = self.message(level, z)

    def _downwards(self) -> Iterator[tuple[int, str]]:
        return reversed([*enumerate(self.sites)])

    def features(self, x: Tensor) -> list[Tensor]:
        """The encoder's features for each level, from the data up, of data ``(*batch, D)``, each ``(*batch, H)``."""
        features = [self.ends.features(x)]
        for up in self.up:
            features.append(up(features[-1]))
        return features

    def message(self, level: int, z: Tensor) -> Tensor | None:
        """What codes ``(*batch, L)`` of a level say to the one below, ``(*batch, level_dim)``, or None."""
        return self.down[level - 1](z) if level else None

    def p_z(self, level: int, message: Tensor | None) -> dist.TorchDistribution:
        """The prior of a level, 0 the one next to the data, given the message from above, where there is one."""
        if message is None:
            return self.top_prior()
        return self.priors[level](message, self.prior_heads[level](message))

    def q_z(self, level: int, features: Tensor, message: Tensor | None) -> dist.TorchDistribution:
        """The posterior of a level given the encoder's features for it, and the message from above."""
        up_heads = self.up_heads[level - 1] if level else self.ends.heads
        heads = up_heads(features)
        if message is not None:
            heads = heads + self.down_heads[level](message)
            features = torch.cat([features.expand(*message.shape[:-1], -1), message], -1)
        return self.posteriors[level](features, heads)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """``n`` data drawn from the model, shape ``(n, D)``."""
        z = message = None
        for level, _ in self._downwards():
            prior = self.p_z(level, message)
            z = prior.sample() if prior.batch_shape else prior.sample((n,))
            message = self.message(level, z)
        return self.ends.p_x(z).sample()

    @torch.no_grad()
    def elbo_terms(self, x: Tensor) -> dict[str, Tensor]:
        """What the ELBO of data ``(n, D)`` is made of, from one draw each: nats, shape ``(n,)``.

        Returns:
            The log-likelihood as "x", and by the site of each level an estimate of its KL, log q - log p. The ELBO is
            the first less all others.
        """
        features, message, terms = self.features(x), None, {}
        for level, site in self._downwards():
            q, p = self.q_z(level, features[level], message), self.p_z(level, message)
            z = q.rsample()
            terms[site] = q.log_prob(z) - p.log_prob(z)
            message = self.message(level, z)
        return {"x": self.ends.p_x(z).log_prob(x), **terms}

    @torch.no_grad()
    def elbo(self, x: Tensor) -> Tensor:
        """An estimate of the ELBO of data of shape ``(n, D)`` from one draw each (nats), shape ``(n,)``."""
        terms = self.elbo_terms(x)
        return terms.pop("x") - sum(terms.values())


def _silent(input_dim: int, latent_dim: int, raw_scale: float = 0.0) -> nn.Linear:
    """Heads of a Gaussian, location and raw scale, that at first do not listen to their input."""
    heads = nn.Linear(input_dim, 2 * latent_dim)
    nn.init.zeros_(heads.weight)
    with torch.no_grad():
        heads.bias.copy_(torch.tensor([0.0, raw_scale]).repeat_interleave(latent_dim))
    return heads
