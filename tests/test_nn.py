"""Conditioners: zero at first, broadcasting contexts, and errors that say what was expected."""

import copy

import pytest
import torch
from torch import nn

from pyro_flowkit.nn import MLP, Constant, ResidualNetwork, default_hidden_dims, make_conditioner

NETWORKS = [MLP, ResidualNetwork]


def randomised(network):
    weight, _ = network.layers()[-1]
    with torch.no_grad():
        weight.normal_()
    return network


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_fresh_output_is_zero(network, context_dim):
    conditioner = network(3, 5, [8, 8], context_dim=context_dim)
    context = torch.randn(4, 2) if context_dim else None
    output = conditioner(torch.randn(4, 3), context)
    assert torch.equal(output, torch.zeros(4, 5))


@pytest.mark.parametrize("network", NETWORKS)
def test_all_parameters_get_a_gradient_once_the_output_is_not_zero(network):
    conditioner = randomised(network(3, 5, [8, 8], context_dim=2))
    conditioner(torch.randn(4, 3), torch.randn(4, 2)).square().sum().backward()
    for name, parameter in conditioner.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("network", NETWORKS)
def test_inputs_and_context_broadcast(network):
    conditioner = randomised(network(3, 5, [8], context_dim=2))
    inputs, context = torch.randn(4, 3), torch.randn(6, 1, 2)
    output = conditioner(inputs, context)
    assert output.shape == (6, 4, 5)
    torch.testing.assert_close(output[2, 3], conditioner(inputs[3], context[2, 0]))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_context_alone_is_enough_and_keeps_its_own_batch(network):
    conditioner = randomised(network(0, 5, [8], context_dim=2))
    assert conditioner(torch.zeros(100, 0), torch.randn(2)).shape == (5,)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_network_runs_in_the_dtype_of_its_weights(network):
    conditioner = randomised(network(3, 5, [8], context_dim=2)).double()
    assert conditioner(torch.randn(4, 3), torch.randn(2)).dtype == torch.float64


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_all_layers_are_in_one_parameter_and_can_be_seen_and_written(network, context_dim):
    conditioner = network(3, 5, [8, 8], context_dim=context_dim)
    (packed,) = conditioner.parameters()
    layers = conditioner.layers()
    assert [weight.shape[0] for weight, _ in layers] == [bias.numel() for _, bias in layers]
    assert packed.numel() == sum(weight.numel() + bias.numel() for weight, bias in layers)
    everything = torch.cat([part.flatten() for layer in layers for part in layer])
    assert torch.equal(everything, packed)
    with torch.no_grad():
        layers[-1][1].fill_(7.0)
    context = torch.randn(4, 2) if context_dim else None
    assert torch.equal(conditioner(torch.randn(4, 3), context), torch.full((4, 5), 7.0))


@pytest.mark.parametrize("network", NETWORKS)
def test_hidden_layers_start_as_those_of_pytorch(network):
    conditioner = network(300, 5, [400, 400])
    for weight, bias in conditioner.layers()[:-1]:
        limit = weight.shape[1] ** -0.5
        for part in (weight, bias):
            assert part.abs().max() <= limit
            assert part.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("network", NETWORKS)
def test_conversion_keeps_layers_and_output(network, dtype):
    conditioner = randomised(network(3, 5, [7, 7], context_dim=2))
    inputs, context = torch.randn(4, 3), torch.randn(4, 2)
    want = conditioner(inputs, context)
    converted = copy.deepcopy(conditioner).to(dtype)
    got = converted(inputs, context)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)
    assert all(part.dtype == dtype for layer in converted.layers() for part in layer)


@pytest.mark.parametrize("network", NETWORKS)
def test_many_networks_of_one_shape_run_in_one_call(network):
    networks = [randomised(network(3, 2, [5, 5])) for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(networks)
    x = torch.randn(6, 3)

    def run(parameters, buffers):
        return torch.func.functional_call(networks[0], (parameters, buffers), (x,))

    got = torch.func.vmap(run)(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([each(x) for each in networks]))


@pytest.mark.parametrize("network", NETWORKS)
def test_second_derivatives_with_respect_to_the_parameters(network):
    conditioner = randomised(network(2, 2, [3, 3], activation=torch.tanh)).double()
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def run(x, packed):
        return torch.func.functional_call(conditioner, {"packed": packed}, (x,))

    assert torch.autograd.gradgradcheck(run, (x, conditioner.packed))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Tanh(), torch.tanh])
def test_activation_may_be_a_class_a_module_or_a_function(network, activation):
    torch.manual_seed(0)
    given = randomised(network(3, 2, [8], activation=activation))
    torch.manual_seed(0)
    default = randomised(network(3, 2, [8]))
    x = torch.randn(4, 3)
    assert not torch.allclose(given(x), default(x))


@pytest.mark.parametrize("network", NETWORKS)
def test_dropout_acts_in_training_only(network):
    conditioner = randomised(network(3, 2, [64], dropout=0.5))
    x = torch.randn(4, 3)
    assert not torch.equal(conditioner(x), conditioner(x))
    conditioner.eval()
    assert torch.equal(conditioner(x), conditioner(x))


def test_nothing_to_condition_on_gives_a_parameter():
    conditioner = make_conditioner(0, 7, [8])
    assert isinstance(conditioner, Constant)
    assert torch.equal(conditioner(torch.zeros(3, 0)), torch.zeros(7))
    assert isinstance(make_conditioner(0, 7, [8], context_dim=1), MLP)
    assert isinstance(make_conditioner(1, 7, [8], residual=True), ResidualNetwork)


def test_default_widths_follow_pyro_up_to_a_cap():
    assert default_hidden_dims(3) == [30, 30]
    assert default_hidden_dims(1000) == [128, 128]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dims": []}, r"hidden_dims .* got \[\]"),
        ({"hidden_dims": [8, 0]}, r"hidden_dims .* got \[8, 0\]"),
        ({"hidden_dims": [8.0]}, r"hidden_dims .* got \[8.0\]"),
        ({"hidden_dims": [8, 16], "residual": True}, r"one width.* got \[8, 16\]"),
        ({"hidden_dims": [8], "dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
        ({"hidden_dims": [8], "activation": "relu"}, "activation .* got 'relu'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_conditioner(2, 3, **options)
