"""A guide with several components: both modes are found with their weights, and the gradient is that of the ELBO."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam, ClippedAdam

from pyro_flowkit import fit
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.gaussian import Gaussian
from pyro_flowkit.guides.modes import Mode, spread
from pyro_flowkit.objectives import ForwardKL
from pyro_flowkit.programs.pairs import vectorized
from pyro_flowkit.testing import perturb_
from pyro_flowkit.training import Callback

TINY = {"num_transforms": 2, "hidden_dims": [8], "num_components": 2}
GRID = torch.linspace(-14.0, 14.0, 4001)[:, None]


def square():
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    pyro.sample("o", dist.Normal(x**2, 4.0), obs=torch.tensor(100.0))


def unequal():
    """.3 N(-6, 1) + .7 N(6, 1), whatever the prior."""
    z = pyro.sample("z", dist.Normal(0.0, 5.0))
    bumps = dist.Normal(torch.tensor([-6.0, 6.0]), 1.0).log_prob(z.unsqueeze(-1))
    target = (bumps + torch.tensor([0.3, 0.7]).log()).logsumexp(-1)
    pyro.factor("target", target - dist.Normal(0.0, 5.0).log_prob(z))


def as_a_site():
    weights, bumps = dist.Categorical(torch.tensor([0.3, 0.7])), torch.tensor([-6.0, 6.0])
    pyro.sample("z", dist.MixtureSameFamily(weights, dist.Normal(bumps, 1.0)))


def check(guide, log_evidence, below_zero):
    """The evidence, and the share of the draws that is in the mode below zero."""
    evidence = guide.evidence(seed=0)
    assert evidence.log_evidence == pytest.approx(log_evidence, abs=0.02)
    assert evidence.elbo == pytest.approx(log_evidence, abs=0.02)
    (draws,) = guide.sample(20_000).values()
    assert float((draws < 0).float().mean()) == pytest.approx(below_zero, abs=0.05)


@pytest.mark.parametrize(
    ("model", "log_evidence", "below_zero"),
    [(square, -6.0235, 0.5), (unequal, 0.0, 0.3), (as_a_site, 0.0, 0.3)],
)
def test_fit_finds_both_modes_and_their_weights(model, log_evidence, below_zero):
    guide = AutoSplineFlow(model, **TINY)
    fit(model, guide, max_steps=30, seed=1, progress=False)
    check(guide, log_evidence, below_zero)


@pytest.mark.parametrize(("num_particles", "steps"), [(1, 400), (8, 200)])
def test_weights_that_are_wrong_are_learned_in_a_loop_of_ones_own(num_particles, steps):
    guide = AutoSplineFlow(unequal, **TINY).setup()
    guide.mixture.restart([0.0, 0.0])
    elbo = Trace_ELBO(num_particles, vectorize_particles=num_particles > 1)
    svi = SVI(unequal, guide, ClippedAdam({"lr": 0.02}), elbo)
    for _ in range(steps):
        svi.step()
    check(guide, 0.0, 0.3)


def test_fit_learns_weights_that_are_wrong():
    guide = AutoSplineFlow(unequal, **TINY).setup()
    guide.find_start(unequal)
    guide.mixture.restart([0.0, 1.0])
    perturb_(guide.flow, 0.01)  # no fresh Gaussian: it stays where it is
    fit(unequal, guide, lr=0.02, num_particles=16, max_steps=100, progress=False)
    check(guide, 0.0, 0.3)


def test_several_sites_have_a_hierarchy_in_every_mode():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        y = pyro.sample("y", dist.Normal(0.5 * x, 1.0))
        pyro.sample("o", dist.Normal(x**2, 4.0), obs=torch.tensor(100.0))
        pyro.sample("p", dist.Normal(y, 1.0), obs=torch.tensor(0.0))

    guide = AutoSplineFlow(model, **TINY)
    fit(model, guide, max_steps=30, seed=0, progress=False)
    assert len(guide.components) == 2 and guide.components[1].hierarchy is not None
    draws = guide.sample(4000)
    right = draws["x"] > 0
    assert float(right.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(draws["y"][right].mean()) == pytest.approx(2.5, abs=0.1)
    assert float(draws["y"][~right].mean()) == pytest.approx(-2.5, abs=0.1)


def overlapping_guide(**settings):
    """Two bent components that overlap, of different weights."""

    def model():
        pyro.sample("z", dist.StudentT(4.0, 0.3, 1.2))

    guide = AutoSplineFlow(model, **TINY, **settings).setup()
    with torch.no_grad():
        for component, loc in zip(guide.components, (-1.0, 1.5), strict=True):
            perturb_(component.flow, 0.3)
            component.affine.restart(torch.tensor([loc]), torch.tensor([[0.8]]))
            component.pace.is_resting = True  # gradients keep their size
    guide.mixture.restart([0.0, 0.8])
    return model, guide


def parameters_of(guide):
    first, second = guide.components
    return [
        guide.mixture.logits,
        *(c.affine.raw_loc for c in (first, second)),
        *(c.affine.raw_log_scale for c in (first, second)),
        *(next(c.flow.parameters()) for c in (first, second)),
    ]


def test_the_density_integrates_to_one_and_is_that_of_the_draws():
    _, guide = overlapping_guide()
    with torch.no_grad():
        density = guide.get_posterior().log_prob(GRID).exp()
    assert float(torch.trapezoid(density, GRID[:, 0])) == pytest.approx(1.0, abs=1e-4)
    mean = torch.trapezoid(density * GRID[:, 0], GRID[:, 0])
    for posterior in (guide.get_posterior(), guide.get_posterior().expand((3, 1))):
        draws = posterior.sample((20_000,))
        assert draws.shape == (20_000, *posterior.batch_shape, 1)
        assert float(draws.mean()) == pytest.approx(float(mean), abs=0.05)
        assert posterior.log_prob(draws).shape == (20_000, *posterior.batch_shape)
        fresh = posterior.rsample((20_000,)).detach()
        assert float(fresh.mean()) == pytest.approx(float(mean), abs=0.05)


@pytest.mark.parametrize("favours_path", [True, False])
@pytest.mark.parametrize("stratified", [True, False])
def test_the_gradient_is_that_of_the_elbo(stratified, favours_path):
    model, guide = overlapping_guide()
    learned = parameters_of(guide)
    log_q = guide.get_posterior().log_prob(GRID)
    log_p = dist.StudentT(4.0, 0.3, 1.2).log_prob(GRID[:, 0])
    loss = torch.trapezoid(log_q.exp() * (log_q - log_p), GRID[:, 0])
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned)]).detach()

    count = 1000
    elbo = Trace_ELBO(count, max_plate_nesting=0, vectorize_particles=True)
    programs = model, guide
    if stratified:
        program = vectorized(model, guide, (), {})
        elbo, programs = guide.elbo(program, count), (program, guide)
    found, losses = [], []
    for _ in range(41):
        for component in guide.components:
            component.noise_squares.copy_(torch.tensor([0.0, 1.0] if favours_path else [1.0, 0.0]))
        value = elbo.differentiable_loss(*programs)
        gradients = torch.autograd.grad(value, learned)
        found.append(torch.cat([g.flatten() for g in gradients]))
        losses.append(value.item())
    found = torch.stack(found[1:])  # the baselines have seen a draw
    error = found.std(0) / len(found) ** 0.5
    assert sum(losses) / len(losses) == pytest.approx(loss.item(), abs=0.01)
    assert float(((found.mean(0) - exact).abs() / (error + 1e-4)).max()) < 4.5
    assert float(error[0]) < 0.02 * float(exact[0].abs()) + 0.002


def test_the_gradient_of_the_weights_is_unbiased_with_one_particle():
    model, guide = overlapping_guide()
    logits = guide.mixture.logits
    log_q = guide.get_posterior().log_prob(GRID)
    log_p = dist.StudentT(4.0, 0.3, 1.2).log_prob(GRID[:, 0])
    loss = torch.trapezoid(log_q.exp() * (log_q - log_p), GRID[:, 0])
    (exact,) = torch.autograd.grad(loss, logits)
    elbo, found = Trace_ELBO(), []
    for _ in range(400):
        value = elbo.differentiable_loss(model, guide)
        found.append(torch.autograd.grad(value, logits)[0])
    found = torch.stack(found[20:])
    error = found.std(0) / len(found) ** 0.5
    assert torch.all((found.mean(0) - exact).abs() < 3.5 * error)


def test_at_the_posterior_there_is_no_noise():
    """Both Gaussians in their place: every gradient is zero at every draw, that of the weights, too."""
    guide = AutoSplineFlow(as_a_site, **TINY).setup()
    for component, loc in zip(guide.components, (6.0, -6.0), strict=True):
        component.affine.restart(torch.tensor([loc]), torch.eye(1))
        component.pace.is_resting = True
        component.noise_squares.copy_(torch.tensor([0.0, 1.0]))
    guide.mixture.restart(torch.tensor([0.7, 0.3]).log().tolist())
    elbo = Trace_ELBO(16, max_plate_nesting=0, vectorize_particles=True)
    for _ in range(3):
        loss = elbo.differentiable_loss(as_a_site, guide)
        gradients = torch.autograd.grad(loss, parameters_of(guide))
        assert loss.item() == pytest.approx(0.0, abs=1e-4)
        assert all(float(g.abs().max()) < 1e-3 for g in gradients)


def test_a_component_without_a_draw_does_not_move():
    guide = AutoSplineFlow(square, **TINY).setup()
    guide.mixture.restart([0.0, 0.0])
    svi = SVI(square, guide, Adam({"lr": 0.02}), Trace_ELBO())
    moved = []
    for _ in range(12):
        before = [c.affine.loc.item() for c in guide.components]
        svi.step()
        guide.get_posterior()  # takes back what is too far
        moved.append(
            [c.affine.loc.item() != b for c, b in zip(guide.components, before, strict=True)]
        )
    assert all(sum(pair) == 1 for pair in moved)
    assert {pair.index(True) for pair in moved} == {0, 1}


def test_components_start_at_the_modes_with_their_share():
    guide = AutoSplineFlow(unequal, init_scale=0.2, **TINY).setup()
    first, second = guide.components
    assert first.affine.loc.item() == pytest.approx(6.0, abs=0.01)
    assert second.affine.loc.item() == pytest.approx(-6.0, abs=0.01)
    assert second.affine.scale.item() == pytest.approx(0.2)
    assert guide.mixture.log_weights.exp().tolist() == pytest.approx([0.7, 0.3], abs=0.01)


def test_without_a_second_mode_components_start_side_by_side():
    def model():
        pyro.sample("z", dist.Normal(torch.tensor([1.0, -2.0, 3.0]), 2.0).to_event(1))

    guide = AutoSplineFlow(model, **{**TINY, "num_components": 3}).setup()
    guide.find_start(model)
    locs = torch.stack([c.affine.loc.detach() for c in guide.components])
    assert torch.pdist(locs).min() > 0.5 and torch.pdist(locs).max() < 2.1
    assert guide.mixture.log_weights.exp().tolist() == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert guide.evidence(seed=0).elbo > -0.05


def test_components_share_the_largest_mode_where_there_are_too_few():
    def mode(loc, elbo):
        return Mode(Gaussian(torch.tensor([loc]), torch.ones(1)), elbo)

    found = spread([mode(5.0, 0.0), mode(-5.0, -1.0), mode(20.0, -30.0)], 3)
    assert [round(float(place.gaussian.loc), 1) for place in found][::2] == [5.0, -5.0]
    assert abs(float(found[1].gaussian.loc) - 5.0) == pytest.approx(0.5)
    assert sum(torch.tensor([p.elbo for p in found[:2]]).exp()) == pytest.approx(1.0)
    assert len(spread([mode(5.0, float("-inf"))], 2)) == 2


def test_more_modes_than_components_are_said():
    def model():
        bumps = dist.Normal(torch.tensor([-20.0, 0.0, 20.0]), 1.0)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(3) / 3), bumps))

    guide = AutoSplineFlow(model, **TINY)
    with pytest.warns(UserWarning, match="3 separate modes.*follows the first 2.*num_components=3"):
        fit(model, guide, max_steps=5, progress=False)


def test_a_mixture_that_got_worse_goes_back_to_its_gaussians():
    guide = AutoSplineFlow(unequal, **TINY).setup()
    start = guide.find_start(unequal)
    guide.mixture.restart([0.0, 3.0])
    assert start is not None and not start.keep_better()
    assert guide.mixture.log_weights.exp().tolist() == pytest.approx([0.7, 0.3], abs=0.01)


def test_summaries_are_those_of_both_modes():
    guide = AutoSplineFlow(unequal, **TINY).setup()
    guide.find_start(unequal)
    quantiles = guide.quantiles([0.15, 0.65])["z"]
    assert quantiles.tolist() == pytest.approx([-6.0, 6.0], abs=0.1)
    assert torch.equal(guide.quantiles([0.15, 0.65])["z"], quantiles)
    posterior = guide.get_posterior()
    assert float(posterior.mean) == pytest.approx(2.4, abs=0.05)
    assert float(posterior.variance) == pytest.approx(1.0 + 144 * 0.21, abs=0.3)
    assert float((guide.resample(2000, seed=0)["z"] < 0).float().mean()) == pytest.approx(
        0.3, abs=0.05
    )
    values = {"z": torch.tensor([-6.0, 6.0])}
    assert guide.log_prob(values).exp().tolist() == pytest.approx([0.1197, 0.2793], abs=2e-3)


def test_copies_pickles_states_and_the_store_carry_every_component(tmp_path):
    model, guide = overlapping_guide()
    expected = guide.get_posterior().log_prob(GRID).detach()
    pyro.get_param_store().save(tmp_path / "store")
    loaded = pickle.loads(pickle.dumps(guide))
    for other in (copy.deepcopy(guide), loaded):
        assert torch.allclose(other.get_posterior().log_prob(GRID), expected)
    state = guide.state_dict()
    del guide, other, loaded
    pyro.clear_param_store()
    twin = AutoSplineFlow(model, **TINY).setup()
    twin.load_state_dict(state)
    assert torch.allclose(twin.get_posterior().log_prob(GRID), expected)
    del twin
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    again = AutoSplineFlow(model, **TINY)
    again()
    assert torch.allclose(again.get_posterior().log_prob(GRID), expected)


class StopsAt(Callback):
    def on_step(self, state):
        if state.step == 12:
            raise KeyboardInterrupt


def test_a_resumed_fit_ends_bit_for_bit_where_it_would_have(tmp_path):
    def run(folder, **settings):
        pyro.clear_param_store()
        guide = AutoSplineFlow(unequal, **TINY)
        options = {"max_steps": 25, "num_particles": 8, "lr": 0.02, "seed": 3, "progress": False}
        fit(unequal, guide, checkpoint_dir=folder, **options, **settings)
        return guide.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", callbacks=[StopsAt()])
    resumed = run(tmp_path / "parts", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_wrong_numbers_of_components_are_refused():
    for wrong in (0, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match=r"num_components to be an int >= 1, got"):
            AutoSplineFlow(square, num_components=wrong)


def test_what_needs_one_map_is_refused_in_words():
    guide = AutoSplineFlow(square, **TINY).setup()
    for ask in (guide.get_transform, guide.get_base_dist, NeuTraReparam(guide).reparam(square)):
        with pytest.raises(ValueError, match="Expected num_components=1, got 2: a mixture"):
            ask()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="the place of JitTrace_ELBO"):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        SVI(square, guide, Adam({"lr": 0.01}), JitTrace_ELBO()).step()
    normal = AutoNormal(square)
    normal()
    with pytest.raises(ValueError, match="Expected num_components=1, got 2: one Gaussian"):
        AutoSplineFlow.from_guide(normal, num_components=2)


def test_angles_are_refused_in_words():
    def model():
        pyro.sample("angle", dist.VonMises(0.0, 1.0))

    with pytest.raises(ValueError, match="Expected num_components=1 for a model with angles"):
        AutoSplineFlow(model, **TINY).setup()


def test_objectives_that_cannot_learn_the_weights_are_refused():
    guide = AutoSplineFlow(unequal, **TINY)
    for objective in (RenyiELBO(num_particles=2), JitTrace_ELBO()):
        with pytest.raises(
            ValueError, match=f"Expected Trace_ELBO .* got {type(objective).__name__}"
        ):
            fit(unequal, guide, objective=objective, max_steps=1, progress=False)


def test_forward_kl_learns_the_weights():
    guide = AutoSplineFlow(unequal, init_scale=1.0, **TINY).setup()
    guide.mixture.restart([0.0, 0.0])
    svi = SVI(unequal, guide, Adam({"lr": 0.02}), ForwardKL(32, vectorize_particles=True))
    for _ in range(100):
        svi.step()
    assert guide.mixture.log_weights.exp().tolist() == pytest.approx([0.7, 0.3], abs=0.1)


def test_a_start_that_was_given_is_one_of_the_modes():
    start = init_to_value(values={"x": torch.tensor(9.0)})
    guide = AutoSplineFlow(square, init_loc_fn=start, **TINY).setup()
    places = sorted(c.affine.loc.item() for c in guide.components)
    assert places == pytest.approx([-10.0, 10.0], abs=0.1)
