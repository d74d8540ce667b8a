"""``fit``: sources of batches, KL schedules, averages, faults by name, interruptions, devices, trackers."""

import math
import os
import signal
import warnings
from collections.abc import Iterator

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

from pyro_flowkit import SplineFlow, ops
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.training import Callback, CsvTracker, FitState, faults, fit
from pyro_flowkit.training.data import open_batches
from pyro_flowkit.training.schedule import kl_weight


class Location(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))
        self.seen: list[torch.Tensor] = []

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.seen.append(x[:, 0].clone())
        return dist.Normal(self.loc, 1.0).to_event(1).log_prob(x)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + 2.0


def coin(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 60, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[..., 0])


def test_a_loader_gives_every_row_in_every_epoch(rows: torch.Tensor) -> None:
    flow = Location()
    loader = DataLoader(TensorDataset(rows), batch_size=25, shuffle=True)
    result = fit(flow, data=loader, max_epochs=2, progress=False)
    assert [len(seen) for seen in flow.seen] == [25, 25, 10, 25, 25, 10]
    for epoch in (flow.seen[:3], flow.seen[3:]):
        assert torch.equal(torch.cat(epoch).sort().values, rows[:, 0].sort().values)
    assert not torch.equal(flow.seen[0], flow.seen[3])
    assert result.stop_reason == "max_epochs"


@pytest.mark.parametrize("inner", [False, True])
def test_a_sampler_of_several_processes_is_told_the_epoch(rows: torch.Tensor, inner: bool) -> None:
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(rows, num_replicas=2, rank=rank)
        choice = (
            {"batch_sampler": BatchSampler(sampler, 30, False)} if inner else {"sampler": sampler}
        )
        loader = DataLoader(TensorDataset(rows), **choice, **({} if inner else {"batch_size": 30}))
        flow = Location()
        fit(flow, data=loader, max_epochs=2, progress=False)
        seen.append(flow.seen)
    for epoch in range(2):
        both = torch.cat([seen[0][epoch], seen[1][epoch]])
        assert torch.equal(both.sort().values, rows[:, 0].sort().values)
    assert not torch.equal(seen[0][0], seen[0][1])


def test_a_loader_trains_what_rows_in_memory_train(rows: torch.Tensor) -> None:
    in_order = DataLoader(TensorDataset(rows), batch_size=60)
    losses = []
    for data in (rows, in_order, lambda step: rows):
        flow = Location()
        result = fit(flow, data=data, val_data=rows[:20], max_steps=20, lr=0.1, progress=False)
        losses.append(result.history["elbo"])
        assert result.validation["elbo"][-1] > result.validation["elbo"][0]
    assert np.array_equal(losses[0], losses[1])
    assert np.array_equal(losses[0], losses[2])


def test_a_loader_without_a_length_trains_but_has_no_epochs(rows: torch.Tensor) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows)

    loader = DataLoader(Stream(), batch_size=20)
    result = fit(Location(), data=loader, max_steps=7, progress=False)
    assert len(result.history["step"]) == 7
    with pytest.raises(ValueError, match="for max_epochs=2, got a source without len"):
        fit(Location(), data=loader, max_epochs=2, progress=False)


def test_a_recipes_batch_size_gives_way_to_rows_and_processes() -> None:
    def size(rows: int, processes: int) -> int:
        part = (0, processes)
        batches, _ = open_batches(torch.zeros(rows, 2), None, 0.0, None, 0, None, part, wish=256)
        return batches.batch_size

    assert (size(1000, 1), size(1000, 3), size(1000, 300)) == (256, 255, 1000)
    assert size(256, 1) == 256 and size(100, 3) == 100
    loader = DataLoader(TensorDataset(torch.zeros(1000, 2)), batch_size=50)
    batches, _ = open_batches(loader, None, 0.0, None, 0, None, (0, 1), wish=256)
    assert len(batches[0][0]) == 50


def test_a_function_is_given_the_step(rows: torch.Tensor) -> None:
    flow, steps = Location(), []

    def batch(step: int) -> torch.Tensor:
        steps.append(step)
        return rows[step : step + 5]

    fit(flow, data=batch, max_steps=4, progress=False)
    assert steps == [0, 1, 2, 3]
    assert torch.equal(flow.seen[3], rows[3:8, 0])


