"""Checkpoints: a fit that is stopped and resumed ends bit for bit where it would have ended; damage is found."""

import itertools
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_flowkit import SplineFlow
from pyro_flowkit.files import read_file, write_file
from pyro_flowkit.guides import AutoSplineFlow, latent_elbo
from pyro_flowkit.training import Callback, DamagedFileError, FitResult, FitState, fit, lock
from pyro_flowkit.training.checkpoint import KIND


class StopsAt(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step(self, state: FitState) -> None:
        if state.step == self.step:
            raise KeyboardInterrupt


class Dropping(nn.Module):
    """A density whose training draws random numbers, with a buffer that it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.raw = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.zeros(2))

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            x = x * (torch.rand_like(x) < 0.9)
        return dist.Normal(self.loc, self.raw.exp()).to_event(1).log_prob(x)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(120, 2, generator=torch.Generator().manual_seed(0)) + 2.0


def regression(x: torch.Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", 120, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(weight * x[..., 0], scale), obs=x[..., 1])


def late_param_guide(x: torch.Tensor) -> None:
    """A guide with a parameter that comes into being once another one has moved."""
    loc = pyro.param("loc", torch.zeros(()))
    spread = pyro.param("spread", torch.ones(()), constraint=dist.constraints.positive)
    if loc.item() > 0.2:
        loc = loc + pyro.param("late", torch.full((), 0.5))
    pyro.sample("weight", dist.Normal(loc, spread))
    pyro.sample("scale", dist.Delta(pyro.param("size", torch.ones(()))))


def density(rows: torch.Tensor, **options) -> FitResult:
    return fit(Dropping(), data=rows, batch_size=32, val_fraction=0.2, **options)


def density_from_a_loader(rows: torch.Tensor, **options) -> FitResult:
    loader = DataLoader(TensorDataset(rows), batch_size=30, shuffle=True)
    return fit(Dropping(), data=loader, val_data=rows[:30], **options)


def density_from_a_loader_with_a_generator(rows: torch.Tensor, **options) -> FitResult:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(rows)
    loader = DataLoader(data, batch_size=50, shuffle=True, drop_last=True, generator=generator)
    return fit(Dropping(), data=loader, **options)


def density_from_a_distributed_sampler(rows: torch.Tensor, **options) -> FitResult:
    data = TensorDataset(rows)
    sampler = DistributedSampler(data, num_replicas=2, rank=1, seed=5)
    return fit(Dropping(), data=DataLoader(data, batch_size=20, sampler=sampler), **options)


def density_from_a_function(rows: torch.Tensor, **options) -> FitResult:
    return fit(Dropping(), data=lambda step: rows[step % 7 :: 3], average=0.9, **options)


def spline_flow(rows: torch.Tensor, **options) -> FitResult:
    flow = SplineFlow(2, num_transforms=2, hidden_dims=[8])
    return fit(flow, data=rows, batch_size=40, average="tail", clip_norm=1.0, **options)


def spline_guide(rows: torch.Tensor, **options) -> FitResult:
    guide = AutoSplineFlow(regression, num_transforms=2, hidden_dims=[8])
    with mock.patch.object(latent_elbo, "FEW_STEPS", 12):  # one way before, another one after that
        return fit(regression, guide, args=(rows,), num_particles=3, **options)


def pyro_guide(rows: torch.Tensor, **options) -> FitResult:
    options = {"lr": 0.02, "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 7), **options}
    return fit(regression, AutoNormal(regression), data=rows, batch_size=40, **options)


def plain_guide(rows: torch.Tensor, **options) -> FitResult:
    return fit(regression, late_param_guide, data=rows, batch_size=40, lr=0.05, **options)


def baseline(rows: torch.Tensor, **options) -> FitResult:
    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("data", 120, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[..., 0])

    def guide(x: torch.Tensor) -> None:
        logit = pyro.param("logit", torch.zeros(()))
        with_baseline = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("z", dist.Bernoulli(logits=logit), infer=with_baseline)

    return fit(model, guide, data=rows, batch_size=40, objective=TraceGraph_ELBO(), **options)


CALLS = {
    call.__name__: call
    for call in (
        density,
        density_from_a_loader,
        density_from_a_loader_with_a_generator,
        density_from_a_distributed_sampler,
        density_from_a_function,
        spline_flow,
        spline_guide,
        pyro_guide,
        plain_guide,
        baseline,
    )
}
OPTIONS = {"max_steps": 30, "progress": False}


def trained(result: FitResult) -> dict[str, torch.Tensor]:
    modules = [m for m in (result.model, result.guide) if isinstance(m, nn.Module)]
    tensors = {f"{i}.{k}": v for i, m in enumerate(modules) for k, v in m.state_dict().items()}
    store = {name: value.detach() for name, value in pyro.get_param_store().items()}
    return {name: t.detach().clone() for name, t in (tensors | store).items()}


def assert_same(one: FitResult, other: FitResult, values: dict, other_values: dict) -> None:
    assert values.keys() == other_values.keys()
    assert all(torch.equal(values[name], other_values[name]) for name in values)
    for key in ("step", "elbo", "learning_rate", "grad_norm", "validation"):
        assert np.array_equal(one.history[key], other.history[key], equal_nan=True), key
    assert (one.best_step, one.stop_reason) == (other.best_step, other.stop_reason)


# fits of a few steps, some of them stopped early
@pytest.mark.filterwarnings("ignore:The spline flow of AutoSplineFlow ended")
@pytest.mark.filterwarnings("ignore:Expected the fit to reach the steps that average='tail'")
@pytest.mark.parametrize("stops", [(7, 19), (3, 29)])
@pytest.mark.parametrize("name", CALLS)
def test_a_resumed_fit_ends_bit_for_bit_where_the_whole_one_does(
    name: str, stops: tuple[int, ...], rows: torch.Tensor, tmp_path: Path
) -> None:
    call = CALLS[name]
    pyro.set_rng_seed(1)
    whole = call(rows, **OPTIONS)
    expected, next_draw = trained(whole), torch.rand(3)
    for number, stop in enumerate((*stops, None)):
        pyro.clear_param_store()
        pyro.set_rng_seed(1 if number == 0 else 77 + number)  # a new process has another state
        options = {"checkpoint_dir": tmp_path, "resume": number > 0, "callbacks": [StopsAt(stop)]}
        result = call(rows, **OPTIONS, **options)
        assert result.stop_reason == ("max_steps" if stop is None else "interrupted")
    assert_same(result, whole, trained(result), expected)
    assert torch.equal(torch.rand(3), next_draw)


def test_a_finished_fit_is_given_back_as_it_ended(rows: torch.Tensor, tmp_path: Path) -> None:
    options = {"seed": 3, "max_steps": 2000, "patience": 3, "lr": 0.05, "progress": False}
    first = density(rows, checkpoint_dir=tmp_path, **options)
    assert first.stop_reason == "patience"
    again = density(rows, checkpoint_dir=tmp_path, resume=True, **options)
    assert_same(again, first, trained(again), trained(first))


def test_a_parameter_that_came_late_is_in_a_finished_fit_that_is_given_back(
    rows: torch.Tensor, tmp_path: Path
) -> None:
    expected = trained(plain_guide(rows, seed=0, checkpoint_dir=tmp_path, **OPTIONS))
    assert "late" in expected
    pyro.clear_param_store()
    again = trained(plain_guide(rows, seed=0, checkpoint_dir=tmp_path, resume=True, **OPTIONS))
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_fit_stopped_by_the_time_can_be_given_more_of_it(
    rows: torch.Tensor, tmp_path: Path, monkeypatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: 1e-3 * next(ticks))
    options = {"seed": 0, "checkpoint_dir": tmp_path, "progress": False}
    first = density(rows, max_seconds=0.3, **options)
    assert first.stop_reason == "max_seconds"
    again = density(rows, max_seconds=0.3, resume=True, **options)
    assert len(again.history["step"]) == len(first.history["step"])
    more = density(rows, max_seconds=0.8, resume=True, **options)
    assert len(more.history["step"]) > 1.2 * len(first.history["step"])


def test_a_result_of_a_renamed_guide_loads_into_another(rows: torch.Tensor, tmp_path: Path) -> None:
    first, second = AutoNormal(regression), AutoNormal(regression)
    options = {"args": (rows,), "max_steps": 5, "progress": False}
    fit(regression, first, **options)
    with pytest.warns(UserWarning, match="under the name 'AutoNormal_1'"):
        fit(regression, second, **options).save(tmp_path / "result.pt")
    pyro.clear_param_store()
    fresh = AutoNormal(regression)
    fresh(rows)
    FitResult.load(tmp_path / "result.pt", regression, fresh)
    assert torch.equal(fresh.median()["weight"], second.median()["weight"])


def test_checkpoints_hold_plain_tensors_and_the_two_newest_are_kept(
    rows: torch.Tensor, tmp_path: Path
) -> None:
    density(rows, checkpoint_dir=tmp_path, checkpoint_every=0, **OPTIONS)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["step-0000000029.pt", "step-0000000030.pt"]
    content = torch.load(files[-1], weights_only=True)
    assert content["step"] == 30
    assert set(content["tensors"]) == {"0.loc", "0.raw", "0.mean"}


def test_a_folder_with_checkpoints_is_not_written_over(rows: torch.Tensor, tmp_path: Path) -> None:
    density(rows, checkpoint_dir=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"resume=True, got 1 in .*newest: step-0000000030.pt"):
        density(rows, checkpoint_dir=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="Expected a checkpoint_dir for resume=True"):
        density(rows, resume=True, **OPTIONS)


def test_a_checkpoint_of_another_call_is_refused(rows: torch.Tensor, tmp_path: Path) -> None:
    density(rows, checkpoint_dir=tmp_path, seed=1, **OPTIONS)
    there = {"checkpoint_dir": tmp_path, "resume": True, **OPTIONS}
    with pytest.raises(ValueError, match="with seed = 1, got 2"):
        density(rows, seed=2, **there)
    with pytest.raises(ValueError, match="with number of data = 96, got 48"):
        density(rows[:60], **there)
    with pytest.raises(ValueError, match="with optimizer = Adam, got SGD"):
        density(rows, optimizer=torch.optim.SGD, lr=0.1, **there)
    with pytest.raises(ValueError, match="with model and guide = .*, got SplineFlow"):
        flow = SplineFlow(2, num_transforms=1)
        fit(flow, data=rows, batch_size=32, val_fraction=0.2, **there)


def test_the_one_before_a_damaged_checkpoint_is_taken(rows: torch.Tensor, tmp_path: Path) -> None:
    whole = density(rows, seed=1, **OPTIONS)
    options = {"checkpoint_dir": tmp_path, "seed": 1, **OPTIONS}
    density(rows, checkpoint_every=0, callbacks=[StopsAt(9)], **options)
    older, newer = sorted(tmp_path.iterdir())
    newer.write_bytes(newer.read_bytes()[:-3000])
    with pytest.warns(UserWarning, match="step-0000000009.pt.*The one before it is taken"):
        result = density(rows, resume=True, **options)
    assert_same(result, whole, trained(result), trained(whole))
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(DamagedFileError, match="Without it, the fit would start afresh"):
        density(rows, resume=True, **options)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_damaged_and_foreign_files_are_refused_and_nothing_is_executed(
    rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 of them: cut short, with flipped bits, noise, other files, and pickles with code."""
    monkeypatch.chdir(tmp_path)
    density(rows, checkpoint_dir=tmp_path / "run", **OPTIONS)
    (good,) = (tmp_path / "run").iterdir()
    content, generator = good.read_bytes(), np.random.default_rng(0)
    expected = torch.load(good, weights_only=True)
    bad, unharmed = tmp_path / "bad.pt", 0
    for number in range(200):
        kind = number % 5
        if kind == 0:
            bad.write_bytes(content[: generator.integers(len(content))])
        elif kind == 1:
            flipped = bytearray(content)
            for place in generator.integers(len(content), size=1 + number // 40):
                flipped[place] ^= 1 << generator.integers(8)
            bad.write_bytes(bytes(flipped))
        elif kind == 2:
            bad.write_bytes(generator.bytes(generator.integers(1, 5000)))
        elif kind == 3:
            bad.write_bytes(pickle.dumps(Malicious(), protocol=2 + number % 3))
        else:
            torch.save({"format": 3, "kind": KIND, "tensors": Malicious()}, bad)
        try:
            found = read_file(bad, KIND)
        except DamagedFileError as error:
            assert str(bad) in str(error)
        else:  # a bit that nothing depends on: in the padding or the directory of the archive
            assert kind == 1
            assert found.keys() == expected.keys() - {"sha256"}
            assert torch.equal(found["tensors"]["0.loc"], expected["tensors"]["0.loc"])
            unharmed += 1
    assert not (tmp_path / "executed").exists()
    assert unharmed < 30


def test_a_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    marker = torch.arange(1000, 1064, dtype=torch.int64)
    write_file(path, KIND, {"tensors": {"a": marker}})
    content = bytearray(path.read_bytes())
    place = bytes(content).index(marker.numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
    assert torch.load(path, weights_only=True)["tensors"]["a"][0] == 1001, "PyTorch does not look"
    with pytest.raises(DamagedFileError, match="contents it was written with"):
        read_file(path, KIND)


def test_other_kinds_and_formats_are_named(rows: torch.Tensor, tmp_path: Path) -> None:
    density(rows, **OPTIONS).save(tmp_path / "result.pt")
    with pytest.raises(DamagedFileError, match="Expected a checkpoint .*got 'fit result'"):
        read_file(tmp_path / "result.pt", KIND)
    torch.save({"kind": KIND, "format": 1}, tmp_path / "old.pt")
    with pytest.raises(DamagedFileError, match="of format 4, got format 1"):
        read_file(tmp_path / "old.pt", KIND)
    with pytest.raises(TypeError, match="got Malicious"):
        write_file(tmp_path / "bad.pt", KIND, {"tensors": Malicious()})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.pt", "result.pt"]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.pt"
    write_file(path, KIND, {"step": 1})

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, KIND, {"step": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["file.pt"]
    assert read_file(path, KIND)["step"] == 1


class AnotherFit(Callback):
    """Starts a fit in the folder of the one that it is called by."""

    def __init__(self, rows: torch.Tensor, **options) -> None:
        self.rows, self.options = rows, options
        self.said = ""

    def on_step(self, state: FitState) -> None:
        try:
            density(self.rows, **self.options)
        except ValueError as error:
            self.said = str(error)


class WindowsLocks:
    """What ``msvcrt`` has of locks: of bytes from where a file is on, for one opening of it."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], int] = {}

    def locking(self, number: int, mode: int, count: int) -> None:
        assert (mode, count) == (self.LK_NBLCK, 1)
        start = os.lseek(number, 0, os.SEEK_CUR)
        assert start > 10_000, "bytes that are locked cannot be read"
        inode = os.fstat(number).st_ino
        holder = self.held.get((inode, start), number)
        if holder != number and is_opening_of(inode, holder):
            raise PermissionError(13, "Permission denied")
        self.held[inode, start] = number


def is_opening_of(inode: int, number: int) -> bool:
    try:
        return os.fstat(number).st_ino == inode
    except OSError:  # it is closed
        return False


class NoLocks:
    """``fcntl`` on a file system that has no locks."""

    LOCK_EX = LOCK_NB = 0

    def flock(self, *arguments) -> None:
        raise OSError(37, "No locks available")


SYSTEMS = {
    "this": {},
    "Windows": {"fcntl": None, "msvcrt": WindowsLocks()},
    "no locks": {"fcntl": NoLocks()},
}


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, module in SYSTEMS[request.param].items():
        monkeypatch.setattr(lock, name, module)
    return request.param


@pytest.mark.parametrize("resume", [False, True])
def test_two_fits_in_one_folder_do_not_mix(
    rows: torch.Tensor, tmp_path: Path, resume, system
) -> None:
    options = {"max_steps": 2, "seed": 0, "checkpoint_dir": tmp_path, "progress": False}
    other = AnotherFit(rows, resume=resume, **options)
    density(rows, callbacks=[other], **options)
    assert f"in which process {os.getpid()} on " in other.said
    assert density(rows, resume=True, **options).stop_reason == "max_steps"
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt"}


def test_the_lock_of_a_process_that_has_died_is_taken_over(
    rows: torch.Tensor, tmp_path: Path, system
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE
    )
    text = f"process {int(ended.stdout)} on {socket.gethostname()} (since yesterday)\n"
    (tmp_path / (".lock.held" if system == "no locks" else ".lock")).write_text(text)
    options = {"max_steps": 2, "seed": 0, "checkpoint_dir": tmp_path, "progress": False}
    assert density(rows, **options).stop_reason == "max_steps"


@pytest.mark.parametrize("holder", ["process 1 on elsewhere (since yesterday)", ""])
def test_without_locks_a_process_elsewhere_may_be_at_work(
    rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder
) -> None:
    monkeypatch.setattr(lock, "fcntl", NoLocks())
    (tmp_path / ".lock.held").write_text(holder)
    named = re.escape(holder or "another process")
    with pytest.raises(ValueError, match=f"in which {named} trains: if it does not, remove .*held"):
        density(rows, max_steps=2, checkpoint_dir=tmp_path, progress=False)
    assert (tmp_path / ".lock.held").read_text() == holder


def test_a_fit_that_fails_gives_its_folder_back(rows: torch.Tensor, tmp_path: Path, system) -> None:
    class Fails(Callback):
        def on_step(self, state: FitState) -> None:
            raise LookupError("on purpose")

    options = {"max_steps": 2, "seed": 0, "checkpoint_dir": tmp_path, "progress": False}
    with pytest.raises(LookupError) as kept:  # and with it the frames of the fit
        density(rows, callbacks=[Fails()], **options)
    assert density(rows, **options).stop_reason == "max_steps"
    assert kept.type is LookupError


TRAINS = """
import time, torch, pyro
from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.training import Callback

class Ready(Callback):
    def on_start(self, state):
        print("ready", flush=True)

    def on_step(self, state):
        time.sleep(0.002)

def train(folder):
    pyro.set_rng_seed(4)
    rows = torch.randn(200, 2)
    flow = SplineFlow(2, num_transforms=2, hidden_dims=[8])
    return fit(flow, data=rows, batch_size=50, val_fraction=0.2, max_steps=150, seed=4, progress=False,
               callbacks=[Ready()], checkpoint_dir=folder, checkpoint_every=0.0, resume=folder is not None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGKILL nor SIGTERM")
def test_a_process_that_is_killed_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL at some moment, most likely while a checkpoint is written; then SIGTERM; then to the end."""
    code = f"{TRAINS}\nimport sys\ntorch.set_num_threads(1)\nprint(train(sys.argv[1]).stop_reason)"
    for number, expected in ((signal.SIGKILL, ""), (signal.SIGTERM, "terminated")):
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.15)
            process.send_signal(number)
            assert process.communicate()[0].strip() == expected
    namespace: dict = {}
    exec(TRAINS, namespace)
    resumed = namespace["train"](tmp_path)
    pyro.clear_param_store()
    whole = namespace["train"](None)
    assert_same(resumed, whole, trained(resumed), trained(whole))
    assert not list(tmp_path.glob(".*")), "nothing half written is left"
