r"""What a trained amortised guide knows of given data: draws, densities, evidence, and draws corrected by weights.

With global latents the weights are those of all data together, ``log w = log p(x, t, z) - log q(t, z)``. Without, the
data are independent, and so every datum has weights of its own:

    log p(x) = sum_i log p(x_i) ~ sum_i log (1/S) sum_s w_is,   log w_is = log p(x_i, z_is) - log q(z_is)

and its draws are resampled by these, whatever the other data have.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_flowkit.guides.amortized_parts import AmortizedParts
from pyro_flowkit.guides.latent_vector import pack
from pyro_flowkit.guides.summaries import Weighed
from pyro_flowkit.guides.supports import bijection_to
from pyro_flowkit.ops.shapes import broadcast_shapes
from pyro_flowkit.programs.pairs import NotVectorizable, trace_pair, vectorized
from pyro_flowkit.programs.runs import in_plate, own_values
from pyro_flowkit.programs.sites import (
    is_point_mass,
    nesting_of,
    plates_of,
    refuse_subsampling,
    scored_sites,
)

NUMBERS_AT_ONCE = 2**17  # of latents


class AmortizedDraws(Weighed, AmortizedParts):
    """Draws, densities and evidence of a guide for local latents, for the model's arguments, after its setup."""

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of all latents, ``{site: values}`` of shape ``(num_samples, *batch, *event)``, without gradients.

        Args:
            num_samples: number of draws.
            args: the model's arguments.
            kwargs: the model's keyword arguments.
        """
        self._synchronise()
        drawn = [values for values, _ in self._draws(num_samples, args, kwargs)]
        return {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """log q of values of all latents, in constrained space.

        Args:
            values: ``{site: value}``, shapes ``(*sample_shape, *batch, *event)``, such as :meth:`sample` returns.
            args: the model's arguments.
            kwargs: the model's keyword arguments.

        Returns:
            log q in nats, shape ``(*sample_shape,)``, differentiable.

        Raises:
            ValueError: for missing or unknown latents, shapes that do not fit, and a global guide whose density
                cannot be had at given values.
        """
        self._synchronise()
        names = {*self._local.names, *self._global.names}
        if set(values) != names:
            raise ValueError(
                f"Expected a value for each of the latents {sorted(names)}, got {sorted(values)}."
            )
        plain = self._plain_trace(args, kwargs)
        shapes = {name: plain.nodes[name]["value"].shape for name in names}
        for name, shape in shapes.items():
            if tuple(values[name].shape[values[name].dim() - len(shape) :]) != tuple(shape):
                raise ValueError(
                    f"Expected a value of shape (*sample_shape, {', '.join(map(str, shape))}) for {name!r}, got "
                    f"{tuple(values[name].shape)}."
                )
        left = {n: values[n].shape[: values[n].dim() - len(shape)] for n, shape in shapes.items()}
        sample_shape = broadcast_shapes(*left.values())
        count = sample_shape.numel()
        flat = {}
        for name, shape in shapes.items():
            drawn, value = plain.nodes[name]["value"], values[name]
            value = value if value.is_floating_point() else value.to(drawn.dtype)
            flat[name] = value.expand((*sample_shape, *shape)).reshape((count, *shape))
        trace = self._given(flat, plain, args, kwargs)
        trace.compute_log_prob()
        parts = [site["log_prob"] for _, site in scored_sites(trace)]
        total = torch.stack([part.reshape(count, -1).sum(-1) for part in parts])
        return total.sum(0).reshape(sample_shape)

    def _chosen(self, values: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
        if len(chosen) == 1:
            return {name: value[chosen[0].to(value.device)] for name, value in values.items()}
        found = {}
        for site in self._local.sites:
            value = values[site.name]
            rows = value.movedim(self._dim - site.event_dim, 1)
            index = chosen.T.to(value.device)
            taken = rows[index, torch.arange(rows.shape[1], device=value.device)]
            found[site.name] = taken.movedim(1, self._dim - site.event_dim)
        return found

    @torch.no_grad()
    def _weigh(
        self, args: tuple, kwargs: dict, num_samples: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draws and their log weights ``(data or 1, num_samples)``, float64 on the CPU."""
        self._synchronise()
        model = self._model_for_weights(self._plain_model[0])
        with torch.random.fork_rng(devices=[]):
            plain, _ = trace_pair(model, self, args, kwargs)
        refuse_subsampling(plain)
        try:
            program = vectorized(model, self, args, kwargs)
        except NotVectorizable as error:
            raise ValueError(
                f"Expected a guide that runs for many draws at a time: {error}."
            ) from None
        frames = [plates_of(site).get(self._dim) for _, site in scored_sites(plain)]
        alone = self.global_guide is None and all(f and f.name == self._plate for f in frames)
        dim = self._dim if alone else None
        drawn, log_weights = [], []
        for values, trace in self._draws(num_samples, args, kwargs):
            trace.compute_log_prob()
            of_model = program.log_probs(values, args, kwargs).values()
            log_p = sum(_summed(log_prob, dim) for log_prob in of_model)
            log_q = sum(_summed(site["log_prob"], dim) for _, site in scored_sites(trace))
            drawn.append(values)
            log_weights.append(torch.as_tensor(log_p - log_q).cpu())
        joined = {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}
        return joined, torch.cat(log_weights).T

    def _plain_trace(self, args: tuple, kwargs: dict) -> poutine.Trace:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), poutine.block():
            return poutine.trace(self).get_trace(*args, **kwargs)

    def _draws(
        self, num_samples: int, args: tuple, kwargs: dict
    ) -> Iterator[tuple[dict[str, Tensor], poutine.Trace]]:
        """Values ``(size, *batch, *event)`` of all latents, and the run of the guide, for so many draws in all."""
        plain = self._plain_trace(args, kwargs)
        sites = {name: plain.nodes[name] for name in (*self._local.names, *self._global.names)}
        numbers = sum(site["value"].numel() for site in sites.values())
        at_once, nesting = max(1, NUMBERS_AT_ONCE // max(1, numbers)), nesting_of(plain)
        for start in range(0, num_samples, at_once):
            size = min(at_once, num_samples - start)
            with poutine.block():
                trace = poutine.trace(in_plate(self, size, nesting)).get_trace(*args, **kwargs)
            values = {
                name: own_values(trace.nodes[name]["value"], site["fn"], size, nesting)
                for name, site in sites.items()
            }
            yield values, trace

    def _given(
        self, values: dict[str, Tensor], plain: poutine.Trace, args: tuple, kwargs: dict
    ) -> poutine.Trace:
        """A run of the guide at values ``(size, *batch, *event)``."""
        size, nesting = len(next(iter(values.values()))), nesting_of(plain)
        given = self._given_global(values, plain, size, nesting)
        parts = []
        for site in self._local.sites:
            unconstrained = bijection_to(site.support).inv(values[site.name])
            rows = unconstrained.movedim(self._dim - site.unconstrained_event_dim, 1)
            parts.append(rows.reshape(*rows.shape[:2], site.size))
        latent = torch.cat(parts, dim=-1)
        before, after = (1,) * (nesting + self._dim), (1,) * (-1 - self._dim)
        shape = (size, *before, latent.shape[1], *after, self._local.size)
        given[f"_{self._pyro_name}_latent"] = latent.reshape(shape)
        fixed = poutine.Trace()
        for name, value in given.items():
            infer = plain.nodes[name]["infer"]
            fixed.add_node(
                name, name=name, type="sample", value=value, is_observed=False, infer=infer
            )
        program = in_plate(poutine.replay(self, trace=fixed), size, nesting)
        with poutine.block():
            return poutine.trace(program).get_trace(*args, **kwargs)

    def _given_global(
        self, values: dict[str, Tensor], plain: poutine.Trace, size: int, nesting: int
    ) -> dict[str, Tensor]:
        """What the global guide draws where the global latents have these values."""
        guide, given = self.global_guide, {}
        if isinstance(guide, AutoContinuous):
            latent, _ = pack(guide, {name: values[name] for name in self._global.names})
            name = f"_{guide._pyro_name}_latent"
            return {name: latent.reshape(size, *(1,) * nesting, -1)}
        for site in self._global.sites:
            name, value, event_dim = site.name, values[site.name], site.event_dim
            if is_point_mass(plain.nodes[name]["fn"]):
                name = f"{name}_unconstrained"  # as Pyro's AutoNormal calls it
                if name not in plain.nodes:
                    raise ValueError(
                        f"Expected a global guide whose density can be had at given values, got "
                        f"{type(guide).__name__}, in which {site.name!r} follows from other draws."
                    )
                value = bijection_to(site.support).inv(value)
                event_dim = plain.nodes[name]["fn"].event_dim
            batch = value.shape[1 : value.dim() - event_dim]
            padding = (1,) * (nesting - len(batch))
            given[name] = value.reshape(size, *padding, *value.shape[1:])
        return given


def _summed(log_prob: Tensor, dim: int | None) -> Tensor:
    """Log-densities ``(draws, *batch)`` summed for each datum of the plate at a dim, or for all, in float64."""
    log_prob = log_prob.double()
    if dim is None:
        return log_prob.reshape(len(log_prob), -1).sum(-1, keepdim=True)
    rows = log_prob.movedim(dim, 1)
    return rows.reshape(*rows.shape[:2], -1).sum(-1)
