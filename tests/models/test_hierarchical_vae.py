"""The VAE with levels of latents: a chain of flows, a posterior beside it, an ELBO with a KL for each level."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import Normal, kl_divergence

from models.hierarchical_vae import HierarchicalVAE, main
from models.hierarchical_vae.program import flat_widths
from models.vae import VAE, train
from models.vae.posterior import normal_of
from models.vae.training import FreeBitsELBO
from pyro_flowkit.diagnostics import inference_gaps, latent_usage, pointwise_bounds
from pyro_flowkit.testing import perturb_

FLOWS = {"num_transforms": 2, "flow_hidden_dims": (8, 8), "count_bins": 4}
SMALL = {"hidden_dims": (16,), "level_dim": 8, "context_dim": 8, **FLOWS}


def make(latent_dims, input_dim=5, data_size=40, **options):
    return HierarchicalVAE(
        input_dim, data_size=data_size, latent_dims=latent_dims, **{**SMALL, **options}
    )


def perturbed(*args, of_posteriors=0.2, **options):
    vae = make(*args, **options)
    for flows, scale in ((vae.priors, 0.2), (vae.top_prior, 0.2), (vae.posteriors, of_posteriors)):
        perturb_(flows, scale)
    return listening(vae)


def listening(vae):
    """With levels that listen to the one above, which fresh ones do not."""
    perturb_(vae.prior_heads, 0.2)
    perturb_(vae.down_heads, 0.2)
    return vae


def traces(vae, x):
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    return model, guide


def rows(n=96):
    """Points on a noisy circle, seen through five dimensions."""
    t = 2 * math.pi * torch.rand(n)
    circle = torch.stack([t.cos(), t.sin()], -1)
    return 3.0 + 2.0 * circle @ torch.randn(2, 5) + 0.1 * torch.randn(n, 5)


@pytest.mark.parametrize("latent_dims", [(3,), (3, 2), (4, 3, 2)])
def test_levels_have_sites_and_a_minibatch_stands_for_all_data(latent_dims):
    vae, x = perturbed(latent_dims), torch.randn(10, 5)
    model, guide = traces(vae, x)
    names = [f"z{i + 1}" for i in range(len(latent_dims))]
    drawn = [name for name in guide.nodes if name in names]
    assert drawn == [name for name in model.nodes if name in names] == names[::-1]
    for name, size in zip(names, latent_dims, strict=True):
        for trace in (model, guide):
            site = trace.nodes[name]
            assert site["fn"].batch_shape == (10,) and site["fn"].event_shape == (size,)
            assert site["scale"] == pytest.approx(4.0)
            assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
    assert vae.sample(7).shape == (7, 5) and vae.elbo(x).shape == (10,)
    with pyro.plate("particles", 3, dim=-2):  # as the diagnostics draw
        model, _ = traces(vae, x)
    assert model.nodes["x"]["fn"].batch_shape == (3, 10)


@pytest.mark.parametrize("latent_dims", [(3, 2), (4, 3, 2)])
def test_the_elbo_is_the_log_likelihood_less_the_kl_of_each_level(latent_dims):
    vae, x = perturbed(latent_dims), torch.randn(40, 5)
    torch.manual_seed(1)
    model, guide = traces(vae, x)
    model.compute_log_prob()
    guide.compute_log_prob()
    torch.manual_seed(1)
    terms = vae.elbo_terms(x)
    assert set(terms) == {"x", *vae.sites}
    torch.testing.assert_close(terms["x"], model.nodes["x"]["log_prob"])
    for site in vae.sites:
        kl = guide.nodes[site]["log_prob"] - model.nodes[site]["log_prob"]
        torch.testing.assert_close(terms[site], kl)
        assert kl.abs().mean() > 0.1
    torch.manual_seed(1)
    elbo = vae.elbo(x)
    total = float((model.log_prob_sum() - guide.log_prob_sum()).detach())
    assert float(elbo.sum()) == pytest.approx(total, rel=1e-5)


def moments(distribution):
    """Location and scale, where the flow is a diagonal Gaussian."""
    zero = torch.zeros(distribution.batch_shape + distribution.event_shape)
    ends = [zero, zero + 1.0]
    for layer in distribution.transforms:
        ends = [layer(end) for end in ends]
    return Normal(ends[0], ends[1] - ends[0])


def test_fresh_levels_are_gaussian_conditionals_with_the_kl_of_gaussians():
    vae, x = listening(make((3, 2))), 3.0 * torch.randn(6, 5)
    with torch.no_grad():
        features = vae.features(x)
        q2, p2 = vae.q_z(1, features[1], None), vae.p_z(1, None)
        z2 = q2.sample()
        message = vae.message(1, z2)
        q1, p1 = vae.q_z(0, features[0], message), vae.p_z(0, message)
        torch.testing.assert_close(p2.log_prob(z2), Normal(0.0, 1.0).log_prob(z2).sum(-1))
        for q, p in ((q2, p2), (q1, p1)):
            exact = kl_divergence(moments(q), moments(p)).sum(-1)
            z = q.sample((20_000,))
            draws = q.log_prob(z) - p.log_prob(z)
            error = draws.std(0) / len(z) ** 0.5
            assert ((draws.mean(0) - exact).abs() < 4 * error).all() and (exact > 0.05).all()
            torch.testing.assert_close(q.log_prob(z), moments(q).log_prob(z).sum(-1))
    # both ways of knowing z1 go by what is above
    assert (moments(p1).loc.std(0) > 0.01).all()
    other = vae.q_z(0, features[0], message + 1.0)
    assert (moments(other).loc - moments(q1).loc).abs().min() > 1e-3


def test_a_fresh_vae_is_a_flat_one_with_a_standard_normal_prior():
    vae, x = make((3, 2)), torch.randn(6, 5)
    with torch.no_grad():
        features, z2, z1 = vae.features(x), torch.randn(6, 2), torch.randn(6, 3)
        message = vae.message(1, z2)
        standard = Normal(0.0, 1.0).log_prob(z1).sum(-1)
        torch.testing.assert_close(vae.p_z(0, message).log_prob(z1), standard)
        flat = Normal(*normal_of(vae.ends.heads(features[0]))).log_prob(z1)
        torch.testing.assert_close(vae.q_z(0, features[0], message).log_prob(z1), flat.sum(-1))


def test_the_bounds_bracket_the_likelihood_that_a_grid_gives():
    vae = perturbed((1, 1), input_dim=3, of_posteriors=0.05).eval()
    with torch.no_grad():
        for heads in (vae.ends.heads, vae.up_heads[0]):  # wide, so that few weights are large
            heads.bias[1] += 2.0
    x = 0.5 * torch.randn(8, 3)
    grid = torch.linspace(-9.0, 9.0, 601)
    step = float(grid[1] - grid[0])
    z = grid[:, None]
    with torch.no_grad():
        log_p2 = vae.p_z(1, None).log_prob(z)
        log_p1 = vae.p_z(0, vae.message(1, z)).log_prob(z[:, None])  # over z1, z2
        log_p1 = torch.logsumexp(log_p1 + log_p2, -1) + math.log(step)
        log_x = vae.ends.p_x(z[:, None]).log_prob(x)
        exact = torch.logsumexp(log_x + log_p1[:, None], 0) + math.log(step)
        assert float(torch.logsumexp(log_p1, 0)) + math.log(step) == pytest.approx(0.0, abs=1e-3)
    found = pointwise_bounds(vae.model, vae.guide, x, num_samples=4000, seed=0)
    iwae = found["iwae"].isel(n_particles=-1).to_numpy()
    error = found["iwae_se"].isel(n_particles=-1).to_numpy()
    exact = exact.numpy()
    assert (found["elbo"].to_numpy() < exact - 0.01).all()
    np.testing.assert_array_less(np.abs(iwae - exact), 4 * error + 0.02)


def test_fit_trains_it_and_the_diagnostics_report_each_level():
    x = rows()
    vae = make((3, 2), data_size=len(x)).standardize(x)
    before = float(vae.elbo(x).mean())
    result = train(vae, x, x[:30], steps=100, batch_size=32, lr=1e-2, progress=False)
    assert float(vae.elbo(x).mean()) > before + 1.5 and result.skipped_steps == 0
    usage = latent_usage(vae.model, vae.guide, x, num_samples=50, seed=0)
    assert usage["site"].to_numpy().tolist() == ["z2", "z1"]
    assert int(usage["active_directions"].sel(site="z1")) >= 1
    terms = vae.elbo_terms(x.repeat(50, 1))
    for site in vae.sites:
        kl = float(terms[site].mean())
        assert float(usage["site_kl"].sel(site=site)) == pytest.approx(kl, abs=0.1)
    found = inference_gaps(vae.model, vae.guide, x[:6], num_samples=300, num_steps=12, seed=0)
    gap = float(found["inference_gap"].mean())
    assert float(found["elbo_optimized"].mean()) >= float(found["elbo"].mean()) and gap > 0
    bounds = pointwise_bounds(vae.model, vae.guide, x[:6], num_samples=300, seed=0)
    error = float(np.hypot(bounds["elbo_se"], found["elbo_se"]).max())
    assert np.abs(bounds["elbo"] - found["elbo"].to_numpy()).max() < 5 * error


@pytest.mark.parametrize("path_gradient", [False, True])
def test_svi_sees_every_network(path_gradient):
    vae = make((4, 3, 2), path_gradient=path_gradient, prior_dropout=0.1, dropout=0.1)
    svi = pyro.infer.SVI(
        vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()
    )
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    for _ in range(5):  # what is zero at first hides what is behind it
        svi.step(rows(40))
    assert not [name for name, p in vae.named_parameters() if torch.equal(p, before[name])]


def test_two_of_them_alive_do_not_share_their_flows():
    one, other = (make((3, 2), name=name) for name in ("one", "other"))
    x = torch.randn(6, 5)
    for vae in (one, other):
        traces(vae, x)
    stored = set(pyro.get_param_store())
    for vae in (one, other):
        assert {f"{vae._pyro_name}.{name}" for name, _ in vae.named_parameters()} <= {
            name.replace("$$$", ".") for name in stored
        }


def loss_and_gradients(vae, objective, x):
    vae.zero_grad()
    pyro.clear_param_store()
    torch.manual_seed(0)
    loss = objective.differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    return float(loss.detach()), {
        n: p.grad for n, p in vae.named_parameters() if p.grad is not None
    }


def test_free_bits_are_those_of_each_level():
    vae, x = listening(make((3, 2))), 3.0 * torch.randn(40, 5)
    torch.manual_seed(0)
    terms = {name: float(value.mean()) for name, value in vae.elbo_terms(x).items()}
    low, high = sorted((terms["z1"], terms["z2"]))
    assert 0 < low < 0.8 * high
    floor = 0.5 * (low + high)  # between the two
    loss, gradients = loss_and_gradients(vae, FreeBitsELBO(floor, 40), x)
    assert loss == pytest.approx(40 * (floor + high - terms["x"]), rel=1e-4)
    above, below = ("0", "1") if terms["z1"] > terms["z2"] else ("1", "0")
    assert all(
        not name.startswith(f"priors.{below}") or not g.any() for name, g in gradients.items()
    )
    assert any(name.startswith(f"priors.{above}") and g.any() for name, g in gradients.items())
    nothing, _ = loss_and_gradients(vae, FreeBitsELBO(1e-6, 40), x)
    assert nothing == pytest.approx(40 * (terms["z1"] + terms["z2"] - terms["x"]), rel=1e-4)


def test_no_level_is_refused():
    with pytest.raises(ValueError, match="at least one level of latents, got no latent_dims"):
        make(())
    with pytest.raises(ValueError, match="likelihood to be one of"):
        make((3, 2), likelihood="poisson")


def test_a_flat_vae_of_the_same_size_has_about_as_many_parameters():
    settings = {"input_dim": 30, "data_size": 9, "latent_dim": 4, "prior": "flow", **FLOWS}
    size = sum(p.numel() for p in make((4, 2), input_dim=30).parameters())
    widths = flat_widths(size, [40, 20], settings)
    count = sum(p.numel() for p in VAE(**settings, hidden_dims=widths).parameters())
    assert abs(count / size - 1) < 0.03 and widths[0] == pytest.approx(2 * widths[1], abs=1)


TINY = ["--fast", "--latent-dim", "4", "--hidden", "16", "--flow-hidden", "8", "--bins", "4"]


def test_the_program_prints_bounds_levels_and_the_difference_from_a_flat_vae(capsys):
    bounds = main([*TINY, "--levels", "3", "--compare-flat", "--gaps", "2"])
    printed = capsys.readouterr().out.splitlines()
    text = "\n".join(printed)
    assert bounds.sizes["obs_id"] == 30
    assert f"{float(bounds['elbo'].mean()):.2f} (" in text and "4 + 2 + 1 latents" in text
    table = printed[printed.index("Levels, on 30 test rows:") + 2 :][:3]
    assert [line.split()[:2] for line in table] == [["z3", "1"], ["z2", "2"], ["z1", "4"]]
    assert "Of 2 test rows" in text and "are the family's (approximation)" in text
    assert "Flat VAE, 7 latents" in text
    assert sum("lower bound" in line for line in printed) == 4
    differences = [line for line in printed if line.startswith(("ELBO, 30", "IWAE-10, 30"))]
    assert len(differences) == 2 and all(": +" in line or ": -" in line for line in differences)


def test_the_program_knows_warm_up_and_free_bits_and_convolutions(capsys):
    main(
        [*TINY, "--kl-warm-up", "0.5", "--free-bits", "2", "--networks", "conv", "--channels", "2"]
    )
    assert "KL in nats per datum" in capsys.readouterr().out