def test_the_plate_is_compared_with_the_size_of_a_loader(rows: torch.Tensor) -> None:
    loader = DataLoader(TensorDataset(rows[:40]), batch_size=20)
    with pytest.raises(ValueError, match=r"to have size 40 = len\(data\), got 60"):
        fit(coin, AutoNormal(coin), data=loader, max_steps=2, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"data": DataLoader(TensorDataset(torch.zeros(4, 2))), "batch_size": 2},
            ValueError,
            "batch_size=2",
        ),
        ({"data": lambda step: "no"}, TypeError, r"data\(0\) to be a tensor .* got str"),
        ({"data": torch.zeros(4, 2), "average": 1.5}, ValueError, "average to be a number in"),
        ({"data": torch.zeros(4, 2), "average": "mean"}, ValueError, "got 'mean'"),
        ({"data": torch.zeros(4, 2), "device": "cuda:77"}, ValueError, "a device of this machine"),
        ({"data": torch.zeros(4, 2), "checkpoint_every": -1}, ValueError, "got -1"),
        ({"data": torch.zeros(4, 2), "kl_schedule": (0.5, 0.1)}, ValueError, "no kl_schedule"),
    ],
)
def test_bad_options_say_expected_and_got(options, error, message) -> None:
    with pytest.raises(error, match=message):
        fit(Location(), max_steps=2, progress=False, **options)


def test_kl_schedule_weighs_latent_sites_only(rows: torch.Tensor) -> None:
    """With w: E_q[log p(x | z)] - w KL(q || p), both parts in closed form for a normal guide."""
    guide = AutoNormal(
        coin, init_scale=0.5, init_loc_fn=init_to_value(values={"z": torch.tensor(3.0)})
    )
    weights = {0: 0.25, 1: 0.5}

    class Records(Callback):
        def on_step(self, state: FitState) -> None:
            found.append(state.elbo)

    found: list[float] = []
    fit(
        coin,
        guide,
        args=(rows,),
        objective=Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=1),
        lr=1e-9,
        max_steps=3,
        kl_schedule=lambda step: weights.get(step, 1.0),
        callbacks=[Records()],
        seed=0,
        progress=False,
    )
    q = dist.Normal(guide.locs.z.detach(), guide.scales.z.detach())
    x = rows[:, 0]
    squares = (x - q.loc).square() + q.scale**2
    likelihood = float((-0.5 * squares - 0.5 * math.log(2 * math.pi)).sum())
    kl = float(torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)))
    for weight, elbo in zip((0.25, 0.5, 1.0), found, strict=True):
        assert elbo == pytest.approx(likelihood - weight * kl, abs=1.5)
    assert kl > 4.0
    assert found[0] - found[2] == pytest.approx(0.75 * kl, abs=1.5)


def test_kl_schedule_by_numbers_rises_in_a_line_and_then_is_one(rows: torch.Tensor) -> None:
    weight = kl_weight((0.5, 0.2))
    assert [weight(0, used) for used in (0.0, 0.1, 0.2, 0.9)] == pytest.approx([0.5, 0.75, 1, 1])
    with pytest.raises(ValueError, match=r"share in \(0, 1\]\) or a function"):
        fit(coin, AutoNormal(coin), args=(rows,), kl_schedule=(0.5, 3.0), progress=False)
    with pytest.raises(ValueError, match="got JitTrace_ELBO"):
        fit(
            coin,
            AutoNormal(coin),
            args=(rows,),
            objective=JitTrace_ELBO(),
            kl_schedule=(0.5, 0.1),
            progress=False,
        )


def test_kl_schedule_refuses_enumerated_sites() -> None:
    def mixture(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x)

    guide = AutoNormal(poutine.block(mixture, hide=["z"]))
    options = {"args": (torch.zeros(4),), "objective": TraceEnum_ELBO(max_plate_nesting=1)}
    with pytest.raises(ValueError, match=r"no kl_schedule with enumerated sites.*\['z'\]"):
        fit(mixture, guide, kl_schedule=(0.5, 0.5), progress=False, **options)
    fit(mixture, guide, max_steps=2, progress=False, **options)


def test_no_annealed_state_is_the_best(rows: torch.Tensor) -> None:
    """With weight 0 the validated ELBO falls; a state of that time would be taken if it counted."""
    result = fit(
        coin,
        AutoDelta(coin),
        data=rows,
        val_data=rows[:30],
        kl_schedule=lambda step: 0.0 if step < 150 else 1.0,
        max_steps=200,
        lr=0.05,
        check_plates=False,
        progress=False,
    )
    assert result.best_step > 150


