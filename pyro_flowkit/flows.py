"""SplineFlow: the module that holds the layers of a flow and hands out distributions.

Reference:
    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_flowkit.bases import make_base
from pyro_flowkit.flow import Flow
from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.head_start import HeadStart
from pyro_flowkit.moves import Stride, StridingModule
from pyro_flowkit.nn import Activation, checked_hidden_dims
from pyro_flowkit.ops import Tails
from pyro_flowkit.transforms.autoregressive import (
    conditional_spline_autoregressive,
    spline_autoregressive,
)
from pyro_flowkit.transforms.base import check_context, check_size
from pyro_flowkit.transforms.conditional import conditioned
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine
from pyro_flowkit.transforms.coupling import (
    conditional_spline_coupling,
    spline_coupling,
)
from pyro_flowkit.transforms.linear import LULinear, Standardization
from pyro_flowkit.transforms.masks import half_mask
from pyro_flowkit.transforms.permute import Permute

MAX_ORDERED_DIM = 128


class SplineFlow(StridingModule, Flow):
    """A rational-quadratic spline flow: density, prior or (with a context) conditional distribution.

    Calling it gives a :class:`FlowDistribution` with event shape ``(input_dim,)``::

        pyro.sample("x", flow(), obs=x)        # density of data; flow().log_prob(x) is exact
        pyro.sample("z", flow())               # prior
        pyro.sample("z", flow(encoder(x)))     # amortised posterior

    A fresh flow is its base distribution. With a context (and linear tails) it ends in an affine map whose location and
    logarithm of the scale are a linear function and a network of the context: a conditional Gaussian, which the splines
    bend in units of its scale. The networks see a context that has been :func:`~pyro_flowkit.nn.compressed`. Trained by
    its draws, as a posterior is, it begins with the affine map alone; the map's network learns after 20 steps of the
    optimizer, the splines after 100 (:mod:`pyro_flowkit.head_start`), and both at a rate of 0.004 at most
    (:mod:`pyro_flowkit.moves`). Where the context has a gradient, as the output of an encoder has that is trained with
    it, the first such draw gives the location slopes: a hundredth of the variance of the batch follows the context from
    then on (:class:`~pyro_flowkit.transforms.conditional_affine.ConditionalAffine`).

    Inside a ``PyroModule`` it takes its name in the param store from there; on its own it is SplineFlow, and further
    ones SplineFlow_1, SplineFlow_2, ... in the order of their first use.

    Args:
        input_dim: size D of the event, at least 1.
        context_dim: size of the context, 0 for none.
        num_transforms: number of couplings, whose masks alternate, or of autoregressive layers, whose orders do.
        hidden_dims: widths of the conditioners' hidden layers; None is ``[10 * D, 10 * D]``, at most 128 each.
        count_bins: bins of each spline.
        bound: the splines live on ``[-bound, bound]``; see :meth:`standardize` for raw data.
        tails: "linear" or "circular".
        mixing: layers between couplings: "lu" (a learned matrix and a permutation), "permute" or None; the last layer
            undoes the permutations. Autoregressive layers have orders of their own in the place of permutations.
        base: "normal", "student_t" (learned degrees of freedom), "conditional_normal" (a normal whose location and
            scale, given by the affine map, are functions of the context, which there has to be), or a Pyro distribution
            with event shape ``(D,)``.
        coupling: couplings, whose density and draws cost the same; or autoregressive layers, in which each dimension is
            given all those before it. Their density is as fast, in one pass; draws go dimension by dimension, in D
            small steps a layer. So they are for data and priors, not for guides, which draw at every step.
        activation: of the conditioners; None is ReLU.
        residual: residual networks as conditioners, instead of multilayer perceptrons; for couplings.
        dropout: probability of dropping a hidden unit while training.
        seed: of the permutations and orders.

    Raises:
        ValueError: for settings that make no flow, saying what was expected and what came.

    Reference:
        Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019.

    Example:
        >>> import torch
        >>> from pyro_flowkit import SplineFlow
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> flow = SplineFlow(2).standardize(x)
        >>> flow.log_prob(x).shape, flow.sample(5).shape
        (torch.Size([200]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        num_transforms: int = 4,
        hidden_dims: Sequence[int] | None = None,
        count_bins: int = 8,
        bound: float = 5.0,
        tails: Tails = "linear",
        mixing: Literal["lu", "permute"] | None = "lu",
        base: str | torch.distributions.Distribution = "normal",
        coupling: bool = True,
        activation: Activation | type[nn.Module] | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(input_dim, context_dim, name="SplineFlow")
        _validate_flow(input_dim, context_dim, num_transforms, tails, mixing, base)
        self.bound, self.tails = bound, tails
        hidden_dims = checked_hidden_dims(hidden_dims, input_dim)
        settings = {
            "input_dim": input_dim,
            "hidden_dims": hidden_dims,
            "count_bins": count_bins,
            "bound": bound,
            "tails": tails,
            "activation": activation,
            "dropout": dropout,
        }
        if context_dim:
            settings["context_dim"] = context_dim
        if coupling:
            settings["residual"] = residual
            couplings = _couplings(num_transforms, settings)
            layers = _mix(couplings, input_dim, mixing, seed)
        elif residual:
            raise ValueError("Expected residual=False with coupling=False, got True.")
        else:
            layers = _autoregressive_layers(num_transforms, settings, mixing, seed)
        self.layers = nn.ModuleList(layers)
        self.affine: ConditionalAffine | None = None
        if context_dim and tails == "linear":  # an affine map does not keep a period
            self.affine = ConditionalAffine(
                torch.zeros(input_dim),
                1.0,
                context_dim,
                "diagonal",
                hidden_dims=hidden_dims,
            )
            self.head_start = HeadStart(self.affine)
        self.standardization = Standardization(input_dim)
        self.base = make_base(base, input_dim, context_dim)
        self.stride: Stride | None = None
        if self.affine is not None:
            self.stride = Stride([[self.affine.network], [self.layers, self.base]], "a SplineFlow")

    def forward(
        self, context: Tensor | None = None, *, path_gradient: bool = False
    ) -> FlowDistribution:
        distribution = super().forward(context, path_gradient=path_gradient)
        if self.affine is not None:
            self.head_start.give(distribution, self.layers, self.affine)
        if self.stride is not None:
            self.stride.follow(distribution)
        return distribution

    def transforms(self, context: Tensor | None = None) -> list[Transform]:
        """The layers from base to sample, as transforms, without the standardisation."""
        check_context(context, self.context_dim, "SplineFlow")
        layers = [*self.layers] if self.affine is None else [*self.layers, self.affine]
        return conditioned(layers, context)


def _couplings(count: int, settings: dict[str, Any]) -> list[nn.Module]:
    make = conditional_spline_coupling if "context_dim" in settings else spline_coupling
    layers: list[nn.Module] = []
    for i in range(count):
        layer = make(**settings, mask=half_mask(settings["input_dim"], flip=i % 2 == 1))
        layer.compresses_context = True
        layers.append(layer)
    return layers


def _autoregressive_layers(
    count: int, settings: dict[str, Any], mixing: str | None, seed: int
) -> list[nn.Module]:
    """Inverses of autoregressive transforms, whose density is the fast direction; every second order is the reverse of
    the one before, and the pairs are random but for the first."""
    make = conditional_spline_autoregressive if "context_dim" in settings else spline_autoregressive
    input_dim = settings["input_dim"]
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(input_dim)
    layers: list[nn.Module] = []
    for i in range(count):
        if i % 2 == 1:
            order = order.flip(0)
        elif i > 0 and mixing is not None:
            order = torch.randperm(input_dim, generator=generator)
        elif i > 0:
            order = torch.arange(input_dim)
        if i > 0 and mixing == "lu":
            layers.append(LULinear(input_dim))
        layer = make(**settings, permutation=order)
        layer.compresses_context = True
        layers.append(layer.inv)
    return layers


def _mix(
    couplings: list[nn.Module], input_dim: int, mixing: str | None, seed: int
) -> list[nn.Module]:
    """The couplings with mixing layers between them, and the inverse of all permutations at the end."""
    if mixing is None:
        return couplings
    identity = now = torch.arange(input_dim)
    layers: list[nn.Module] = []
    for i, order in enumerate(_orders(input_dim, len(couplings), seed)):
        if i > 0 and mixing == "lu":
            layers.append(LULinear(input_dim))
        if not torch.equal(order, now):
            layers.append(Permute(now.argsort()[order]))
        layers.append(couplings[i])
        now = order
    if not torch.equal(now, identity):
        layers.append(Permute(now.argsort()))
    return layers


def _orders(input_dim: int, count: int, seed: int) -> list[Tensor]:
    """The order of the dimensions that each coupling sees; it transforms one half given the other, in turns.

    Two couplings in a row share a split, so that every output comes to depend on every input; three have only one. Each
    further split is, of a hundred random ones, that which parts most dimensions that no split has parted so far: alone,
    alternating halves would never transform a dimension given its own half, and what is never direct is learned slowly,
    through the mixing layers.
    """
    generator = torch.Generator().manual_seed(seed)
    middle = input_dim // 2
    tries = 100 if input_dim <= MAX_ORDERED_DIM else 1
    splits = [torch.arange(input_dim)]
    parted = torch.zeros(input_dim, input_dim, dtype=torch.bool)

    def part(order: Tensor) -> Tensor:
        side = order.argsort() < middle
        return parted | (side[:, None] != side)

    while input_dim > 2 and count > 3 and 2 * len(splits) < count:
        parted = part(splits[-1])
        candidates = [torch.randperm(input_dim, generator=generator) for _ in range(tries)]
        splits.append(max(candidates, key=lambda order: int(part(order).sum())))
    return [splits[min(i // 2, len(splits) - 1)] for i in range(count)]


def _validate_flow(
    input_dim: int,
    context_dim: int,
    num_transforms: int,
    tails: Tails,
    mixing: str | None,
    base: Any,
) -> None:
    sizes = (("input_dim", input_dim, 1), ("context_dim", context_dim, 0))
    for name, value, least in (*sizes, ("num_transforms", num_transforms, 1)):
        check_size(name, value, least)
    if tails not in ("linear", "circular"):
        raise ValueError(
            f'Expected tails to be "linear" or "circular" for a SplineFlow, got {tails!r}.'
        )
    if mixing not in ("lu", "permute", None):
        raise ValueError(f'Expected mixing to be "lu", "permute" or None, got {mixing!r}.')
    if tails == "circular" and isinstance(base, str) and base == "conditional_normal":
        raise ValueError(
            'Expected linear tails with base="conditional_normal", got "circular": location and scale do not keep the '
            "period."
        )
    if mixing == "lu" and tails == "circular":
        raise ValueError(
            'Expected mixing "permute" or None with circular tails, got "lu": a linear map does not keep the period.'
        )
