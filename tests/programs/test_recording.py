"""What people write in models: the recording of it is right, and where it stops being right that is noticed."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.programs.graph import ReadsValue, recorded
from tests.programs.test_vectorized import plain, program_of, traces_of

Y = torch.linspace(-1.0, 2.0, 12)
GROUP = torch.arange(12) % 4


def assert_recorded(model, *args, size=3):
    """Its densities and their derivatives are those of plain runs."""
    program, guide = program_of(model, *args)
    assert program.way == "graph", program.reasons
    for _ in range(6):  # the graph for one draw, then another one for all
        guide_trace, trace = traces_of(program, guide, size, *args)
        expected = 0.0
        for row in range(size):
            for name, log_prob in plain(program, guide_trace, row, *args).items():
                wide = trace.nodes[name]["log_prob"]
                got = wide.select(wide.dim() - 1 - program.nesting, row).reshape(log_prob.shape)
                assert torch.allclose(got, log_prob, rtol=1e-5, atol=1e-5), name
                expected = expected + log_prob.sum()
        got = sum(
            trace.nodes[name]["log_prob"].sum() for name in plain(program, guide_trace, 0, *args)
        )
        inputs = list(guide.parameters())
        pairs = zip(
            torch.autograd.grad(got, inputs, retain_graph=True, materialize_grads=True),
            torch.autograd.grad(expected, inputs, materialize_grads=True),
            strict=True,
        )
        for one, other in pairs:
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)
    return program


def test_a_model_may_read_the_values_of_its_data():
    def model(group, y):
        a = pyro.sample("a", dist.Normal(torch.zeros(int(group.max()) + 1), 1.0).to_event(1))
        censored = y > 1.0
        with pyro.plate("seen", int((~censored).sum())):
            pyro.sample("y", dist.Normal(a[group[~censored]], 1.0), obs=y[~censored])
        with pyro.plate("censored", int(censored.sum())):
            late = torch.log1p(-dist.Normal(a[group[censored]], 1.0).cdf(torch.tensor(1.0)))
            pyro.factor("late", late)

    assert_recorded(lambda: model(GROUP, Y))
    assert_recorded(model, GROUP, Y)


def test_data_whose_values_are_read_are_not_mistaken_for_others():
    def model(group):
        a = pyro.sample("a", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        rows = Y[group == 0]
        pyro.sample("y", dist.Normal(a[0], 1.0).expand([len(rows)]).to_event(1), obs=rows)

    program, _ = program_of(model, GROUP)
    assert program.way == "graph", program.reasons
    z = torch.zeros(2, 4)
    other = (GROUP > 1).long()
    with pytest.warns(UserWarning, match="another tensor from call to call"):
        got = program.log_probs({"a": z}, (other,), {})["y"]
    assert torch.allclose(got[0], dist.Normal(0.0, 1.0).log_prob(Y[other == 0]).sum())


def test_batches_whose_values_are_read_are_refused_at_once():
    def model(group):
        a = pyro.sample("a", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", 12, subsample_size=len(group)):
            scale = 1.0 if group.max() > 0 else 2.0
            pyro.sample("y", dist.Normal(a[group], scale), obs=Y[: len(group)])

    guide = AutoSplineFlow(model, num_transforms=2, hidden_dims=[8])
    with pytest.warns(UserWarning, match="reads the value of a tensor"):
        fit(model, guide, data=GROUP, batch_size=6, max_steps=1, progress=False)


def test_a_shape_that_depends_on_an_input_is_refused():
    mask = torch.tensor([True, False, True])

    def selected(values, tensors):
        return values["z"] + tensors[0][mask].sum()

    def selecting(values, tensors):
        return values["z"] + tensors[1][tensors[0] > 0].sum()

    tensors = [torch.ones(3), torch.ones(3)]
    recorded(selected, {"z": torch.ones(())}, tensors)
    with pytest.raises(ReadsValue, match="shape depends on values"):
        recorded(selecting, {"z": torch.ones(())}, tensors)


def test_steps_of_a_plate_one_after_the_other_are_recorded():
    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        for i in pyro.plate("steps", 3):
            pyro.sample(f"y{i}", dist.Normal(a[i], 1.0), obs=Y[i])

    assert_recorded(model)


def test_priors_that_were_made_before_are_recorded():
    class Network(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = PyroModule[torch.nn.Linear](2, 1)
            self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

        def forward(self, x):
            mean = self.layer(x)[:, 0]
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

    assert_recorded(Network(), torch.stack([Y, Y.square()], -1))


@pytest.mark.parametrize("kind", ["recurrent", "attention"])
def test_networks_that_change_tensors_of_their_own_are_recorded(kind):
    torch.manual_seed(0)
    recurrent = torch.nn.GRU(2, 3, batch_first=True)
    attention = torch.nn.MultiheadAttention(2, 1, batch_first=True)

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = Y.reshape(2, 3, 2) * a
        h = recurrent(x)[0] if kind == "recurrent" else attention(x, x, x)[0]
        pyro.sample("y", dist.Normal(h.sum((1, 2)), 1.0).to_event(1), obs=Y[:2])

    program = assert_recorded(model)
    network = recurrent if kind == "recurrent" else attention
    z = torch.randn(3, 2)
    total = program.log_joint({"a": z}, (), {}).sum()
    expected = sum(
        poutine.trace(poutine.condition(model, {"a": row})).get_trace().log_prob_sum() for row in z
    )
    parameters = list(network.parameters())
    for one, other in zip(
        torch.autograd.grad(total, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_scales_of_latents_are_kept():
    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with poutine.scale(scale=s), pyro.plate("three", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=0.3):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    assert_recorded(model)


def test_a_scale_that_changes_later_is_found_out():
    setting = {"scale": 1.0}

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=setting["scale"]):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    program, guide = program_of(model)
    traces_of(program, guide, 2)
    setting["scale"] = 2.0
    with pytest.warns(UserWarning, match="does not hold any more, site 'y'"):
        guide_trace, trace = traces_of(program, guide, 2)
    expected = plain(program, guide_trace, 0)["y"]
    assert torch.allclose(trace.nodes["y"]["log_prob"].reshape(-1)[0], expected)


def test_a_plate_of_draws_is_looked_at_again():
    setting = {"mixes": False}

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = z.mean(0, keepdim=True) if setting["mixes"] and z.dim() else z
        pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor(0.3))

    program, guide = program_of(model, ways=["plate", "rows"], with_deterministic=False)
    assert program.way == "plate"
    traces_of(program, guide, 4)
    setting["mixes"] = True
    with pytest.warns(UserWarning, match="plate of draws does not hold any more, site 'y'"):
        guide_trace, trace = traces_of(program, guide, 4)
    for row in range(4):
        expected = plain(program, guide_trace, row)["y"]
        assert torch.allclose(trace.nodes["y"]["log_prob"][row], expected)


def test_a_batch_that_cannot_be_recorded_does_not_end_a_fit():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 1.0 if len(x) == 5 or bool(z.sum() > -1e6) else 2.0
        with pyro.plate("data", 12, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(z, scale), obs=x)

    program, guide = program_of(model, Y[:5])
    assert program.way == "graph", program.reasons
    with pytest.warns(UserWarning, match="does not hold any more, .* reads the value"):
        guide_trace, trace = traces_of(program, guide, 3, Y[:4])
    for row in range(3):
        expected = plain(program, guide_trace, row, Y[:4])["y"]
        assert torch.allclose(trace.nodes["y"]["log_prob"][row], expected)


def test_the_first_batch_of_a_new_shape_is_verified():
    setting = {"scale": 1.0}

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(z, 1.0 if len(x) > 4 else setting["scale"]), obs=x)

    program, guide = program_of(model, Y[:6])
    for _ in range(4):
        traces_of(program, guide, 2, Y[:6])
    before = program._recording.made
    made = []
    run = program._difference
    program._difference = lambda *args: made.append(1) or run(*args)
    traces_of(program, guide, 2, Y[:4])  # the fifth call
    assert program._recording.made == before + 1 and made


@pytest.mark.parametrize("guide_of", [AutoNormal, AutoSplineFlow])
def test_data_outside_of_their_support_are_an_error(guide_of):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Poisson(z.exp()), obs=torch.tensor(2.5))

    with pytest.raises(ValueError, match="support"):
        fit(model, guide_of(model), max_steps=2, num_particles=2, progress=False)


def test_a_recording_that_takes_too_long_is_refused_in_words(monkeypatch):
    monkeypatch.setattr("pyro_flowkit.programs.recording.MAX_SECONDS", 0.05)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in range(300):
            pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=torch.tensor(0.1))

    program, _ = program_of(model)
    assert program.way == "plate"
    assert "takes more than 0.05 s" in program.reasons["graph"]
