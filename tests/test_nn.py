"""Conditioners: zero at first, broadcasting contexts, and errors that say what was expected."""

import pytest
import torch
from torch import nn

from pyro_flowkit.nn import MLP, Constant, ResidualNetwork, default_hidden_dims, make_conditioner

NETWORKS = [MLP, ResidualNetwork]


def randomised(network):
    nn.init.normal_(network.output.weight)
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
