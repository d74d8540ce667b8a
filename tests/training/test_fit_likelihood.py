"""``fit`` without a guide: exact likelihood, validation, stopping, faults, seeds, files."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_flowkit.training import Callback, FitResult, FitState, fit
from pyro_flowkit.training.validation import Best, Window


class GaussianFlow(nn.Module):
    """The smallest thing that looks like a flow: a learned diagonal normal."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self) -> dist.Distribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        if self.training:
            self.calls += 1
        shifted = x if context is None else x - context
        return self().log_prob(shifted)


@pytest.fixture
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(400, 2, generator=generator) * torch.tensor([2.0, 0.5]) + 1.0


def test_maximum_likelihood_finds_mean_and_scale(rows: torch.Tensor) -> None:
    flow = GaussianFlow()
    result = fit(flow, data=rows, max_steps=600, lr=0.03, progress=False)
    assert flow.loc.detach().numpy() == pytest.approx(rows.mean(0).numpy(), abs=0.01)
    assert flow.log_scale.exp().detach().numpy() == pytest.approx(
        rows.std(0, correction=0).numpy(), rel=0.01
    )
    with torch.no_grad():
        assert result.history["elbo"][-1] == pytest.approx(
            float(flow.log_prob(rows).mean()), abs=1e-3
        )
    assert result.guide is None
    assert not flow.training
    late = result.history["elbo"][-60:].mean()
    assert repr(result) == (
        f"FitResult(stop_reason='max_steps', 600 steps, best_step={result.best_step}, "
        f"elbo={late:.5g} (mean of the last 60 steps))"
    )


def test_minibatches_find_the_same_as_all_rows(rows: torch.Tensor) -> None:
    flow = GaussianFlow()
    result = fit(flow, data=rows, batch_size=100, max_epochs=150, lr=0.03, progress=False)
    assert result.stop_reason == "max_epochs"
    assert len(result.history["step"]) == 600
    assert flow.loc.detach().numpy() == pytest.approx(rows.mean(0).numpy(), abs=0.05)


