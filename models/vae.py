r"""A variational autoencoder whose prior and posterior can each be a normalizing flow.

    z ~ p(z)                          standard normal, or a SplineFlow
    x | z ~ p(x | decoder(z))         Bernoulli for binary pixels, or a normal with learned scales
    z | x ~ q(z | encoder(x))         diagonal normal, or a conditional SplineFlow

The likelihood of a datum, log p(x) = log E_p(z)[p(x | z)], is out of reach; training maximises the
ELBO, E_q[log p(x, z) - log q(z | x)], which is log p(x) minus KL(q(z | x) || p(z | x)). A flow as the
posterior shrinks that gap. A flow as the prior lets p(z) follow where the encoder puts the data.

    python -m models.vae --prior flow --posterior flow --gaps 50

With ``--gaps`` it also says how much of the gap is the family's, how much the encoder's, and which latents have
collapsed.

References:
    Diederik P. Kingma, Max Welling. Auto-Encoding Variational Bayes. ICLR 2014.

    Danilo Rezende, Shakir Mohamed. Variational Inference with Normalizing Flows. ICML 2015.

    Xi Chen et al. Variational Lossy Autoencoder. ICLR 2017 (a flow as the prior).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
import xarray as xr
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from models._prepare import FAST_ROWS, binary, dequantized, load
from pyro_flowkit import SplineFlow
from pyro_flowkit.diagnostics import (
    compare_densities,
    inference_gaps,
    latent_usage,
    pointwise_bounds,
)
from pyro_flowkit.training import FitResult, fit

PRIORS = ("standard", "flow")
POSTERIORS = ("normal", "flow")
LIKELIHOODS = ("bernoulli", "normal")

MIN_SCALE = 1e-3
FAST_STEPS = 20


class VAE(PyroModule):
    """Model and guide of a variational autoencoder for vectors.

    Args:
        input_dim: size D of a datum.
        data_size: number N of training data, which a minibatch stands for.
        latent_dim: size of the code z.
        hidden_dims: widths of the encoder's hidden layers; the decoder has them in reverse.
        prior: "standard" or "flow".
        posterior: "normal" or "flow".
        likelihood: "bernoulli" for data in {0, 1}, or "normal": every dimension has one learned scale.
        min_scale: smallest scale of the normal likelihood, in standard deviations of the dimension
            (see `standardize`). Without it the density of a constant dimension has no bound.
        num_transforms: couplings of each flow.
        flow_hidden_dims: widths of the flows' conditioners.
        dropout: probability of dropping a hidden unit of encoder and decoder while training.
        prior_dropout: that of the conditioners of a flow prior, which overfits before the others do.
        name: prefix of the parameters in Pyro's store; two VAEs alive at once need two names.

    Raises:
        ValueError: for an unknown prior, posterior or likelihood.
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
        min_scale: float = MIN_SCALE,
        num_transforms: int = 4,
        flow_hidden_dims: Sequence[int] = (64, 64),
        dropout: float = 0.0,
        prior_dropout: float = 0.0,
        name: str = "vae",
    ):
        super().__init__(name)
        _check_choice("prior", prior, PRIORS)
        _check_choice("posterior", posterior, POSTERIORS)
        _check_choice("likelihood", likelihood, LIKELIHOODS)
        self.input_dim, self.latent_dim, self.data_size = input_dim, latent_dim, data_size
        self.likelihood, self.min_scale = likelihood, min_scale
        widths = list(hidden_dims)
        flow: dict[str, Any] = {
            "num_transforms": num_transforms,
            "hidden_dims": list(flow_hidden_dims),
        }
        if posterior == "flow":
            self.encoder = mlp([input_dim, *widths], dropout)
            self.posterior = SplineFlow(latent_dim, widths[-1], base="conditional_normal", **flow)
        else:
            self.encoder = mlp([input_dim, *widths, 2 * latent_dim], dropout)
            self.posterior = None
        self.prior = None
        if prior == "flow":
            self.prior = SplineFlow(latent_dim, dropout=prior_dropout, **flow)
        self.decoder = mlp([latent_dim, *reversed(widths), input_dim], dropout)
        self.register_buffer("loc", torch.zeros(input_dim))
        self.register_buffer("scale", torch.ones(input_dim))
        self.raw_noise = nn.Parameter(torch.zeros(input_dim)) if likelihood == "normal" else None

    def standardize(self, data: Tensor) -> "VAE":
        """Fit the shift and scale between data and networks; densities stay those of the data.

        Args:
            data: shape ``(n, D)``, finite.

        Returns:
            The VAE itself.
        """
        if data.dim() != 2 or data.shape[-1] != self.input_dim or not bool(data.isfinite().all()):
            raise ValueError(
                f"Expected finite data of shape (n, {self.input_dim}), got {tuple(data.shape)}"
            )
        scale = data.std(0)
        self.loc.copy_(data.mean(0))
        self.scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))
        return self

    @pyro_method
    def model(self, x: Tensor) -> None:
        """p(x, z) of data of shape ``(batch, D)``, which stand for ``data_size`` data in training."""
        with self._plate(x):
            z = pyro.sample("z", self._prior())
            pyro.sample("x", self._observation(z), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        with self._plate(x):
            pyro.sample("z", self._posterior(x))

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """``n`` data drawn from the model, shape ``(n, D)``."""
        z = self._prior().sample((n,))
        return self._observation(z).sample()

    def _plate(self, x: Tensor) -> pyro.plate:
        # An evaluation may bring more data than the training had.
        return pyro.plate("data", max(self.data_size, len(x)), subsample=x)

    def _prior(self) -> dist.TorchDistribution:
        if self.prior is not None:
            return self.prior()
        return dist.Normal(self.loc.new_zeros(self.latent_dim), 1.0).to_event(1)

    def _posterior(self, x: Tensor) -> dist.TorchDistribution:
        hidden = self.encoder((x - self.loc) / self.scale)
        if self.posterior is not None:
            return self.posterior(hidden, path_gradient=True)
        loc, raw_scale = hidden.chunk(2, dim=-1)
        return dist.Normal(loc, 1e-4 + F.softplus(raw_scale)).to_event(1)

    def _observation(self, z: Tensor) -> dist.TorchDistribution:
        output = self.decoder(z)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=output).to_event(1)
        noise = self.min_scale + F.softplus(self.raw_noise)
        return dist.Normal(self.loc + self.scale * output, self.scale * noise).to_event(1)


