"""Act norm: it starts at the first data that it is trained on, once, wherever it was saved in between."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowkit.transforms as T
from pyro_flowkit import FlowDistribution


def data(seed=0, loc=10.0, scale=4.0):
    return loc + scale * torch.randn(200, 2, generator=torch.Generator().manual_seed(seed))


def standardized(x):
    mean, deviation = x.mean(0), x.std(0, correction=0)
    return torch.allclose(mean, torch.zeros(2), atol=1e-5) and torch.allclose(
        deviation, torch.ones(2), atol=1e-5
    )


def started():
    layer = T.act_norm(2)
    layer.inverse_and_ladj(data())
    return layer


def test_the_first_batch_leaves_the_inverse_standardized():
    layer, y = T.act_norm(2), data()
    assert torch.equal(layer(y[:3]).detach(), y[:3])
    layer = T.act_norm(2)
    x, ladj = layer.inverse_and_ladj(y)
    assert standardized(x)
    torch.testing.assert_close(ladj, -y.std(0, correction=0).log().sum().expand(200))
    torch.testing.assert_close(layer(x), y)
    ladj.sum().backward()
    assert layer.log_scale.grad is not None


def test_the_layers_of_a_flow_start_with_what_reaches_them():
    layers = [T.act_norm(2), T.lu_linear(2), T.act_norm(2)]
    with torch.no_grad():
        layers[1].lu.fill_(0.5)
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    FlowDistribution(base, layers).log_prob(data())
    x = data()
    for layer in reversed(layers):
        x = layer.inv(x)
        if isinstance(layer, T.ActNorm):
            assert standardized(x.detach())


def through_state_dict(layer):
    other = T.act_norm(2)
    other.load_state_dict(layer.state_dict())
    return other


def through_param_store(layer):
    pyro.clear_param_store()
    pyro.module("layer", layer)
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    return pyro.module("layer", T.act_norm(2), update_module_params=True)


@pytest.mark.parametrize(
    "save_and_load",
    [
        through_state_dict,
        through_param_store,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
    ],
    ids=["state_dict", "param store", "deepcopy", "pickle"],
)
def test_a_layer_that_has_started_does_not_start_again(save_and_load):
    layer = started()
    other = save_and_load(layer)
    for module in (layer, other):
        x, _ = module.inverse_and_ladj(data(1, loc=-3.0, scale=0.1))
        assert not standardized(x)
        assert torch.equal(module.loc, layer.loc)
        assert torch.equal(module.log_scale, layer.log_scale)


def test_a_fresh_state_starts_again_after_it_was_loaded():
    layer = started()
    layer.load_state_dict(T.act_norm(2).state_dict())
    assert standardized(layer.inverse_and_ladj(data(1))[0])


def no_grad(layer, y):
    with torch.no_grad():
        layer.inverse_and_ladj(y)


def frozen(layer, y):
    layer.loc.requires_grad_(False)
    layer.inverse_and_ladj(y)


def after_a_draw(layer, y):
    layer.call_and_ladj(y)
    layer.inverse_and_ladj(y)


@pytest.mark.parametrize(
    "call",
    [
        no_grad,
        frozen,
        after_a_draw,
        lambda layer, y: layer.eval().inverse_and_ladj(y),
        lambda layer, y: layer.inverse_and_ladj(y[:1]),
        lambda layer, y: layer.inverse_and_ladj(y[:0]),
        lambda layer, y: layer.inverse_and_ladj(torch.ones(5, 2)),
        lambda layer, y: layer.inverse_and_ladj(y.masked_fill(y > 12, torch.inf)),
        lambda layer, y: torch.func.vmap(layer.inverse_and_ladj)(y),
    ],
    ids=["no grad", "frozen", "draws", "eval", "one row", "empty", "constant", "inf", "vmap"],
)
def test_what_is_no_training_data_leaves_the_identity(call):
    layer = T.act_norm(2)
    call(layer, data())
    assert not layer.loc.any() and not layer.log_scale.any()


def test_a_column_that_does_not_vary_is_only_shifted():
    layer, y = T.act_norm(2), data()
    y[:, 1] = 7.0
    x, _ = layer.inverse_and_ladj(y)
    assert torch.equal(x[:, 1].detach(), torch.zeros(200))
    assert layer.log_scale[1] == 0.0


def test_float16_data_far_away_start_it():
    layer = T.act_norm(2)
    x, ladj = layer.inverse_and_ladj(data(loc=500.0).half())
    assert x.dtype == ladj.dtype == torch.float16
    torch.testing.assert_close(x.float().std(0), torch.ones(2), atol=0.05, rtol=0.0)
