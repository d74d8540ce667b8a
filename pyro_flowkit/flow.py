"""What every flow of this package is to its users: a module that hands out distributions of vectors."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from torch import Tensor, nn
from torch.distributions import Transform

from pyro_flowkit._pyro import StoreModule
from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.pictures import columns_of, draw_panels, first_variables
from pyro_flowkit.preprocessing import as_tensor
from pyro_flowkit.transforms.linear import Standardization


class Flow(StoreModule):
    """A base, transforms and a standardisation of data; a subclass says what the transforms are.

    Attributes:
        input_dim: size D of the event.
        context_dim: size of the context, 0 for none.
        base: module that makes the base distribution.
        standardization: the outermost layer, fitted by :meth:`standardize`.
    """

    def __init__(self, input_dim: int, context_dim: int, *, name: str):
        super().__init__(name=name)
        self.input_dim = input_dim
        self.context_dim = context_dim

    base: nn.Module
    standardization: Standardization

    def transforms(self, context: Tensor | None = None) -> list[Transform]:
        """The layers from base to sample, as transforms, without the standardisation."""
        raise NotImplementedError

    def forward(
        self, context: Tensor | None = None, *, path_gradient: bool = False
    ) -> FlowDistribution:
        """The distribution, for a context of shape ``(*batch, context_dim)`` where the flow has one.

        Args:
            context: conditions the flow; its batch shape becomes the distribution's.
            path_gradient: see :class:`FlowDistribution`.

        Raises:
            ValueError: if a context is missing, unexpected or of another size.
        """
        self.sync_with_store()
        return self._distribution(context, path_gradient)

    def _distribution(
        self, context: Tensor | None, path_gradient: bool = False
    ) -> FlowDistribution:
        return FlowDistribution(
            self.base(),
            [*self.transforms(context), self.standardization],
            path_gradient=path_gradient,
        )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Exact log-density (nats) of ``x`` of shape ``(*batch, D)``, shape ``(*batch,)``.

        Raises:
            ValueError: if shapes do not fit, or (while validation is on, as it is by default) a value is NaN.
        """
        self.sync_with_store(lend=False)
        return self._distribution(context).log_prob(x)

    def sample(self, n: int | Sequence[int], context: Tensor | None = None) -> Tensor:
        """Draws without gradient, shape ``(n, *batch, D)`` where batch is the batch shape of the context.

        Args:
            n: how many, or a shape ``S`` of them, for ``(*S, *batch, D)``.
            context: as for a call.
        """
        self.sync_with_store(lend=False)
        return self._distribution(context).sample((n,) if isinstance(n, int) else n)

    def plot(
        self,
        data: Any = None,
        context: Tensor | None = None,
        *,
        num_samples: int = 2000,
        axes: Any = None,
    ) -> Any:
        """Marginals and pairs of draws, over those of data where they are given.

        Args:
            data: rows to lay the flow over, a tensor, an array or a frame of shape ``(n, D)``.
            context: a single one, shape ``(C,)``, where the flow has one.
            num_samples: draws of the flow.
            axes: an ``(n, n)`` array of Axes; a new figure by default.

        Returns:
            The ``(n, n)`` array of Axes for the first n = min(D, 8) dimensions.
        """
        columns = (
            {}
            if data is None
            else {"data": columns_of({"x": as_tensor(data).detach().cpu().double().numpy()})}
        )
        columns["flow"] = columns_of(
            {"x": self.sample(num_samples, context).cpu().double().numpy()}
        )
        names, note = first_variables(list(columns["flow"]))
        reference = None if data is None else "data"
        return draw_panels(columns, names, reference=reference, axes=axes, note=note)

    def standardize(self, data: Any, kind: Literal["diagonal", "full"] = "diagonal") -> Self:
        """Fit shift and scale of the outermost layer to data, so that the flow sees it around 0 with scale 1.

        The layer is part of the density, log-det included, and of ``state_dict`` and param store; it is not learned.

        Args:
            data: a tensor, an array or a frame of shape ``(n, D)``, finite.
            kind: "diagonal" divides each column by its standard deviation; "full" whitens, so that a fresh flow with a
                normal base is the Gaussian of maximum likelihood.

        Returns:
            The flow itself.

        Raises:
            ValueError: if the data is not finite, of another shape, or has no spread.
            TypeError: if an array or a frame holds no numbers.
        """
        self.standardization.fit(as_tensor(data), kind)
        return self
