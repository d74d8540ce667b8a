"""A fit that is killed again and again must end bit for bit where it would have ended; damaged checkpoints are refused.

    python -m benchmarks.faults

A process trains a spline flow on minibatches with validation and writes a checkpoint as often as it can, so that most
kills (SIGKILL, at random moments) fall into the writing of one. After each it is started again with ``resume=True``.
Then a checkpoint is damaged in 200 ways: cut short, bits flipped, noise, pickles that would run code.
"""

import argparse
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import RESULTS
from models._measure import Report, table
from pyro_flowkit.files import read_file
from pyro_flowkit.training import DamagedFileError
from pyro_flowkit.training.checkpoint import KIND

TRAINS = """
import sys, torch, pyro
from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.training import Callback

class Says(Callback):
    def on_start(self, state):
        print("from", state.step, flush=True)

torch.set_num_threads(1)
pyro.set_rng_seed(1)
rows = torch.randn(2000, 4) @ torch.randn(4, 4)
flow = SplineFlow(4, num_transforms=3, hidden_dims=[32], dropout=0.1)
folder = sys.argv[2] if len(sys.argv) > 2 else None
result = fit(flow, data=rows, batch_size=100, val_fraction=0.2, max_steps=int(sys.argv[1]), average=0.99, seed=1,
             clip_norm=5.0, callbacks=[Says()], progress=False, checkpoint_dir=folder, checkpoint_every=0,
             resume=folder is not None)
torch.save({"flow": flow.state_dict(), "elbo": torch.from_numpy(result.history["elbo"]),
            "validation": torch.from_numpy(result.history["validation"])}, "trained.pt")
"""


class Code:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def run(folder: Path, *args: object, seconds: float | None = None) -> int | None:
    """Trains in a process, which is killed after some seconds; the step that it began at, None at the end."""
    command = [sys.executable, "-c", TRAINS, *map(str, args)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if len(words) != 2:
            raise RuntimeError(f"expected the process to start, got status {process.wait()}")
        if seconds is None:
            if process.wait():
                raise RuntimeError(
                    f"expected the process to finish, got status {process.returncode}"
                )
            return None
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return int(words[1])


def killed_and_resumed(kills: int, steps: int, seed: int) -> tuple[list[int], bool, int]:
    """Where each process began, whether the end is that of the whole fit, and how many files were half written."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder, steps)
        whole = torch.load(folder / "trained.pt", weights_only=True)
        begun: list[int] = []
        left_over = 0
        for _ in range(kills):
            found = run(folder, steps, "run", seconds=generator.uniform(0.05, 1.0))
            begun.append(found or 0)
            left_over += len(list((folder / "run").glob(".*")))
        run(folder, steps, "run")
        resumed = torch.load(folder / "trained.pt", weights_only=True)
    same = all(torch.equal(whole["flow"][key], resumed["flow"][key]) for key in whole["flow"])
    for key in ("elbo", "validation"):
        same = same and torch.equal(whole[key].nan_to_num(-1), resumed[key].nan_to_num(-1))
    return begun, same, left_over


def damaged(count: int, seed: int) -> dict[str, tuple[int, int, int]]:
    """For every kind of damage: how many files, how many were refused, how many had lost nothing."""
    generator = random.Random(seed)
    kinds = ("cut short", "bits flipped", "noise", "a pickle with code", "a checkpoint with code")
    counts = {kind: [0, 0, 0] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder, 30, "run")
        content = sorted((folder / "run").iterdir())[-1].read_bytes()
        bad, before = folder / "bad.pt", os.getcwd()
        os.chdir(folder)
        try:
            for number in range(count):
                kind = kinds[number % len(kinds)]
                bad.write_bytes(_damage(kind, content, generator))
                counts[kind][0] += 1
                try:
                    read_file(bad, KIND)
                except DamagedFileError:
                    counts[kind][1] += 1
                else:  # the digest says that every tensor and number is what was written
                    counts[kind][2] += 1
                if Path("executed").exists():
                    raise RuntimeError(f"expected nothing to be executed, got {kind}")
        finally:
            os.chdir(before)
    return {kind: (found[0], found[1], found[2]) for kind, found in counts.items()}


def _damage(kind: str, content: bytes, generator: random.Random) -> bytes:
    if kind == "cut short":
        return content[: generator.randrange(len(content))]
    if kind == "bits flipped":
        flipped = bytearray(content)
        for _ in range(generator.randint(1, 8)):
            flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
        return bytes(flipped)
    if kind == "noise":
        return generator.randbytes(generator.randint(1, 20_000))
    if kind == "a pickle with code":
        return pickle.dumps(Code(), protocol=generator.randint(0, 5))
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save({"format": 2, "kind": KIND, "tensors": Code()}, file.name)
        return Path(file.name).read_bytes()


def main(argv: Sequence[str] | None = None) -> bool:
    """Run both, print and save; whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--steps", type=int, default=4000, help="of the fit")
    parser.add_argument("--files", type=int, default=200, help="damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage")
    parser.add_argument("--output", default=RESULTS / "faults.md", help="file to write")
    args = parser.parse_args(argv)
    begun, same, left_over = killed_and_resumed(args.kills, args.steps, args.seed)
    files = damaged(args.files, args.seed)
    report = Report("Faults: a fit that is killed, and damaged checkpoints")
    report.add(
        f"A fit of {args.steps:,} steps was killed {args.kills} times by SIGKILL; the processes began at steps "
        f"{', '.join(map(str, begun))}. A file half written was there after {left_over} of the kills; every start "
        f"found a checkpoint to go on from. Parameters, losses and validations are bit-equal to those of the fit that "
        f"was never killed: **{'yes' if same else 'no'}**.",
        "",
        *table(
            ["damage", "files", "refused", "nothing lost"],
            [[kind, *map(str, numbers)] for kind, numbers in files.items()],
        ),
        "",
        "No code was executed. Where nothing was lost, the bits were in the padding or directory of the archive: all "
        "tensors and numbers were those written.",
    )
    report.save(args.output)
    return same


if __name__ == "__main__":
    sys.exit(not main())
