"""SplineFlow inside Pyro programs that train, and copied, saved and converted."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import Tensor

from tests.tiny import CONTEXT, bent, make_flow

# training


def two_steps(model, guide=lambda *_: None, *args) -> dict[str, bool]:
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*args)
    before = {n: v.detach().clone() for n, v in pyro.get_param_store().named_parameters()}
    svi.step(*args)
    after = dict(pyro.get_param_store().named_parameters())
    learned = {n: v for n, v in before.items() if "standardization" not in n}
    return {n: not torch.equal(after[n], v) for n, v in learned.items()}


def test_observed_flow_trains_for_two_steps() -> None:
    flow, data = make_flow(), torch.randn(8, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow(), obs=x)

    trained = two_steps(model, lambda x: None, data)
    assert trained == {f"SplineFlow.{name}": True for name, _ in flow.named_parameters()}


def test_one_distribution_object_trains_for_two_steps() -> None:
    flow, data = make_flow(), torch.randn(8, 3)
    d = flow()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (-d.log_prob(data).mean()).backward()
        optimizer.step()
    assert all(p.grad is not None for p in flow.parameters())


class VAE(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.prior = make_flow(2)
        self.posterior = make_flow(2, 4, base="conditional_normal")
        self.encoder, self.decoder = torch.nn.Linear(3, 4), torch.nn.Linear(2, 3)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", self.posterior(self.encoder(x)))


def test_flow_prior_and_flow_posterior_of_a_vae_train(no_head_start) -> None:
    vae = VAE()
    trained = two_steps(vae.model, vae.guide, torch.randn(8, 3))
    assert all(trained.values())
    assert {name.split(".")[0].split("$$$")[0] for name in trained} == {
        "prior",
        "posterior",
        "encoder",
        "decoder",
    }


def test_observed_conditional_flow_inside_a_pyro_module_trains() -> None:
    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = make_flow(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("y", self.flow(x), obs=y)

    model = Regression()
    trained = two_steps(model, lambda *_: None, CONTEXT, torch.randn(5, 3))
    assert trained == {name: True for name, _ in model.named_parameters()}


# copies


@pytest.mark.parametrize("what", ["flow", "distribution"])
def test_copies_are_equal_and_carry_nothing_remembered(what: str) -> None:
    flow = bent(3)
    thing = flow if what == "flow" else flow()
    x = torch.randn(5, 3)
    small = len(pickle.dumps(thing))
    d = flow() if what == "flow" else thing
    draw = d.rsample()
    d.log_prob(draw).sum().backward()
    for p in flow.parameters():
        p.grad = None
    with torch.no_grad():
        d.log_prob(torch.zeros(50_000, 3))
        d.sample((50_000,))
    flow.log_prob(x).sum().backward()
    for p in flow.parameters():
        p.grad = None
    assert abs(len(pickle.dumps(thing)) - small) < 2000
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(thing),
        pickle.loads(pickle.dumps(thing)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin.log_prob(x), flow.log_prob(x))


def test_module_conversions_and_state_dict() -> None:
    flow = bent(3, mixing="permute", seed=3).standardize(torch.randn(9, 3) * 3)
    x = torch.randn(5, 3)
    other = make_flow(3, mixing="permute", seed=9)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    flow.double()
    assert flow.sample(2).dtype == torch.float64
    assert torch.allclose(flow.log_prob(x.double()), other.log_prob(x).double(), atol=1e-3)