@pytest.mark.parametrize("validated", [True, False])
def test_a_rising_weight_of_the_kl_is_no_fall_of_the_objective(validated: bool) -> None:
    """Some steps of the first window that is judged had a lower weight, and an objective that was higher by that."""

    def far(rows: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 0.1).expand([10]).to_event(1))
        with pyro.plate("data", 20, subsample_size=len(rows)):
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=rows)

    rows = torch.full((20, 10), 2.0)
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(
            far,
            AutoNormal(far, init_loc_fn=init_to_value(values={"z": torch.full((10,), 0.5)})),
            data=rows,
            val_data=rows if validated else None,
            kl_schedule=lambda step: 0.1 if step < 250 else 1.0,
            max_steps=300,
            lr=1e-4,
            num_particles=100,
            check_plates=False,
            progress=False,
        )
    assert result.history["elbo"][0] - result.history["elbo"][-1] > 4.0  # nats per datum
    assert not result.divergence
    assert validated or result.best_step == 300


def conjugate(rows: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 60, subsample_size=len(rows)):
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=rows)


def test_steps_of_a_lower_weight_after_the_best_window_do_not_take_its_place(
    rows: torch.Tensor,
) -> None:
    result = fit(
        conjugate,
        AutoNormal(conjugate),
        data=rows,
        kl_schedule=lambda step: 1.0 if step < 1040 else 0.0,
        max_steps=1050,
        lr=0.1,
        num_particles=16,
        scheduler="constant",
        seed=0,
        progress=False,
    )
    assert result.best_step <= 1040


def test_a_fit_that_was_stopped_in_its_warm_up_goes_on(rows: torch.Tensor, tmp_path) -> None:
    options = {
        "data": rows,
        "val_data": rows[:30],
        "kl_schedule": lambda step: 0.1 if step < 100 else 1.0,
        "checkpoint_dir": tmp_path,
        "check_plates": False,
        "seed": 0,
        "progress": False,
    }
    fit(conjugate, AutoNormal(conjugate), max_steps=65, **options)
    pyro.clear_param_store()
    result = fit(conjugate, AutoNormal(conjugate), max_steps=130, resume=True, **options)
    assert result.best_step > 100


def test_a_fit_whose_steps_fail_once_the_weight_is_one_ends_in_words(rows: torch.Tensor) -> None:
    calls = iter(range(10_000))

    def breaks(rows: torch.Tensor) -> None:
        conjugate(rows)
        pyro.factor("f", torch.tensor(0.0 if next(calls) < 15 else math.nan))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = fit(
            breaks,
            AutoNormal(breaks),
            data=rows,
            val_data=rows,
            kl_schedule=lambda step: 0.1 if step < 15 else 1.0,
            max_steps=2000,
            seed=0,
            check_plates=False,
            progress=False,
        )
    assert result.stop_reason.startswith("non-finite at step")


@pytest.mark.parametrize("average", [0.98, "tail"])
def test_an_average_is_less_noisy_than_the_last_step(rows: torch.Tensor, average) -> None:
    def errors(**options) -> list[float]:
        found = []
        for seed in range(5):
            flow = Location()
            fit(
                flow,
                data=rows,
                batch_size=5,
                max_steps=600,
                lr=0.2,
                scheduler="constant",
                restore_best=False,
                seed=seed,
                progress=False,
                **options,
            )
            found.append(float((flow.loc.detach() - rows.mean(0)).abs().max()))
        return found

    assert max(errors(average=average)) < 0.5 * min(errors())


def test_validation_judges_the_average(rows: torch.Tensor) -> None:
    flow = Location()
    result = fit(
        flow,
        data=rows,
        batch_size=5,
        val_data=rows,
        average=0.95,
        max_steps=100,
        lr=0.3,
        progress=False,
    )
    with torch.no_grad():
        value = float(flow.log_prob(rows).mean())
    assert value == pytest.approx(float(result.validation["elbo"].max()), abs=1e-6)


