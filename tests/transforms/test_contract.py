"""Every transform, and the inverse of each, goes through the conformance kit."""

import pytest
import torch

import pyro_flowkit.transforms as T
from pyro_flowkit.testing import CHECKS, SPLINE_CHECKS, check_transform
from pyro_flowkit.transforms.affine import Affine
from pyro_flowkit.transforms.hierarchical_affine import HierarchicalAffine


def restarted() -> Affine:
    affine = Affine(torch.zeros(3), 1.0)
    scale = torch.tensor([[0.5, 0.0, 0.0], [1.0, 2.0, 0.0], [-0.3, 0.2, 0.8]])
    affine.restart(torch.tensor([1.0, -2.0, 0.5]), scale)
    return affine


def standardization(kind):
    transform = T.Standardization(3)
    data = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    transform.fit(
        data @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.5]]) + 1.0, kind
    )
    return transform


# One layer of splines: the constructor, then what the kit should know about it.
SPLINE_LAYERS = {
    "spline": (lambda: T.spline(3), {"bound": 3.0}),
    "spline, 1-d": (lambda: T.spline(1, 4, 2.0), {"bound": 2.0}),
    "spline, circular": (
        lambda: T.spline(2, bound=torch.pi, tails="circular"),
        {"bound": torch.pi, "tails": "circular"},
    ),
    "spline, no tails": (lambda: T.spline(2, tails=None), {"bound": 3.0, "tails": None}),
    "conditional_spline": (lambda: T.conditional_spline(2, 3), {"bound": 3.0}),
    "spline_coupling": (lambda: T.spline_coupling(5), {"bound": 3.0}),
    "spline_coupling, 1-d": (lambda: T.spline_coupling(1), {"bound": 3.0}),
    "spline_coupling, 2-d, 16 bins": (lambda: T.spline_coupling(2, count_bins=16), {"bound": 3.0}),
    "spline_coupling, identity": (lambda: T.spline_coupling(3, identity=True), {"bound": 3.0}),
    "spline_coupling, mask": (
        lambda: T.spline_coupling(4, mask=torch.tensor([False, True, False, True]), bound=5.0),
        {"bound": 5.0},
    ),
    "spline_coupling, residual": (
        lambda: T.spline_coupling(3, 2, [8, 8], residual=True, activation=torch.tanh),
        {"bound": 3.0},
    ),
    "spline_coupling, circular": (
        lambda: T.spline_coupling(3, tails="circular"),
        {"bound": 3.0, "tails": "circular"},
    ),
    "spline_coupling, no tails": (
        lambda: T.spline_coupling(2, tails=None),
        {"bound": 3.0, "tails": None},
    ),
    "spline_autoregressive": (
        lambda: T.spline_autoregressive(3, [8], permutation=torch.tensor([1, 2, 0])),
        {"bound": 3.0},
    ),
    "spline_autoregressive, 1-d": (lambda: T.spline_autoregressive(1), {"bound": 3.0}),
    "spline_autoregressive, circular": (
        lambda: T.spline_autoregressive(3, [8], tails="circular"),
        {"bound": 3.0, "tails": "circular"},
    ),
    "spline_autoregressive, no tails": (
        lambda: T.spline_autoregressive(2, [8], tails=None),
        {"bound": 3.0, "tails": None},
    ),
    "conditional_spline_autoregressive": (
        lambda: T.conditional_spline_autoregressive(3, 2, [8]),
        {"bound": 3.0},
    ),
    "conditional_spline_autoregressive, 1-d": (
        lambda: T.conditional_spline_autoregressive(1, 2),
        {"bound": 3.0},
    ),
    "conditional_spline_coupling": (  # a wider network makes large noise in its weights larger still
        lambda: T.conditional_spline_coupling(3, 2, hidden_dims=[8]),
        {"bound": 3.0},
    ),
    "conditional_spline_coupling, 1-d": (
        lambda: T.conditional_spline_coupling(1, 2),
        {"bound": 3.0},
    ),
    "conditional_spline_coupling, residual": (
        lambda: T.conditional_spline_coupling(2, 1, None, [8], residual=True),
        {"bound": 3.0},
    ),
}

