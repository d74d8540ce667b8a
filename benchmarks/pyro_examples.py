"""Programs in the way of Pyro's own examples, trained by their own loop and by ``fit``, with only the loop replaced.

    python -m benchmarks.pyro_examples

Loop and ``fit`` get the same model, guide, optimizer, constant rate, batch size and number of steps; for the sequences
``kl_schedule`` takes the place of the model's annealing factor. ``fit`` also runs with its own default, a rate that
falls over the last tenth of the steps, and along a cosine over all of them, which pays once training is long enough to
be held up by the noise of its steps, and not before. The final loss is -ELBO per datum over all data (per sequence, per
regression), with equal noise.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from benchmarks import RESULTS
from benchmarks._pyro_examples import DMM, VAE, BayesianRegression, sequences
from models._measure import Report, table
from models.data import digits
from pyro_flowkit import fit


@dataclass(frozen=True)
class Example:
    """A program, its data, and the settings of its own loop.

    Args:
        make: Model and guide.
        data: What they are called with, cut into batches.
        batch_size: Rows per step; None for all.
        steps: Number of steps.
        lr: Learning rate.
        annealing: Share of the steps in which the KL's weight rises from 0.2 to 1.
    """

    make: Callable[[], tuple[Any, Any]]
    data: tuple[Tensor, ...]
    batch_size: int | None
    steps: int
    lr: float
    annealing: float = 0.0

    @property
    def rows(self) -> int:
        return len(self.data[0])


def _regression() -> Example:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(170, 3, generator=generator)
    noise = 0.8 * torch.randn(170, generator=generator)
    y = 9.0 + x @ torch.tensor([-0.2, -1.9, 0.4]) + noise

    def make() -> tuple[Any, Any]:
        model = BayesianRegression(3, 1)
        return model, AutoNormal(model)

    return Example(make, (x, y), None, 1500, 0.03)


def _vae() -> Example:
    images = (digits().train > 8).float()

    def make() -> tuple[Any, Any]:
        vae = VAE(images.shape[1])
        return vae.model, vae.guide

    return Example(make, (images,), 128, 1500, 1e-3)


def _dmm() -> Example:
    data = sequences(400)

    def make() -> tuple[Any, Any]:
        dmm = DMM(data.shape[-1])
        return dmm.model, dmm.guide

    return Example(make, (data,), 50, 800, 3e-3, annealing=0.3)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "regression, AutoNormal": _regression,
    "VAE, digits": _vae,
    "DMM, KL annealing": _dmm,
}


def by_loop(example: Example, model: Any, guide: Any, steps: int) -> None:
    """As in Pyro's examples."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": example.lr}), Trace_ELBO())
    done = 0
    while done < steps:
        size = example.batch_size or example.rows
        for index in torch.randperm(example.rows).split(size)[: example.rows // size]:
            batch = example.data if example.batch_size is None else [d[index] for d in example.data]
            if example.annealing:
                factor = min(1.0, 0.2 + 0.8 * done / (example.annealing * steps))
                svi.step(*batch, annealing_factor=factor)
            else:
                svi.step(*batch)
            done += 1
            if done == steps:
                return


def by_fit(
    example: Example, model: Any, guide: Any, steps: int, seed: int, scheduler: str | None
) -> None:
    fit(
        model,
        guide,
        data=example.data,
        batch_size=example.batch_size,
        max_steps=steps,
        lr=example.lr,
        scheduler=scheduler,
        kl_schedule=(0.2, example.annealing) if example.annealing else None,
        check_plates=example.batch_size is None,  # Pyro's plates have the size of the batch
        seed=seed,
        progress=False,
    )


def final_loss(example: Example, model: Any, guide: Any) -> float:
    """-ELBO per datum, or of all data where they are one batch."""
    pyro.set_rng_seed(123)
    elbo = Trace_ELBO(num_particles=200 if example.batch_size is None else 20)
    with torch.no_grad():
        loss = elbo.loss(model, guide, *example.data)
    return loss / (1 if example.batch_size is None else example.rows)


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    """Train, print and save; the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to try it")
    parser.add_argument("--output", default=RESULTS / "pyro_examples.md", help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = []
    for name, load in EXAMPLES.items():
        example = load()
        steps = max(1, int(args.share * example.steps))
        for seed in range(args.seeds):
            losses, seconds = [], []
            for by in ("loop", "constant", None, "cosine"):
                pyro.clear_param_store()
                pyro.set_rng_seed(seed)
                model, guide = example.make()
                begun = time.process_time()
                if by == "loop":
                    by_loop(example, model, guide, steps)
                else:
                    by_fit(example, model, guide, steps, seed, by)
                seconds.append(time.process_time() - begun)
                losses.append(final_loss(example, model, guide))
            lines.append(
                [name, str(seed), str(steps)]
                + [f"{loss:.3f}" for loss in losses]
                + [f"{s:.1f}" for s in seconds]
            )
            print(*lines[-1], sep="  ", flush=True)
    report = Report("Pyro's own examples, with only the loop replaced")
    report.add(
        "Final loss: -ELBO in nats, per image and per sequence, of all data for the regression. CPU seconds.",
        "",
        *table(
            [
                "program",
                "seed",
                "steps",
                "loop",
                "fit",
                "fit, default",
                "fit, cosine",
                "loop: s",
                "fit: s",
                "default: s",
                "cosine: s",
            ],
            lines,
        ),
    )
    report.save(args.output)
    return lines


if __name__ == "__main__":
    main()
