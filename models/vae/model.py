"""The VAE as a Pyro module: model and guide, with a choice of prior, posterior, likelihood and networks."""

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from models.vae.likelihoods import DiscretizedLogistic
from models.vae.networks import ConvDecoder, ConvEncoder, mlp
from models.vae.posterior import FlowPosterior, NormalPosterior
from pyro_flowkit import ContinuousFlow, SplineFlow

PRIORS = ("standard", "flow", "autoregressive", "continuous")
POSTERIORS = ("normal", "flow")
PRIOR_STEPS = 8  # of the solver of a continuous prior, four evaluations each
LIKELIHOODS = ("bernoulli", "logistic", "normal")
NETWORKS = ("mlp", "conv")

MIN_SCALE = 1e-3


class VAE(PyroModule):
    """Model and guide of a variational autoencoder for vectors.

    Args:
        input_dim: size D of a datum.
        data_size: number N of training data, which a minibatch stands for.
        latent_dim: size L of the code z.
        hidden_dims: widths of the encoder's hidden layers; the decoder has them in reverse. With ``networks="conv"``
            the last one is the number of the encoder's features, and the others are not used.
        prior: "standard"; "flow", of couplings; "autoregressive"; or "continuous", a ``ContinuousFlow``, whose density
            takes ``32 (L + 1)`` evaluations of its field for a code.
        posterior: "normal" or "flow".
        likelihood: "bernoulli" for data in {0, 1}; "logistic", a discretised logistic with one learned scale for every
            dimension, for integers 0 to ``levels - 1``; or "normal", likewise with one scale for every dimension.
        levels: number of levels of the "logistic" likelihood.
        min_scale: smallest scale of the last two, in units of the data's scale (see ``standardize``). Without it the
            normal density of a constant dimension has no bound.
        num_transforms: couplings of each flow.
        flow_hidden_dims: widths of the flows' conditioners; of a continuous prior's field one width, for each block.
        count_bins: bins of the flows' splines.
        context_dim: size of the context of a flow posterior, a linear map of the encoder's features.
        path_gradient: train the posterior, normal or flow, by the path gradient (see ``FlowDistribution``).
        networks: "mlp" or "conv".
        image_shape: height and width, for "conv".
        channels: of the first stage of "conv".
        dropout: probability of dropping a hidden unit of encoder and decoder while training.
        prior_dropout: that of the conditioners of a flow prior.
        name: prefix of the parameters in Pyro's store; two VAEs alive at once need two names.

    Raises:
        ValueError: for an unknown prior, posterior, likelihood or kind of networks, or where what they need is missing.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        data_size: int,
        latent_dim: int = 8,
        hidden_dims: Sequence[int] = (256, 256),
        prior: str = "standard",
        posterior: str = "normal",
        likelihood: str = "normal",
        levels: int | None = None,
        min_scale: float = MIN_SCALE,
        num_transforms: int = 2,
        flow_hidden_dims: Sequence[int] = (64, 64),
        count_bins: int = 8,
        context_dim: int = 64,
        path_gradient: bool = True,
        networks: str = "mlp",
        image_shape: tuple[int, int] | None = None,
        channels: int = 16,
        dropout: float = 0.0,
        prior_dropout: float = 0.0,
        name: str = "vae",
    ):
        super().__init__(name)
        _check_choice("prior", prior, PRIORS)
        _check_choice("posterior", posterior, POSTERIORS)
        _check_choice("likelihood", likelihood, LIKELIHOODS)
        _check_choice("networks", networks, NETWORKS)
        if likelihood == "logistic" and levels is None:
            raise ValueError("Expected levels for the logistic likelihood, got None")
        self.input_dim, self.latent_dim, self.data_size = input_dim, latent_dim, data_size
        self.likelihood, self.levels, self.min_scale = likelihood, levels, min_scale
        widths = list(hidden_dims)
        if networks == "conv":
            shape = _checked_shape(image_shape, input_dim)
            self.encoder: nn.Module = ConvEncoder(shape, widths[-1], channels, dropout)
            self.decoder: nn.Module = ConvDecoder(latent_dim, shape, channels, dropout)
        else:
            self.encoder = mlp([input_dim, *widths], dropout, activate_last=True)
            self.decoder = mlp([latent_dim, *reversed(widths), input_dim], dropout)
        flow: dict[str, Any] = {
            "num_transforms": num_transforms,
            "hidden_dims": list(flow_hidden_dims),
            "count_bins": count_bins,
        }
        self.prior: SplineFlow | ContinuousFlow | None = None
        self.posterior: nn.Module = NormalPosterior(latent_dim, path_gradient=path_gradient)
        self.heads = nn.Linear(widths[-1], 2 * latent_dim)
        if posterior == "flow":
            self.posterior = FlowPosterior(
                latent_dim, widths[-1], context_dim, path_gradient=path_gradient, **flow
            )
        if prior in ("flow", "autoregressive"):
            self.prior = SplineFlow(
                latent_dim, coupling=prior == "flow", dropout=prior_dropout, **flow
            )
        elif prior == "continuous":
            self.prior = ContinuousFlow(
                latent_dim, hidden_dims=list(flow_hidden_dims), num_steps=PRIOR_STEPS
            )
        self.register_buffer("loc", torch.zeros(input_dim))
        self.register_buffer("scale", torch.ones(input_dim))
        self.raw_noise = nn.Parameter(torch.zeros(input_dim)) if likelihood != "bernoulli" else None

    def standardize(
        self, data: Tensor, kind: Literal["columns", "common", "centre"] = "columns"
    ) -> "VAE":
        """Fit the shift and scale between data and networks; densities stay those of the data.

        Args:
            data: shape ``(n, D)``, finite.
            kind: the mean of every column is subtracted, and what is left is divided by the standard deviation of each
                ("columns", for tables), by one for all ("common", for grey pixels) or not at all ("centre", for binary
                ones). A pixel that is on in one image of ten thousand would be 100 in units of its own deviation.

        Returns:
            The VAE itself.

        Raises:
            ValueError: if the data is not finite or of another shape, or the kind is unknown.
        """
        if data.dim() != 2 or data.shape[-1] != self.input_dim or not bool(data.isfinite().all()):
            raise ValueError(
                f"Expected finite data of shape (n, {self.input_dim}), got {tuple(data.shape)}"
            )
        _check_choice("kind", kind, ("columns", "common", "centre"))
        variance, mean = torch.var_mean(data, 0)
        if kind == "common":
            variance = variance.mean().expand_as(mean)
        scale = torch.ones_like(mean) if kind == "centre" else variance.sqrt()
        self.loc.copy_(mean)
        self.scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))
        return self

    @pyro_method
    def model(self, x: Tensor) -> None:
        """p(x, z) of data of shape ``(batch, D)``, which stand for ``data_size`` data in training."""
        with self.plate(x):
            z = pyro.sample("z", self.p_z())
            pyro.sample("x", self.p_x(z), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        with self.plate(x):
            pyro.sample("z", self.q_z(x))

    def plate(self, x: Tensor) -> pyro.plate:
        """The data's plate, for rows of shape ``(batch, D)``."""
        # An evaluation may bring more data than the training had.
        return pyro.plate("data", max(self.data_size, len(x)), subsample=x)

    def p_z(self) -> dist.TorchDistribution:
        """The prior, with event shape ``(L,)``."""
        if self.prior is not None:
            return self.prior()
        return dist.Normal(self.loc.new_zeros(self.latent_dim), 1.0).to_event(1)

    def features(self, x: Tensor) -> Tensor:
        """What the encoder says of data of shape ``(*batch, D)``, shape ``(*batch, H)``."""
        return self.encoder((x - self.loc) / self.scale)

    def q_z(self, x: Tensor) -> dist.TorchDistribution:
        """The posterior that the encoder gives for data of shape ``(*batch, D)``."""
        features = self.features(x)
        heads = self.heads(features)
        return self.posterior(features, heads)

    def p_x(self, z: Tensor) -> dist.TorchDistribution:
        """The distribution of the data given codes of shape ``(*batch, L)``."""
        output = self.decoder(z)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=output).to_event(1)
        noise = self.scale * (self.min_scale + F.softplus(self.raw_noise))
        loc = self.loc + self.scale * output
        if self.likelihood == "logistic":
            return DiscretizedLogistic(loc, noise, self.levels).to_event(1)
        return dist.Normal(loc, noise).to_event(1)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """``n`` data drawn from the model, shape ``(n, D)``."""
        return self.p_x(self.p_z().sample((n,))).sample()

    @torch.no_grad()
    def elbo(self, x: Tensor) -> Tensor:
        """An estimate of the ELBO of data of shape ``(n, D)`` from one draw each (nats), shape ``(n,)``."""
        q = self.q_z(x)
        z = q.rsample()
        return self.p_x(z).log_prob(x) + self.p_z().log_prob(z) - q.log_prob(z)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Mean of the data given codes of shape ``(*batch, L)``, shape ``(*batch, D)``."""
        return self.p_x(z).mean


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"Expected {what} to be one of {', '.join(choices)}, got {value!r}")


def _checked_shape(image_shape: tuple[int, int] | None, input_dim: int) -> tuple[int, int]:
    if image_shape is None or image_shape[0] * image_shape[1] != input_dim:
        raise ValueError(
            f"Expected an image_shape of {input_dim} pixels for convolutional networks, got {image_shape}"
        )
    height, width = image_shape
    return height, width
