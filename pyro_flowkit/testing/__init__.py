r"""A conformance kit: what a transform of this package promises, as checks for anyone's transform.

A transform maps a base to a sample (forward) and must be, at once, a correct bijection,

.. math::

    f^{-1}(f(x)) = x, \qquad \log|\det df/dx| = -\log|\det df^{-1}/dy|,

with the log-det of the Jacobian that autograd finds, and at home in PyTorch and Pyro. Name the
constructors, then let pytest cross them with the checks::

    from pyro_flowkit.testing import CHECKS, check_transform

    TRANSFORMS = {"mine": lambda: MyCoupling(5), "linear": lambda: MyLinear(5)}

    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_contract(name, check):
        check_transform(TRANSFORMS[name], only=[check])

A transform here is a ``TransformModule`` with an attribute ``input_dim``, or a module that has
``condition(context)`` and an attribute ``context_dim`` too. Every check takes a transform, leaves
its parameters as they were (not their gradients), and raises AssertionError with the numbers.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch

from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.testing.behaviour import (
    check_compile,
    check_conditioner_runs_once,
    check_deepcopy,
    check_distribution,
    check_double_backward,
    check_function_transforms,
    check_inverse_module,
    check_jit_trace,
    check_param_store,
    check_pickle,
    check_pyro_module,
    check_state_dict,
    check_with_cache,
)
from pyro_flowkit.testing.bijection import (
    check_context,
    check_dtypes,
    check_edges,
    check_extreme_parameters,
    check_far,
    check_identity_at_init,
    check_infinite,
    check_input_errors,
    check_log_det,
    check_monotone,
    check_nan,
    check_pushed_derivative,
    check_round_trip,
    check_shapes,
    check_slope_at_bounds,
)
from pyro_flowkit.testing.support import perturb_, sample_context, sample_points

#: The checks of any transform, then those of one layer of splines.
CHECKS: dict[str, Callable[..., None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_round_trip,
        check_log_det,
        check_pushed_derivative,
        check_identity_at_init,
        check_shapes,
        check_context,
        check_input_errors,
        check_dtypes,
        check_far,
        check_nan,
        check_function_transforms,
        check_double_backward,
        check_compile,
        check_jit_trace,
        check_deepcopy,
        check_pickle,
        check_state_dict,
        check_param_store,
        check_with_cache,
        check_pyro_module,
        check_inverse_module,
        check_distribution,
        check_conditioner_runs_once,
        check_monotone,
        check_edges,
        check_slope_at_bounds,
        check_infinite,
        check_extreme_parameters,
    )
}

#: Names of the checks of one layer of splines: they need to know its ``bound``.
SPLINE_CHECKS = frozenset(
    name for name, check in CHECKS.items() if "bound" in inspect.signature(check).parameters
)

__all__ = [
    "CHECKS",
    "SPLINE_CHECKS",
    *sorted(check.__name__ for check in CHECKS.values()),
    "check_transform",
    "perturb_",
    "sample_context",
    "sample_points",
]


def check_transform(
    constructor: Callable[[], Any],
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    perturbation: float = 0.1,
    **options: Any,
) -> None:
    """Put one transform through the checks, each with a fresh and perturbed instance.

    Args:
        constructor: makes the transform, with the same architecture each time.
        only: names of the checks to run; None is all of :data:`CHECKS`.
        skip: names of the checks to leave out, such as "identity_at_init" for a permutation.
        perturbation: standard deviation of the noise on the parameters ("identity_at_init" runs
            without any).
        **options: passed to the checks that have an argument of that name. ``bound`` and ``tails``
            describe one layer of splines (element-wise or coupling); without a ``bound``,
            :data:`SPLINE_CHECKS` are left out.

    Raises:
        AssertionError: from the first check that fails, with its numbers.
        ValueError: for a check or an option that does not exist.
    """
    known = {name for check in CHECKS.values() for name in inspect.signature(check).parameters}
    for kind, given, existing in (
        ("check", {*(only or ()), *skip}, set(CHECKS)),
        ("option", set(options), known - {"transform"}),
    ):
        unknown = sorted(given - existing)
        if unknown:
            raise ValueError(
                f"Expected each {kind} to be one of {sorted(existing)}, got {unknown}."
            )
    for name, check in CHECKS.items():
        chosen = (only is None or name in only) and name not in skip
        if not chosen or (name in SPLINE_CHECKS and "bound" not in options):
            continue
        accepted = inspect.signature(check).parameters
        with fixed_seed(torch.device("cpu")):
            transform = constructor()
            if name != "identity_at_init":
                perturb_(transform, perturbation)
            check(transform, **{key: options[key] for key in options if key in accepted})
