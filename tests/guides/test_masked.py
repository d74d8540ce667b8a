"""Masked latents: what the model gives no density has no log q, so that the ELBO is a bound, by exact evidences."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor

from pyro_flowkit.diagnostics import evidence_bounds
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.testing import perturb_
from pyro_flowkit.training import fit

TINY = {"num_transforms": 2, "hidden_dims": [8, 8], "count_bins": 4}

Y = torch.tensor([1.9, 0.3, 0.0, 2.1, 1.6, 0.0, 2.4, 1.1])
SEEN = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1]).bool()


def missing(y: Tensor, seen: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)


def missing_evidence(y: Tensor, seen: Tensor) -> float:
    count = int(seen.sum())
    covariance = 4.0 * torch.ones(count, count) + torch.eye(count)
    return float(dist.MultivariateNormal(torch.zeros(count), covariance).log_prob(y[seen]))


KEEP = torch.tensor([True, False, True, True, False])


def summed(x: Tensor, keep: Tensor) -> None:
    with pyro.plate("terms", 5), poutine.mask(mask=keep):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    total = torch.where(keep, z, 0.0).sum(-1, keepdim=True)
    pyro.sample("x", dist.Normal(total, 0.5), obs=x)


def summed_evidence(x: Tensor, keep: Tensor) -> float:
    return float(dist.Normal(0.0, math.sqrt(float(keep.sum()) + 0.25)).log_prob(x))


PADDED = torch.linspace(-1.5, 2.0, 20)
FIRST = torch.arange(20) < 10


def padded(x: Tensor, keep: Tensor) -> None:
    with pyro.plate("rows", len(x)), poutine.mask(mask=keep):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def padded_evidence(x: Tensor, keep: Tensor) -> float:
    return float(dist.Normal(0.0, math.sqrt(1.25)).log_prob(x[keep]).sum())


PROGRAMS = [
    pytest.param(missing, (Y, SEEN), missing_evidence(Y, SEEN), 3, id="obs_mask"),
    pytest.param(
        summed,
        (torch.tensor([2.0]), KEEP),
        summed_evidence(torch.tensor([2.0]), KEEP),
        3,
        id="plate",
    ),
    pytest.param(padded, (PADDED, FIRST), padded_evidence(PADDED, FIRST), 10, id="padding"),
]


def make_guide(model, **settings) -> AutoSplineFlow:
    return AutoSplineFlow(model, **{**TINY, **settings})


def check_bound(model, guide, args, exact: float, slack: float) -> None:
    evidence = guide.evidence(*args, num_samples=2000, seed=0)
    assert evidence.elbo < exact + 4 * evidence.elbo_standard_error + 1e-3
    assert evidence.elbo > exact - slack
    assert evidence.log_evidence == pytest.approx(exact, abs=max(0.02, slack / 4))
    traced = evidence_bounds(model, guide, args=args, num_samples=2000, seed=0)
    assert float(traced.elbo) == pytest.approx(evidence.elbo, abs=max(0.02, slack / 2))


def test_exact_evidence_with_missing_rows() -> None:
    assert missing_evidence(Y, SEEN) == pytest.approx(-8.874, abs=5e-4)


@pytest.mark.parametrize(("model", "args", "exact", "size"), PROGRAMS)
def test_fit_ends_at_the_exact_evidence(model, args, exact: float, size: int) -> None:
    guide = make_guide(model)
    fit(model, guide, args=args, max_steps=10, lr=2e-5, seed=0, progress=False)
    assert guide.latent_dim == size, "idle elements are no part of the vector"
    check_bound(model, guide, args, exact, slack=0.02)


@pytest.mark.parametrize(("model", "args", "exact", "size"), PROGRAMS)
def test_plain_loop_stays_below_the_exact_evidence_and_comes_near(
    model, args, exact: float, size: int
) -> None:
    guide = make_guide(model, hierarchical=False)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.02}), elbo)
    for _ in range(150):
        svi.step(*args)
    check_bound(model, guide, args, exact, slack=0.4)


def test_posterior_with_missing_rows_is_the_exact_one() -> None:
    guide = make_guide(missing)
    fit(missing, guide, args=(Y, SEEN), max_steps=10, lr=1e-4, seed=0, progress=False)
    draws = guide.sample(4000)
    assert float(draws["mu"].mean()) == pytest.approx(1.504, abs=0.03)
    assert float(draws["mu"].std()) == pytest.approx(0.400, abs=0.02)
    imputed = draws["y_unobserved"]
    assert imputed.shape == (4000, 8)
    assert float(imputed[:, ~SEEN].std()) == pytest.approx(math.sqrt(1.16), abs=0.05)
    assert torch.equal(imputed[:, SEEN], imputed[:1, SEEN].expand(4000, -1))


@pytest.mark.parametrize("vectorize", [True, False])
def test_log_density_of_every_site_is_that_of_the_kept_elements_alone(vectorize: bool) -> None:
    def model(keep: Tensor) -> None:
        with pyro.plate("rows", 4), poutine.mask(mask=keep):
            pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        pyro.sample("inside", dist.LogNormal(torch.zeros(4), 1.0).mask(keep).to_event(1))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    keep = torch.tensor([True, False, True, True])
    guide = perturb_(make_guide(model).setup(keep), 0.1)
    assert guide.latent_dim == 3 + 6 + 3
    short = make_guide(
        lambda: (
            pyro.sample("scale", dist.LogNormal(torch.zeros(3), 1.0).to_event(1)),
            pyro.sample("shares", dist.Dirichlet(torch.ones(3, 3)).to_event(1)),
            pyro.sample("inside", dist.LogNormal(torch.zeros(3), 1.0).to_event(1)),
        )
    )
    with pyro.get_param_store().scope():
        short.setup()
    short.load_state_dict(guide.state_dict())
    draws = guide.sample(5)
    kept = {name: value[:, keep] for name, value in draws.items()}
    assert torch.allclose(guide.log_prob(draws), short.log_prob(kept), atol=1e-4)
    elbo = Trace_ELBO(4, vectorize_particles=vectorize, max_plate_nesting=1)
    traces = list(elbo._get_traces(model, guide, (keep,), {}))
    for _, trace in traces:
        values = {name: trace.nodes[name]["value"].detach() for name in draws}
        values["scale"], values["shares"] = (
            values[n][..., keep, :] if n == "shares" else values[n][..., keep]
            for n in ("scale", "shares")
        )
        values["inside"] = values["inside"].reshape(-1, 4)[:, keep]
        values = {n: v.reshape(-1, *kept[n].shape[1:]) for n, v in values.items()}
        assert float(trace.log_prob_sum().detach()) == pytest.approx(
            float(short.log_prob(values).sum().detach()), abs=1e-3
        )


def test_masked_latent_that_the_model_depends_on_has_a_flat_density() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    guide = make_guide(model)
    args = (torch.tensor([3.0, -1.0]),)
    fit(model, guide, args=args, max_steps=10, lr=2e-5, seed=0, progress=False)
    assert guide.latent_dim == 2
    assert guide.evidence(*args, seed=0).log_evidence == pytest.approx(0.0, abs=1e-3)
    assert torch.allclose(guide.median()["z"], args[0], atol=0.02)


def test_idle_and_flat_elements_of_one_site_are_told_apart() -> None:
    def model(keep: Tensor) -> None:
        with pyro.plate("terms", 5), poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., :3], 1.0).to_event(1), obs=torch.zeros(3))

    guide = make_guide(model).setup(KEEP)
    assert guide.idle.columns.tolist() == [0, 1, 2, 3], "1 is flat, 4 is idle"


def test_call_with_another_mask_is_an_error_that_names_the_site() -> None:
    guide = make_guide(missing).setup(Y, SEEN)
    guide(Y, SEEN)
    guide(Y + 1.0, SEEN.clone())
    with pytest.raises(ValueError, match=r"mask of 'y_unobserved'.*2 of 8 .*got 3 of 8"):
        guide(Y, SEEN & (Y != 1.9))
    seen = SEEN.clone()
    guide(Y, seen)
    seen[0] = False
    with pytest.raises(ValueError, match="y_unobserved"):
        guide(Y, seen)


def test_model_without_its_observations_can_be_predicted_from() -> None:
    def model(y: Tensor | None, seen: Tensor | None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", 8):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    guide = make_guide(model)
    fit(model, guide, args=(Y, SEEN), max_steps=10, lr=1e-4, seed=0, progress=False)
    draws = Predictive(model, guide=guide, num_samples=400)(None, None)
    assert float(draws["y"].mean()) == pytest.approx(1.504, abs=0.15)


def test_mask_that_depends_on_a_latent_is_refused() -> None:
    def model() -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=z > 0):
                pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match="mask of 'y' to be data"):
        make_guide(model).setup()


def test_model_of_masked_latents_alone_is_refused() -> None:
    def model() -> None:
        with pyro.plate("rows", 3), poutine.mask(mask=False):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(RuntimeError, match="only masked ones"):
        make_guide(model).setup()


def test_part_of_a_list_sees_what_the_whole_model_depends_on() -> None:
    def model() -> None:
        mu = pyro.sample(
            "mu", dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False])).to_event(1)
        )
        pyro.sample("z", dist.Normal(mu.sum(-1), 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    guide = AutoGuideList(model)
    guide.append(make_guide(poutine.block(model, expose=["mu"])))
    guide.append(AutoNormal(poutine.block(model, expose=["z"])))
    guide()
    assert guide[0].latent_dim == 2, "z depends on the masked element"
    with pytest.raises(ValueError, match="AutoGuideList"):
        make_guide(poutine.block(model, expose=["mu"])).setup()


def test_copies_pickles_and_jit_keep_masked_elements_out() -> None:
    guide = perturb_(make_guide(missing).setup(Y, SEEN), 0.1)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = guide(Y, SEEN)
            torch.manual_seed(0)
            got = other(Y, SEEN)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    svi = SVI(
        missing, guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO(ignore_jit_warnings=True)
    )
    losses = [svi.step(Y, SEEN) for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)


def test_double_and_warm_start_know_of_masked_elements() -> None:
    normal = AutoNormal(missing)
    normal(Y, SEEN)
    guide = AutoSplineFlow.from_guide(normal, **TINY).double().setup(Y, SEEN)
    assert guide.latent_dim == 3
    draws = guide.sample(3)
    assert draws["mu"].dtype == torch.float64
    assert guide.log_prob(draws).shape == (3,)
