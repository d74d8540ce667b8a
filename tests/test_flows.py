"""SplineFlow and FlowDistribution: exact densities, shapes, mixings, errors, copies."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flowkit.transforms as T
from pyro_flowkit import FlowDistribution, SplineFlow
from pyro_flowkit.testing import perturb_
from tests.tiny import CONTEXT, TINY, bent, make_flow

# the density


@pytest.mark.parametrize("mixing", ["lu", "permute", None])
@pytest.mark.parametrize("input_dim", [1, 2, 5])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("coupling", [True, False])
def test_fresh_flow_is_its_base(mixing, input_dim: int, context_dim: int, coupling: bool) -> None:
    flow = SplineFlow(input_dim, context_dim, num_transforms=3, mixing=mixing, coupling=coupling)
    context = CONTEXT[:1] if context_dim else None
    x = 4 * torch.rand(50, input_dim) - 2
    expected = dist.Normal(0.0, 1.0).expand([input_dim]).to_event(1).log_prob(x)
    assert (flow.log_prob(x, context) - expected).abs().max() <= 2e-5
    mapped = x
    for transform in flow.transforms(context):
        mapped = transform(mapped)
    assert (mapped - x).abs().max() <= 2e-6


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("coupling", [True, False])
def test_density_integrates_to_one(context_dim: int, coupling: bool) -> None:
    flow = bent(2, context_dim, coupling=coupling).double()
    axis = torch.linspace(-9.0, 9.0, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    context = CONTEXT[0].double() if context_dim else None
    with torch.no_grad():
        total = flow.log_prob(grid, context).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("mixing", ["lu", "permute", None])
@pytest.mark.parametrize("input_dim", [2, 5, 8])
@pytest.mark.parametrize("num_transforms", [3, 4])
def test_every_output_depends_on_every_input(mixing, input_dim: int, num_transforms: int) -> None:
    for seed in range(3 if mixing == "permute" else 1):
        flow = SplineFlow(
            input_dim,
            num_transforms=num_transforms,
            hidden_dims=[16],
            count_bins=4,
            mixing=mixing,
            seed=seed,
            activation=torch.nn.Tanh,
        )
        perturb_(flow, 0.5).double()
        z = 0.3 * torch.randn(input_dim, dtype=torch.float64)

        def push(z: Tensor, flow: SplineFlow = flow) -> Tensor:
            for transform in flow.transforms():
                z = transform(z)
            return z

        jacobian = torch.autograd.functional.jacobian(push, z)
        assert (jacobian.abs() > 1e-12).all(), seed
        expected = flow.base().log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
        assert torch.allclose(flow._distribution(None).log_prob(push(z)), expected, atol=1e-9)


def test_permuting_flow_ends_in_the_order_of_its_base() -> None:
    for num_transforms in (1, 2, 5):
        flow = SplineFlow(6, num_transforms=num_transforms, hidden_dims=[4], mixing="permute")
        z = torch.arange(6.0) / 3
        x = z
        for transform in flow.transforms():
            x = transform(x)
        assert torch.allclose(x, z, atol=2e-6)
    permutations = [m.permutation.tolist() for m in flow.modules() if isinstance(m, T.Permute)]
    assert len(permutations) == 3 and list(range(6)) not in permutations


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_rsample_and_log_prob_agrees_with_log_prob(context_dim, dtype, tolerance) -> None:
    flow = bent(3, context_dim, base="conditional_normal" if context_dim else "student_t").to(dtype)
    context = CONTEXT.to(dtype) if context_dim else None
    d = flow(context)
    x, log_prob = d.rsample_and_log_prob((20,))
    assert x.dtype == log_prob.dtype == dtype
    assert (log_prob - flow(context).log_prob(x.detach())).abs().max() < tolerance
    x = d.rsample((20,))
    assert (d.log_prob(x) - d.log_prob(x.detach())).abs().max() < tolerance


def arcs(n: int) -> torch.Tensor:
    t = math.pi * torch.rand(n)
    return torch.stack([t.cos(), t.sin()], -1) + 0.05 * torch.randn(n, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-9)])
def test_trained_flow_goes_there_and_back(dtype, tolerance) -> None:
    flow = make_flow(2, num_transforms=6, hidden_dims=[16], bound=3.0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    before = flow.log_prob(arcs(1000)).mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        (-flow.log_prob(arcs(256)).mean()).backward()
        optimizer.step()
    assert flow.log_prob(arcs(1000)).mean().item() > before + 0.5
    flow.to(dtype)
    layers = flow.transforms()
    with torch.no_grad():
        z = flow().base_dist.sample((2000,))
        x = functools.reduce(lambda value, layer: layer(value), layers, z)
        back = functools.reduce(lambda value, layer: layer.inv(value), reversed(layers), x)
        again = functools.reduce(lambda value, layer: layer(value), layers, back)
    assert (back - z).abs().max() <= tolerance
    assert (again - x).abs().max() <= tolerance


# standardisation


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_standardized_flow_is_the_gaussian_of_maximum_likelihood(kind: str) -> None:
    mixer = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [30.0, 0.0, 9.0]])
    data = torch.randn(500, 3) @ mixer.T + torch.tensor([100.0, -5.0, 0.0])
    flow = make_flow()
    assert flow.standardize(data, kind) is flow
    cov = data.T.cov()
    cov = cov if kind == "full" else cov.diagonal().diag()
    expected = dist.MultivariateNormal(data.mean(0), cov).log_prob(data)
    assert torch.allclose(flow.log_prob(data), expected, atol=2e-3)
    draws = flow.sample(20_000)
    assert torch.allclose(draws.mean(0), data.mean(0), atol=0.05 * data.std(0).max())
    assert not any(p is flow.standardization.loc for p in flow.parameters())
    fresh = make_flow()
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(fresh.log_prob(data), flow.log_prob(data))


BAD_DATA = {
    "nan": torch.tensor([[1.0, 2.0], [float("nan"), 3.0], [0.0, 1.0]]),
    "inf": torch.tensor([[1.0, 2.0], [float("inf"), 3.0], [0.0, 1.0]]),
    "constant": torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 1.0]]),
    "columns": torch.randn(5, 3),
    "vector": torch.randn(2),
    "one row": torch.randn(1, 2),
}


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_standardize_refuses_bad_data_and_leaves_the_flow_alone(name: str, kind: str) -> None:
    flow = make_flow(2)
    with pytest.raises(ValueError, match=r"Expected .* got"):
        flow.standardize(BAD_DATA[name], kind)
    assert torch.equal(flow.standardization.scale_tril, torch.eye(2))
    assert torch.equal(flow.standardization.loc, torch.zeros(2))


def test_standardize_refuses_singular_data_and_unknown_kinds() -> None:
    column = torch.randn(20, 1)
    for dependent in (torch.cat([column, 2 * column], 1), torch.randn(2, 3)):
        with pytest.raises(ValueError, match="singular"):
            make_flow(dependent.shape[1]).standardize(dependent, "full")
    make_flow(2).standardize(torch.cat([column, 2 * column], 1), "diagonal")
    with pytest.raises(ValueError, match="'none'"):
        make_flow(1).standardize(column, "none")


# shapes


@pytest.mark.parametrize("batch", [(), (4,), (2, 4), (0,)])
def test_batch_shapes_without_context(batch: tuple) -> None:
    flow = bent(3)
    d = flow()
    assert d.batch_shape == () and d.event_shape == (3,) and d.event_dim == 1
    assert flow.log_prob(torch.zeros(*batch, 3)).shape == batch
    x = d.rsample(batch)
    assert x.shape == (*batch, 3) and d.log_prob(x).shape == batch


@pytest.mark.parametrize("base", ["normal", "conditional_normal", "student_t"])
@pytest.mark.parametrize("batch", [(), (5,), (2, 1)])
def test_context_batch_becomes_the_batch_shape(base: str, batch: tuple) -> None:
    flow = bent(3, 2, base=base)
    context = torch.randn(*batch, 2)
    d = flow(context)
    assert d.batch_shape == batch and d.event_shape == (3,)
    x = d.rsample((7,))
    assert x.shape == (7, *batch, 3) and d.log_prob(x).shape == (7, *batch)
    assert d.log_prob(torch.zeros(3)).shape == batch
    assert flow.sample(4, context).shape == (4, *batch, 3)
    for index in itertools.product(*(range(n) for n in batch)):
        alone = flow.log_prob(x[(slice(None), *index)].detach(), context[index])
        assert torch.allclose(d.log_prob(x.detach())[(slice(None), *index)], alone, atol=1e-4)


def test_conditional_distribution_of_pyro_gets_the_batch_of_the_context() -> None:
    coupling = perturb_(T.conditional_spline_coupling(3, 2, count_bins=4), 0.3)
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    d = dist.ConditionalTransformedDistribution(base, [coupling]).condition(CONTEXT)
    assert d.batch_shape == (5,)
    assert d.sample().shape == (5, 3)


def test_expand_mask_to_event_and_plates() -> None:
    flow = bent(3).double()
    d = flow().expand([2, 5])
    assert isinstance(d, FlowDistribution) and d.batch_shape == (2, 5)
    x = d.rsample()
    assert x.unique(dim=0).shape[0] == 2 and x.shape == (2, 5, 3)
    assert torch.allclose(d.log_prob(x), flow.log_prob(x), atol=1e-4)
    conditional = bent(3, 2)(CONTEXT).expand([4, 5])
    assert conditional.rsample().shape == (4, 5, 3)
    joint = flow().expand([5]).to_event(1)
    y = joint.rsample((2,))
    assert torch.allclose(joint.log_prob(y), flow.log_prob(y.detach()).sum(-1), atol=1e-4)
    mask = torch.tensor([True, False])
    masked = flow().expand([2]).mask(mask)
    z = masked.rsample()
    assert masked.log_prob(z)[1] == 0 and masked.log_prob(z)[0] != 0
    with pyro.plate("outer", 4, dim=-2), pyro.plate("rows", 5, dim=-1):
        assert pyro.sample("x", bent(3, 2)(CONTEXT)).shape == (4, 5, 3)


def test_transforms_of_others_mix_in() -> None:
    affine = torch.distributions.AffineTransform(torch.tensor([1.0, -2.0, 0.0]), 2.0)
    pyros = dist.transforms.Permute(torch.tensor([2, 0, 1]))
    coupling = perturb_(T.spline_coupling(3, count_bins=4), 0.3)
    parts = [coupling, affine, pyros, torch.distributions.SigmoidTransform()]
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    d = FlowDistribution(base, parts)
    plain = dist.TransformedDistribution(base, parts)
    x, log_prob = d.rsample_and_log_prob((6,))
    assert log_prob.shape == (6,) and d.event_shape == (3,)
    assert torch.allclose(log_prob, plain.log_prob(x.detach()), atol=1e-3)
    assert d.support.check(x.detach()).all()
    assert FlowDistribution(base, coupling).log_prob(torch.zeros(3)).shape == ()
    assert torch.equal(
        FlowDistribution(base, []).log_prob(torch.zeros(3)), base.log_prob(torch.zeros(3))
    )


def test_events_of_two_dimensions() -> None:
    coupling = perturb_(T.spline_coupling(3, count_bins=4), 0.1).double()
    half = torch.distributions.AffineTransform(0.0, 0.5)
    rows = dist.Normal(torch.zeros(4, 3, dtype=torch.float64), 1.0)
    for base, parts in (
        (rows.to_event(2), [coupling]),
        (rows.to_event(1), [half, coupling, torch.distributions.CorrCholeskyTransform()]),
    ):
        d = FlowDistribution(base, parts)
        x, log_prob = d.rsample_and_log_prob((5,))
        expected = dist.TransformedDistribution(base, parts).log_prob(x.detach())
        assert log_prob.shape == expected.shape == (5, *d.batch_shape)
        assert torch.allclose(log_prob, expected, atol=1e-8)
        assert torch.allclose(d.log_prob(x.detach()), expected, atol=1e-8)


def test_support_is_that_of_a_real_vector() -> None:
    support = make_flow()().support
    assert support.event_dim == 1
    assert torch.equal(torch.distributions.biject_to(support)(torch.ones(3)), torch.ones(3))


def test_summaries_come_from_fixed_draws() -> None:
    data = torch.randn(100, 3) * 2 + 5
    d = make_flow().standardize(data)()
    state = torch.get_rng_state()
    assert torch.allclose(d.mean, data.mean(0), atol=1e-4), "antithetic"
    assert torch.allclose(d.variance, data.var(0), rtol=0.05)
    assert torch.equal(d.variance, d.variance)
    assert torch.equal(torch.get_rng_state(), state)


# errors


@pytest.mark.parametrize(
    "settings",
    [
        {"input_dim": 0},
        {"input_dim": 2.0},
        {"context_dim": -1},
        {"num_transforms": 0},
        {"tails": None},
        {"mixing": "random"},
        {"mixing": "lu", "tails": "circular"},
        {"coupling": False, "residual": True},
        {"base": "cauchy"},
        {"base": "conditional_normal"},
        {"base": dist.Normal(torch.zeros(3), 1.0)},
        {"base": dist.Normal(torch.zeros(4), 1.0).to_event(1)},
        {"hidden_dims": []},
        {"count_bins": 5000},
        {"bound": -1.0},
        {"dropout": 1.0},
    ],
)
def test_bad_settings_say_expected_and_got(settings: dict) -> None:
    settings = {"input_dim": 3, **settings}
    with pytest.raises(ValueError, match=r"(?s)[Ee]xpected .*got"):
        SplineFlow(
            settings.pop("input_dim"), settings.pop("context_dim", 0), **{**TINY, **settings}
        )


def test_context_errors_say_expected_and_got() -> None:
    plain, conditional = make_flow(), make_flow(3, 2)
    for action in (
        lambda: plain(CONTEXT),
        lambda: plain.log_prob(torch.zeros(3), CONTEXT),
        lambda: plain.sample(2, CONTEXT),
        lambda: conditional(),
        lambda: conditional.sample(2),
        lambda: conditional.log_prob(torch.zeros(3)),
        lambda: conditional(torch.zeros(5, 3)),
        lambda: conditional(torch.tensor(1.0)),
    ):
        with pytest.raises(ValueError, match=r"Expected .*context.* got"):
            action()


def test_data_errors() -> None:
    flow = make_flow()
    with pytest.raises(ValueError, match="3"):
        flow.log_prob(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="3"):
        flow.log_prob(torch.tensor(0.0))
    with pytest.raises(ValueError, match="nan"):
        flow.log_prob(torch.tensor([0.0, float("nan"), 0.0]))


# circular


@pytest.mark.parametrize("mixing", ["permute", None])
def test_circular_flow_is_periodic_and_stays_in_its_box(mixing) -> None:
    flow = make_flow(
        2,
        tails="circular",
        mixing=mixing,
        bound=math.pi,
        base=dist.Uniform(-math.pi * torch.ones(2), math.pi * torch.ones(2)).to_event(1),
    )
    perturb_(flow, 0.3)
    x = flow.sample(500)
    assert x.abs().max() <= math.pi + 1e-5
    low, high = torch.tensor([-math.pi, 0.3]), torch.tensor([math.pi, 0.3])
    low, high = low + torch.tensor([1e-5, 0]), high - torch.tensor([1e-5, 0])
    assert torch.allclose(flow.log_prob(low), flow.log_prob(high), atol=1e-2)
    axis = -math.pi + 2 * math.pi * (torch.arange(400) + 0.5) / 400
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = flow.log_prob(grid).exp().mean() * (2 * math.pi) ** 2
    assert float(total) == pytest.approx(1.0, abs=0.01)
