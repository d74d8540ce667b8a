"""Pyro's transforms, with this package's in the place of those that it improves.

Names, argument order and defaults follow ``pyro.distributions.transforms``, so that a program changes its import and
nothing else::

    import pyro_flowkit.transforms as T

Ours: ``spline``, ``conditional_spline``, ``spline_coupling``, ``conditional_spline_coupling``,
``spline_autoregressive``, ``conditional_spline_autoregressive``, ``lu_linear``, ``permute``, ``act_norm``, ``iterated``
and their classes. Every other name is Pyro's, unchanged.
"""

import pyro.distributions.transforms as _pyro_transforms
from pyro.distributions.transforms import *  # noqa: F403

from pyro_flowkit.transforms.act_norm import ActNorm, act_norm
from pyro_flowkit.transforms.autoregressive import (
    ConditionalSplineAutoregressive,
    SplineAutoregressive,
    conditional_spline_autoregressive,
    spline_autoregressive,
)
from pyro_flowkit.transforms.base import (
    Bijection,
    FlowTransformModule,
)
from pyro_flowkit.transforms.compose import Compose, ConditionalCompose, iterated
from pyro_flowkit.transforms.conditional import (
    ConditionalFlowTransformModule,
)
from pyro_flowkit.transforms.coupling import (
    ConditionalSplineCoupling,
    SplineCoupling,
    conditional_spline_coupling,
    spline_coupling,
)
from pyro_flowkit.transforms.linear import LULinear, Standardization, lu_linear
from pyro_flowkit.transforms.permute import Permute, permute
from pyro_flowkit.transforms.spline import (
    ConditionalSpline,
    Spline,
    conditional_spline,
    spline,
)

__all__ = [
    "ActNorm",
    "Bijection",
    "Compose",
    "ConditionalCompose",
    "ConditionalFlowTransformModule",
    "ConditionalSpline",
    "ConditionalSplineAutoregressive",
    "ConditionalSplineCoupling",
    "FlowTransformModule",
    "LULinear",
    "Permute",
    "Spline",
    "SplineAutoregressive",
    "SplineCoupling",
    "Standardization",
    "act_norm",
    "conditional_spline",
    "conditional_spline_autoregressive",
    "conditional_spline_coupling",
    "iterated",
    "lu_linear",
    "permute",
    "spline",
    "spline_autoregressive",
    "spline_coupling",
]
__all__ += [name for name in _pyro_transforms.__all__ if name not in __all__]
