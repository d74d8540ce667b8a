"""``poutine.scale`` of any type: around a datum it multiplies the bound, around some sites it is a power inside."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_flowkit.objectives import AlphaDivergence, ForwardKL, ImportanceWeightedELBO
from pyro_flowkit.training.messengers import KLWeight

X = torch.tensor([-2.0, -0.5, 0.7, 2.4], dtype=torch.float64)
K = 6
OBJECTIVES = {
    "iwae": ImportanceWeightedELBO(K),
    "plain gradient": ImportanceWeightedELBO(K, doubly_reparameterized=False),
    "alpha": AlphaDivergence(0.5, K),
    "forward_kl": ForwardKL(K),
    "stacked": ImportanceWeightedELBO(K, vectorize_particles=True, max_plate_nesting=1),
}
SCALES = {
    "number": 3.0,
    "tensor": torch.tensor(3.0),
    "weighted data": torch.tensor([3.0, 3.0, 1.0, 1.0]),
}


def scaled(scale):
    return contextlib.nullcontext() if scale is None else poutine.scale(scale=scale)


def likelihood_of(z):
    return dist.Normal(z, 0.5)


def posterior(x):
    loc = pyro.param("slope", torch.tensor(0.8, dtype=torch.float64)) * x
    return dist.Normal(loc, 0.7)


def programs(scale=None, beta=None):
    """Model and guide with a scale around both, and one around the latents."""

    def model(x):
        with pyro.plate("data", len(x)), scaled(scale):
            with scaled(beta):
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", likelihood_of(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), scaled(scale), scaled(beta):
            pyro.sample("z", posterior(x))

    return model, guide


def expected(objective, seed, beta=1.0):
    """What the objective is for each datum, from draws of the same noise."""
    pyro.set_rng_seed(seed)
    posterior_ = posterior(X)
    if objective.vectorize_particles:
        z = posterior_.expand([K, len(X)]).sample()
    else:
        z = torch.stack([posterior_.sample() for _ in range(K)])
    log_w = dist.Normal(0.0, 1.0).log_prob(z) - posterior_.log_prob(z)
    log_w = (likelihood_of(z).log_prob(X) + beta * log_w).detach()
    if isinstance(objective, ForwardKL):
        v = torch.softmax(log_w, 0)
        return (v * (K * v).log()).sum(0)
    s = 1.0 - objective.alpha
    return -((s * log_w).logsumexp(0) - math.log(K)) / s


def loss_and_gradient(objective, scale, seed=0, beta=None):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    loss = objective.loss_and_grads(*programs(scale, beta), X)
    return loss, float(pyro.param("slope").grad)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_around_each_datum_multiplies_its_bound(name, scale):
    objective, scale = OBJECTIVES[name], SCALES[scale]
    loss, gradient = loss_and_gradient(objective, scale)
    assert loss == pytest.approx(float((scale * expected(objective, 0)).sum()), abs=1e-9)
    total = 0.0
    for row, factor in enumerate(torch.as_tensor(scale).expand(4).tolist()):
        only = torch.full((4,), 1e-12, dtype=torch.float64)
        only[row] = 1.0
        total += factor * loss_and_gradient(objective, only)[1]
    assert gradient == pytest.approx(total, abs=1e-9) and abs(gradient) > 1e-3


@pytest.mark.parametrize("scale", SCALES)
def test_no_bound_of_weighted_data_passes_their_evidence(scale):
    scale = torch.as_tensor(SCALES[scale])
    evidence = dist.Normal(0.0, math.sqrt(1.25)).log_prob(X)
    floor = -float((scale * evidence).sum())
    objective = ImportanceWeightedELBO(50, vectorize_particles=True, max_plate_nesting=1)
    losses = [objective.loss(*programs(scale), X) for _ in range(20)]
    error = torch.tensor(losses).std() / 20**0.5
    assert floor - 4 * error < sum(losses) / 20 < floor + 0.2


@pytest.mark.parametrize(
    ("scale", "floor"),
    [(3.0, 19.062), (torch.tensor(3.0), 19.062), (torch.tensor([3.0, 3.0, 1.0, 1.0]), 11.348)],
)
def test_four_rows_with_weights_have_a_loss_right_above_their_evidence(scale, floor):
    # a tensor gave 17.077 and 10.360, below minus the log evidence
    x = torch.tensor([-1.0, 0.3, 0.7, 2.0], dtype=torch.float64)
    evidence = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x)
    assert -float((scale * evidence).sum()) == pytest.approx(floor, abs=1e-3)
    pyro.set_rng_seed(0)
    objective = ImportanceWeightedELBO(50, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([objective.loss(*programs(scale), x) for _ in range(100)])
    error = losses.std() / 10.0
    assert floor - 4 * error < losses.mean() < floor + 0.1 + 4 * error
    assert error < 0.1


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0), torch.tensor([3.0, 3.0, 1.0, 1.0])])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "forward_kl"])
def test_annealing_inside_of_a_scale_is_a_power_and_the_scale_is_not(name, scale):
    objective = OBJECTIVES[name]
    loss, _ = loss_and_gradient(objective, scale, beta=0.5)
    assert loss == pytest.approx(float((scale * expected(objective, 0, 0.5)).sum()), abs=1e-9)


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_a_kl_weight_of_fit_is_a_power_inside_of_the_users_scale(weight):
    kl_weight = KLWeight()
    kl_weight.weight = weight
    model, guide = map(kl_weight, programs(2.0))
    pyro.set_rng_seed(0)
    loss = ImportanceWeightedELBO(K).loss(model, guide, X)
    expected_loss = 2.0 * expected(ImportanceWeightedELBO(K), 0, weight)
    assert loss == pytest.approx(float(expected_loss.sum()), abs=1e-9)


def test_a_scale_that_varies_inside_of_a_weight_is_refused():
    scale = torch.tensor([3.0, 3.0, 1.0, 1.0])

    def model():
        with pyro.plate("data", 2, dim=-2), pyro.plate("inside", 4, dim=-1), scaled(scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2, 4))

    def guide():
        with pyro.plate("data", 2, dim=-2), pyro.plate("inside", 4, dim=-1), scaled(scale):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert math.isfinite(ImportanceWeightedELBO(3).loss(model, guide))
    assert math.isfinite(ImportanceWeightedELBO(1, plate="data").loss(model, guide))
    with pytest.raises(ValueError, match=r"got shape \(4,\) at 'z'.*scale the likelihood alone"):
        ImportanceWeightedELBO(3, plate="data").loss(model, guide)
