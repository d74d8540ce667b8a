"""Which sites a weight is made of, and what a bound counts: per datum, per particle, subsampled, scaled."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_flowkit.objectives import AlphaDivergence, ForwardKL, ImportanceWeightedELBO
from tests.objectives import gaussian

VALUES = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64)
OBJECTIVES = {
    "iwae": ImportanceWeightedELBO,
    "alpha": lambda *args, **kwargs: AlphaDivergence(0.5, *args, **kwargs),
    "forward_kl": ForwardKL,
}


class Local:
    """A latent per datum with an amortised guide; remembers its log weights, shape (particles, data)."""

    def __init__(self, size: int = len(VALUES), event: int = 1) -> None:
        self.size, self.event, self.log_w = size, event, []

    def model(self, x: Tensor) -> None:
        with self.plate(x):
            prior = dist.Normal(torch.zeros(self.event, dtype=x.dtype), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            noise = pyro.param("noise", torch.tensor(0.7, dtype=torch.float64))
            likelihood = dist.Normal(z.sum(-1), noise)
            pyro.sample("x", likelihood, obs=x)
        posterior = self.posterior(x)
        log_w = prior.log_prob(z) + likelihood.log_prob(x) - posterior.log_prob(z)
        self.log_w.append(log_w.detach())

    def guide(self, x: Tensor) -> None:
        with self.plate(x):
            pyro.sample("z", self.posterior(x))

    def plate(self, x: Tensor) -> pyro.plate:
        return pyro.plate("data", self.size, subsample=torch.arange(len(x)))

    def posterior(self, x: Tensor) -> dist.Distribution:
        slope = pyro.param("slope", torch.tensor(0.3, dtype=torch.float64))
        loc = (slope * x).unsqueeze(-1).expand(*x.shape, self.event)
        return dist.Normal(loc, 0.8).to_event(1)

    def weights(self) -> Tensor:
        return torch.stack(self.log_w).reshape(-1, *self.log_w[0].shape[-1:])


class Scaled(poutine.messenger.Messenger):
    """Scales single sites of a program."""

    def __init__(self, program, scales: dict[str, float]) -> None:
        super().__init__()
        self.program, self.scales = program, scales

    def __call__(self, *args) -> None:
        with self:
            self.program(*args)

    def _pyro_sample(self, msg) -> None:
        msg["scale"] = msg["scale"] * self.scales.get(msg["name"], 1.0)


def iwae(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("event", [1, 3])
def test_value_is_the_log_mean_exp_of_each_datum(vectorize: bool, event: int) -> None:
    program = Local(event=event)
    options = {"vectorize_particles": vectorize, "max_plate_nesting": 1}
    loss = ImportanceWeightedELBO(8, **options).loss(program.model, program.guide, VALUES)
    log_w = program.weights()
    assert log_w.shape == (8, len(VALUES))
    assert loss == pytest.approx(-float(iwae(log_w).sum()))
    whole_model = -float(iwae(log_w.sum(1)))
    assert loss < whole_model - 0.2


def test_two_plates_around_everything_are_data_together_unless_one_is_chosen() -> None:
    log_w = []

    def model() -> None:
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(4, 3))
            log_w.append(dist.Normal(z, 1.0).log_prob(torch.ones(4, 3)))

    def guide() -> None:
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for plate, inside in ((None, ()), ("rows", (2,)), ("columns", (1,))):
        for vectorize in (False, True):
            log_w.clear()
            objective = ImportanceWeightedELBO(5, plate=plate, vectorize_particles=vectorize)
            loss = objective.loss(model, guide)
            used = log_w[-1] if vectorize else torch.stack(log_w)
            expected = used.sum(inside) if inside else used
            assert loss == pytest.approx(-float(iwae(expected).sum()), rel=1e-5)


def test_sites_in_a_plate_inside_of_the_data_belong_to_their_datum() -> None:
    log_w = []

    def model() -> None:
        with pyro.plate("data", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inside", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(4, 3))
            log_w.append(dist.Normal(z, 1.0).log_prob(torch.ones(4, 3)).sum(-1))

    def guide() -> None:
        with pyro.plate("data", 4, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for vectorize in (False, True):
        log_w.clear()
        loss = ImportanceWeightedELBO(5, vectorize_particles=vectorize).loss(model, guide)
        used = log_w[-1] if vectorize else torch.stack(log_w)
        assert loss == pytest.approx(-float(iwae(used).sum()), rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("annealed", [False, True])
def test_a_subsample_counts_for_all_data_in_value_and_gradient(
    name: str, vectorize: bool, annealed: bool
) -> None:
    found = []
    for size in (len(VALUES), 1000):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        program = Local(size)
        likelihood = {"x": 0.4 if annealed else 1.0}
        model = Scaled(program.model, likelihood)
        objective = OBJECTIVES[name](6, vectorize_particles=vectorize)
        objective.loss_and_grads(model, program.guide, VALUES)
        program.log_w.clear()
        for parameter in ("slope", "noise"):
            pyro.param(parameter).grad = None
        pyro.set_rng_seed(1)
        loss = objective.loss_and_grads(model, program.guide, VALUES)
        gradients = [pyro.param(parameter).grad.item() for parameter in ("slope", "noise")]
        found.append((program.weights(), loss, *gradients))
    assert torch.equal(found[0][0], found[1][0])
    for own, all_data in zip(found[0][1:], found[1][1:], strict=True):
        assert abs(own) > 0.1
        assert all_data == pytest.approx(own * 1000 / len(VALUES))


def test_subsamples_estimate_the_bound_of_all_data() -> None:
    program = Local()
    objective = ImportanceWeightedELBO(3, vectorize_particles=True, max_plate_nesting=1)
    batches = VALUES.reshape(4, 3)
    whole = [objective.loss(program.model, program.guide, VALUES) for _ in range(60)]
    parts = [objective.loss(program.model, program.guide, b) for b in batches for _ in range(60)]
    error = torch.tensor(parts).reshape(4, 60).std(1).square().sum().div(16 * 60).sqrt()
    assert error < 0.3
    assert abs(sum(parts) / 240 - sum(whole) / 60) < 5 * error


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_common_scale_multiplies_the_loss(name: str) -> None:
    losses = []
    for scale in (1.0, 0.01):
        pyro.set_rng_seed(0)
        program = Local()
        model, guide = poutine.scale(program.model, scale), poutine.scale(program.guide, scale)
        losses.append(OBJECTIVES[name](6).loss(model, guide, VALUES))
    assert losses[1] == pytest.approx(0.01 * losses[0]) and abs(losses[0]) > 0.1


def test_masked_data_count_nothing() -> None:
    mask = torch.arange(len(VALUES)) < 5

    def masked(program):
        return poutine.mask(program, mask)

    program = Local()
    loss = ImportanceWeightedELBO(6).loss(masked(program.model), masked(program.guide), VALUES)
    assert loss == pytest.approx(-float(iwae(program.weights())[mask].sum()))


def test_a_global_latent_makes_one_weight_per_particle() -> None:
    log_w = []

    def model(size: int = 4) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size, subsample_size=4):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(4))
        likelihood = dist.Normal(z, 1.0).log_prob(torch.ones(4))
        log_w.append((dist.Normal(loc, 1.0).log_prob(z) + likelihood).sum())

    def guide(size: int = 4) -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size, subsample_size=4):
            z = pyro.sample("z", dist.Normal(0.0, 0.5))
        log_w.append(-dist.Normal(0.0, 0.5).log_prob(z).sum())

    loss = ImportanceWeightedELBO(6).loss(model, guide)
    weights = torch.stack(log_w).reshape(6, 2).sum(1)
    assert loss == pytest.approx(-float(iwae(weights)), rel=1e-5)
    for objective in (ImportanceWeightedELBO(6), AlphaDivergence(0.5, 6), ForwardKL(6)):
        with pytest.raises(ValueError, match="'data'.* a subsample of 4 out of 10"):
            objective.loss(model, guide, 10)
    # Linear in the log weights, so that estimates do no harm:
    assert math.isfinite(AlphaDivergence(1.0, 6).loss(model, guide, 10))
    assert math.isfinite(ImportanceWeightedELBO(1).loss(model, guide, 10))
    with pytest.raises(ValueError, match="inside of the plate 'data', got 'loc' of the model"):
        ImportanceWeightedELBO(6, plate="data").loss(model, guide)


def test_a_plate_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="inside of the plate 'date', got 'z' of the model, 'x'"):
        ForwardKL(plate="date").loss(gaussian.model, gaussian.guide, gaussian.data(3))


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide:UserWarning")
def test_a_latent_without_guide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"for every latent of the model, got none for \['z'\]"):
        ImportanceWeightedELBO().loss(gaussian.model, lambda data: None, gaussian.data(3))


def test_a_model_without_sites_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample site"):
        ImportanceWeightedELBO().loss(lambda: None, lambda: None)