# A whole stack or a linear layer.
OTHERS = {
    "iterated": (lambda: T.iterated(3, T.spline_coupling, 4, hidden_dims=[8]), {}),
    "iterated, conditional": (
        lambda: T.iterated(2, T.conditional_spline_coupling, 2, 3, hidden_dims=[8]),
        {},
    ),
    "compose, conditional": (
        lambda: T.ConditionalCompose(
            [T.permute(3), T.conditional_spline_coupling(3, 2), T.lu_linear(3)], 2
        ),
        {},
    ),
    "lu_linear": (lambda: T.lu_linear(5), {}),
    "act_norm": (lambda: T.act_norm(5), {}),
    "permute": (lambda: T.permute(5), {}),
    "Affine, full": (lambda: Affine(torch.tensor([1.0, -2.0, 0.5]), 0.7, rate=1.0), {}),
    "Affine, diagonal": (lambda: Affine(torch.zeros(2), 1.0, "diagonal", rate=2.0), {}),
    "Affine, low rank": (lambda: Affine(torch.zeros(10), 1.0, "low_rank", rate=1.0), {}),
    "Affine, restarted": (restarted, {}),
    "HierarchicalAffine": (lambda: HierarchicalAffine([1, 2, 1], hidden_dims=[8]), {}),
    "HierarchicalAffine, no linear part": (
        lambda: HierarchicalAffine([101, 100], hidden_dims=[4]),
        {},
    ),
    "Standardization, diagonal": (lambda: standardization("diagonal"), {}),
    "Standardization, full": (lambda: standardization("full"), {}),
}

# These are not the identity, by construction.
NOT_IDENTITY = {
    "compose, conditional",
    "permute",
    "Affine, full",
    "Affine, restarted",
    "Standardization, diagonal",
    "Standardization, full",
}

# A compilation takes seconds; these run nearly all the code there is.
COMPILED = {
    "conditional_spline_autoregressive",
    "spline, circular",
    "compose, conditional",
    "Affine, full",
}

# One of each kind of transform: these go through every check, and so do their inverses. Variants of a
# kind go through the checks of the map itself and of the distribution that it makes.
KINDS = {
    "spline",
    "spline, no tails",
    "conditional_spline",
    "spline_coupling",
    "conditional_spline_coupling",
    "spline_autoregressive",
    "conditional_spline_autoregressive",
    "iterated, conditional",
    "lu_linear",
    "act_norm",
    "permute",
    "Affine, full",
    "HierarchicalAffine",
    "Standardization, full",
}
OF_VARIANTS = {name for name, check in CHECKS.items() if check.__module__.endswith("bijection")} | {
    "distribution"
}
# Of an inverse: what its own class adds. (Its log_prob runs the conditioner twice: only what an inverse
# call returns carries a log-det, and the inverse of an inverse is the forward call.)
OF_INVERSES = {
    "round_trip",
    "log_det",
    "shapes",
    "context",
    "input_errors",
    "nan",
    "deepcopy",
    "pickle",
    "state_dict",
    "param_store",
    "with_cache",
    "pyro_module",
    "distribution",
}


def cases():
    for name, (constructor, options) in {**SPLINE_LAYERS, **OTHERS}.items():
        checks = set(CHECKS if name in KINDS else OF_VARIANTS)
        if name in OTHERS:
            checks -= SPLINE_CHECKS
        if name in NOT_IDENTITY:
            checks -= {"identity_at_init"}
        checks -= {"compile", "jit_trace"}
        if name in COMPILED:
            checks |= {"compile", "jit_trace"}
        for check in sorted(checks):
            yield pytest.param(constructor, options, check, id=f"{name}-{check}")
        if name in KINDS:
            inverse = inverted(constructor)
            for check in sorted(OF_INVERSES):
                yield pytest.param(inverse, options, check, id=f"{name}.inv-{check}")


def inverted(constructor):
    return lambda: constructor().inv


@pytest.mark.parametrize(("constructor", "options", "check"), list(cases()))
def test_contract(constructor, options, check):
    check_transform(constructor, only=[check], **options)


PAIRS = {
    "spline": (lambda: T.spline(3), lambda: T.conditional_spline(3, 2)),
    "coupling": (lambda: T.spline_coupling(3), lambda: T.conditional_spline_coupling(3, 2)),
    "autoregressive": (
        lambda: T.spline_autoregressive(3),
        lambda: T.conditional_spline_autoregressive(3, 2),
    ),
    "composition": (
        lambda: T.Compose([T.spline_coupling(3), T.permute(3)]),
        lambda: T.ConditionalCompose([T.conditional_spline_coupling(3, 2), T.permute(3)], 2),
    ),
}


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_context_is_taken_just_where_there_is_one(kind, inverted):
    plain, conditional = (make() for make in PAIRS[kind])
    if inverted:
        plain, conditional = plain.inv, conditional.inv
    x, context = torch.zeros(5, 3), torch.zeros(5, 2)
    for method in ("call_and_ladj", "inverse_and_ladj", "call_and_event_ladj"):
        with pytest.raises(ValueError, match=r"Expected no context for \w+ \(context_dim=0\), got"):
            getattr(plain, method)(x, context)
        with pytest.raises(ValueError, match=r"Expected a context of shape \(\*batch, 2\) for"):
            getattr(conditional, method)(x)
        assert getattr(plain, method)(x)[0].shape == (5, 3)
        assert getattr(conditional, method)(x, context=context)[0].shape == (5, 3)
