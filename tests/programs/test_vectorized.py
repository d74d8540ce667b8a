"""A model at many draws gives what plain runs of it give, whatever its style; what cannot, is found out and said."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from models._styles import MODELS
from pyro_flowkit.programs.pairs import NotVectorizable, vectorized
from pyro_flowkit.programs.sites import scored_sites


def program_of(model, *args, guide=None, ways=("graph", "plate", "rows"), with_deterministic=True):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = guide or AutoNormal(model, init_scale=0.3)
    guide(*args)
    options = {"ways": ways, "with_deterministic": with_deterministic}
    return vectorized(model, guide, args, {}, **options), guide


def traces_of(program, guide, size, *args):
    """Of guide and model, in a plate of draws."""
    with pyro.plate("num_particles_vectorized", size, dim=-1 - program.nesting):
        guide_trace = poutine.trace(guide).get_trace(*args)
        trace = poutine.trace(poutine.replay(program, trace=guide_trace)).get_trace(*args)
    trace.compute_log_prob()
    return guide_trace, trace


def plain(program, guide_trace, row, *args):
    """The densities of one of the draws in a run of its own."""
    values = {}
    for name, own in program.latents.items():
        site = guide_trace.nodes[name]
        value, event_dim = site["value"], site["fn"].event_dim
        value = value.select(value.dim() - 1 - program.nesting - event_dim, row)
        values[name] = value.reshape(value.shape[value.dim() - own - event_dim :])
    trace = poutine.trace(poutine.condition(program.model, data=values)).get_trace(*args)
    trace.compute_log_prob()
    return {name: site["log_prob"] for name, site in scored_sites(trace)}


@pytest.mark.parametrize("way", ["graph", "plate", "rows"])
@pytest.mark.parametrize("name", MODELS)
def test_both_styles_of_a_model_have_the_densities_of_plain_runs(name, way):
    def model():
        MODELS[name](batched=way == "plate")

    program, guide = program_of(model, ways=[way])
    assert program.way == way, program.reasons
    guide_trace, trace = traces_of(program, guide, 3)
    for row in range(3):
        expected = plain(program, guide_trace, row)
        for site, log_prob in expected.items():
            wide = trace.nodes[site]["log_prob"]
            got = wide.select(wide.dim() - 1 - program.nesting, row).reshape(log_prob.shape)
            assert torch.allclose(got, log_prob, rtol=1e-5, atol=1e-5), site


@pytest.mark.parametrize("name", MODELS)
def test_both_styles_of_a_model_are_recorded_with_the_same_elbo_and_gradient(name):
    found = []
    for batched in (False, True):

        def model(batched=batched):
            MODELS[name](batched)

        program, guide = program_of(model)
        assert program.way == "graph", program.reasons
        pyro.set_rng_seed(1)
        elbo = Trace_ELBO(8, max_plate_nesting=program.nesting, vectorize_particles=True)
        for _ in range(6):  # beyond the calls before another graph is made for eight draws
            loss = elbo.differentiable_loss(program, guide)
        gradient = torch.autograd.grad(loss, list(guide.parameters()))
        found.append([loss, *gradient])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def mixing(n):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(z.mean(), 1.0))
    with pyro.plate("data", n):
        pyro.sample("y", dist.Normal(w, 1.0), obs=torch.full((n,), 0.2))


@pytest.mark.parametrize("n", [10, 8000])
def test_mixed_particles_are_found_out_however_many_the_data(n):
    program, _ = program_of(mixing, n, ways=["plate", "rows"])
    assert program.way == "rows"
    assert "'w' has another log-density" in program.reasons["plate"]
    program, _ = program_of(mixing, n)
    assert program.way == "graph", "recorded for one draw, a mean is that draw's"


def test_a_branch_on_a_latent_is_not_recorded():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 1.0 if z > 0 else 3.0
        pyro.sample("y", dist.Normal(z, scale), obs=torch.tensor(0.3))

    program, _ = program_of(model)
    assert program.way == "rows"
    assert "'z'" in program.reasons["graph"] and "reads the value" in program.reasons["graph"]
    assert "plate" in program.reasons


def test_random_numbers_of_a_models_own_are_not_recorded():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + torch.randn(()), 1.0), obs=torch.tensor(0.3))

    program, _ = program_of(model, ways=["graph", "rows"])
    assert program.way == "rows"
    assert "draws random numbers" in program.reasons["graph"]


def test_rows_that_a_plate_draws_are_inputs_of_the_recording():
    data = torch.arange(20.0)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=data[rows])

    program, guide = program_of(model)
    assert program.way == "graph", program.reasons
    seen = set()
    for _ in range(4):
        _, trace = traces_of(program, guide, 2)
        rows = trace.nodes["data"]["value"]
        assert torch.equal(trace.nodes["y"]["value"], data[rows])
        assert trace.nodes["y"]["scale"] == 4.0
        seen.add(tuple(rows.tolist()))
    assert len(seen) > 1


def test_a_gradient_that_a_model_cuts_is_not_recorded():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with torch.no_grad():
            twice = 2 * z
        pyro.sample("y", dist.Normal(z + twice, 1.0), obs=torch.tensor(3.0))

    program, _ = program_of(model, ways=["graph", "rows"])
    assert program.way == "rows"
    assert "derivative" in program.reasons["graph"]


def test_elements_that_are_written_have_the_right_derivative():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = torch.zeros(40)
        mean[3] = z[0]
        mean[5:7] = z[1:]
        pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=torch.ones(40))

    program, guide = program_of(model)
    assert program.way == "graph", program.reasons
    z = torch.randn(4, 3, requires_grad=True)
    log_joint = program.log_joint({"z": z}, (), {})
    (got,) = torch.autograd.grad(log_joint.sum(), z)
    assert torch.allclose(got, -z + (1.0 - z) / 0.25, atol=1e-5)


def test_a_tensor_that_the_model_changes_is_not_recorded():
    count = torch.zeros(())

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        count.add_(1.0)
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    program, _ = program_of(model, ways=["graph", "rows"])
    assert program.way == "rows"
    assert "in place" in program.reasons["graph"]


def test_a_number_that_changes_later_is_found_out_and_said():
    setting = {"scale": 1.0}

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, setting["scale"]), obs=torch.tensor(0.3))

    program, guide = program_of(model)
    assert program.way == "graph"
    traces_of(program, guide, 2)
    setting["scale"] = 2.0
    with pytest.warns(UserWarning, match="does not hold any more, site 'y'"):
        guide_trace, trace = traces_of(program, guide, 2)
    expected = plain(program, guide_trace, 0)["y"]
    assert torch.allclose(trace.nodes["y"]["log_prob"][0], expected)
    assert program.way == "plate"
    setting["scale"] = 3.0
    guide_trace, trace = traces_of(program, guide, 2)
    assert torch.allclose(trace.nodes["y"]["log_prob"][0], plain(program, guide_trace, 0)["y"])


def test_batches_and_parameters_are_inputs():
    network = torch.nn.Linear(2, 1)

    def model(x, y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 20, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ w + network(x)[:, 0], scale), obs=y)

    x, y = torch.randn(20, 2), torch.randn(20)
    program, guide = program_of(model, x[:8], y[:8])
    assert program.way == "graph", program.reasons
    unconstrained = pyro.param("scale").unconstrained()
    elbo = Trace_ELBO(3, max_plate_nesting=program.nesting, vectorize_particles=True)
    for start, stop in ((0, 8), (8, 16), (16, 20), (0, 8)):
        batch = x[start:stop], y[start:stop]
        with torch.no_grad():
            network.weight += 0.1
            unconstrained += 0.05
        gradients = []
        for candidate in (program, model):
            pyro.set_rng_seed(3)
            runs = 1 if candidate is program else 3
            single = Trace_ELBO(3)
            loss = (elbo if runs == 1 else single).differentiable_loss(candidate, guide, *batch)
            gradients.append(
                torch.autograd.grad(loss, [network.weight, unconstrained], retain_graph=True)
            )
        # other noise in a plate than one by one, so compare with the model in a loop over its own draws
        guide_trace, trace = traces_of(program, guide, 3, *batch)
        expected = sum(plain(program, guide_trace, row, *batch)["y"].sum() for row in range(3))
        got = trace.nodes["y"]["log_prob"].sum()
        assert torch.allclose(got, expected, rtol=1e-5)
        inputs = [network.weight, unconstrained]
        for one, other in zip(
            torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_guide_that_mixes_particles_is_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(z, 1.0))

    def guide():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(z.mean(), 1.0))

    with pytest.raises(NotVectorizable, match="plate of draws: site .w. has another log-density"):
        program_of(model, guide=guide)


def test_deterministic_and_observed_values_and_masks_are_kept():
    mask = torch.tensor([True, False, True])
    y = torch.tensor([0.1, 0.2, 0.3])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        with pyro.plate("data", 3), poutine.mask(mask=mask), poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    program, guide = program_of(model)
    assert program.way == "graph", program.reasons
    guide_trace, trace = traces_of(program, guide, 4)
    z = guide_trace.nodes["z"]["value"]
    assert torch.allclose(trace.nodes["twice"]["value"], 2 * z)
    assert torch.equal(trace.nodes["y"]["value"], y)
    expected = 0.5 * dist.Normal(z, 1.0).log_prob(y) * mask
    assert torch.allclose(trace.nodes["y"]["log_prob"], expected)


def test_nothing_is_said_where_a_model_is_recorded():
    def model():
        MODELS["varying_intercepts"](False)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program, guide = program_of(model)
        for _ in range(8):
            traces_of(program, guide, 5)
