"""The first stage of a guide's training, and its safety net: a Gaussian, found without noise.

A guide that was trained before goes on from there, and has its own state for a net.

With several components it is a mixture of Gaussians, each the best one at its mode; their ELBOs say how much of the
mass each has.

Where the guide has a hierarchical affine map, what is linear in that follows in the same way, from fixed draws by
L-BFGS: the latents of each site are a Gaussian then whose location and log scale are linear in those before it, times a
Gaussian that is always the same, as a prior and a likelihood are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from pyro_flowkit.deadline import Deadline
from pyro_flowkit.guides.circular import CircularAffine
from pyro_flowkit.guides.draws import Draws
from pyro_flowkit.guides.gaussian import SEARCH_SECONDS, Density, Gaussian, best_gaussian, minimized
from pyro_flowkit.guides.latent_vector import LatentDensity, in_words
from pyro_flowkit.guides.mixture import MixturePosterior
from pyro_flowkit.guides.modes import (
    COMPARABLE,
    NEGLIGIBLE,
    Mode,
    comparable,
    is_apart,
    modes,
    separate,
    spread,
)
from pyro_flowkit.guides.posterior import GuidePosterior
from pyro_flowkit.guides.room import Room
from pyro_flowkit.ops.quasi_random import normal_draws
from pyro_flowkit.programs.modules import copied
from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.transforms.affine import Affine
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine
from pyro_flowkit.warning import warn

NUM_JUDGES = 2048
MAX_ROUNDS = 8  # of so many judges
LEVEL_ERROR = 0.005  # nats; with a smaller error of the difference no more are drawn
CLEAR = 4.0  # errors; a difference that is larger needs no more either
SHARE_FOR_MORE = 0.5  # of the time that is left by the first Gaussian, for other modes and for the hierarchical map
SHARE_FOR_MODES = 0.5  # of that
MIN_LOSS, MIN_ROOM = 0.05, 0.02  # nats; what is less is not worth a word


class GaussianStart:
    """Where a guide's training starts: the best Gaussian, or where an earlier one ended; keeps what leads back there.

    Attributes:
        room: what the guide has left to gain.
        tensors: the guide's ``state_dict`` at that start.
    """

    def __init__(
        self,
        guide: Draws,
        density: LatentDensity,
        tensors: Mapping[str, Tensor] | None = None,
    ):
        self._guide, self._density = guide, density
        self.room = Room(guide, density)
        self.tensors = copied(guide.state_dict() if tensors is None else tensors)

    @classmethod
    def of(
        cls,
        guide: Draws,
        density: LatentDensity,
        max_seconds: float | None,
        other_starts: Callable[[], Sequence[Tensor]],
    ) -> Self | None:
        """Put a fresh guide onto the best Gaussian; one that was trained stays where it is.

        Args:
            guide: after its setup.
            density: of its model.
            max_seconds: of the search, by the clock on the wall; None for no other limit than its own.
            other_starts: gives locations to look for other modes from, besides the guide's own; those found are named
                in a warning.

        Returns:
            None, with nothing done, where the model cannot be run for many draws at a time; with a warning, if the
            guide is fresh.
        """
        is_fresh = _is_gaussian(guide, hierarchical=False)
        if density.obstacle is not None:
            if is_fresh:
                warn(
                    f"The search for the best Gaussian is left out, so training starts at {type(guide).__name__}'s own "
                    f"start and has farther to go: the model is not run for many draws at a time: {density.obstacle}."
                )
            return None
        if not is_fresh:
            return cls(guide, density)
        wall_seconds = math.inf if max_seconds is None else max_seconds
        affine, deadline = guide.affine, Deadline(SEARCH_SECONDS, wall_seconds)
        flat: Density = density
        if isinstance(affine, CircularAffine):
            affine.cut_anew(density)
            flat = affine.flat_density(density)
        with torch.no_grad():
            scale = affine.scale if affine.kind == "full" else affine.scale.diagonal().clone()
            start = Gaussian(affine.loc.clone(), scale)
        found = best_gaussian(flat, start, deadline=deadline)
        deadline = deadline.part(SHARE_FOR_MORE)
        starts = other_starts()
        if guide.num_components > 1:
            _place_components(guide, density, _refined_modes(guide, flat, found, starts, deadline))
        else:
            if starts:
                found = _refined_modes(guide, flat, found, starts, deadline)[0].gaussian
            if found is not start:
                affine.restart(found.loc, found.scale)
        for component in guide.components:
            if component.hierarchy is not None:
                _fit_hierarchy(density, component.hierarchy, component.affine, deadline)
        return cls(guide, density)

    def take_over(self) -> None:
        """Let the guide as it is now be the start."""
        self.tensors = copied(self._guide.state_dict())

    @torch.no_grad()
    def keep_better(self) -> bool:
        """Go back to the start unless the flow is better; with a warning if much was lost.

        The better one has the larger ELBO at the same draws of the base, or, where the two are within two standard
        errors of the difference, the smaller spread of log p - log q, which importance weights come from. One draw far
        out can hide a large difference: as long as the error is large, there are more.

        Returns:
            Whether the trained guide was kept.
        """
        self._density.look_again()
        now = copied(self._guide.state_dict())
        differences, squares = [], torch.zeros(2)
        for number in range(1, MAX_ROUNDS + 1):
            self._load(now)
            trained, spread_trained = self._elbos(number)
            self._load(self.tensors)
            first, spread_first = self._elbos(number)
            differences.append(trained - first)
            squares += torch.tensor([spread_trained, spread_first]) ** 2
            difference = torch.cat(differences)
            gain = float(difference.mean())
            error = float(difference.std()) / len(difference) ** 0.5
            if not (abs(gain) <= CLEAR * error and error > LEVEL_ERROR):
                break
        spread_trained, spread_first = (squares / number).sqrt().tolist()
        is_level = abs(gain) <= 2.0 * error and spread_trained < spread_first
        if gain > 2.0 * error or is_level:
            self._load(now)
            return True
        # far below, the error is large, too, and no excuse; a NaN is none either. Below a start that is all but the
        # posterior nothing is lost.
        room = 0.5 * spread_first**2
        if not gain >= -MIN_LOSS and not room < MIN_ROOM:
            is_gaussian = _is_gaussian(self._guide, hierarchical=True)
            place = "Gaussian" if is_gaussian else "trained flow"
            warn(
                f"The spline flow of {type(self._guide).__name__} ended {-gain:.3g} nats below the {place} that it "
                f"started from, so the guide is that {place} again. More particles, more steps or a smaller learning "
                "rate may help."
            )
        return False

    def _elbos(self, number: int) -> tuple[Tensor, float]:
        """log p - log q (nats) at the same quasi-random draws of the base for whatever the guide is now.

        Args:
            number: of the set of draws, from 1 on.

        Returns:
            The mean over the components, weighted by what they are in the mixture, at each draw, ``(n,)``; and the
            standard deviation over draws and components.
        """
        posterior = self._guide.get_posterior()
        z = normal_draws(NUM_JUDGES // 2, self._guide.affine.loc, seed=2 + number)
        if isinstance(posterior, MixturePosterior):
            shares = posterior.weights.log_weights.exp()
            each = [
                self._log_weights(component, posterior, z, number)
                for component in posterior.components
            ]
            elbos = torch.stack(each)
        else:
            shares = z.new_ones(1)
            elbos = self._log_weights(posterior, posterior, z, number)[None]
        means = shares @ elbos
        variance = shares @ (elbos - means.mean()).square().sum(-1) / (elbos.shape[-1] - 1)
        return means, float(variance.sqrt())

    def _log_weights(
        self,
        component: GuidePosterior,
        posterior: GuidePosterior | MixturePosterior,
        z: Tensor,
        number: int,
    ) -> Tensor:
        """log p - log q where a component takes draws of its base."""
        if self._guide.base_kind == "student_t":
            with fixed_seed(z.device, number):
                z = component.base_dist.sample(z.shape[:1])
        latent, log_prob = component._push(z)
        if component is not posterior:
            log_prob = posterior.log_prob(latent)
        return self._density(latent) - log_prob

    def _load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._guide.state_dict().items():
            tensor.copy_(state[name])


@torch.no_grad()
def _is_gaussian(guide: Draws, *, hierarchical: bool) -> bool:
    """Whether the splines are the identity still; one with a base of Student's t counts.

    Args:
        guide: after its setup.
        hierarchical: whether that is enough, or the hierarchical map is to be the identity, too.
    """
    z = normal_draws(8, guide.affine.loc, seed=0)
    for component in guide.components:
        x = z
        for layer in component.layers()[:-1]:
            if layer is not component.hierarchy or not hierarchical:
                x = layer(x)
        if not torch.allclose(x, z, atol=1e-4):
            return False
    return True


def _place_components(guide: Draws, density: Density, found: Sequence[Mode]) -> None:
    places = spread(found, guide.num_components)
    for component, place in zip(guide.components, places, strict=True):
        component.affine.restart(place.gaussian.loc, place.gaussian.scale)
    guide.mixture.restart(place.elbo for place in places)


def _refined_modes(
    guide: Draws,
    density: Density,
    first: Gaussian,
    starts: Sequence[Tensor],
    deadline: Deadline,
) -> list[Mode]:
    """The best Gaussians of the modes that are found, the largest first.

    A warning where the guide has fewer components than there are modes of comparable mass.
    """
    starts = [first.loc, *starts]
    found = modes(density, starts, guide.init_scale, deadline=deadline.part(SHARE_FOR_MODES))
    judges = normal_draws(512, first.loc, seed=5)
    refined = [Mode(first, first.elbo(density, judges))]
    within = COMPARABLE if guide.num_components == 1 else NEGLIGIBLE
    for mode in comparable(found, within):
        if all(is_apart(density, mode, other) for other in refined):
            scale = mode.gaussian.scale
            start = Gaussian(mode.gaussian.loc, scale.diag() if first.scale.dim() == 2 else scale)
            better = best_gaussian(density, start, deadline=deadline)
            refined.append(Mode(better, better.elbo(density, judges)))
    found = separate(density, refined)
    several = comparable(found)
    if len(several) > guide.num_components:
        warn(_several_modes(guide, several))
    return found


def _several_modes(guide: Draws, found: Sequence[Mode]) -> str:
    places = [f"{in_words(guide, m.gaussian.loc)} (ELBO {m.elbo:.2f})" for m in found[:3]]
    count = guide.num_components
    followed = "the first" if count == 1 else f"the first {count}"
    return (
        f"The posterior has at least {len(found)} separate modes of comparable mass: {'; '.join(places)}. "
        f"{type(guide).__name__} follows {followed}: its ELBO and evidence leave the others out, and the latents look "
        f"more certain than they are. num_components={len(found)} has a flow for each of them; or start at another "
        "one with init_loc_fn=init_to_value(values=...): the evidences of both say how the mass is shared."
    )


class _Scaling(nn.Module):
    """The affine maps at the end of a guide, as a function of their parameters."""

    def __init__(self, hierarchy: HierarchicalAffine, affine: Affine):
        super().__init__()
        self.hierarchy, self.affine = hierarchy, affine

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y, first = self.hierarchy.call_and_ladj(z)
        latent, second = self.affine.call_and_ladj(y)
        return latent, first + second


@torch.no_grad()
def _fit_hierarchy(
    density: Density, hierarchy: HierarchicalAffine, affine: Affine, deadline: Deadline
) -> None:
    """Fit the hierarchical map but for its networks, and the affine map with it, where that raises the ELBO."""
    scaling = _Scaling(hierarchy, affine)
    learned = {
        name: parameter
        for name, parameter in scaling.named_parameters()
        if name.startswith("affine.") or name.endswith((".weight", ".likelihood"))
    }
    start = torch.cat([parameter.flatten() for parameter in learned.values()])
    size = affine.input_dim
    draws = normal_draws(max(512, 8 * size), affine.loc, seed=1)
    judges = normal_draws(max(512, 8 * size), affine.loc, seed=2)

    def unpacked(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([parameter.numel() for parameter in learned.values()])
        return {
            name: part.reshape(parameter.shape)
            for part, (name, parameter) in zip(parts, learned.items(), strict=True)
        }

    def loss(vector: Tensor, z: Tensor) -> Tensor:
        latent, ladj = torch.func.functional_call(scaling, unpacked(vector), (z,))
        return -(density(latent) + ladj).mean()

    found = minimized(lambda vector: loss(vector, draws), start, 200, deadline)
    if float(loss(found, judges)) < float(loss(start, judges)):
        for name, value in unpacked(found).items():
            learned[name].copy_(value)
