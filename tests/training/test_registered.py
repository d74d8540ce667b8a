"""Modules registered by ``pyro.module`` in plain functions: their buffers and modes belong to the fit."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_flowkit.programs.modules import registered_modules
from pyro_flowkit.training import Callback, FitResult, FitState, fit

Program = Callable[..., Any]


def programs() -> tuple[Program, Program, nn.Module, nn.Module]:
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    decoder = nn.Linear(1, 3)
    bystander = nn.Linear(1, 1)

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", 60, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(decoder(z.unsqueeze(-1)), 0.3).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        bystander(torch.zeros(1))
        with pyro.plate("data", 60, subsample_size=len(x)):
            loc, log_scale = encoder(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return model, guide, encoder, bystander


@pytest.fixture
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(60, 1, generator=generator)
    return latent * torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(60, 3, generator=generator)


def train(model: Program, guide: Program, rows: torch.Tensor, **options: Any) -> FitResult:
    options = {
        "max_steps": 30,
        "batch_size": 20,
        "lr": 0.01,
        "seed": 0,
        "progress": False,
    } | options
    return fit(model, guide, data=rows, **options)


class Stop(Callback):
    def on_step(self, state: FitState) -> None:
        if state.step == 17:
            raise KeyboardInterrupt


def test_modules_train_in_training_mode_and_end_in_eval_mode(rows: torch.Tensor) -> None:
    model, guide, encoder, bystander = programs()
    train(model, guide, rows)
    assert not encoder.training and not encoder[2].training and bystander.training
    moved = encoder[1].running_mean.clone()
    assert float(moved.abs().max()) > 0.01
    train(model, guide, rows)  # which finds them in eval mode
    assert not torch.equal(encoder[1].running_mean, moved)


def test_validation_leaves_dropout_out_and_buffers_alone(rows: torch.Tensor) -> None:
    model, guide, encoder, _ = programs()
    modes = []
    encoder[2].register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_grad_enabled()))
    )
    batches = []
    encoder[1].register_forward_hook(
        lambda module, *_: batches.append(int(module.num_batches_tracked))
    )
    train(model, guide, rows, val_data=rows, check_plates=False)
    in_steps = [mode for mode, has_grad in modes if has_grad]
    assert all(in_steps) and not all(mode for mode, _ in modes)
    assert max(batches) == sum(mode for mode, _ in modes)


def test_an_interrupted_fit_goes_on_bit_for_bit(rows: torch.Tensor, tmp_path: Path) -> None:
    model, guide, encoder, _ = programs()
    whole = train(model, guide, rows)
    uninterrupted = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}

    pyro.clear_param_store()
    model, guide, encoder, _ = programs()
    train(model, guide, rows, checkpoint_dir=tmp_path, callbacks=[Stop()])
    pyro.clear_param_store()
    model, guide, encoder, _ = programs()
    resumed = train(model, guide, rows, checkpoint_dir=tmp_path, resume=True)
    assert resumed.history["elbo"].tolist() == whole.history["elbo"].tolist()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, uninterrupted[name]), name


def test_a_saved_result_has_the_buffers(rows: torch.Tensor, tmp_path: Path) -> None:
    model, guide, encoder, _ = programs()
    train(model, guide, rows).save(tmp_path / "result.pt")
    pyro.clear_param_store()
    model, guide, fresh, _ = programs()
    model(rows)
    guide(rows)
    FitResult.load(tmp_path / "result.pt", model, guide)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name]), name


class Holder:
    """A plain object with networks, and a program that registers one of them."""

    def __init__(self) -> None:
        self.net, self.other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def program(self) -> None:
        pyro.module("net", self.net)


def takes_nets(nets: list[nn.Module]) -> None:
    for number, net in enumerate(nets):
        pyro.module(f"net{number}", net)


def calls_another(net: nn.Module) -> Program:
    def inner() -> None:
        pyro.module("net", net)

    return lambda: inner()


def test_modules_are_found_wherever_a_program_may_hold_them() -> None:
    holder = Holder()
    holder.program()
    assert registered_modules(holder.program, None) == {"net": holder.net}
    scaled = poutine.scale(holder.program, 2.0)
    assert registered_modules(scaled, scaled) == {"net": holder.net}

    pyro.clear_param_store()
    nets = [nn.BatchNorm1d(2), nn.BatchNorm1d(3)]
    program = functools.partial(takes_nets, nets)
    program()
    assert registered_modules(program) == {"net0": nets[0], "net1": nets[1]}

    pyro.clear_param_store()
    whole = nn.Sequential(*nets)
    program = calls_another(nets[1])
    assert registered_modules(program) == {}
    program()
    assert registered_modules(program, whole.forward) == {}  # belongs to a program that is a module
    assert registered_modules(program) == {"net": nets[1]}
