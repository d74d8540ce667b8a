"""What the parts of :class:`~pyro_flowkit.guides.AmortizedSplineFlow` know of it: one list of what it holds."""

from collections.abc import Callable
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.guides.data_plate import PlateCall
from pyro_flowkit.guides.lazy import LazyGuide
from pyro_flowkit.guides.local_latents import Latents
from pyro_flowkit.guides.masked_rows import MaskedRows
from pyro_flowkit.moves import StridingModule
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine


class AmortizedParts(LazyGuide, AutoGuide, StridingModule):
    """A guide for local latents: its constructor and its setup fill in what is declared here."""

    encoder: nn.Module | None
    context_dim: int
    condition_on_global: bool
    global_guide: Any
    init_loc_fn: Callable[[dict], Tensor]
    init_scale: float
    path_gradient: bool
    flow: SplineFlow
    affine: ConditionalAffine
    masked_loc: Tensor
    plates: dict[str, pyro.plate]
    _plain_model: tuple[Any]  # the model, or None where the guide was unpickled
    _encoder_function: tuple[Callable[..., Tensor] | None]
    _early_conversions: list[Callable[[Tensor], Tensor]]
    _first_values: dict[str, Tensor]
    _masked: MaskedRows
    _plate: str
    _dim: int
    _local: Latents
    _global: Latents
    _prototype_call: PlateCall
    _prototype_frames: dict[str, Any]
    _lead: Callable[[], None]
    _encode: Callable[[tuple, dict], Tensor]
    _posterior: Callable[[Tensor, Tensor | None], FlowDistribution]