def test_an_epoch_visits_every_row_once_and_differs_from_the_next(rows: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []

    class Watching(GaussianFlow):
        def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
            if torch.is_grad_enabled():
                seen.append(x[:, 0].detach())
            return super().log_prob(x)

    fit(Watching(), data=rows, batch_size=100, max_epochs=2, seed=0, progress=False)
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert torch.equal(first.sort().values, rows[:, 0].sort().values)
    assert torch.equal(second.sort().values, rows[:, 0].sort().values)
    assert not torch.equal(first, second)


def test_a_tuple_of_tensors_gives_leading_arguments(rows: torch.Tensor) -> None:
    flow = GaussianFlow()
    context = rows.mean(0).expand_as(rows)
    fit(flow, data=(rows, context), batch_size=100, max_steps=200, lr=0.01, progress=False)
    assert flow.loc.abs().max().item() < 0.15


def test_same_seed_same_history_bit_for_bit(rows: torch.Tensor) -> None:
    def run(seed: int) -> FitResult:
        return fit(
            GaussianFlow(),
            data=rows,
            batch_size=64,
            val_fraction=0.2,
            max_steps=60,
            seed=seed,
            progress=False,
        )

    one, two, other = run(5), run(5), run(6)
    for key in ("step", "elbo", "learning_rate", "grad_norm"):
        assert np.array_equal(one.history[key], two.history[key])
    assert np.array_equal(one.validation["elbo"], two.validation["elbo"])
    assert not np.array_equal(one.history["elbo"], other.history["elbo"])


def test_validation_does_not_touch_the_random_stream_and_runs_in_eval_mode(
    rows: torch.Tensor,
) -> None:
    flow = GaussianFlow()
    options = {"batch_size": 64, "max_steps": 40, "seed": 1, "progress": False}
    fit(flow, data=rows, val_data=rows[:50], restore_best=False, **options)
    after = torch.rand(())
    assert flow.calls.item() == 41  # one call to prepare, one per step, none by validation
    fit(GaussianFlow(), data=rows, **options)
    assert torch.equal(after, torch.rand(()))


def test_restore_best_returns_the_best_validated_state(rows: torch.Tensor) -> None:
    class Breaks(Callback):
        def on_step(self, state: FitState) -> None:
            if state.step == 150:
                with torch.no_grad():
                    state.model.loc.fill_(30.0)

    def run(restore_best: bool) -> tuple[GaussianFlow, FitResult]:
        flow = GaussianFlow()
        result = fit(
            flow,
            data=rows,
            val_data=rows[:100],
            max_steps=200,
            lr=0.02,
            scheduler="constant",
            restore_best=restore_best,
            callbacks=[Breaks()],
            progress=False,
        )
        return flow, result

    with pytest.warns(RuntimeWarning, match="the validation objective per datum has fallen"):
        flow, result = run(True)
    best = result.validation["elbo"].argmax()
    assert result.best_step == result.validation["step"][best] <= 150
    with torch.no_grad():
        value = float(flow.eval().log_prob(rows[:100]).mean())
    assert value == pytest.approx(result.validation["elbo"][best], abs=1e-6)
    with pytest.warns(RuntimeWarning, match="the validation objective per datum has fallen"):
        last, result = run(False)
    assert last.loc.max().item() > 20
    assert result.best_step == 200


def test_without_validation_the_broken_end_is_not_returned(rows: torch.Tensor) -> None:
    class Breaks(Callback):
        def on_step(self, state: FitState) -> None:
            if state.step == 350:
                with torch.no_grad():
                    state.model.loc.fill_(30.0)

    flow = GaussianFlow()
    with pytest.warns(RuntimeWarning, match="the training objective has fallen"):
        result = fit(
            flow,
            data=rows,
            batch_size=100,
            max_steps=400,
            lr=0.02,
            callbacks=[Breaks()],
            progress=False,
        )
    assert result.best_step <= 350
    assert flow.loc.max().item() < 2


def test_the_noisiest_window_is_not_the_best() -> None:
    best = Best()
    best.update(10, 1.5, 1.0, dict)  # lucky and noisy
    best.update(20, 1.0, 0.1, dict)
    best.update(30, 1.02, 0.1, dict)
    best.update(40, 0.99, 0.1, dict)  # as good within the noise, and later
    best.update(50, 0.6, 0.1, dict)  # near the lucky one within its noise, but not near the best
    assert best.step == 40
    assert best.mean == 1.02


def test_of_many_windows_that_are_alike_the_last_is_kept() -> None:
    """The luckiest of a hundred is 2.5 standard errors above the others: no reason to go back to it."""
    generator, kept = torch.Generator().manual_seed(0), []
    for _ in range(50):
        best = Best()
        for step, noise in enumerate(torch.randn(100, generator=generator).tolist(), 1):
            best.update(step, 0.1 * noise, 0.1, dict)
        kept.append(best.step)
    assert min(kept) >= 95
    fallen = Best()
    for step in range(100):
        fallen.update(step, -0.01 * max(0, step - 30), 0.1, dict)  # by seven standard errors
    assert 30 < fallen.step < 99


def test_a_window_in_which_the_objective_falls_is_not_excused_by_its_spread() -> None:
    best = Best()
    for step in range(1, 11):
        best.update(step, -1.4, 0.002, dict)
    best.update(11, -20.0, 9.0, dict)  # half of its steps are broken
    assert best.step == 10


def test_window_gives_mean_and_standard_error() -> None:
    window = Window(4)
    for value in (1.0, 2.0, 3.0, 4.0):
        window.add(value)
    assert window.full
    mean, error = window.close()
    assert mean == 2.5
    assert error == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
    assert len(window) == 0


def test_patience_stops_on_validation(rows: torch.Tensor) -> None:
    result = fit(
        GaussianFlow(),
        data=rows[:20],
        val_data=rows[20:40],
        max_steps=4000,
        lr=0.05,
        patience=3,
        progress=False,
    )
    assert result.stop_reason == "patience"
    assert len(result.history["step"]) < 4000
    assert result.best_step <= result.validation["step"][-3]


def test_without_limits_the_rate_drops_at_plateaus_and_the_fit_ends(rows: torch.Tensor) -> None:
    result = fit(GaussianFlow(), data=rows, lr=0.05, progress=False)
    assert result.stop_reason == "converged"
    rates = sorted(set(np.round(result.history["learning_rate"], 8)), reverse=True)
    assert rates == pytest.approx([0.05, 0.005, 0.0005])


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("step", [1.0, 1.0, 0.1, 0.01]),
        (
            "cosine",
            [1.0, 0.5 * (1 + math.cos(0.4 * math.pi)), 0.5, 0.5 * (1 - math.cos(0.2 * math.pi))],
        ),
    ],
)
def test_schedules_by_name(rows: torch.Tensor, scheduler: str, expected: list[float]) -> None:
    result = fit(
        GaussianFlow(), data=rows, max_steps=10, lr=0.01, scheduler=scheduler, progress=False
    )
    rate = result.history["learning_rate"][[0, 4, 5, 8]] / 0.01
    assert rate == pytest.approx(expected)


