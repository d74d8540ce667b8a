"""Latents on a circle: the guide knows one turn of each, and its ELBO is a bound, by quadrature."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.guides.circular import MAX_SEARCHED, TURN, CircularAffine, Cut
from pyro_flowkit.guides.latent_vector import LatentDensity
from pyro_flowkit.testing import perturb_
from pyro_flowkit.training import fit

TINY = {"num_transforms": 2, "hidden_dims": [8, 8], "count_bins": 4}
NUM_POINTS = 4000


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def direction(data: Tensor, concentration: float | Tensor = 4.0) -> None:
    theta = pyro.sample("theta", dist.VonMises(scalar(0.0), scalar(0.1)))
    with pyro.plate("rows", len(data)):
        pyro.sample("x", dist.VonMises(theta, concentration + scalar(0.0)), obs=data)


AT_THE_CUT = torch.tensor([3.0, -3.1, 2.6, -2.9, 3.1], dtype=torch.float64)


def make_guide(model=direction, **settings) -> AutoSplineFlow:
    return AutoSplineFlow(model, **{**TINY, **settings})


def log_evidence(data: Tensor, concentration: float) -> float:
    """The trapezoidal rule, which is exact to rounding for a smooth periodic function."""
    grid = torch.arange(NUM_POINTS, dtype=torch.float64) * (TURN / NUM_POINTS)
    log_joint = dist.VonMises(scalar(0.0), scalar(0.1)).log_prob(grid)
    likelihood = dist.VonMises(grid[:, None], scalar(concentration))
    log_joint = log_joint + likelihood.log_prob(data).sum(-1)
    return float(log_joint.logsumexp(0)) + math.log(TURN / NUM_POINTS)


def elbo(guide: AutoSplineFlow, model, *args) -> tuple[float, float]:
    evidence = guide.evidence(*args, num_samples=4000, seed=1)
    return evidence.elbo, evidence.elbo_standard_error


@pytest.mark.parametrize("concentration", [4.0, 0.3])
def test_elbo_is_a_bound_on_the_evidence_and_close_to_it(concentration: float) -> None:
    guide = make_guide(lambda data: direction(data, concentration))
    fit(guide.model, guide, args=(AT_THE_CUT,), max_steps=25, seed=0, progress=False)
    exact = log_evidence(AT_THE_CUT, concentration)
    value, error = elbo(guide, direction, AT_THE_CUT)
    assert value < exact + 4 * error, "no bound: the guide counts more than one turn"
    assert value > exact - 0.06
    draws = guide.sample(2000)["theta"]
    assert float(draws.max() - draws.min()) < TURN


def test_elbo_cannot_grow_by_spreading_over_more_turns() -> None:
    guide = make_guide(lambda: pyro.sample("theta", dist.VonMises(scalar(0.0), scalar(1e-6))))
    guide.setup()
    values = []
    for log_scale in (0.5 * math.log(TURN), 1.5, 2.0):
        with torch.no_grad():
            guide.affine.raw_log_scale.fill_(log_scale / guide.affine.rate)
        values.append(guide.evidence(num_samples=2000, seed=0).elbo)
    assert values[0] == pytest.approx(0.0, abs=1e-3), "the uniform distribution is a normal one"
    assert values[2] < values[1] < -0.2


def test_density_integrates_to_one_over_any_turn() -> None:
    guide = make_guide().setup(AT_THE_CUT)
    perturb_(guide.flow, 0.3)
    with torch.no_grad():
        guide.affine.raw_log_scale.fill_(math.log(0.5) / guide.affine.rate)
    for start in (-math.pi, 0.7, 20.0):
        grid = start + (torch.arange(NUM_POINTS, dtype=torch.float64) + 0.5) * (TURN / NUM_POINTS)
        total = guide.log_prob({"theta": grid}).logsumexp(0) + math.log(TURN / NUM_POINTS)
        assert float(total.detach()) == pytest.approx(0.0, abs=1e-5), start


def test_cut_is_opposite_to_the_mass_and_the_start_at_the_mode() -> None:
    guide = make_guide().setup(AT_THE_CUT)
    mode = torch.atan2(AT_THE_CUT.sin().sum(), AT_THE_CUT.cos().sum())
    assert float((guide.affine.centre[0] - mode).cos()) > 0.99
    assert float((guide.median()["theta"] - mode).cos()) > 0.99
    assert torch.allclose(guide.median()["theta"], guide._init_loc()[0], atol=1e-5)
    low, high = guide.quantiles([0.05, 0.95])["theta"]
    assert 0.1 < float(high - low) < 1.0, "an interval that the cut does not split"


def test_given_start_is_honoured_and_fit_moves_the_cut_away_from_the_mass() -> None:
    start = init_to_value(values={"theta": scalar(0.3)})
    guide = make_guide(init_loc_fn=start, init_scale=0.2).setup(AT_THE_CUT)
    assert float(guide.median()["theta"]) == pytest.approx(0.3, abs=1e-5)
    assert float(guide.get_posterior().variance.sqrt()) == pytest.approx(0.2, rel=0.05)
    guide.find_start(direction, (AT_THE_CUT,))
    value, _ = elbo(guide, direction, AT_THE_CUT)
    assert value == pytest.approx(log_evidence(AT_THE_CUT, 4.0), abs=0.01)
    assert float(guide.median()["theta"].cos()) < -0.99


def test_users_own_loop_trains_on_the_circle() -> None:
    guide = make_guide()
    svi = SVI(
        direction,
        guide,
        pyro.optim.Adam({"lr": 0.01}),
        Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1),
    )
    for _ in range(100):
        svi.step(AT_THE_CUT)
    value, _ = elbo(guide, direction, AT_THE_CUT)
    assert value == pytest.approx(log_evidence(AT_THE_CUT, 4.0), abs=0.03)


def test_angles_and_other_latents_beside_each_other() -> None:
    def model() -> None:
        pyro.sample("scale", dist.LogNormal(scalar(0.0), scalar(0.5)))
        with pyro.plate("two", 2):
            pyro.sample("angles", dist.VonMises(scalar(3.0), scalar(5.0)))
        means = torch.tensor([1.0, -2.0], dtype=torch.float64)
        pyro.sample("z", dist.Normal(means, 0.1).to_event(1))

    guide = make_guide(model).setup()
    assert guide.affine.columns.tolist() == [1, 2]
    perturb_(guide, 0.1)
    x = guide.get_posterior().sample((5,))
    transform = guide.get_transform()
    z = transform.inv(x)
    assert torch.allclose(transform(z), x, atol=1e-9)
    jacobian = torch.func.vmap(torch.func.jacrev(transform))(z)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(transform.log_abs_det_jacobian(z, x), expected, atol=1e-9)
    turned = x + TURN * torch.tensor([0, 1, -3, 0, 0]).to(x)
    posterior = guide.get_posterior()
    assert torch.allclose(posterior.log_prob(turned), posterior.log_prob(x))
    assert not torch.allclose(posterior.log_prob(x + TURN), posterior.log_prob(x))


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_is_a_bijection_of_one_turn(kind, dtype) -> None:
    loc = torch.tensor([0.5, 3.0, -1.0], dtype=dtype)
    layer = CircularAffine(Cut([1], loc[1:2], loc), 1.5, kind)
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, ladj = layer.call_and_ladj(x)
    back, inverse_ladj = layer.inverse_and_ladj(y)
    atol = 2e-3 if dtype == torch.float32 else 1e-10
    assert torch.allclose(back, x, atol=atol) and torch.allclose(-inverse_ladj, ladj, atol=atol)
    assert ((y[:, 1] - 3.0).abs() < math.pi).all() and y[:, 0].max() > 3.0
    far, far_ladj = layer.inverse_and_ladj(loc + torch.tensor([0.0, math.pi, 0.0], dtype=dtype))
    assert far.isfinite().all() and far_ladj.isfinite()


def test_angle_of_a_model_that_is_not_periodic_stays_on_the_line() -> None:
    def model(data: Tensor) -> None:
        theta = pyro.sample("theta", dist.VonMises(scalar(0.0), scalar(1.0)))
        pyro.sample("x", dist.Normal(theta, 0.1), obs=data)

    guide = make_guide(model).setup(scalar(4.0))
    assert not isinstance(guide.affine, CircularAffine)


def test_torus_and_skewed_priors_are_angles() -> None:
    one = scalar(1.0)

    def model() -> None:
        pyro.sample("pair", dist.SineBivariateVonMises(one, one, one, one, correlation=0.3 * one))
        prior = dist.SineSkewed(dist.VonMises(one, one).expand([1]).to_event(1), 0.5 * one[None])
        pyro.sample("skewed", prior)
        pyro.sample("line", dist.Normal(one, one))

    assert make_guide(model).setup().affine.columns.tolist() == [0, 1, 2]


def test_neutra_draws_one_turn_of_the_posterior() -> None:
    guide = perturb_(make_guide().setup(AT_THE_CUT), 0.1)
    reparametrised = NeuTraReparam(guide).reparam(direction)
    trace = poutine.trace(reparametrised).get_trace(AT_THE_CUT)
    z = trace.nodes["theta_shared_latent"]["value"]
    transform = guide.get_transform()
    latent = transform(z)
    expected = LatentDensity(direction, guide, (AT_THE_CUT,))(latent[None])[0]
    expected = expected + transform.log_abs_det_jacobian(z, latent)
    assert torch.allclose(trace.log_prob_sum(), expected, atol=1e-6)


def test_cut_is_saved_with_the_guide() -> None:
    guide = perturb_(make_guide().setup(AT_THE_CUT), 0.1)
    expected = guide.median()["theta"]
    twin = pickle.loads(pickle.dumps(guide))
    assert torch.equal(twin.median()["theta"], expected)
    fresh = make_guide(init_loc_fn=init_to_value(values={"theta": scalar(0.0)}))
    pyro.clear_param_store()
    fresh.setup(AT_THE_CUT)
    fresh.load_state_dict(guide.state_dict())
    assert torch.equal(fresh.median()["theta"], expected)


def test_warm_start_is_cut_opposite_to_the_gaussian() -> None:
    first = AutoDiagonalNormal(direction, init_loc_fn=init_to_value(values={"theta": scalar(3.1)}))
    first(AT_THE_CUT)
    guide = AutoSplineFlow.from_guide(first, **TINY).setup(AT_THE_CUT)
    assert float(guide.affine.centre) == pytest.approx(3.1)
    assert float(guide.median()["theta"]) == pytest.approx(3.1, abs=1e-5)


def test_jit_conversion_and_copies_keep_the_circle() -> None:
    guide = make_guide().float().setup(AT_THE_CUT)
    assert guide.affine.centre.dtype == torch.float32
    assert guide.affine.columns.dtype == torch.int64
    with pyro.validation_enabled(False):
        traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
    pyro.set_rng_seed(3)
    (expected,) = guide.call()
    pyro.set_rng_seed(3)
    (got,) = traced.call()
    assert torch.allclose(got, expected) and float(got.detach().cos()) < -0.5
    assert torch.equal(copy.deepcopy(guide).median()["theta"], guide.median()["theta"])


def test_part_of_a_guide_list_finds_the_angle_beside_latents_that_it_does_not_know() -> None:
    def model(data: Tensor) -> None:
        kappa = pyro.sample("kappa", dist.LogNormal(scalar(1.0), scalar(0.3)))
        direction(data, kappa)

    guides = AutoGuideList(model)
    guides.append(make_guide(poutine.block(model, hide=["kappa"])))
    guides.append(AutoNormal(poutine.block(model, hide=["theta"])))
    guides(AT_THE_CUT)
    assert isinstance(guides[0].affine, CircularAffine)
    assert float(guides[0].median()["theta"].cos()) < -0.9


def test_of_many_angles_some_are_searched_and_all_are_on_the_circle() -> None:
    def model() -> None:
        with pyro.plate("angles", MAX_SEARCHED + 2):
            pyro.sample("theta", dist.VonMises(scalar(2.0), scalar(3.0)))

    guide = make_guide(model).setup()
    assert guide.affine.columns.tolist() == list(range(MAX_SEARCHED + 2))
    searched = guide.affine.centre[:MAX_SEARCHED]
    assert torch.allclose(searched, scalar(2.0), atol=0.15)
    x = guide.sample(3)["theta"]
    assert guide.log_prob({"theta": x}).isfinite().all()
