"""Stages of a VAE's training: free bits, warm-up, the prior on frozen codes, the encoder on samples, resuming."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from models.vae import VAE, refine_encoder, train, train_prior
from models.vae.data import FreshBatches
from models.vae.posterior import FlowPosterior
from models.vae.storage import start_from
from models.vae.training import FreeBitsELBO
from pyro_flowkit.training import Callback

SMALL = {"latent_dim": 2, "hidden_dims": (16,), "num_transforms": 2, "flow_hidden_dims": (8, 8)}
QUIET = {"progress": False, "seed": 0}


def rows(n=200):
    return torch.where(torch.rand(n, 1) < 0.5, 2.0, -2.0) * torch.ones(5) + 0.3 * torch.randn(n, 5)


def batches(x):
    return FreshBatches(x, lambda r, generator: r, 32, 0)


def make(x, **options):
    return VAE(5, data_size=len(x), **{**SMALL, **options}).standardize(x)


def copy_of(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def changed(before, vae):
    """First parts of the names of all that differs."""
    now = vae.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], now[name])}


@pytest.mark.parametrize("prior", ["flow", "autoregressive"])
def test_the_prior_alone_is_trained_on_frozen_codes(prior):
    x = rows()
    vae = make(x, prior=prior)
    train(vae, batches(x), x[:50], steps=40, lr=1e-2, **QUIET)
    before, elbo = copy_of(vae), _mean_elbo(vae, x)
    train_prior(vae, batches(x), x[:50], steps=60, lr=1e-2, **QUIET)
    assert changed(before, vae) == {"prior"}
    assert _mean_elbo(vae, x) > elbo
    assert all(p.requires_grad for p in vae.parameters())
    with pytest.raises(ValueError, match="flow prior to train on codes, got the standard normal"):
        train_prior(make(x, name="plain"), batches(x), x, steps=1)


def test_a_continuous_prior_matches_frozen_codes():
    x = rows()
    plain = make(x)
    train(plain, batches(x), x[:50], steps=40, lr=1e-2, **QUIET)
    pyro.clear_param_store()
    vae = make(x, prior="continuous", flow_hidden_dims=(16, 16))
    start_from(vae, plain)
    vae.eval()
    before, elbo = copy_of(vae), _mean_elbo(vae, x)
    train_prior(vae, batches(x), x[:50], steps=120, lr=1e-2, **QUIET)
    assert changed(before, vae) == {"prior"}
    assert _mean_elbo(vae, x) > elbo


def test_a_vae_with_flows_starts_from_a_plain_one_with_the_same_bound():
    x = rows()
    plain = make(x)
    train(plain, batches(x), x[:50], steps=60, lr=1e-2, **QUIET)
    for prior, posterior in (("flow", "normal"), ("standard", "flow"), ("flow", "flow")):
        pyro.clear_param_store()
        vae = make(x, prior=prior, posterior=posterior)
        torch.manual_seed(1)
        assert abs(float((vae.elbo(x) - plain.elbo(x)).mean())) > 0.5
        start_from(vae, plain)
        values = []
        for one in (vae, plain):
            torch.manual_seed(2)
            values.append(one.elbo(x))
        torch.testing.assert_close(*values, atol=1e-4, rtol=1e-5)
        copies, state = copy_of(vae), plain.state_dict()
        assert all(torch.equal(copies[name], value) for name, value in state.items())
    with pytest.raises(ValueError, match="same networks to start from: decoder.0.weight has"):
        start_from(make(x, latent_dim=3), plain)
    with pytest.raises(ValueError, match="without a flow as its prior to start from, got one"):
        start_from(plain, make(x, prior="flow"))
    with pytest.raises(ValueError, match="without a flow as its posterior to start from, got one"):
        start_from(plain, make(x, posterior="flow"))


def test_a_flow_posterior_bends_a_normal_that_is_much_narrower_than_its_bins():
    """A banana of scale .05, for every x: the best normal has a gap of .35 nats."""
    pyro.set_rng_seed(0)
    features = torch.ones(256, 1)
    posterior = FlowPosterior(
        2, 1, 4, path_gradient=False, num_transforms=2, hidden_dims=[16, 16], count_bins=8
    )
    raw_scale = math.log(math.expm1(0.05))
    heads = torch.tensor([1.0, 1.0, raw_scale, raw_scale]).expand(256, -1)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=2e-2)

    def gap():
        q = posterior(features, heads)
        z = q.rsample()
        a, b = ((z - 1.0) / 0.05).unbind(-1)
        squares = a.square() + (b - 0.5 * a.square()).square()
        log_p = -0.5 * squares - math.log(2 * math.pi) - 2 * math.log(0.05)
        return (q.log_prob(z) - log_p).mean()

    before = gap().item()
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / 200)
        optimizer.zero_grad()
        gap().backward()
        optimizer.step()
    with torch.no_grad():
        after = float(torch.stack([gap() for _ in range(50)]).mean())
    assert before > 0.3 and after < 0.05


@pytest.mark.parametrize("posterior", ["normal", "flow"])
def test_the_encoder_alone_is_tuned_on_samples_and_never_for_the_worse(posterior):
    x = rows()
    vae = make(x, prior="flow", posterior=posterior)
    train(vae, batches(x), x[:50], steps=40, lr=1e-2, **QUIET)
    before, elbo = copy_of(vae), float(vae.eval().elbo(x).mean())
    result = refine_encoder(vae, x, steps=100, batch_size=32, lr=1e-2, **QUIET)
    assert changed(before, vae) <= {"encoder", "heads", "posterior"}
    assert result.best_step > 0 and _mean_elbo(vae, x) > elbo
    assert all(p.requires_grad for p in vae.parameters())
    before = copy_of(vae)
    with pytest.warns(RuntimeWarning, match="diverges"):
        result = refine_encoder(vae, x, steps=20, batch_size=2, lr=10.0, **QUIET)
    assert changed(before, vae) == set() and result.best_step == 0


def _mean_elbo(vae, x):
    torch.manual_seed(0)
    return float(torch.stack([vae.eval().elbo(x) for _ in range(20)]).mean())


def test_free_bits_count_a_small_kl_as_the_floor_and_leave_a_large_one_alone():
    x = rows(30)
    vae = make(x)

    def loss_and_gradients(objective):
        torch.manual_seed(0)
        vae.zero_grad()
        loss = objective.differentiable_loss(vae.model, vae.guide, x)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in vae.encoder.parameters()]

    plain, gradients = loss_and_gradients(Trace_ELBO())
    torch.manual_seed(0)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    expected = float(model.nodes["x"]["fn"].log_prob(x).sum().detach())
    kl = expected + plain  # -ELBO = KL - E log p(x | z)
    above, same = loss_and_gradients(FreeBitsELBO(0.5 * kl / len(x), len(x)))
    assert above == pytest.approx(plain)
    for one, other in zip(gradients, same, strict=True):
        torch.testing.assert_close(one, other)
    below, others = loss_and_gradients(FreeBitsELBO(2.0 * kl / len(x), len(x)))
    assert below == pytest.approx(2.0 * kl - expected, rel=1e-5)
    assert not torch.allclose(gradients[0], others[0])
    with pytest.raises(ValueError, match="free bits > 0, got -1"):
        FreeBitsELBO(-1.0, 3)


def test_free_bits_keep_a_kl_that_would_collapse():
    x = torch.randn(200, 5)  # nothing to encode
    kl = {}
    for free_bits in (0.0, 1.0):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = make(x)
        train(vae, batches(x), x, steps=200, lr=1e-2, free_bits=free_bits, **QUIET)
        with torch.no_grad():
            q = vae.q_z(x)
            z = q.sample((50,))
            kl[free_bits] = float((q.log_prob(z) - vae.p_z().log_prob(z)).mean())
    assert kl[0.0] < 0.5 < kl[1.0]


def test_the_weight_of_the_kl_rises_to_one_and_the_average_is_what_is_kept():
    x = rows()
    warm = train(make(x), batches(x), x[:50], steps=60, kl_warm_up=0.5, **QUIET)
    assert warm.best_step > 30  # earlier states have another objective
    pyro.clear_param_store()
    states = []
    for average in (None, 0.9):
        torch.manual_seed(0)
        pyro.clear_param_store()
        vae = make(x)
        train(vae, batches(x), x[:50], steps=30, average=average, **QUIET)
        states.append(copy_of(vae))
    assert not torch.equal(states[0]["decoder.0.weight"], states[1]["decoder.0.weight"])


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path):
    x = rows()

    class Halt(Callback):
        def on_step(self, state):
            if state.step == 13:
                state.stop = "halt"

    def run(folder, *callbacks):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = make(x, prior="flow", posterior="flow", dropout=0.2)
        noisy = FreshBatches(x, lambda r, g: r + 0.1 * torch.randn(r.shape, generator=g), 32, 0)
        options = {"checkpoint_dir": folder, "resume": True, "callbacks": callbacks}
        result = train(vae, noisy, x[:50], steps=30, **options, **QUIET)
        return result, copy_of(vae)

    whole, expected = run(tmp_path / "whole")
    halted, _ = run(tmp_path / "halted", Halt())
    assert halted.stop_reason == "halt"
    resumed, state = run(tmp_path / "halted")
    assert len(whole.history["step"]) == len(resumed.history["step"]) == 30
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
