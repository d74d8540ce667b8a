"""``compile=True`` for a recorded model: its density, if the same and faster; and without a compiler as before."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.latent_elbo import FEW_STEPS
from pyro_flowkit.training import compilation
from pyro_flowkit.training.objective import chosen_loss

Y = torch.tensor([0.3, 1.2, -0.5, 0.9])


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def ready_loss():
    """The objective of a fit, before its first step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoSplineFlow(model, num_transforms=1, hidden_dims=[8]).setup(Y)
    loss = chosen_loss(model, guide, (), (Y,), {}, objective=None, num_particles=4)
    loss.prepare((), None, False)
    return loss


@pytest.fixture
def calls(monkeypatch):
    """Calls of what was compiled, without the compiler's slow last stage."""
    found = []
    compiler = torch.compile

    def traced(function, **options):
        run = compiler(function, backend="eager", **options)

        @functools.wraps(run)
        def noted(*args):
            found.append(len(args))
            return run(*args)

        return noted

    monkeypatch.setattr(torch, "compile", traced)
    return found


@pytest.mark.parametrize("gain", [2.0, 1.05])
def test_a_density_that_is_faster_is_taken(calls, monkeypatch, gain):
    seconds = iter([gain, 1.0])
    monkeypatch.setattr(compilation, "_seconds_of", lambda call: next(seconds))
    plain, loss = ready_loss(), ready_loss()
    note = compilation.compile_where_it_pays(loss, ())
    if gain > compilation.MIN_GAIN:
        assert note == (
            "the model's density compiled: with its derivative it took 2e+03 ms before, 1e+03 ms compiled"
        )
    else:
        assert note.startswith("nothing compiled: the model's density and its derivative took")
    assert len(calls) == 1, "the look at its numbers"
    for one in (plain, loss):
        pyro.set_rng_seed(1)
        one.begin_step(FEW_STEPS)
        one.elbos = [one.backward(()) for _ in range(5)]
    assert (len(calls) > 1) == (gain > compilation.MIN_GAIN)
    assert loss.elbos == pytest.approx(plain.elbos, rel=1e-4)


def test_without_a_compiler_fit_says_so_and_goes_on(monkeypatch):
    def no_compiler(function, **options):
        def compiled(*args):
            raise RuntimeError("No working C++ compiler found\n  in a long traceback")

        return compiled

    monkeypatch.setattr(torch, "compile", no_compiler)
    guide = AutoSplineFlow(model, num_transforms=1, hidden_dims=[8])
    result = fit(model, guide, args=(Y,), max_steps=3, compile=True, progress=False)
    assert result.notes == ("nothing compiled: RuntimeError: No working C++ compiler found",)
    assert len(result.history["elbo"]) == 3


def test_other_numbers_are_not_taken(monkeypatch):
    def wrong(function, **options):
        return lambda *args: [output + 0.5 for output in function(*args)]

    monkeypatch.setattr(torch, "compile", wrong)
    note = compilation.compile_where_it_pays(ready_loss(), ())
    assert note == "nothing compiled: RuntimeError: the compiled density has other values"
