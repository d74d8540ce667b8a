r"""Conditional flows: how near they come to a posterior of any scale, and to that of Pyro's notebook.

The banana is a posterior that is known, given a context of one number c:

.. math:: c \sim N(0, 1), \qquad z_1 \sim N(c, s^2), \qquad z_2 \sim N\big((z_1 - c)^2 / s, (s / 2)^2\big)

at scales s of 1, .25 and .05. Its evidence is 1, so that the gap is minus the ELBO. A ``SplineFlow`` in a guide
function and an ``AmortizedSplineFlow`` learn it from 512 contexts by ``fit``, 64 a step; the gap is that of new
contexts.

The other table is the program of ``models.pyro_notebooks.flow_guide`` with this project's flow and with zuko's neural
spline flow: the loss per datum in steps 181 to 200, which is the KL divergence but for a constant.

    python -m benchmarks.conditional_flow
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from benchmarks import RESULTS
from models._measure import Report, table
from models.pyro_notebooks import flow_guide
from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.guides import AmortizedSplineFlow

SCALES = (1.0, 0.25, 0.05)
ROWS, BATCH, STEPS, LR, DRAWS = 512, 64, 1500, 3e-3, 400
SIZES: dict[str, Any] = {"num_transforms": 4, "hidden_dims": [32, 32]}
NOTEBOOK_STEPS, LAST = 200, 20

Model = Callable[[Tensor], None]


def banana(scale: float) -> Model:
    def model(context: Tensor) -> None:
        with pyro.plate("data", ROWS, subsample=context):
            first = pyro.sample("first", dist.Normal(context[:, 0], scale))
            bend = (first - context[:, 0]).square() / scale
            pyro.sample("second", dist.Normal(bend, scale / 2))

    return model


def spline_flow(model: Model) -> Model:
    flow = SplineFlow(2, 1, base="conditional_normal", **SIZES)

    def guide(context: Tensor) -> None:
        with pyro.plate("data", ROWS, subsample=context):
            posterior = flow(context, path_gradient=True)
            z = pyro.sample("z", posterior, infer={"is_auxiliary": True})
            pyro.sample("first", dist.Delta(z[..., 0]))
            pyro.sample("second", dist.Delta(z[..., 1]))

    return guide


def amortized_spline_flow(model: Model) -> Model:
    guide: Model = AmortizedSplineFlow(model, lambda context: context, context_dim=1, **SIZES)
    return guide


GUIDES = {"SplineFlow": spline_flow, "AmortizedSplineFlow": amortized_spline_flow}


def gap(kind: str, scale: float, seed: int, steps: int) -> float:
    """In nats per datum, after training."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, data = banana(scale), torch.randn(ROWS, 1)
    guide = GUIDES[kind](model)
    fit(
        model,
        guide,
        data=data,
        max_steps=steps,
        batch_size=BATCH,
        lr=LR,
        num_particles=4,
        scheduler="cosine",
        clip_norm=10.0,
        check_plates=False,  # nothing is observed
        seed=seed,
        progress=False,
    )
    judge, new = Trace_ELBO(num_particles=DRAWS, vectorize_particles=True), torch.randn(ROWS, 1)
    with torch.no_grad():
        return float(judge.loss(model, guide, new)) / ROWS


class ZukoFlow(nn.Module):
    """zuko's neural spline flow, as the notebook has it."""

    def __init__(self) -> None:
        super().__init__()
        import zuko

        self.flow = zuko.flows.NSF(
            flow_guide.LATENTS, flow_guide.CONTEXT, transforms=1, bins=8, hidden_features=(256, 256)
        )

    def forward(self, context: Tensor) -> Any:
        from pyro.contrib.zuko import ZukoToPyro

        distribution = ZukoToPyro(self.flow(context))
        distribution.sample = distribution.dist.sample  # it only draws when it is called
        return distribution


NOTEBOOK: dict[str, Callable[[], nn.Module]] = {
    "SplineFlow": lambda: flow_guide.FLOWS["flowkit"]((256, 256)),
    "zuko": ZukoFlow,
}


def notebook_loss(kind: str, seed: int) -> float:
    """In nats per datum, after 200 steps."""
    data = flow_guide.simulate(64)
    pyro.set_rng_seed(seed)
    losses = flow_guide.train(NOTEBOOK[kind](), data, steps=NOTEBOOK_STEPS).losses
    return statistics.fmean(losses[-LAST:]) / data.shape[1]


def row(name: str, values: Sequence[float]) -> list[str]:
    print(name, *(f"{value:.4f}" for value in values), flush=True)
    return [name, f"{statistics.fmean(values):.4f}", f"{max(values):.4f}", str(len(values))]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    warnings.simplefilter("ignore")
    seeds = range(args.seeds)
    bananas = [
        row(f"{kind}, scale {scale:g}", [gap(kind, scale, seed, args.steps) for seed in seeds])
        for kind in GUIDES
        for scale in SCALES
    ]
    notebook = [row(kind, [notebook_loss(kind, seed) for seed in seeds]) for kind in NOTEBOOK]
    report = Report("Conditional flows")
    report.add(
        f"Gap of the banana, nats per datum: {args.steps} steps of {BATCH} contexts, 4 particles, lr {LR:g}, cosine.",
        "",
        *table(["guide", "mean", "worst", "seeds"], bananas),
        "",
        f"Loss of the notebook's program in nats per datum, mean of the last {LAST} of {NOTEBOOK_STEPS} steps.",
        "",
        *table(["flow", "mean", "worst", "seeds"], notebook),
    )
    report.save(args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conditional_flow")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", default=str(RESULTS / "conditional_flow.md"), metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
