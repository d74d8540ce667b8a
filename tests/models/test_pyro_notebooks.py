"""The programs of Pyro's notebooks on flows run with its constructors and with ours, and train."""

import pyro
import pytest
import torch

from models.pyro_notebooks import flow_guide, flow_prior, flows_intro


@pytest.mark.parametrize("transforms", flows_intro.TRANSFORMS)
def test_the_introduction_runs_with_either_import(transforms, capsys) -> None:
    results = flows_intro.main(["--fast", "--transforms", transforms])
    assert capsys.readouterr().out.count("after 60 steps") == len(results) == 3
    for trained in results.values():
        losses = torch.tensor(trained.losses)
        assert losses.isfinite().all() and losses[-1] < losses[0] - 0.1
        assert trained.draws.shape == (200, 2) and trained.draws.isfinite().all()
        assert not trained.draws.requires_grad


def test_losses_have_the_unit_of_pyros_and_ours_begin_at_the_base() -> None:
    """By element for the element-wise spline, by point for the coupling: those of a standard normal, at first."""
    data = flows_intro.rings(200)
    by_element = 0.5 * data.square().mean() + 0.5 * torch.log(torch.tensor(2 * torch.pi))
    transforms = flows_intro.TRANSFORMS["flowkit"]
    for flow, elements in (("elementwise", 1), ("coupled", 2), ("conditional", 2)):
        train, _ = flows_intro.FLOWS[flow]
        assert train(transforms, data, 1).losses[0] == pytest.approx(
            elements * float(by_element), abs=1e-4
        )


def test_draws_given_contexts_follow_their_contexts() -> None:
    """Rings: where x_1 is far out, x_2 is near 0. Draws that were paired with other contexts would not know."""
    pyro.set_rng_seed(0)
    data = flows_intro.rings(400)
    trained = flows_intro.conditional(flows_intro.TRANSFORMS["flowkit"], data, 300)
    x_1, x_2 = trained.draws[:, 0].abs(), trained.draws[:, 1].abs()
    outside, inside = x_2[x_1 > 1.5].mean(), x_2[x_1 < 0.5].mean()
    assert outside < inside - 0.3


@pytest.mark.parametrize("flow", flow_guide.FLOWS)
def test_the_amortised_guide_runs_with_each_constructor(flow, capsys) -> None:
    trained = flow_guide.main(["--fast", "--flow", flow])
    assert "loss" in capsys.readouterr().out
    losses = torch.tensor(trained.losses)
    assert losses.isfinite().all() and losses[-10:].mean() < 0.1 * losses[:10].mean()
    assert trained.draws.shape == (1000, 3) and trained.draws.isfinite().all()


@pytest.mark.parametrize("flow", flow_prior.FLOWS)
def test_the_vae_runs_with_each_prior(flow, capsys) -> None:
    trained = flow_prior.main(["--fast", "--flow", flow])
    assert "nats per image" in capsys.readouterr().out
    losses = torch.tensor(trained.losses)
    assert losses.isfinite().all() and losses[-1] < losses[0] - 5.0
    assert trained.images.shape == (16, 64)
    assert ((trained.images >= 0) & (trained.images <= 1)).all()


@pytest.mark.parametrize("program", ["guide", "prior"])
def test_a_flow_that_pyro_module_registers_too_moves_once_per_step(program) -> None:
    """The store has its parameters under its name and that of ``pyro.module``; the optimizer has them once."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    if program == "guide":
        flow = flow_guide.FLOWS["flowkit"]([8])
        before = {name: p.detach().clone() for name, p in flow.named_parameters()}
        flow_guide.train(flow, flow_guide.simulate(4), steps=1, num_particles=2)
    else:
        flow = flow_prior.FLOWS["flowkit"](2, [8])
        before = {name: p.detach().clone() for name, p in flow.named_parameters()}
        vae = flow_prior.VAE(flow, 64, 2, 8)
        flow_prior.train(vae, flow_prior.bars(4), epochs=1, batch_size=4)
    moved = torch.cat(
        [(p.detach() - before[name]).abs().flatten() for name, p in flow.named_parameters()]
    )
    assert moved.max() == pytest.approx(1e-3, rel=1e-2)  # Adam's first step is the learning rate
    names = set(pyro.get_param_store().keys())
    prefix = "flow$$$" if program == "guide" else "prior$$$"
    own = {name for name, _ in flow.named_parameters()}
    assert {prefix + name for name in own} | {f"SplineFlow.{name}" for name in own} <= names
