r"""ContinuousFlow: the flow of a learned velocity field, trained by flow matching, with its exact density.

The field v takes the base at t = 0 to the data at t = 1, and the density follows from its divergence
(:mod:`pyro_flowkit.transforms.ode`). Flow matching learns it without solving the equation: with z from the base, x from
the data and t uniform,

.. math:: \min_v \; \mathrm{E} \, \lVert v((1 - t) z + t x,\, t) - (x - z) \rVert^2,

whose minimum is a field that takes the one distribution to the other. Where z and x are paired by optimal transport
within a batch, instead of at random, its paths are straighter and need fewer steps.

References:
    Yaron Lipman, Ricky T. Q. Chen, Heli Ben-Hamu, Maximilian Nickel, Matt Le. Flow Matching for Generative Modeling.
    ICLR 2023.

    Alexander Tong et al. Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport.
    TMLR 2024.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_flowkit.bases import make_base
from pyro_flowkit.flow import Flow
from pyro_flowkit.nn import ResidualNetwork, checked_hidden_dims, compressed
from pyro_flowkit.recipe import Recipe
from pyro_flowkit.transforms.base import check_context, check_size
from pyro_flowkit.transforms.conditional import conditioned
from pyro_flowkit.transforms.linear import Standardization
from pyro_flowkit.transforms.ode import ODE, ConditionalODE, Solution, Solver, Trace

NUM_FREQUENCIES = 3


class VelocityNetwork(nn.Module):
    """A velocity field: a residual network with SiLU of the point, whose blocks time and context gate; zero at first.

    Of the time it sees t and the cosine and sine of pi k t for k = 1, 2, 3.

    Args:
        input_dim: size D of a point.
        hidden_dims: one width, repeated for each residual block.
        context_dim: size of the context, 0 for none.

    Shapes: ``(*batch, D)``, times ``(*batch, 1)`` and a context ``(*batch, context_dim)`` to ``(*batch, D)``.
    """

    def __init__(self, input_dim: int, hidden_dims: Sequence[int], *, context_dim: int = 0):
        super().__init__()
        self.network = ResidualNetwork(
            input_dim,
            input_dim,
            hidden_dims,
            context_dim=1 + 2 * NUM_FREQUENCIES + context_dim,
            activation=nn.SiLU,
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        angles = math.pi * t * torch.arange(1, NUM_FREQUENCIES + 1, dtype=t.dtype, device=t.device)
        seen = [t, angles.cos(), angles.sin()]
        if context is not None:
            seen.append(compressed(context).expand(*t.shape[:-1], -1))
        return self.network(x, torch.cat(seen, dim=-1))


class ContinuousFlow(Flow):
    """A continuous normalizing flow: density, prior or (with a context) conditional distribution.

    It is used as a :class:`SplineFlow` is::

        flow = ContinuousFlow(2).standardize(x)
        fit(flow, data=x)                             # by flow matching; no equation is solved
        fit(flow, data=x, objective="likelihood")     # by maximum likelihood, from there on
        flow.log_prob(x)                              # exact to the solver's error, which solver_error(x) tells
        pyro.sample("z", flow())                      # prior

    Where the caller of ``fit`` does not say, flow matching takes 256 rows a step, by a rate that falls from 1e-2 to
    zero along a cosine (over 20,000 steps, or as many as ``max_steps``, ``max_epochs`` or ``max_seconds`` leave), and
    ends with a moving average of the parameters (:meth:`recipe`); with ``val_data`` or ``val_fraction``, with the best
    of these averages.

    A fresh flow is its base distribution. Densities cost D evaluations of the field for its trace in each of the
    solver's, draws one.

    Args:
        input_dim: size D of the event, at least 1.
        context_dim: size of the context, 0 for none.
        hidden_dims: one width, repeated for each of the field's residual blocks; None is two blocks of ``10 * D``, at
            least 64, at most 256.
        velocity: a field of your own instead, a module ``(x, t, context)`` of shapes ``(*batch, D)``, ``(*batch, 1)``
            and ``(*batch, context_dim)`` (None without a context) to ``(*batch, D)``.
        solver: "rk4", ``num_steps`` fixed steps, or "dopri5", adaptive ones of the given tolerance, by torchdiffeq
            (``pip install "pyro-flowkit[continuous]"``).
        num_steps: of "rk4".
        tolerance: of a step of "dopri5", relative and absolute.
        trace: "exact", or "hutchinson", whose log-densities are unbiased estimates along a direction drawn at each
            call: for a D too large for the exact one.
        pairing: of draws and data in flow matching: "independent", or "optimal", by optimal transport within each
            batch (without a context).
        base: "normal", or a Pyro distribution with event shape ``(D,)``.

    Raises:
        ValueError: for settings that make no flow, saying what was expected and what came.
        ImportError: for "dopri5" without torchdiffeq.

    Example:
        >>> import torch
        >>> from pyro_flowkit import ContinuousFlow
        >>> flow = ContinuousFlow(2)
        >>> flow.log_prob(torch.zeros(5, 2)).shape, flow.sample(5).shape
        (torch.Size([5]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] | None = None,
        velocity: nn.Module | None = None,
        solver: Solver = "rk4",
        num_steps: int = 40,
        tolerance: float = 1e-6,
        trace: Trace = "exact",
        pairing: Literal["independent", "optimal"] = "independent",
        base: str | Distribution = "normal",
    ):
        super().__init__(input_dim, context_dim, name="ContinuousFlow")
        check_size("input_dim", input_dim)
        check_size("context_dim", context_dim, 0)
        if isinstance(base, str) and base != "normal":
            raise ValueError(f'Expected base to be "normal" or a distribution, got {base!r}.')
        if pairing not in ("independent", "optimal"):
            raise ValueError(f'Expected pairing "independent" or "optimal", got {pairing!r}.')
        if pairing == "optimal" and context_dim:
            raise ValueError(
                'Expected pairing "independent" with a context, got "optimal": it would pair draws with rows of '
                "other contexts."
            )
        if velocity is None:
            hidden_dims = hidden_dims or [min(max(10 * input_dim, 64), 256)] * 2
            widths = checked_hidden_dims(hidden_dims, input_dim)
            velocity = VelocityNetwork(input_dim, widths, context_dim=context_dim)
        elif hidden_dims is not None:
            raise ValueError(f"Expected no hidden_dims with a velocity, got {hidden_dims!r}.")
        self.pairing = pairing
        solution = Solution(solver, num_steps, tolerance, trace)
        self.ode: ODE | ConditionalODE = (
            ConditionalODE(input_dim, context_dim, velocity, solution)
            if context_dim
            else ODE(input_dim, velocity, solution)
        )
        self.standardization = Standardization(input_dim)
        self.base = make_base(base, input_dim, context_dim)

    def recipe(self) -> Recipe:
        """What :func:`pyro_flowkit.fit` does in flow matching where its caller does not say.

        The loss of a step is as noisy as its draws of base and time, at the end, too: a rate that falls to zero gains
        by that, batches lose little by it, and no state can be told for the best. So the flow ends with the average
        of its last parameters.
        """
        return Recipe(lr=1e-2, scheduler="cosine", batch_size=256, average=0.99)

    @property
    def is_estimate(self) -> bool:
        """Whether log-densities are estimates, by Hutchinson's trace."""
        return self.ode.solution.trace == "hutchinson"

    def transforms(self, context: Tensor | None = None) -> list[Transform]:
        """The flow of the field, as a transform, without the standardisation."""
        check_context(context, self.context_dim, "ContinuousFlow")
        return conditioned([self.ode], context)

    @torch.no_grad()
    def sample(self, n: int | Sequence[int], context: Tensor | None = None) -> Tensor:
        self.sync_with_store(lend=False)
        distribution = self._distribution(context)
        x = distribution.base_dist.sample(torch.Size((n,) if isinstance(n, int) else n))
        return self.standardization(self.ode.move(x, context, 0.0, 1.0))

    @torch.no_grad()
    def solver_error(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """How far the solver's log-density of each row may be off, in nats, shape ``(*batch,)``.

        The difference from a finer solution: twice the steps of "rk4", a hundredth of the tolerance of "dopri5".
        """
        given = self.ode.solution
        finer = replace(
            given, num_steps=2 * given.num_steps, tolerance=max(given.tolerance / 100, 1e-12)
        )
        found = []
        try:
            for solution in (given, finer):
                self.ode.solution = solution
                with torch.random.fork_rng(
                    devices=[]
                ):  # the same directions, where the trace has some
                    torch.manual_seed(0)
                    found.append(self.log_prob(x, context))
        finally:
            self.ode.solution = given
        return (found[0] - found[1]).abs()

    def matching_loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The loss of flow matching for each row, from a draw of the base and a time each.

        Args:
            x: shape ``(n, D)``.
            context: shape ``(n, context_dim)``, where the flow has one.

        Returns:
            The square of what the field misses, a mean over the dimensions (of standardised data), shape ``(n,)``.
        """
        check_context(context, self.context_dim, "ContinuousFlow")
        self.sync_with_store(lend=False)
        with torch.no_grad():
            x, _ = self.standardization.inverse_and_ladj(x)
            z = self.base().sample(x.shape[:1]).to(x)
            if self.pairing == "optimal":
                z = z[_optimal_pairing(z, x)]
            # of all parts of the way there is one in every batch
            shift = torch.rand((), dtype=x.dtype, device=x.device)
            t = torch.arange(len(x), dtype=x.dtype, device=x.device).div(max(len(x), 1))
            t = ((t + shift) % 1.0).unsqueeze(-1)
        missed = self.ode.velocity(z + t * (x - z), t, context) - (x - z)
        return missed.square().mean(-1)


def _optimal_pairing(z: Tensor, x: Tensor) -> Tensor:
    """For every row of x the row of z that is its partner where the sum of the squared distances is least."""
    from scipy.optimize import (
        linear_sum_assignment,  # which changes filters of warnings when it is imported
    )

    cost = torch.cdist(x.double(), z.double()).square()
    _, partners = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(partners, device=z.device)
