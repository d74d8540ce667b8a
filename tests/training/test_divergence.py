"""``fit`` says when an objective has fallen far below its best, and nothing while it only fluctuates."""

import math
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_flowkit import SplineFlow
from pyro_flowkit.training import Callback, FitResult, FitState, fit
from pyro_flowkit.training.divergence import LIMIT, Divergence, Series, level_and_spread


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 2.0


def small() -> SplineFlow:
    pyro.clear_param_store()
    torch.manual_seed(0)
    return SplineFlow(2, num_transforms=2, hidden_dims=[8])


def leaps(to: float, at: int = 100, lr: float = 0.01):
    """A learning rate that jumps."""

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 if step < at else to / lr
        )

    return {"lr": lr, "scheduler": scheduler}


@pytest.mark.parametrize("seed", range(2))
def test_validation_far_below_its_best_is_said_and_ends_the_fit(
    rows: torch.Tensor, seed: int
) -> None:
    flow = small()
    with pytest.warns(RuntimeWarning, match="validation objective per datum has fallen") as said:
        result = fit(
            flow,
            data=rows[:300],
            val_data=rows[300:],
            max_steps=400,
            batch_size=100,
            seed=seed,
            progress=False,
            **leaps(3.0, at=200),
        )
    assert len(said) == 1
    assert "nats below its best" in str(said[0].message) and "lower lr" in str(said[0].message)
    assert result.stop_reason == "diverged" and len(result.history["step"]) < 400
    best = result.validation["elbo"].argmax()
    assert result.best_step == result.validation["step"][best] <= 220
    assert f"the parameters are those of step {result.best_step}" in result.divergence
    assert "divergence='the validation objective" in repr(result)
    with torch.no_grad():
        value = float(flow.log_prob(rows[300:]).mean())
    assert value == pytest.approx(result.validation["elbo"][best], abs=1e-5)


def test_a_patience_of_the_callers_decides_alone(rows: torch.Tensor) -> None:
    options = {"data": rows[:300], "val_data": rows[300:], "max_steps": 400, "progress": False}
    with pytest.warns(RuntimeWarning, match="has fallen"):
        result = fit(small(), batch_size=100, patience=100, **leaps(3.0), **options)
    assert result.stop_reason == "max_steps" and result.divergence


@pytest.mark.parametrize("average", [None, "tail"])
def test_training_far_below_its_best_is_said_without_validation(
    rows: torch.Tensor, average: str | None
) -> None:
    flow = small()
    with pytest.warns(RuntimeWarning, match="the training objective has fallen") as said:
        result = fit(
            flow, data=rows, max_steps=400, average=average, progress=False, **leaps(3.0, at=250)
        )
    assert len(said) == 1
    assert result.best_step <= 260
    with torch.no_grad():
        assert float(flow.log_prob(rows).mean()) > result.history["elbo"][0]


def test_a_fit_that_explodes_at_once_is_said_and_ends_where_it_began(rows: torch.Tensor) -> None:
    flow = Gaussian()
    with pytest.warns(RuntimeWarning, match="nats below where it began"):
        result = fit(
            flow,
            data=rows,
            max_steps=30,
            lr=3.0,
            optimizer=torch.optim.SGD,  # twice as far from the mean at every step
            scheduler="constant",
            progress=False,
        )
    assert result.best_step == 0 and "Training diverges" in result.divergence
    assert torch.equal(flow.loc, torch.zeros(2))


def test_overfitting_is_told_from_divergence() -> None:
    watch = Divergence(validated=True)
    for step in range(1, 16):
        validation = -10.0 + step if step < 8 else -3.0 - 4.0 * (step - 7) ** 2
        watch.add(step, [-10.0 + step] * 20, validation)
    assert "the model overfits" in watch.news()
    assert watch.news() == ""  # once


class Lifts(Callback):
    """Breaks the state for some steps."""

    def on_step(self, state: FitState) -> None:
        with torch.no_grad():
            if state.step == 200:
                self.before = state.model.loc.clone()
                state.model.loc.add_(30.0)
            if state.step == 270:
                state.model.loc.copy_(self.before)


class Gaussian(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(2))

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return dist.Normal(self.loc, 1.0).to_event(1).log_prob(x)


def test_a_fit_that_comes_back_says_so_and_goes_on(rows: torch.Tensor) -> None:
    with pytest.warns(RuntimeWarning, match="has fallen"):
        result = fit(
            Gaussian(), data=rows, max_steps=400, lr=0.02, callbacks=[Lifts()], progress=False
        )
    assert result.stop_reason == "max_steps" and "has come back to" in result.divergence