def test_optimizer_and_scheduler_by_callable(rows: torch.Tensor) -> None:
    result = fit(
        GaussianFlow(),
        data=rows,
        max_steps=6,
        lr=0.1,
        optimizer=torch.optim.SGD,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
        progress=False,
    )
    assert result.history["learning_rate"] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


def test_clip_norm_bounds_the_update_but_the_history_has_the_norm(rows: torch.Tensor) -> None:
    flow = GaussianFlow()
    result = fit(
        flow,
        data=rows + 100.0,
        max_steps=1,
        lr=1.0,
        optimizer=torch.optim.SGD,
        clip_norm=0.5,
        progress=False,
    )
    moved = torch.cat([flow.loc.detach(), flow.log_scale.detach()]).norm()
    assert moved.item() == pytest.approx(0.5, rel=1e-4)
    assert result.history["grad_norm"][0] > 10


def poison(flow: GaussianFlow, bad_steps: set[int]) -> GaussianFlow:
    original, count = flow.log_prob, [0]

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        value = original(x)
        if torch.is_grad_enabled():
            count[0] += 1
            if count[0] in bad_steps:
                return value * math.nan
        return value

    flow.log_prob = log_prob  # type: ignore[method-assign]
    return flow


def test_a_nan_step_is_skipped_and_counted(rows: torch.Tensor) -> None:
    flow = poison(GaussianFlow(), {3, 50})
    result = fit(flow, data=rows, max_steps=600, lr=0.03, progress=False)
    assert result.skipped_steps == 2
    assert np.isnan(result.history["elbo"]).nonzero()[0].tolist() == [2, 49]
    assert flow.loc.detach().numpy() == pytest.approx(rows.mean(0).numpy(), abs=0.01)


def test_persistent_nan_stops_with_the_last_good_state(rows: torch.Tensor) -> None:
    flow = poison(GaussianFlow(), set(range(301, 1000)))
    with pytest.warns(RuntimeWarning, match="non-finite at step 310"):
        result = fit(flow, data=rows, max_steps=800, lr=0.03, progress=False)
    assert "step 310" in result.stop_reason
    assert result.skipped_steps == 10
    assert result.best_step <= 300
    assert torch.isfinite(flow.loc).all()
    assert len(result.history["elbo"]) == 310


def test_non_finite_raise_names_the_step(rows: torch.Tensor) -> None:
    flow = poison(GaussianFlow(), {4})
    with pytest.raises(FloatingPointError, match="at step 4, got loss nan"):
        fit(flow, data=rows, max_steps=10, non_finite="raise", progress=False)


def test_an_exploding_rate_ends_in_a_usable_state(rows: torch.Tensor) -> None:
    def model(x: torch.Tensor) -> None:
        log_scale = pyro.param("log_scale", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, log_scale.exp()), obs=x[:, 0])

    with pytest.warns(RuntimeWarning, match="non-finite"):
        result = fit(
            model, data=rows, max_steps=500, optimizer=torch.optim.SGD, lr=1e6, progress=False
        )
    assert result.stop_reason.startswith("non-finite at step")
    assert torch.isfinite(pyro.param("log_scale"))


def test_an_interrupted_fit_returns_what_there_is(rows: torch.Tensor) -> None:
    class Interrupts(Callback):
        def on_step(self, state: FitState) -> None:
            if state.step == 7:
                raise KeyboardInterrupt

    result = fit(GaussianFlow(), data=rows, max_steps=100, callbacks=[Interrupts()], progress=False)
    assert result.stop_reason == "interrupted"
    assert len(result.history["step"]) == 7


def test_a_callback_sees_the_run_and_can_stop_it(rows: torch.Tensor) -> None:
    events: list[str] = []

    class Records(Callback):
        def on_start(self, state: FitState) -> None:
            events.append(f"start {state.step}")

        def on_validation(self, state: FitState) -> None:
            events.append(f"validation {state.step}")

        def on_step(self, state: FitState) -> None:
            if state.step == 5:
                state.stop = "enough"

        def on_end(self, state: FitState) -> None:
            events.append(f"end {state.step}")

    result = fit(
        GaussianFlow(),
        data=rows,
        val_data=rows[:10],
        max_steps=40,
        callbacks=[Records()],
        progress=False,
    )
    assert result.stop_reason == "enough"
    assert events == ["start 0", "validation 2", "validation 4", "validation 5", "end 5"]