def test_persistent_faults_name_the_site(rows: torch.Tensor) -> None:
    calls = [0]

    def model(x: torch.Tensor) -> None:
        calls[0] += 1
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = torch.tensor(1.0 if calls[0] < 40 else math.inf)
        with pyro.plate("data", 60):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0] * noise)

    with pytest.warns(RuntimeWarning, match="value of site 'x' of the model has 60 inf"):
        result = fit(model, AutoNormal(model), args=(rows,), max_steps=100, progress=False)
    assert result.stop_reason.startswith("non-finite at step")
    assert torch.isfinite(torch.cat([p.flatten() for p in result.guide.parameters()])).all()
    assert result.best_step > 0


def test_an_observation_of_inf_ends_the_fit_and_is_named(rows: torch.Tensor) -> None:
    rows[7, 0] = math.inf
    with pytest.warns(RuntimeWarning, match="site 'x' of the model has 1 inf among 60 values"):
        result = fit(coin, AutoNormal(coin), args=(rows,), max_steps=100, progress=False)
    assert result.skipped_steps == 10
    assert torch.isfinite(result.guide.locs.z)
    flow = SplineFlow(2, num_transforms=2, hidden_dims=[8])
    with pytest.raises(ValueError, match="Expected finite data, got NaN or inf in 1 of 60 rows: 7"):
        fit(flow, data=rows, max_steps=100, progress=False)
    assert torch.isfinite(flow.log_prob(rows[:5])).all()


