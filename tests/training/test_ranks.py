"""A fit on two processes: equal parameters, independent noise, the answer of one process; and the death of one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.training import ground
from pyro_flowkit.training.ranks import Ranks
from pyro_flowkit.transforms.conditional_affine import START_SHARE, ConditionalAffine

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch was built without torch.distributed"
)

PROGRAM = """
import math, os, signal, sys, torch, pyro, pyro.distributions as dist
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro_flowkit import ContinuousFlow, SplineFlow, fit
import pyro_flowkit.transforms as T
from pyro_flowkit.training import Callback, LostRankError
from pyro_flowkit.transforms.conditional_affine import ConditionalAffine

torch.set_num_threads(1)
rank, folder = int(os.environ.get("RANK", 0)), sys.argv[1]
rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2.0


def model(x):
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
    with pyro.plate("data", 64, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[..., 0])


def density(**options):
    pyro.set_rng_seed(3 + rank)
    flow = SplineFlow(2, num_transforms=2, hidden_dims=[8]).double()
    options = {"max_steps": 20, "val_data": rows[:30], **options}
    return flow, fit(flow, data=rows, batch_size=16, lr=0.01, progress=False, **options)


def matching(**options):
    pyro.set_rng_seed(3 + rank)
    flow = ContinuousFlow(2, hidden_dims=[8], num_steps=2).double()
    options = {"max_steps": 20, "lr": 0.01, "seed": 3, "restore_best": False, **options}
    return flow, fit(flow, data=rows, batch_size=16, progress=False, **options)


class Gradients(Callback):
    def __init__(self):
        self.found = []

    def on_step(self, state):
        self.found.append(state.guide.locs.z.grad.clone())


def late_guide(x):
    loc = pyro.param("loc", torch.zeros((), dtype=torch.float64))
    scale = pyro.param("scale", torch.ones((), dtype=torch.float64), constraint=dist.constraints.positive)
    if float(loc) > 0.2:
        loc = loc + pyro.param("late", torch.randn((), dtype=torch.float64))
    pyro.sample("z", dist.Normal(loc, scale))
"""

TRAINS = f"""{PROGRAM}
out = {{}}
flow, result = density(seed=3)
out["density"] = flow.state_dict()
out["elbo"] = torch.from_numpy(result.history["elbo"])
out["validation"] = torch.from_numpy(result.validation["elbo"])

pyro.clear_param_store()
pyro.set_rng_seed(100 + rank)  # nobody gave the same seed to all
guide = AutoNormal(model)
fit(model, guide, data=rows, batch_size=16, lr=0.01, max_steps=200, progress=False)
out["guide"] = guide.state_dict()

pyro.clear_param_store()
fit(model, late_guide, data=rows, batch_size=16, lr=0.05, max_steps=30, progress=False)
out["late"] = {{name: value.detach() for name, value in pyro.get_param_store().items()}}

pyro.clear_param_store()
gradients = Gradients()
fit(model, AutoNormal(model), args=(rows,), lr=1e-12, max_steps=300, seed=0, callbacks=[gradients], progress=False)
out["gradients"] = torch.stack(gradients.found)

class Stops(Callback):
    def on_step(self, state):
        if state.step == 7 and rank == 1:
            state.stop = "enough"

class Interrupts(Callback):
    def on_step(self, state):
        if state.step == 7 and rank == 0:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
_, result = density(seed=3, callbacks=[Interrupts()])
out["interrupted"] = [result.stop_reason, len(result.history["step"])]

flow, result = density(seed=3, max_steps=None, max_seconds=1.0)
out["timed"], out["timed reason"] = flow.state_dict(), result.stop_reason

_, result = density(seed=3, callbacks=[Stops()], checkpoint_dir=f"{{folder}}/run")
out["stop"] = [result.stop_reason, len(result.history["step"])]
flow, result = density(seed=3, checkpoint_dir=f"{{folder}}/run", resume=True)
out["resumed"] = flow.state_dict()

out["matched"] = matching()[0].state_dict()
matching(callbacks=[Stops()], checkpoint_dir=f"{{folder}}/matched")
out["matched, resumed"] = matching(checkpoint_dir=f"{{folder}}/matched", resume=True)[0].state_dict()

layer = T.act_norm(2).double()
layer.inverse_and_ladj(rows[:20] if rank else rows[20:])
out["act_norm"] = layer.state_dict()
layer = ConditionalAffine(torch.zeros(1), 1.0, 2, hidden_dims=[2]).double()
context = (rows[:20] if rank else rows[20:]).clone().requires_grad_()
layer.call_and_ladj(torch.zeros(len(context), 1).double(), context)
out["first slopes"] = {{name: getattr(layer, name).data for name in ("raw_constant", "weight")}}
torch.save(out, f"{{folder}}/{{rank}}.pt")
"""

DIES = f"""{PROGRAM}
class Dies(Callback):
    def on_step(self, state):
        if state.step == 12 and rank == 1 and sys.argv[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)

try:
    flow, result = density(seed=3, callbacks=[Dies()], checkpoint_dir=f"{{folder}}/run", checkpoint_every=0,
                           resume=True)
except LostRankError as error:
    print(error)
    sys.exit(7)
torch.save(flow.state_dict(), f"{{folder}}/{{rank}}-restarted.pt")
"""


def run(code: str, *args: str, ranks: int = 2, timeout: float = 300.0) -> list[tuple[int, str]]:
    """Exit status and output of every process, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *args],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    end = time.monotonic() + timeout
    try:
        return [
            (p.wait(), output)
            for p in processes
            for output in [p.communicate(timeout=end - time.monotonic())[0]]
        ]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("ranks")
    for status, output in run(TRAINS, str(folder)):
        assert status == 0, output
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one() -> dict:
    """The same program's functions, in this process."""
    namespace: dict = {}
    arguments, threads = sys.argv, torch.get_num_threads()
    sys.argv = ["", ""]
    try:
        exec(PROGRAM, namespace)
    finally:
        sys.argv = arguments
        torch.set_num_threads(threads)
    return namespace