def mlp(widths: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these widths with SiLU, and dropout, between them."""
    layers: list[nn.Module] = []
    for i, (size, next_size) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        if i > 0:
            layers += [nn.SiLU(), nn.Dropout(dropout)] if dropout else [nn.SiLU()]
        layers.append(nn.Linear(size, next_size))
    return nn.Sequential(*layers)


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"Expected {what} to be one of {', '.join(choices)}, got {value!r}")


def train(
    vae: VAE,
    data: Tensor,
    val_data: Tensor,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 4e-3,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Maximise the ELBO; keeps the state that is best on ``val_data``."""
    return fit(
        vae.model,
        vae.guide,
        data=data,
        val_data=val_data,
        max_steps=steps,
        batch_size=min(batch_size, len(data)),
        lr=lr,
        scheduler="cosine",
        clip_norm=10.0,
        seed=seed,
        progress=progress,
    )


def main(argv: Sequence[str] | None = None) -> xr.Dataset:
    """Train a VAE, print its bounds on the test data; returns these per datum."""
    args = _parser().parse_args(argv)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    dataset = load(args.data, rows=FAST_ROWS if args.fast else None)
    if args.likelihood == "bernoulli":
        dataset = binary(dataset)
    elif dataset.levels:
        dataset = dequantized(dataset, copies=1 if args.fast else args.copies, seed=args.seed)
    steps = FAST_STEPS if args.fast else args.steps

    vae = VAE(
        dataset.train.shape[-1],
        data_size=len(dataset.train),
        latent_dim=args.latent_dim,
        hidden_dims=args.hidden,
        prior=args.prior,
        posterior=args.posterior,
        likelihood=args.likelihood,
        dropout=args.dropout,
        prior_dropout=args.prior_dropout,
    )
    vae.standardize(dataset.train)
    result = train(
        vae,
        dataset.train,
        dataset.val,
        steps=steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        progress=sys.stderr.isatty() and not args.fast,
    )
    num_samples = 50 if args.fast else args.num_samples
    bounds = pointwise_bounds(
        vae.model, vae.guide, dataset.test, num_samples=num_samples, seed=args.seed
    )
    name = f"VAE, {args.prior} prior, {args.posterior} posterior"
    table = compare_densities({name: bounds}).loc[name]
    unit = "binarised data" if args.likelihood == "bernoulli" else "data as loaded"
    if dataset.levels and args.likelihood == "normal":
        unit = f"integer levels 0 to {dataset.levels - 1} with uniform noise"
    print(
        f"{name}, {args.likelihood} likelihood, on {len(dataset.test)} test rows of {dataset.name}"
    )
    print(f"{len(result.history['step'])} steps, {result.history['seconds'][-1]:.0f} s; {unit}")
    print("quantity    kind         nats per datum (standard error)  bits per dimension")
    for quantity, row in table.iterrows():
        value = f"{row['nats']:.2f} ({row['se']:.2f})"
        print(f"{quantity:<11} {row['kind']:<12} {value:<32} {row['bits_per_dim']:.3f}")
    tightest = table.iloc[-1]
    print(f"gap, {table.index[-1]} - ELBO: {tightest['gap']:.2f} ({tightest['gap_se']:.2f}) nats")
    if args.gaps:
        rows = dataset.test[: args.gaps]
        print(f"Of {len(rows)} test rows, whose posteriors are optimised one by one:")
        gaps = inference_gaps(vae.model, vae.guide, rows, num_samples=num_samples, seed=args.seed)
        print(gaps.attrs["message"])
        print(latent_usage(vae.model, vae.guide, dataset.test, seed=args.seed).attrs["message"])
    return bounds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.vae",
        description="A VAE with a standard or flow prior and a normal or flow posterior.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", default="digits", help="digits, a table's name, or a path")
    parser.add_argument("--prior", choices=PRIORS, default="standard")
    parser.add_argument("--posterior", choices=POSTERIORS, default="normal")
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="normal")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256], metavar="WIDTH")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--prior-dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument(
        "--copies", type=int, default=16, help="noisy copies of each training image"
    )
    parser.add_argument("--num-samples", type=int, default=1000, help="importance draws per datum")
    parser.add_argument(
        "--gaps", type=int, default=0, metavar="ROWS", help="test rows whose gap is split"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few steps on a few rows, to try it")
    return parser


if __name__ == "__main__":
    main()
