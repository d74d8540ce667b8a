"""Where a guide starts: at values of its latents, with angles cut open, or at the Gaussian of another guide."""

from typing import Any

import torch
from torch import Tensor

from pyro_flowkit.guides.circular import CircularAffine, Cut, best_cut, periodic_columns
from pyro_flowkit.guides.gaussian import Gaussian, normal_draws
from pyro_flowkit.guides.latent_density import LatentDensity
from pyro_flowkit.guides.supports import bijection_to
from pyro_flowkit.guides.without_masked import WithoutMasked
from pyro_flowkit.programs.vectorized import Way
from pyro_flowkit.transforms.affine import Affine

# a setup looks at a few points only
WITHOUT_RECORDING: tuple[Way, ...] = ("plate", "rows")


class Start(WithoutMasked):
    """The steps of a guide's setup that choose its location, after that of the prototype."""

    affine: Affine
    init_scale: float

    def _start_warm(self, sizes: dict[str, int], gaussian: Gaussian) -> None:
        own = {name: shape.numel() for name, shape in self._unconstrained_shapes.items()}
        if own != sizes:
            raise ValueError(
                f"Expected the latents of the guide to start from, {sizes} (site: unconstrained values), got {own}."
            )
        if self.idle is not None:
            gaussian = gaussian.marginal(self.idle.columns)
        self.affine.restart(gaussian.loc, gaussian.scale)
        if isinstance(self.affine, CircularAffine):
            self.affine.centre.copy_(gaussian.loc[self.affine.columns])

    def _choose_loc(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Where ``init_loc_fn`` says; without one the prior's medians, unless the origin is the better start.

        The median of a vague prior may be far out, or underflow.
        """
        loc = self._init_loc()
        model, is_given = self._given
        if is_given:
            return loc
        density = LatentDensity(model, self, args, kwargs, WITHOUT_RECORDING)
        draws = normal_draws(8, loc, seed=0)
        scale = torch.full_like(loc, self.init_scale)
        origin = torch.zeros_like(loc)
        of_median, of_origin = (Gaussian(at, scale).elbo(density, draws) for at in (loc, origin))
        if of_median >= of_origin:
            return loc
        self._start_at(origin)
        return origin

    def _start_at(self, loc: Tensor) -> None:
        for site, unconstrained in self._unpack_latent(loc):
            site["value"] = bijection_to(site["fn"].support)(unconstrained)

    def _cut(
        self, angular: list[int], loc: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Cut:
        """Where to cut the angles among the latents: opposite to a given start, or where there is least mass."""
        model, is_given = self._given
        density = LatentDensity(model, self, args, kwargs, WITHOUT_RECORDING)
        columns = periodic_columns(density, loc, angular)
        if is_given:
            return Cut(columns, loc[columns], loc)
        cut = best_cut(density, loc, columns)
        self._start_at(cut.loc)
        return cut
