"""The guide for the global latents of an amortised model: splines wait for the affine map, and minibatches are noisy.

The more data there are, the narrower is the posterior of the global latents, and the farther away is the start, in its
standard deviations: fifty in ``benchmarks/amortized.py`` with 1,000 data. All particles are pulled into one direction
then. The affine map has to go there, but splines follow the pull as well: there, thirty steps of Adam squeezed a
dimension to a thirtieth of its width, and a thousand did not undo it. So they wait:

- While the pull, the mean square of the path gradient in units of the guide's standard deviations, is above a limit,
  no gradient reaches the splines (not even zeros, which Adam would count as steps). Once it has been below, they learn.
- Where the path gradient is off, or the objective does not use it, nothing is known of the pull, and they wait for a
  fixed number of calls. What jit traces cannot change later, so there they do not wait.

A minibatch of b out of N data adds noise: it pulls all particles of the global latents into one direction, sqrt(N / b)
times as hard as their own spread justifies. Two things follow:

- Particles come in pairs e, -e of the base while gradients are recorded: the common pull cancels in the scale.
- Where the plate is subsampled at setup, the splines are frozen. Under Adam, whose steps do not shrink with the
  gradient, such noise bends them further than any signal would, and with many data the posterior of global latents is
  close to normal.

Local latents may be told of the draws of global ones: how far these are from the centre of the global guide.
With t the unconstrained global draws, m and s location and scale of the global guide, as they are at the time,

    context = (t - m) / max(s, 1).

- Raw draws would not do: with many data the posterior of a global latent is narrow, 1.30 +- 0.01 say, and a network
  that reads 1.30 learns nothing of the 0.01.
- Nor would whitened draws, (t - m) / s: where s is small the local latents depend little on t, and the noise of
  training moves a network that reads numbers of unit size further than that.
- No gradient passes through m and s. To move m is the same as to move the constants of the local guide, so that this
  changes nothing at the optimum; on the way there local latents move with t, as in the posterior, not with t - m.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from torch import Size, Tensor

from pyro_flowkit.bases import _StandardNormal
from pyro_flowkit.guides.amortized_parts import AmortizedParts
from pyro_flowkit.guides.auto_spline_flow import AutoSplineFlow
from pyro_flowkit.guides.local_latents import Latents
from pyro_flowkit.guides.posterior import GradientNoise
from pyro_flowkit.guides.without_masked import all_values
from pyro_flowkit.path_gradient import held_fixed
from pyro_flowkit.transforms.base import FlowTransformModule

MAX_PULL = 4.0  # mean square; a location that is two standard deviations off
MIN_STEPS = 20  # what the mean square forgets
MAX_SILENCE = 100  # calls


class GlobalSplineFlow(AutoSplineFlow):
    """An :class:`AutoSplineFlow` with antithetic particles, whose splines wait; see the module's docstring."""

    _runs_in_the_kernel = False  # its draws come in pairs, and its layers wait
    _sees_to_its_pace = False  # the pull of minibatches decides when its parts learn
    _arrival_counts: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("_arrival_counts", Arrival.counts_at_first(), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if torch.is_grad_enabled():
            self._gradient_noise().called()
        return super().forward(*args, **kwargs)

    def get_base_dist(self) -> dist.TorchDistribution:
        base = super().get_base_dist().base_dist
        return AntitheticNormal(base.loc, base.scale, validate_args=False).to_event(1)

    def _gradient_noise(self) -> "Arrival":
        return Arrival(self._noise_squares, self._arrival_counts)

    def _layers(self) -> list[Any]:
        layers = super()._layers()
        if torch.jit.is_tracing() or not torch.is_grad_enabled():
            return layers
        if self._gradient_noise().happened:
            return layers
        count = len(self.flow.layers)
        return [*(Still(layer) for layer in layers[:count]), *layers[count:]]


class Arrival(GradientNoise):
    """The noise of gradients, and whether the affine map has come near the posterior.

    Args:
        squares: the mean squares of gradients.
        counts: number of steps, calls since the last step, and whether it happened; integers, shape ``(3,)``. A buffer
            of the guide, as the mean squares are.
    """

    def __init__(self, squares: Tensor, counts: Tensor):
        super().__init__(squares)
        self._counts = counts

    @staticmethod
    def counts_at_first() -> Tensor:
        return torch.zeros(3, dtype=torch.long)

    @property
    def happened(self) -> bool:
        """Once True it stays so."""
        return bool(self._counts[2])

    def called(self) -> None:
        """Take note of a call of the guide in training."""
        self._counts[1] += 1
        self._counts[2] |= self._counts[1] > MAX_SILENCE

    def update(self, squares: Tensor) -> None:
        super().update(squares)
        self._counts[0] += 1
        self._counts[1] = 0
        self._counts[2] |= bool(self._counts[0] >= MIN_STEPS and self.with_path < MAX_PULL)


class Still(FlowTransformModule):
    """A transform whose parameters get no gradients, while its inputs do."""

    def __init__(self, transform: FlowTransformModule):
        super().__init__(transform.input_dim)
        self.transform = transform

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with held_fixed([self.transform]):
            return self.transform.call_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        with held_fixed([self.transform]):
            return self.transform.inverse_and_ladj(y)


class AntitheticNormal(_StandardNormal):
    """Standard normal draws, in pairs of opposite sign along the first dimension while gradients are recorded."""

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        if not torch.is_grad_enabled() or len(shape) < 2 or shape[0] % 2:
            return super().rsample(sample_shape)
        half = self.loc.new_empty((shape[0] // 2, *shape[1:])).normal_()
        return torch.cat([half, -half])


def check_covered(
    guide: Callable[..., Any], latents: Latents, plate: str, args: tuple, kwargs: dict
) -> None:
    """Raise a ValueError unless a global guide samples these latents, and no others."""
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    nodes = trace.iter_stochastic_nodes()
    covered = sorted(name for name, node in nodes if not node["infer"].get("is_auxiliary"))
    if covered != latents.names:
        raise ValueError(
            f"Expected a global guide for the latents outside of plate {plate!r}, {latents.names}, got one for "
            f"{covered}: poutine.block(model, hide=[...]) leaves latents out."
        )


def centred(guide: Any, latents: Latents, values: Mapping[str, Tensor]) -> Tensor:
    """Global draws as a context, shape ``(*batch, size)``.

    Args:
        guide: the global guide, after its setup. Guides that have no location and scale leave the unconstrained draws
            as they are.
        latents: the global latents.
        values: their values.
    """
    draws = latents.pack(values)
    with torch.no_grad():
        loc, scale = _loc_scale(guide, latents, draws)
    return (draws - loc) / scale.clamp(min=1.0)


def _loc_scale(guide: Any, latents: Latents, draws: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(guide, AutoSplineFlow):
        if guide.num_components > 1:
            loc, scale = guide._loc_scale()
        else:
            unit = torch.eye(guide.latent_dim, dtype=draws.dtype, device=draws.device)
            loc, _ = guide.affine.call_and_ladj(torch.zeros_like(unit[0]))
            columns, _ = guide.affine.call_and_ladj(unit)
            scale = (columns - loc).square().sum(0).sqrt()
        if guide.idle is not None:
            loc, scale = (
                all_values(guide, loc),
                guide.idle.all_of(scale, torch.ones_like(guide.idle.fixed)),
            )
        return loc, scale
    if isinstance(guide, AutoNormal):
        pairs = [guide._get_loc_and_scale(site.name) for site in latents.sites]
        loc, scale = (
            torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*pairs, strict=True)
        )
        return loc, scale
    if isinstance(guide, AutoContinuous):
        try:
            return guide._loc_scale()
        except NotImplementedError:  # flows of Pyro's
            pass
    return torch.zeros_like(draws[..., :1]), torch.ones_like(draws[..., :1])


class GlobalPart(AmortizedParts):
    """The global guide of an amortised one, which is its master."""

    def _setup_global_guide(self, args: tuple, kwargs: dict) -> None:
        if self.global_guide is not None:
            self._lead()
            check_covered(self.global_guide, self._global, self._plate, args, kwargs)
        elif self._global.sites:
            guide: Any = GlobalSplineFlow(
                poutine.block(self._plain_model[0], expose=self._global.names),
                init_loc_fn=self.init_loc_fn,
                init_scale=self.init_scale,
                path_gradient=self.path_gradient,
            )
            guide._conversions = list(self._early_conversions)
            guide._pyro_name = f"{self._pyro_name}.global_guide"
            guide._update_master(weakref.ref(self) if self.master is None else self.master)
            guide.setup(*args, **kwargs)  # before it is a child: Pyro may ask those for parameters
            call = self._prototype_call
            guide.flow.requires_grad_(call.rows == call.size)
            self.global_guide = guide

    def _check_prototype(self, part_trace: poutine.Trace) -> None:
        """What a master is asked for its parts; :meth:`_setup_global_guide` compares the latents."""

    def _lead(self) -> None:
        """Be the global guide's master; copying takes that away from Pyro's guides."""
        master = weakref.ref(self) if self.master is None else self.master
        if self.global_guide is not None and self.global_guide.master is not master:
            self.global_guide._update_master(master)
