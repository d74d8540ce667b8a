"""The picture of the front page: three guides of eight schools, centred, over the exact posterior.

    PYTHONPATH=. python docs/front_page.py

The posterior is drawn from exactly: given tau, all else is normal, and tau is on a grid. Two minutes of one core.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from models.eight_schools import EXACT_LOG_EVIDENCE, centred, data
from pyro_flowkit import fit
from pyro_flowkit.diagnostics import evidence_bounds
from pyro_flowkit.guides import AutoSplineFlow
from pyro_flowkit.pictures import COLORS

PICTURE = Path(__file__).parent / "front_page.png"
GUIDES = (AutoNormal, AutoMultivariateNormal, AutoSplineFlow)
SCHOOL, DRAWS = 0, 4000


def exact_draws(count: int, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of log tau and of one school's theta, each of shape ``(count,)``."""
    log_tau = torch.linspace(-9.0, 5.0, 20_001, dtype=sigma.dtype)
    tau = log_tau.exp()
    precision = 1 / (sigma**2 + tau.unsqueeze(-1) ** 2)  # of y_j given mu
    total = precision.sum(-1) + 1 / 25
    loc = (precision * y).sum(-1) / total
    log_p = 0.5 * (
        precision.log().sum(-1) - (precision * y**2).sum(-1) + loc**2 * total - total.log()
    )
    log_p = (
        log_p - torch.log1p((tau / 5) ** 2) + log_tau
    )  # HalfCauchy(5), and the step of the grid in tau
    at = torch.multinomial(log_p.softmax(0), count, replacement=True)
    mu = loc[at] + torch.randn_like(loc[at]) * total[at].rsqrt()
    own = 1 / sigma[SCHOOL] ** 2 + 1 / tau[at] ** 2
    centre = (y[SCHOOL] / sigma[SCHOOL] ** 2 + mu / tau[at] ** 2) / own
    return log_tau[at], centre + torch.randn_like(centre) * own.rsqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the picture of the front page.")
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument(
        "--steps", type=int, default=3000, help="of the normal guides; the flow decides by itself"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    sigma, y = data()
    figure, panels = plt.subplots(
        1, len(GUIDES), figsize=(9.6, 3.4), layout="constrained", sharex=True, sharey=True
    )
    pyro.set_rng_seed(0)
    exact = exact_draws(DRAWS, sigma, y)
    for ax, kind in zip(panels, GUIDES, strict=True):
        pyro.clear_param_store()
        guide = kind(centred)
        normal = (
            {}
            if kind is AutoSplineFlow
            else {"num_particles": 32, "max_steps": options.steps, "lr": 0.03}
        )
        fit(centred, guide, args=(sigma, y), seed=0, progress=False, **normal)
        bounds = evidence_bounds(centred, guide, args=(sigma, y), num_samples=20_000, seed=0)
        gap = EXACT_LOG_EVIDENCE - float(bounds["elbo"])
        print(
            f"{kind.__name__}: ELBO {float(bounds['elbo']):.3f} ({float(bounds['elbo_se']):.3f}), gap {gap:.3f} nats"
        )
        with torch.no_grad(), pyro.plate("draws", DRAWS, dim=-2):
            drawn = guide(sigma, y)
        theta = drawn["theta"].reshape(DRAWS, -1)[:, SCHOOL]
        ax.scatter(*map(np.asarray, exact), s=3, color="0.75", linewidth=0, label="exact posterior")
        ax.scatter(
            drawn["tau"].reshape(-1).log(),
            theta,
            s=1.5,
            color=COLORS[1],
            linewidth=0,
            label="guide",
        )
        ax.set(
            title=f"{kind.__name__}\n{gap:.3f} nats below log p(y)",
            xlabel=r"$\log\ \tau$",
            xlim=(-5, 4),
            ylim=(-25, 45),
        )
    panels[0].set_ylabel("effect of the first school")
    panels[0].legend(loc="upper left", frameon=False, markerscale=5)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
