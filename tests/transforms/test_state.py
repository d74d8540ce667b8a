"""What a transform remembers (its parameters and buffers), and what it must not (anything else)."""

import copy
import gc
import io
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowkit.transforms as T
from pyro_flowkit.testing import perturb_


def standard_normal(input_dim):
    return dist.Normal(torch.zeros(input_dim), torch.ones(input_dim)).to_event(1)


def stack(seed):
    layers = [T.spline_coupling(4), T.permute(4, seed=seed), T.spline_coupling(4), T.lu_linear(4)]
    return perturb_(T.Compose(layers), 0.3, seed)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_state_dict_carries_random_permutations():
    a, b = stack(0), stack(1)
    x = torch.randn(5, 4)
    assert not torch.allclose(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
    assert torch.equal(a.inv(x), b.inv(x))


def test_a_module_of_inverses_trains():
    transform = T.spline_coupling(4)
    module = T.ComposeTransformModule([transform.inv])
    assert {id(p) for p in module.parameters()} == {id(p) for p in transform.parameters()}
    d = dist.TransformedDistribution(standard_normal(4), list(module.parts))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    x = 2.0 * torch.randn(100, 4)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -d.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_log_prob_follows_a_change_of_weights():
    transform = perturb_(T.spline_coupling(4), 0.3)
    d = dist.TransformedDistribution(standard_normal(4), [transform])
    x = d.sample((5,))
    before = d.log_prob(x)
    perturb_(transform, 0.3, 1)
    after = d.log_prob(x)
    assert not torch.allclose(before, after)
    fresh = dist.TransformedDistribution(standard_normal(4), [transform])
    assert torch.equal(after, fresh.log_prob(x))


def test_log_prob_of_a_sample_trains_the_flow():
    transform = perturb_(T.spline_coupling(4), 0.3)
    d = dist.TransformedDistribution(standard_normal(4), [transform])
    x = d.sample((50,))
    d.log_prob(x).mean().backward()
    got = [p.grad.clone() for p in transform.parameters()]
    transform.zero_grad()
    z, ladj = transform.inverse_and_ladj(x)
    (standard_normal(4).log_prob(z) + ladj).mean().backward()
    for gradient, parameter in zip(got, transform.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    assert sum(gradient.abs().sum() for gradient in got) > 0


def test_an_observed_flow_takes_many_svi_steps():
    transform = T.spline_coupling(2)
    data = torch.randn(20, 2)

    def model():
        pyro.module("flow", transform)
        d = dist.TransformedDistribution(standard_normal(2), [transform])
        with pyro.plate("data", 20):
            pyro.sample("x", d, obs=data)

    optimizer = pyro.optim.Adam({"lr": 1e-2})
    svi = pyro.infer.SVI(model, lambda: None, optimizer, pyro.infer.Trace_ELBO())
    losses = [svi.step() for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layers", [1, 3])
def test_log_prob_runs_each_conditioner_once(layers):
    transforms = [perturb_(T.spline_coupling(4)) for _ in range(layers)]
    calls = [count_calls(t.conditioner) for t in transforms]
    d = dist.TransformedDistribution(standard_normal(4), transforms)
    d.log_prob(torch.randn(5, 4))
    assert [len(c) for c in calls] == [1] * layers


def test_conditional_log_prob_runs_the_conditioner_once():
    transform = perturb_(T.conditional_spline_coupling(4, 2))
    calls = count_calls(transform.conditioner)
    d = dist.ConditionalTransformedDistribution(standard_normal(4), [transform])
    d.condition(torch.randn(5, 2)).log_prob(torch.randn(5, 4))
    assert len(calls) == 1


def test_composed_log_prob_runs_each_conditioner_once():
    transform = perturb_(T.iterated(3, T.spline_coupling, 4))
    calls = [count_calls(part.conditioner) for part in transform.parts]
    d = dist.TransformedDistribution(standard_normal(4), [transform])
    d.log_prob(torch.randn(5, 4))
    assert [len(c) for c in calls] == [1, 1, 1]


def test_the_log_det_that_travels_is_used_once_and_only_while_it_holds():
    transform = perturb_(T.spline_coupling(4), 0.3)
    calls = count_calls(transform.conditioner)
    y = torch.randn(5, 4)

    def calls_for_the_log_det(between=lambda x: x, value=y):
        x = transform.inv(y)
        x = between(x)
        before = len(calls)
        ladj = transform.log_abs_det_jacobian(x, value)
        fresh = transform.call_and_ladj(x)[1]
        torch.testing.assert_close(ladj, fresh)
        return len(calls) - before - 1

    assert calls_for_the_log_det() == 0
    assert calls_for_the_log_det(lambda x: (transform.log_abs_det_jacobian(x, y), x)[1]) == 1
    assert calls_for_the_log_det(lambda x: (perturb_(transform), x)[1]) == 1
    assert calls_for_the_log_det(lambda x: x.clone()) == 1
    assert calls_for_the_log_det(value=y.clone()) == 1


def test_a_log_det_computed_without_gradients_is_not_used_with_them():
    transform = perturb_(T.spline_coupling(4), 0.3)
    y = torch.randn(5, 4)
    with torch.no_grad():
        x = transform.inv(y)
    assert transform.log_abs_det_jacobian(x, y).requires_grad


def test_the_log_det_that_travels_is_neither_saved_nor_copied():
    transform = perturb_(T.spline_coupling(4))
    y = torch.randn(5, 4)
    with torch.no_grad():
        x = transform.inv(y)
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded, x)
    for other in (loaded, copy.deepcopy(x)):
        expected = transform.call_and_ladj(other)[1]
        assert torch.equal(transform.log_abs_det_jacobian(other, y), expected)
    bare = io.BytesIO()
    torch.save(x.clone(), bare)
    assert len(buffer.getvalue()) < len(bare.getvalue()) + 1000


def test_a_transform_and_its_results_keep_nothing_alive():
    transform = perturb_(T.spline_coupling(4))
    y = torch.randn(5, 4)
    x = transform.inv(y)
    watched = [weakref.ref(y), weakref.ref(x)]
    del x, y
    gc.collect()
    assert [w() for w in watched] == [None, None]
    x = transform.inv(torch.randn(5, 4))
    watched = weakref.ref(transform)
    x = x.detach()
    del transform
    gc.collect()
    assert watched() is None


def test_a_context_batch_becomes_the_batch_shape():
    transform = perturb_(T.conditional_spline_coupling(3, 2))
    d = dist.ConditionalTransformedDistribution(standard_normal(3), [transform])
    conditioned = d.condition(torch.randn(5, 2))
    assert conditioned.batch_shape == (5,)
    assert conditioned.sample().shape == (5, 3)
    assert conditioned.sample((7,)).shape == (7, 5, 3)
    assert conditioned.log_prob(torch.randn(7, 5, 3)).shape == (7, 5)


def test_double_survives_every_copy():
    transform = perturb_(T.iterated(2, T.spline_coupling, 3)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert transform(x).dtype == copy.deepcopy(transform)(x).dtype == torch.float64


def train(transform, dtype, steps=25):
    """A few steps of maximum likelihood on two moons."""
    transform = transform.to(dtype)
    generator = torch.Generator().manual_seed(0)
    t = torch.pi * torch.rand(256, generator=generator)
    side = torch.rand(256, generator=generator) < 0.5
    upper = torch.stack([t.cos(), t.sin()], -1)
    lower = torch.stack([1 - t.cos(), 0.5 - t.sin()], -1)
    data = torch.where(side[:, None], upper, lower)
    data = (data - torch.tensor([0.5, 0.25])) / torch.tensor([0.9, 0.5])
    data = (data + 0.05 * torch.randn(256, 2, generator=generator)).to(dtype)
    base = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
    d = dist.TransformedDistribution(base, [transform])
    optimizer = torch.optim.Adam(transform.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -d.log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    return d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trained_flow_comes_back_from_its_own_samples(dtype):
    """Each row to a few roundings of x, carried back: where the flow squeezes a thousandfold, those count a
    thousandfold. What training found there differs between processors, this bound does not."""
    transform = T.iterated(6, T.spline_coupling, 2, hidden_dims=[32])
    train(transform, dtype)
    with torch.no_grad():
        z = torch.randn(2000, 2).to(dtype)
        x, ladj = transform.call_and_ladj(z)
    x.requires_grad_()
    back, inverse_ladj = transform.inverse_and_ladj(x)
    jacobian = torch.stack(
        [torch.autograd.grad(z.sum(), x, retain_graph=True)[0] for z in back.unbind(-1)], -2
    )
    rounding = torch.finfo(dtype).eps * torch.linalg.matrix_norm(jacobian, 2).clamp(min=1)
    assert ((back - z).abs().amax(-1) / rounding).max() <= 60
    assert ((ladj + inverse_ladj).abs() / rounding).max() <= 400


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(torch.float32, 0.1, 2e-5), (torch.float64, 0.5, 1e-9)],  # steeper where rounding is finer
)
def test_the_log_density_is_continuous_across_the_bound(dtype, scale, tolerance):
    transform = perturb_(T.spline_coupling(2), scale).to(dtype)
    base = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
    d = dist.TransformedDistribution(base, [transform])
    edge = torch.tensor(3.0, dtype=dtype)
    for i in range(2):
        x = torch.zeros(3, 2, dtype=dtype)
        x[:, i] = torch.stack(
            [torch.nextafter(edge, edge * 0), edge, torch.nextafter(edge, 2 * edge)]
        )
        log_prob = d.log_prob(x)
        assert log_prob.max() - log_prob.min() <= tolerance