def test_nan_at_random_steps_is_survived(rows: torch.Tensor) -> None:
    noise = torch.Generator().manual_seed(5)

    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        bad = float(torch.rand((), generator=noise)) < 0.2
        with pyro.plate("data", 60):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0] * (math.nan if bad else 1.0))

    guide = AutoNormal(model)
    with (
        pyro.validation_enabled(False),
        pytest.warns(
            RuntimeWarning, match="of 800 steps were left out, the last one for its loss nan"
        ),
    ):
        result = fit(model, guide, args=(rows,), max_steps=800, lr=0.03, progress=False)
    assert result.stop_reason == "max_steps"
    assert 80 < result.skipped_steps < 240
    assert guide.locs.z.item() == pytest.approx(float(rows[:, 0].sum()) / 61, abs=0.1)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """The handler of an ordinary process; those of a parallel test run ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interruption_waits_for_the_end_of_the_step(rows: torch.Tensor) -> None:
    """Ctrl-C in the middle of log_prob: the step is finished, and the handler is the old one again."""

    class Interrupted(Location):
        def log_prob(self, x: torch.Tensor) -> torch.Tensor:
            if len(self.seen) == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().log_prob(x)

    before = signal.getsignal(signal.SIGINT)
    flow = Interrupted()
    result = fit(flow, data=rows, max_steps=50, lr=0.1, scheduler="constant", progress=False)
    assert result.stop_reason == "interrupted"
    assert len(result.history["step"]) == 5
    assert flow.loc[0].item() == pytest.approx(0.5, abs=0.02), (
        "five steps of Adam, not four and a half"
    )
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("ctrl_c")
def test_a_later_interruption_ends_at_once(rows: torch.Tensor, monkeypatch) -> None:
    monkeypatch.setattr(faults, "SAME_WISH", 0.0)

    class Stuck(Location):
        def log_prob(self, x: torch.Tensor) -> torch.Tensor:
            value = super().log_prob(x)
            if len(self.seen) == 4:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                raise AssertionError("not reached")
            return value

    result = fit(Stuck(), data=rows, max_steps=50, progress=False)
    assert (result.stop_reason, len(result.history["step"])) == ("interrupted", 3)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("moment", ["step", "end"])
def test_a_double_press_loses_nothing(rows: torch.Tensor, monkeypatch, moment: str) -> None:
    """The second signal comes in the same step, or while the result is made ready."""
    monkeypatch.setattr(faults, "SAME_WISH", 5.0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    class Pressed(Location):
        def log_prob(self, x: torch.Tensor) -> torch.Tensor:
            if len(self.seen) == 4:
                os.kill(os.getpid(), signal.SIGINT)
                if moment == "step":
                    os.kill(os.getpid(), signal.SIGINT)
            return super().log_prob(x)

        def train(self, mode: bool = True) -> "Pressed":
            if not mode and moment == "end" and len(self.seen) > 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().train(mode)

    flow = Pressed()
    result = fit(flow, data=rows, max_steps=50, progress=False)
    assert (result.stop_reason, len(result.history["step"])) == ("interrupted", 5)
    assert not flow.training


def test_device_moves_model_data_and_arguments(rows: torch.Tensor) -> None:
    """On the meta device nothing can be computed, so the error comes from there if everything has moved."""
    places: list[str] = []

    class Watching(Location):
        def log_prob(self, x: torch.Tensor, shift: dict) -> torch.Tensor:
            places.extend([x.device.type, shift["by"][0].device.type, self.loc.device.type])
            return super().log_prob(x - shift["by"][0])

    shift = {"by": [torch.ones(2)]}
    fit(Watching(), data=rows, args=(shift,), device="cpu", max_steps=1, progress=False)
    assert set(places) == {"cpu"}
    places.clear()
    with pytest.raises((RuntimeError, NotImplementedError)):
        fit(
            Watching(),
            data=rows.new_zeros(3, 2),
            args=(shift,),
            device="meta",
            max_steps=1,
            progress=False,
        )
    assert set(places) <= {"meta"}
    auto = fit(Location(), data=rows, device="auto", max_steps=1, progress=False)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert auto.model.loc.device.type == expected


def test_compile_says_what_it_did(rows: torch.Tensor) -> None:
    flow = SplineFlow(2, num_transforms=1, hidden_dims=[8])
    (note,) = fit(flow, data=rows, max_steps=2, compile=True, progress=False).notes
    if ops.backend() == "fused":
        assert note.startswith("nothing compiled: on this CPU the flow runs in the fused kernel")
    (note,) = fit(
        coin, AutoNormal(coin), args=(rows,), max_steps=2, compile=True, progress=False
    ).notes
    assert note.startswith("nothing compiled: a Pyro program runs in Python")


def test_what_compiles_and_pays_is_taken_and_what_fails_is_not(
    rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyro_flowkit.training import compilation

    monkeypatch.setattr(compilation, "backend", lambda: "reference")
    calls: list[str] = []

    def compiler(function):
        def compiled(*args):
            calls.append("compiled")
            return function(*args)

        return compiled

    seconds = iter([2.0, 1.0, 2.0, 1.9])
    monkeypatch.setattr(compilation, "_seconds", lambda loss, batch: next(seconds))
    monkeypatch.setattr(torch, "compile", compiler)
    result = fit(Location(), data=rows, max_steps=3, compile=True, progress=False)
    assert result.notes == (
        "log_prob compiled: with its gradient it took 2e+03 ms before, 1e+03 ms compiled",
    )
    assert calls == ["compiled"] * 3
    calls.clear()
    (note,) = fit(Location(), data=rows, max_steps=3, compile=True, progress=False).notes
    assert note.startswith(
        "nothing compiled: log_prob and its gradient took 2e+03 ms before, 1.9e+03"
    )
    assert not calls


def test_trackers_see_every_step_and_validation(rows: torch.Tensor, tmp_path) -> None:
    options = {
        "batch_size": 20,
        "val_data": rows[:10],
        "max_steps": 30,
        "seed": 2,
        "progress": False,
    }

    class Stops(Callback):
        def on_step(self, state: FitState) -> None:
            if state.step == 13:
                raise KeyboardInterrupt

    path, folder = tmp_path / "history.csv", tmp_path / "run"
    for number, callbacks in enumerate(([Stops()], [])):
        result = fit(
            Location(),
            data=rows,
            trackers=[CsvTracker(path)],
            checkpoint_dir=folder,
            resume=number > 0,
            callbacks=callbacks,
            **options,
        )
    table = np.genfromtxt(path, delimiter=",", names=True)
    assert table["step"].tolist() == list(range(1, 31))
    for key in ("elbo", "learning_rate", "grad_norm", "validation"):
        assert np.allclose(table[key], result.history[key], rtol=1e-6, equal_nan=True), key


def test_the_history_is_drawn(rows: torch.Tensor) -> None:
    matplotlib.use("agg")
    result = fit(Location(), data=rows, max_steps=30, lr=0.1, progress=False)
    axes = result.plot()
    assert any(np.array_equal(line.get_ydata(), result.history["elbo"]) for line in axes.lines)
    assert result.plot(axes) is axes


@pytest.mark.parametrize("lr", [30.0, 1e3, 1e6])
def test_an_exploding_rate_with_a_guide_ends_in_a_usable_result(
    rows: torch.Tensor, lr: float
) -> None:
    """Scales become 0, which no text of an error calls NaN."""
    guide = AutoNormal(coin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fit(coin, guide, args=(rows,), lr=lr, max_steps=200, seed=0, progress=False)
    assert all(p.isfinite().all() for p in guide.parameters())
    assert math.isfinite(Trace_ELBO().loss(coin, guide, rows))


@pytest.mark.parametrize("lr", [1e10, 1e38])
def test_where_the_first_steps_are_none_the_state_before_them_is_given_back(
    rows: torch.Tensor, lr: float
) -> None:
    flow = SplineFlow(2, num_transforms=2, hidden_dims=[8])
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="non-finite"):
        result = fit(flow, data=rows, lr=lr, max_steps=200, seed=0, progress=False)
    assert result.best_step == 0
    assert all(torch.equal(flow.state_dict()[name], before[name]) for name in before)


def test_a_matrix_that_cannot_be_decomposed_is_a_step_left_out(rows: torch.Tensor) -> None:
    calls = [0]

    def model(x: torch.Tensor) -> None:
        calls[0] += 1
        torch.linalg.cholesky(torch.eye(2) * (math.nan if calls[0] == 20 else 1.0))
        coin(x)

    result = fit(model, AutoNormal(model), args=(rows,), max_steps=40, progress=False)
    assert result.skipped_steps == 1


def test_validation_that_is_not_finite_is_said_and_training_goes_on(rows: torch.Tensor) -> None:
    held_out = rows[:10].clone()
    held_out[3, 0] = 1e30  # whose density underflows to 0
    options = {"data": rows, "batch_size": 20, "val_data": held_out, "progress": False}
    with pytest.warns(RuntimeWarning, match="finite objective on the validation data, got -inf"):
        result = fit(coin, AutoNormal(coin), max_steps=40, **options)
    assert result.stop_reason == "max_steps"


def test_a_checkpoint_that_cannot_be_written_is_said_and_training_goes_on(
    rows: torch.Tensor, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left on device. Training goes on"):
        result = fit(
            Location(),
            data=rows,
            max_steps=20,
            checkpoint_dir=tmp_path / "run",
            checkpoint_every=0,
            progress=False,
        )
    assert len(result.history["step"]) == 20
    assert not list((tmp_path / "run").iterdir())


def test_a_schedule_that_cannot_be_saved_is_refused_before_the_first_step(
    rows: torch.Tensor, tmp_path
) -> None:
    class Odd(torch.optim.lr_scheduler.ConstantLR):
        def state_dict(self):
            return {"object": object()}

    with pytest.raises(TypeError, match="got object"):
        fit(
            Location(),
            data=rows,
            scheduler=Odd,
            checkpoint_dir=tmp_path,
            max_steps=5,
            progress=False,
        )


def test_an_average_over_steps_that_never_came_is_said(rows: torch.Tensor) -> None:
    class Stops(Callback):
        def on_step(self, state: FitState) -> None:
            state.stop = "enough" if state.step == 20 else None

    flow, other = Location(), Location()
    options = {"data": rows, "max_steps": 100, "callbacks": [Stops()], "progress": False}
    with pytest.warns(UserWarning, match="got an earlier end: nothing is averaged"):
        fit(flow, average="tail", **options)
    fit(other, **options)
    assert torch.equal(flow.loc, other.loc)


def test_an_interruption_of_a_guides_start_gives_the_guide_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoSplineFlow, "find_start", interrupted)
    result = fit(model, AutoSplineFlow(model), max_steps=20, progress=False)
    assert (result.stop_reason, len(result.history["step"])) == ("interrupted", 0)


def test_hooks_at_the_end_see_what_is_returned(rows: torch.Tensor) -> None:
    """A flow that gains nothing on the Gaussian it started from: that Gaussian."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    seen: dict[str, torch.Tensor] = {}

    class Ends(Callback):
        def on_end(self, state: FitState) -> None:
            seen.update({k: v.clone() for k, v in state.guide.state_dict().items()})

    guide = AutoSplineFlow(model, num_transforms=2, hidden_dims=[8])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = fit(model, guide, max_steps=20, callbacks=[Ends()], seed=0, progress=False)
    assert result.best_step == 0
    assert all(torch.equal(seen[name], value) for name, value in guide.state_dict().items())


def test_a_buffer_that_is_a_view_is_no_obstacle(rows: torch.Tensor) -> None:
    class Viewing(Location):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("zero", torch.zeros(()).expand(2))

    assert fit(Viewing(), data=rows, val_data=rows, max_steps=20, progress=False).best_step > 0
