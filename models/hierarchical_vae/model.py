"""The hierarchical VAE as a Pyro module: model and guide."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from models.vae.model import VAE
from models.vae.networks import mlp
from pyro_flowkit import SplineFlow


class HierarchicalVAE(PyroModule):
    """Model and guide of a VAE with levels of latents.

    Sites are named from the data up: z1, z2, ...; the data's is x, its plate "data".

    Args:
        input_dim: size D of a datum.
        data_size: number N of training data, which a minibatch stands for.
        latent_dims: sizes of the levels from the data up, at least one; with one level it is a flat VAE with a flow as
            its prior and as its posterior.
        hidden_dims: widths of the encoder's hidden layers; the decoder has them in reverse, and the networks between
            levels, which have one hidden layer each, the last one.
        num_transforms: couplings of each flow.
        flow_hidden_dims: widths of the flows' conditioners.
        count_bins: bins of the flows' splines.
        path_gradient: have the posterior's flows take the path gradient (see `FlowDistribution`).
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
        num_transforms: int = 2,
        flow_hidden_dims: Sequence[int] = (64, 64),
        count_bins: int = 8,
        path_gradient: bool = False,
        dropout: float = 0.0,
        prior_dropout: float = 0.0,
        name: str = "hierarchical_vae",
        **options: Any,
    ):
        super().__init__(name)
        if not latent_dims:
            raise ValueError("Expected at least one level of latents, got no latent_dims")
        self.latent_dims, self.data_size = tuple(latent_dims), data_size
        self.path_gradient = path_gradient
        self.ends = VAE(
            input_dim,
            data_size=data_size,
            latent_dim=latent_dims[0],
            hidden_dims=hidden_dims,
            dropout=dropout,
            name=f"{name}.ends",
            **options,
        )
        width = hidden_dims[-1]
        upper = latent_dims[1:]
        self.up = nn.ModuleList(
            mlp([width, width, width], dropout, activate_last=True) for _ in upper
        )
        self.heads = nn.ModuleList(nn.Linear(width, 2 * size) for size in upper)
        self.down = nn.ModuleList(
            mlp([above, width, 2 * size], dropout) for size, above in pairwise(latent_dims)
        )
        flow: dict[str, Any] = {
            "num_transforms": num_transforms,
            "hidden_dims": list(flow_hidden_dims),
            "count_bins": count_bins,
        }
        top = latent_dims[-1]
        priors = [SplineFlow(s, 2 * s, dropout=prior_dropout, **flow) for s in latent_dims[:-1]]
        self.priors = PyroModule[nn.ModuleList](
            [*priors, SplineFlow(top, dropout=prior_dropout, **flow)]
        )
        posteriors = [SplineFlow(size, 4 * size, **flow) for size in latent_dims[:-1]]
        self.posteriors = PyroModule[nn.ModuleList]([*posteriors, SplineFlow(top, 2 * top, **flow)])

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
        with self._plate(x):
            message = None
            for level, site in self._downwards():
                z = pyro.sample(site, self.p_z(level, message))
                message = self.message(level, z)
            pyro.sample("x", self.ends.p_x(z), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        """q(z1, z2, ... | x), drawn from the top down."""
        with self._plate(x):
            features, message = self.features(x), None
            for level, site in self._downwards():
                z = pyro.sample(site, self.q_z(level, features[level], message))
                message = self.message(level, z)

    def _plate(self, x: Tensor) -> pyro.plate:
        # An evaluation may bring more data than the training had.
        return pyro.plate("data", max(self.data_size, len(x)), subsample=x)

    def _downwards(self) -> Iterator[tuple[int, str]]:
        return reversed([*enumerate(self.sites)])

    def features(self, x: Tensor) -> list[Tensor]:
        """What the encoder says to each level, from the data up, of data ``(*batch, D)``; shapes ``(*batch, 2 L)``."""
        state = self.ends.encoder((x - self.ends.loc) / self.ends.scale)
        said = [self.ends.heads(state)]
        for up, heads in zip(self.up, self.heads, strict=True):
            state = up(state)
            said.append(heads(state))
        return said

    def message(self, level: int, z: Tensor) -> Tensor | None:
        """What codes ``(*batch, L)`` of a level say to the one below, of size l: ``(*batch, 2 l)``, or None."""
        return self.down[level - 1](z) if level else None

    def p_z(self, level: int, message: Tensor | None) -> dist.TorchDistribution:
        """The prior of a level, 0 the one next to the data, given the message from above, where there is one."""
        return self.priors[level](message)

    def q_z(self, level: int, features: Tensor, message: Tensor | None) -> dist.TorchDistribution:
        """The posterior of a level given what the encoder says to it, and the message from above."""
        context = features
        if message is not None:
            features = features.expand(*message.shape[:-1], -1)
            context = torch.cat([features, message], -1)
        return self.posteriors[level](context, path_gradient=self.path_gradient)

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
