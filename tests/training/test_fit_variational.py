"""``fit`` with a model and guide: the exact answers of conjugate models, minibatches, plates."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, pyro_method

from pyro_flowkit import SplineFlow
from pyro_flowkit.guides import AutoSplineFlow, Recipe
from pyro_flowkit.training import Callback, FitState, fit
from pyro_flowkit.training.data import split_rows

SIGMA = 0.7


@pytest.fixture
def rows() -> torch.Tensor:
    return 1.5 + SIGMA * torch.randn(200, generator=torch.Generator().manual_seed(1))


def full_model(x: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, SIGMA), obs=x)


def sized_model(size: int):
    def model(x: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mu, SIGMA), obs=x)

    return model


def exact(x: torch.Tensor) -> tuple[float, float, float]:
    """Posterior mean, posterior standard deviation and log evidence of ``full_model``."""
    variance = 1.0 / (1.0 + len(x) / SIGMA**2)
    mean = variance * float(x.sum()) / SIGMA**2
    cov = SIGMA**2 * torch.eye(len(x), dtype=torch.float64) + 1.0
    evidence = dist.MultivariateNormal(torch.zeros(len(x), dtype=torch.float64), cov).log_prob(
        x.double()
    )
    return mean, math.sqrt(variance), float(evidence)


def posterior(guide: AutoNormal, *args: torch.Tensor) -> tuple[float, float]:
    low, mid, high = guide.quantiles([0.1587, 0.5, 0.8413], *args)["mu"].tolist()
    return mid, (high - low) / 2


def test_conjugate_gaussian_reaches_exact_posterior_and_evidence(rows: torch.Tensor) -> None:
    guide = AutoNormal(full_model)
    settings = {"max_steps": 400, "lr": 0.1, "scheduler": "cosine", "num_particles": 8}
    result = fit(full_model, guide, data=rows, **settings, progress=False)
    mean, sd, evidence = exact(rows)
    got_mean, got_sd = posterior(guide, rows)
    assert got_mean == pytest.approx(mean, abs=0.1 * sd)
    assert got_sd == pytest.approx(sd, rel=0.1)
    # At the exact posterior the ELBO estimate has no variance: every late step is the evidence.
    assert result.history["elbo"][-50:].mean() * len(rows) == pytest.approx(evidence, abs=0.1)
    assert result.stop_reason == "max_steps"
    assert len(result.history["step"]) == 400


def test_args_only_model_has_the_plain_elbo(rows: torch.Tensor) -> None:
    guide = AutoNormal(full_model)
    result = fit(
        full_model, guide, args=(rows,), max_steps=300, lr=0.1, num_particles=4, progress=False
    )
    assert result.history["elbo"][-50:].mean() == pytest.approx(exact(rows)[2], abs=0.1)


def test_minibatches_give_the_full_batch_answer(rows: torch.Tensor) -> None:
    model = sized_model(len(rows))
    guide = AutoNormal(model)
    result = fit(
        model, guide, data=rows, batch_size=50, max_steps=800, lr=0.05, seed=0, progress=False
    )
    mean, sd, evidence = exact(rows)
    got_mean, got_sd = posterior(guide, rows[:50])
    assert got_mean == pytest.approx(mean, abs=0.25 * sd)
    assert got_sd == pytest.approx(sd, rel=0.2)
    assert result.history["elbo"][-400:].mean() * len(rows) == pytest.approx(evidence, abs=3.0)


def test_a_plate_of_the_batch_size_is_an_error_with_both_numbers(rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"plate 'data'.*size 200 = len\(data\), got 50"):
        fit(
            full_model,
            AutoNormal(full_model),
            data=rows,
            batch_size=50,
            max_steps=2,
            progress=False,
        )


def test_a_plate_of_another_size_is_an_error_with_both_numbers(rows: torch.Tensor) -> None:
    model = sized_model(1000)
    with pytest.raises(ValueError, match=r"size 200 = len\(data\), got 1000"):
        fit(model, AutoNormal(model), data=rows, batch_size=50, max_steps=2, progress=False)


def test_a_guide_plate_of_the_batch_size_is_an_error(rows: torch.Tensor) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 200, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    def guide(x: torch.Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(w * x, 0.5))

    with pytest.raises(ValueError, match=r"of the guide \(site 'z'\).*200 = len\(data\), got 50"):
        fit(model, guide, data=rows, batch_size=50, max_steps=2, progress=False)


def test_the_plate_check_can_be_left_out(rows: torch.Tensor) -> None:
    guide = AutoNormal(full_model)
    result = fit(
        full_model,
        guide,
        data=rows,
        batch_size=50,
        max_steps=3,
        check_plates=False,
        progress=False,
    )
    assert len(result.history["elbo"]) == 3


def test_scaling_by_hand_equals_scaling_by_the_plate(rows: torch.Tensor) -> None:
    def program(by_hand: bool):
        def model(x: torch.Tensor) -> None:
            loc = pyro.param("loc", torch.tensor(0.0))
            size, scale = (len(x), 4.0) if by_hand else (200, 1.0)
            with pyro.plate("data", size, subsample_size=len(x)), poutine.scale(scale=scale):
                pyro.sample("x", dist.Normal(loc, SIGMA), obs=x)

        return model

    histories = []
    for by_hand in (True, False):
        pyro.clear_param_store()
        result = fit(
            program(by_hand), data=rows, batch_size=50, max_steps=5, seed=0, progress=False
        )
        histories.append(result.history["elbo"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-6)


def test_mean_field_elbo_is_refused_for_an_auto_continuous_guide(rows: torch.Tensor) -> None:
    from pyro.infer.autoguide import AutoDiagonalNormal

    guide = AutoDiagonalNormal(full_model)
    with pytest.raises(ValueError, match="TraceMeanField_ELBO for AutoDiagonalNormal.*log-density"):
        fit(full_model, guide, args=(rows,), objective=TraceMeanField_ELBO(), progress=False)


def test_path_gradient_that_an_objective_ignores_is_said(rows: torch.Tensor) -> None:
    guide = AutoSplineFlow(full_model, num_transforms=1, hidden_dims=[4])
    with pytest.warns(UserWarning, match="path_gradient of AutoSplineFlow.*RenyiELBO"):
        fit(
            full_model,
            guide,
            args=(rows,),
            objective=RenyiELBO(num_particles=2),
            max_steps=2,
            progress=False,
        )


def test_spline_flow_guide_is_set_up_and_reaches_the_evidence(rows: torch.Tensor) -> None:
    guide = AutoSplineFlow(full_model, num_transforms=1, hidden_dims=[4], count_bins=4)
    result = fit(
        full_model, guide, args=(rows,), max_steps=300, num_particles=8, lr=0.01, progress=False
    )
    assert result.history["elbo"][-20:].mean() == pytest.approx(exact(rows)[2], abs=0.1)


def test_mean_field_elbo_is_accepted_for_other_guides(rows: torch.Tensor) -> None:
    result = fit(
        full_model,
        AutoNormal(full_model),
        args=(rows,),
        objective=TraceMeanField_ELBO(),
        max_steps=400,
        lr=0.05,
        progress=False,
    )
    assert result.history["elbo"][-20:].mean() == pytest.approx(exact(rows)[2], abs=0.2)


@pytest.mark.parametrize(
    "objective",
    [Trace_ELBO(2), TraceGraph_ELBO(2), RenyiELBO(alpha=0.5, num_particles=2)],
    ids=lambda objective: type(objective).__name__,
)
def test_pyro_objectives_train(rows: torch.Tensor, objective) -> None:
    guide = AutoNormal(full_model)
    result = fit(
        full_model, guide, data=rows, objective=objective, max_steps=400, lr=0.05, progress=False
    )
    mean, _, evidence = exact(rows)
    assert posterior(guide, rows)[0] == pytest.approx(mean, abs=0.05)
    assert result.history["elbo"][-20:].mean() * len(rows) == pytest.approx(evidence, abs=0.5)


def test_jit_objective_trains(rows: torch.Tensor) -> None:
    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(0.1), constraint=dist.constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    objective = JitTrace_ELBO(ignore_jit_warnings=True)
    fit(full_model, guide, data=rows, objective=objective, max_steps=300, lr=0.05, progress=False)
    assert pyro.param("loc").item() == pytest.approx(exact(rows)[0], abs=0.05)


@pytest.mark.parametrize("before", [None, "of another program", "late"])
def test_params_of_plain_functions_and_late_params_are_trained(
    rows: torch.Tensor, before: str | None
) -> None:
    calls = []
    if before is not None:
        pyro.param(before, torch.tensor(0.0))

    def model(x: torch.Tensor) -> None:
        calls.append(1)
        loc = pyro.param("loc", torch.tensor(0.0))
        if len(calls) > 100:
            loc = loc + pyro.param("late", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, SIGMA), obs=x)

    fit(model, data=rows, max_steps=400, lr=0.05, progress=False)
    total = pyro.param("loc") + pyro.param("late")
    assert total.item() == pytest.approx(float(rows.mean()), abs=1e-2)
    assert abs(pyro.param("late").item()) > 1e-3


def test_module_local_params_are_trained(rows: torch.Tensor) -> None:
    with pyro.settings.context(module_local_params=True):
        guide = AutoNormal(full_model)
        fit(full_model, guide, data=rows, max_steps=300, lr=0.05, progress=False)
        assert posterior(guide, rows)[0] == pytest.approx(exact(rows)[0], abs=0.05)


def test_a_frozen_parameter_stays_frozen(rows: torch.Tensor) -> None:
    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor(0.0))
            self.shift = torch.nn.Parameter(torch.tensor(0.3), requires_grad=False)

        def forward(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc + self.shift, SIGMA), obs=x)

    model = Model()
    fit(model, data=rows, max_steps=300, lr=0.05, progress=False)
    assert model.shift.item() == pytest.approx(0.3)
    assert not model.shift.requires_grad
    assert model.loc.item() == pytest.approx(float(rows.mean()) - 0.3, abs=1e-2)


def test_latents_without_a_guide_are_named(rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"guide=None and \['mu'\]"):
        fit(full_model, data=rows, max_steps=2, progress=False)


def test_the_recipe_of_the_guide_is_read_and_arguments_win(rows: torch.Tensor) -> None:
    class Guide(AutoNormal):
        def recipe(self) -> Recipe:
            return Recipe(max_steps=30, lr=0.02, scheduler="constant")

    result = fit(full_model, Guide(full_model), data=rows, progress=False)
    assert len(result.history["step"]) == 30
    assert (result.history["learning_rate"] == 0.02).all()
    pyro.clear_param_store()
    result = fit(full_model, Guide(full_model), data=rows, max_steps=5, lr=0.1, progress=False)
    assert result.history["learning_rate"].tolist() == [0.1] * 5


def test_a_recipe_may_clip_by_the_norms_of_late() -> None:
    """A gradient many times as large as those before it moves nothing further than a few of them."""

    class Guide(AutoNormal):
        def recipe(self) -> Recipe:
            return Recipe(max_steps=40, lr=1e-3, scheduler="constant", clip_ratio=3.0)

    class Look(Callback):
        def on_step(self, state: FitState) -> None:
            places.append(torch.cat([p.detach().flatten() for p in state.guide.parameters()]))

    def far_once(step: int) -> torch.Tensor:
        return torch.full((50,), 100.0 if step == 30 else 1.0 + 0.1 * (step % 3))

    def moves(**options: Any) -> tuple[torch.Tensor, np.ndarray]:
        pyro.clear_param_store()
        places.clear()
        guide, sgd = Guide(full_model), torch.optim.SGD
        result = fit(
            full_model,
            guide,
            data=far_once,
            optimizer=sgd,
            callbacks=[Look()],
            seed=0,
            progress=False,
            **options,
        )
        return torch.stack(places).diff(dim=0).norm(dim=-1), result.history["grad_norm"]

    places: list[torch.Tensor] = []
    moved, norms = moves()
    assert norms[30] > 20 * np.median(norms[:30])
    assert moved[29].item() == pytest.approx(1e-3 * 3.0 * np.median(norms[:30]), rel=1e-3)
    assert moved[28].item() == pytest.approx(1e-3 * norms[29], rel=1e-3)  # as it was
    moved, norms = moves(clip_norm=1e9)  # the caller's wins
    assert moved[29].item() == pytest.approx(1e-3 * norms[30], rel=1e-3)


def test_a_recipe_is_of_the_packages_kind(rows: torch.Tensor) -> None:
    class Guide(AutoNormal):
        def recipe(self) -> dict[str, int]:
            return {"max_steps": 30}

    with pytest.raises(TypeError, match="recipe.* of Guide to return a .*Recipe, got dict"):
        fit(full_model, Guide(full_model), data=rows, progress=False)


def test_a_guide_of_anybodys_has_its_start_and_its_rates(rows: torch.Tensor) -> None:
    """It starts where it says, its scales have a rate of their own, and it may go back there."""

    class Place:
        room = None

        def __init__(self, guide: AutoNormal) -> None:
            self.guide = guide
            self.take_over()

        def take_over(self) -> None:
            self.tensors = {k: v.clone() for k, v in self.guide.state_dict().items()}

        def keep_better(self) -> bool:
            self.guide.load_state_dict(self.tensors)
            return False

    class Guide(AutoNormal):
        def recipe(self) -> Recipe:
            return Recipe(lr=0.01, max_steps=3, scheduler="constant")

        def find_start(self, model, args=(), kwargs=None, *, max_seconds=None, found=None):
            assert found is None and torch.equal(args[0], rows)
            with torch.no_grad():
                self.locs.mu.fill_(7.0)
            return Place(self)

        def parameter_groups(self):
            return [(list(self.scales.parameters()), 0.5)]

        def room(self, model, args=(), kwargs=None) -> None:
            return None

    class Look(Callback):
        def on_step(self, state: FitState) -> None:
            rates = [group["lr"] for group in state.optimizer.param_groups]
            seen.append((rates, guide.locs.mu.item()))

    seen: list[tuple[list[float], float]] = []
    guide = Guide(full_model)
    result = fit(full_model, guide, data=rows, callbacks=[Look()], progress=False)
    assert [rates for rates, _ in seen] == [[0.01, 0.5]] * 3
    assert 6.9 < seen[-1][1] < 7.0, "it moved from its start"
    assert guide.locs.mu.item() == 7.0 and result.best_step == 0, "and went back"


def test_a_guide_of_anybodys_has_a_say_in_its_objective(rows: torch.Tensor) -> None:
    class Tempered(Trace_ELBO):
        def differentiable_loss(self, model, guide, *args, **kwargs):
            asked.append("differentiable_loss")
            return super().differentiable_loss(model, guide.own_name, *args, **kwargs)

    class Guide(AutoNormal):
        def own_name(self, *args, **kwargs):
            return self(*args, **kwargs)

        def elbo(self, program, num_particles):
            asked.append(("elbo", program.way, num_particles))
            return Tempered(
                num_particles, max_plate_nesting=program.nesting, vectorize_particles=True
            )

        def check_objective(self, objective):
            if isinstance(objective, TraceGraph_ELBO):
                raise ValueError("Expected another objective, got TraceGraph_ELBO.")

    asked: list[Any] = []
    options = {"max_steps": 2, "progress": False}
    guide = Guide(full_model)
    fit(full_model, guide, data=rows, num_particles=3, val_fraction=0.2, **options)
    assert asked == [("elbo", "graph", 3), "differentiable_loss", "differentiable_loss"]
    with pytest.raises(ValueError, match="another objective, got TraceGraph_ELBO"):
        fit(full_model, guide, data=rows, objective=TraceGraph_ELBO(), **options)


def test_a_recipes_particles_are_few_and_said_where_they_run_one_by_one(rows: torch.Tensor) -> None:
    calls = 0

    def model(x: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu.item(), SIGMA).expand(x.shape).to_event(1), obs=x)

    guide = AutoSplineFlow(model, num_transforms=1, hidden_dims=[4])
    few = pytest.warns(UserWarning, match="A step runs 8 particles one after the other.* of 128")
    no_search = pytest.warns(UserWarning, match="the best Gaussian is left out.*'mu'")
    with few, no_search:
        fit(model, guide, args=(rows,), max_steps=10, progress=False)
    assert calls < 10 * 8 + 100
    calls = 0
    with pytest.warns(UserWarning, match="16 particles .*, which takes about 16 times"):
        fit(model, guide, args=(rows,), max_steps=10, num_particles=16, progress=False)
    assert 10 * 16 <= calls < 10 * 16 + 100, "what the caller asks for is done"


def test_wrong_objectives_say_expected_and_got(rows: torch.Tensor) -> None:
    guide = AutoNormal(full_model)
    with pytest.raises(TypeError, match="Expected objective to be an instance of pyro.infer.ELBO"):
        fit(full_model, guide, args=(rows,), objective=Trace_ELBO, progress=False)
    with pytest.raises(ValueError, match="Expected num_particles of the objective, 2, got.*=3"):
        fit(
            full_model,
            guide,
            args=(rows,),
            objective=Trace_ELBO(2),
            num_particles=3,
            progress=False,
        )


def test_a_vae_of_bound_methods_trains_on_minibatches_and_ends_in_eval_mode() -> None:
    class VAE(torch.nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size
            self.encoder = torch.nn.Linear(3, 2)
            self.decoder = torch.nn.Linear(1, 3)

        def model(self, x: torch.Tensor) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", self.size, subsample_size=len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                loc = self.decoder(z.unsqueeze(-1))
                pyro.sample("x", dist.Normal(loc, 0.3).to_event(1), obs=x)

        def guide(self, x: torch.Tensor) -> None:
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", self.size, subsample_size=len(x)):
                loc, log_scale = self.encoder(x).unbind(-1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    latent = torch.randn(400, 1)
    x = latent * torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(400, 3)
    vae = VAE(360)
    result = fit(
        vae.model,
        vae.guide,
        data=x,
        val_fraction=0.1,
        batch_size=60,
        max_steps=300,
        lr=0.04,
        num_particles=2,
        seed=0,
        progress=False,
    )
    assert result.history["elbo"][-50:].mean() > result.history["elbo"][:20].mean() + 5.0
    train, held_out = split_rows((x,), 0.1, 0)
    for rows, elbo in (
        (train, result.history["elbo"][-50:].mean()),
        (held_out, result.validation["elbo"][-1]),
    ):
        loss = Trace_ELBO(num_particles=100).loss(vae.model, vae.guide, *rows)
        assert elbo == pytest.approx(-loss / 360, abs=0.1)
    assert not vae.training
    assert len(result.param_names) == 4


def test_progress_false_is_silent_with_several_particles(rows: torch.Tensor, capfd) -> None:
    fit(
        full_model,
        AutoNormal(full_model),
        data=rows,
        num_particles=4,
        max_steps=3,
        progress=False,
    )
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_two_guides_of_one_name_train_by_themselves_and_it_is_said() -> None:
    """In Pyro the second AutoNormal takes over the parameters of the first, which changes with it."""

    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    first, second = AutoNormal(model), AutoNormal(model)
    options = {"max_steps": 300, "lr": 0.05, "seed": 0, "progress": False}
    fit(model, first, args=(torch.full((50,), 3.0),), **options)
    before = first.median()["z"]
    with pytest.warns(
        UserWarning, match="another live AutoNormal .* under the name 'AutoNormal_1'"
    ):
        fit(model, second, args=(torch.full((50,), -3.0),), **options)
    assert torch.equal(first.median()["z"], before)
    assert before.item() == pytest.approx(150 / 51, abs=0.1)
    assert second.median()["z"].item() == pytest.approx(-150 / 51, abs=0.1)
    fit(model, first, args=(torch.full((50,), 3.0),), **options)  # its own name, no warning
    late = AutoNormal(model)
    late(torch.full((50,), 3.0))
    with pytest.warns(UserWarning, match="shares its parameters with another live one"):
        fit(model, late, args=(torch.full((50,), 3.0),), **options)


def test_a_guide_that_is_gone_or_cleared_leaves_its_name_free() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(2.0, 1.0))

    first = AutoNormal(model)
    fit(model, first, max_steps=2, progress=False)
    pyro.clear_param_store()
    second = AutoNormal(model)
    fit(model, second, max_steps=2, progress=False)
    assert set(pyro.get_param_store().keys()) == {"AutoNormal.locs.z", "AutoNormal.scales.z"}


class SmallVAE(PyroModule):
    """In the style of a user's own: no name, networks of torch, a flow for the prior."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(3, 4)
        self.decoder = torch.nn.Linear(2, 3)
        self.prior = SplineFlow(2, num_transforms=1, hidden_dims=[4])

    @pyro_method
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.mark.parametrize("clears", [False, True])
def test_loops_over_folds_give_what_separate_programs_give(clears):
    def fold_of_vae(seed):
        pyro.set_rng_seed(seed)
        vae = SmallVAE()
        x = torch.randn(20, 3) + seed
        fit(vae.model, vae.guide, args=(x,), max_steps=3, seed=0, progress=False)
        return vae.decoder(vae.prior.sample(1)).detach()

    def fold_of_guide(seed):
        guide = AutoNormal(location)
        x = torch.full((5,), float(seed))
        fit(location, guide, args=(x,), max_steps=3, lr=0.1, seed=0, progress=False)
        return guide.median()["mu"].detach()

    for fold in (fold_of_vae, fold_of_guide):
        alone = []
        for seed in range(3):
            pyro.clear_param_store()
            alone.append(fold(seed))
        pyro.clear_param_store()
        for seed in range(3):
            if clears:
                pyro.clear_param_store()
            assert torch.equal(fold(seed), alone[seed])


def location(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