def test_max_seconds_ends_the_fit(rows: torch.Tensor, monkeypatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: 1e-3 * next(ticks))
    result = fit(GaussianFlow(), data=rows, max_seconds=0.2, progress=False)
    assert result.stop_reason == "max_seconds"
    assert result.history["learning_rate"][-1] < 0.2 * result.history["learning_rate"][0]


def test_save_and_load_give_back_parameters_and_history(rows: torch.Tensor, tmp_path) -> None:
    flow = GaussianFlow()
    result = fit(flow, data=rows, max_steps=30, progress=False)
    path = tmp_path / "result.pt"
    result.save(path)
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["modules"][0]["loc"], flow.loc)
    fresh = GaussianFlow()
    loaded = FitResult.load(path, fresh)
    assert torch.equal(fresh.loc, flow.loc)
    assert torch.equal(fresh.calls, flow.calls)
    assert np.array_equal(loaded.history["elbo"], result.history["elbo"])
    assert loaded.versions["torch"] == result.versions["torch"]
    with pytest.raises(ValueError, match=r"Expected loc of shape \(2,\).*got \(3,\)"):
        FitResult.load(path, GaussianFlow(3))


def test_save_covers_the_param_store(rows: torch.Tensor, tmp_path) -> None:
    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    fit(model, data=rows, max_steps=30, lr=0.1, progress=False).save(tmp_path / "result.pt")
    trained = pyro.param("loc").detach().clone()
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="none named loc; call the model"):
        FitResult.load(tmp_path / "result.pt", model)
    model(rows)
    FitResult.load(tmp_path / "result.pt", model)
    assert torch.equal(pyro.param("loc"), trained)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"data": [[1.0]]},
            TypeError,
            "Expected data to be a tensor or a tuple of tensors, got list",
        ),
        ({"data": torch.zeros(0, 2)}, ValueError, r"non-zero length, got shapes \(0, 2\)"),
        ({"data": (torch.zeros(3), torch.zeros(4))}, ValueError, r"shapes \(3,\), \(4,\)"),
        (
            {"data": torch.full((3, 2), math.nan)},
            ValueError,
            "got NaN or inf in 3 of 3 rows: 0, 1, 2",
        ),
        ({"data": torch.zeros(3, 2), "batch_size": 5}, ValueError, "len.data. = 3, got 5"),
        ({"data": torch.zeros(3, 2), "lr": -1.0}, ValueError, "Expected lr > 0, got -1.0"),
        ({"data": torch.zeros(3, 2), "scheduler": "linear"}, ValueError, "got 'linear'"),
        ({"data": torch.zeros(3, 2), "non_finite": "no"}, ValueError, "got 'no'"),
        ({"data": torch.zeros(3, 2), "val_fraction": 1.0}, ValueError, "got 1.0 of 3 rows"),
        ({"args": (torch.zeros(3, 2),), "val_fraction": 0.1}, ValueError, "got data=None"),
        ({}, ValueError, "Expected data for maximum likelihood, got none"),
    ],
)
def test_bad_input_says_expected_and_got(options, error, message) -> None:
    with pytest.raises(error, match=message):
        fit(GaussianFlow(), max_steps=2, progress=False, **options)


def test_nothing_to_train_is_an_error(rows: torch.Tensor) -> None:
    flow = GaussianFlow().requires_grad_(False)
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        fit(flow, data=rows, max_steps=2, progress=False)


def test_progress_bar_shows_and_false_is_silent(rows: torch.Tensor, capfd) -> None:
    fit(GaussianFlow(), data=rows, max_steps=30, progress=False)
    quiet = capfd.readouterr()
    assert quiet.out == quiet.err == ""
    fit(GaussianFlow(), data=rows, max_steps=30, progress=True)
    assert "30/30" in capfd.readouterr().err


def test_importing_training_changes_nothing_global() -> None:
    code = """
import sys, torch, pyro
import torch.distributions as td
def state():
    return (torch.get_default_dtype(), torch.initial_seed(), td.Distribution._validate_args,
            torch.is_grad_enabled(), pyro.settings.get(), len(pyro.get_param_store()))
before = state()
import pyro_flowkit.training
assert state() == before
assert not {"arviz", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