@pytest.mark.parametrize(
    "name",
    [
        *("density", "guide", "late", "timed", "resumed", "act_norm", "first slopes"),
        *("matched", "matched, resumed"),
    ],
)
def test_parameters_are_equal_bit_for_bit_on_both(two, name: str) -> None:
    first, second = (found[name] for found in two[1])
    assert first.keys() == second.keys()
    assert first
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_parameters_that_come_late_are_trained_on_both(two) -> None:
    assert "late" in two[1][0]["late"]


def test_two_processes_do_what_one_does(two, one) -> None:
    """Without noise: the same batches, losses, validations and parameters."""
    flow, result = one["density"](seed=3)
    for key, value in flow.state_dict().items():
        assert torch.allclose(two[1][0]["density"][key], value, rtol=0, atol=1e-6), key
    assert torch.allclose(two[1][0]["elbo"], torch.from_numpy(result.history["elbo"]), atol=1e-6)
    validation = torch.from_numpy(result.validation["elbo"])
    assert torch.allclose(two[1][0]["validation"], validation, atol=1e-6)


def test_noise_is_independent(two, one) -> None:
    """The variance of the averaged gradient is half of one process's; with equal noise it would be the same."""
    gradients = one["Gradients"]()
    pyro.clear_param_store()
    options = {"lr": 1e-12, "max_steps": 300, "seed": 0, "progress": False}
    model = one["model"]
    fit(model, AutoNormal(model), args=(one["rows"],), callbacks=[gradients], **options)
    alone = torch.stack(gradients.found).var()
    assert torch.equal(two[1][0]["gradients"], two[1][1]["gradients"])
    assert two[1][0]["gradients"].var() / alone == pytest.approx(0.5, rel=0.3)


def test_act_norm_starts_with_the_rows_of_both(two, one) -> None:
    rows, state = one["rows"], two[1][0]["act_norm"]
    torch.testing.assert_close(state["loc"], rows.mean(0))
    torch.testing.assert_close(state["log_scale"], rows.std(0, correction=0).log())


def test_first_slopes_are_those_of_the_rows_of_both(two, one) -> None:
    layer = ConditionalAffine(torch.zeros(1), 1.0, 2, hidden_dims=[2]).double()
    layer.load_state_dict(two[1][0]["first slopes"], strict=False)
    loc, _ = layer.call_and_ladj(torch.zeros(64, 1).double(), one["rows"])
    assert loc.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert loc.var(correction=0).item() == pytest.approx(START_SHARE, rel=1e-6)


def test_a_stop_on_one_stops_both(two) -> None:
    assert two[1][1]["stop"] == ["enough", 7]
    assert two[1][0]["stop"] == ["stopped by another process", 7]


def test_an_interruption_of_one_ends_both(two) -> None:
    assert two[1][0]["interrupted"] == two[1][1]["interrupted"] == ["interrupted", 7]


def test_a_limit_of_time_ends_both_at_the_same_step(two) -> None:
    assert two[1][0]["timed reason"] == two[1][1]["timed reason"] == "max_seconds"


@pytest.mark.parametrize(
    ("resumed", "whole"), [("resumed", "density"), ("matched, resumed", "matched")]
)
def test_a_resumed_fit_ends_where_the_whole_one_does(two, resumed: str, whole: str) -> None:
    _, (first, _) = two
    assert all(torch.equal(first[resumed][key], first[whole][key]) for key in first[whole])


def test_another_number_of_processes_is_refused(two, one) -> None:
    with pytest.raises(ValueError, match="with number of processes = 2, got 1"):
        one["density"](seed=3, checkpoint_dir=two[0] / "run", resume=True)


def test_a_process_that_dies_ends_the_others_with_a_message_and_a_restart_goes_on(
    tmp_path: Path, one
) -> None:
    (status, output), (killed, _) = run(DIES, str(tmp_path), "die")
    assert killed == -signal.SIGKILL
    assert status == 7, output
    assert "rank 0 of 2 has lost the others" in output
    assert "Start all of them again, with resume=True" in output
    for status, output in run(DIES, str(tmp_path), "live"):
        assert status == 0, output
    flow, _ = one["density"](seed=3)
    restarted = torch.load(tmp_path / "0-restarted.pt", weights_only=True)
    assert all(torch.allclose(restarted[k], v, atol=1e-6) for k, v in flow.state_dict().items())


def test_a_process_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.join(None)
    assert (ranks.number, ranks.count, ranks.leads) == (0, 1, True)
    assert ranks.largest(1.0, 2.0) == [1.0, 2.0]
    assert ranks.gather("x") == ["x"]


def test_batches_that_cannot_be_shared_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three(Ranks):
        @classmethod
        def join(cls, device):
            ranks = Ranks()
            ranks.count = 3
            monkeypatch.setattr(ranks, "largest", lambda *values: list(values))
            monkeypatch.setattr(ranks, "share", lambda value: value)
            return ranks

    monkeypatch.setattr(ground, "Ranks", Three)
    with pytest.raises(ValueError, match="multiple of the number of processes, 3, got 16"):
        fit(SplineFlow(2), data=dist.Normal(0.0, 1.0).sample((64, 2)), batch_size=16, max_steps=1)