def test_what_is_said_survives_a_file_and_a_checkpoint(rows: torch.Tensor, tmp_path: Path) -> None:
    options = {"data": rows, "max_steps": 400, "batch_size": 100, "seed": 0, "progress": False}
    options |= {"checkpoint_dir": tmp_path / "c", "patience": 100, **leaps(3.0, at=200)}

    class Stops(Callback):
        def on_step(self, state: FitState) -> None:
            if state.step == 330:
                state.stop = "interrupted"

    with pytest.warns(RuntimeWarning, match="has fallen"):
        fit(small(), callbacks=[Stops()], **options)
    flow = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        result = fit(flow, resume=True, **options)
    assert "below its best" in result.divergence
    result.save(tmp_path / "fit.pt")
    assert FitResult.load(tmp_path / "fit.pt", flow).divergence == result.divergence


@pytest.mark.parametrize("seed", range(10))
def test_noise_outliers_and_steps_down_the_hill_are_no_divergence(seed: int) -> None:
    """Objectives that rise and then fluctuate; a tenth of the steps are outliers, one window a spike."""
    rng = np.random.default_rng(seed)
    watch = Divergence(validated=False)
    for window in range(100):
        level = -50.0 - 200.0 * math.exp(-window / 5)
        steps = level + 3.0 * rng.standard_normal(100)
        steps[rng.random(100) < 0.1] -= 1e4
        watch.add(100 * (window + 1), (steps - 500 * (window == 60)).tolist(), None)
        assert watch.news() == "", window
        assert watch.is_far == (window == 60)
    assert watch.conclusion(100) == ("", False)


@pytest.mark.parametrize(
    ("steps", "length"), [(20, 1), (39, 1), (40, 2), (30, 10), (61, 10), (300, 10)]
)
def test_a_lucky_first_step_of_a_flat_objective_is_no_divergence(steps: int, length: int) -> None:
    """Of 300 fits that are at their optimum from the start: the first of so few steps is often the highest."""
    for seed in range(300):
        values = 4.5 * np.random.default_rng(seed).standard_normal(steps) - 120.0
        watch = Divergence(validated=True)
        for start in range(0, steps, length):
            window = values[start : start + length].tolist()
            watch.add(start + len(window), window, -120.0)
        assert watch.conclusion(steps) == ("", False), seed


def test_a_fit_that_began_with_another_weight_has_no_beginning_to_be_below() -> None:
    for began in (True, False):
        watch = Divergence(validated=True)
        for step, level in ((10, -100.0), (20, -110.0), (30, -110.0)):
            watch.add(step, [level + 0.1 * k for k in range(10)], -110.0, began=began)
        assert watch.is_far == began


def falling(x: torch.Tensor) -> None:
    """Two nats are lost with every call; there is one without a number."""
    falling.calls += 1
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.tensor(math.nan if falling.calls == 5 else -2.0 * falling.calls))


falling.calls = 0


def test_a_step_that_is_left_out_does_not_hide_that_a_fit_fell_at_once(rows: torch.Tensor) -> None:
    falling.calls = 0
    guide = AutoNormal(falling)
    with pytest.warns(RuntimeWarning, match="nats below where it began"):
        result = fit(falling, guide, args=(rows,), max_steps=60, seed=0, progress=False)
    assert len(result.history["step"]) == 60 and not np.isfinite(result.history["elbo"]).all()


@pytest.mark.parametrize("seed", range(5))
def test_validations_that_fluctuate_are_no_divergence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    series = Series()
    for step in range(200):
        series.add(step, -100.0 * 0.8**step + 2.0 * rng.standard_normal())
    assert series.in_a_row == 0 and series.deepest is None
    for count in range(1, LIMIT + 1):
        series.add(200 + count, -60.0)
        assert series.in_a_row == count
    series.add(300, -math.inf)
    assert series.deepest == (300, -math.inf, series.best[1])


def test_a_validation_of_density_zero_from_the_start_is_no_fall() -> None:
    watch = Divergence(validated=True)
    for step in range(20):
        watch.add(step, [-3.0 + 0.1 * step] * 10, -math.inf)
        assert watch.news() == "" and not watch.is_far and not watch.is_lost
    watch.add(20, [-1.0] * 10, -4.0)
    assert watch.conclusion(20) == ("", False)


def test_healthy_training_is_silent_with_a_guide_and_with_a_flow(rows: torch.Tensor) -> None:
    def model(x: torch.Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        z = pyro.sample("z", dist.Normal(0.0, scale))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.StudentT(1.5, z, 0.5), obs=x[:, 0])

    for seed in range(2):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        result = fit(
            model, guide, args=(rows[:50],), max_steps=300, lr=0.05, seed=seed, progress=False
        )
        assert result.divergence == ""
        result = fit(
            small(), data=rows, val_fraction=0.2, max_steps=100, lr=0.02, seed=seed, progress=False
        )
        assert result.divergence == "" and result.stop_reason == "max_steps"


def test_median_and_spread_of_steps() -> None:
    steps = np.random.default_rng(0).normal(3.0, 2.0, 4001)
    level, spread = level_and_spread([*steps.tolist(), -1e9])
    assert level == pytest.approx(3.0, abs=0.1) and spread == pytest.approx(2.0, rel=0.05)
    assert level_and_spread([1.5]) == (1.5, 0.0)
