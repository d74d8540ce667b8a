"""From a request to the table, the text, the figure and the file."""

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import xarray as xr

from models.compare.figure import draw
from models.compare.jobs import (
    BOTH,
    GAUSSIAN,
    PLAIN,
    SPLINE_FLOW,
    Job,
    Outcome,
    jobs_of,
    model_names,
    run_all,
    vae_arguments,
)
from models.compare.recipes import Request, parse
from models.compare.report import sentences, table, table_text
from models.vae.data import Prepared
from models.vae.program import prepared_data

WIDTH = 120


@dataclass(frozen=True)
class Comparison:
    """What ``run`` returns.

    Attributes:
        table: the printed table, one row a model.
        text: what it says, a paragraph each.
        scores: test scores by model, with the dimensions seed and obs_id.
        reasons: what of the plain VAE a flow could mend.
        figure: path of the figure.
        netcdf: path of the netCDF file.
    """

    table: pd.DataFrame
    text: list[str]
    scores: dict[str, xr.Dataset]
    reasons: xr.Dataset
    figure: Path
    netcdf: Path


def main(argv: Sequence[str] | None = None) -> Comparison:
    """Train, score, print and save."""
    return run(parse(argv))


def run(request: Request) -> Comparison:
    """The comparison that was asked for."""
    request.output.mkdir(parents=True, exist_ok=True)
    return summarise(request, _train(request))


def summarise(request: Request, outcomes: Mapping[str, Sequence[Outcome]]) -> Comparison:
    """Print, draw and save what was found.

    Args:
        request: what was asked for.
        outcomes: of every model by seed, in the order of the table.
    """
    recipe = request.recipe
    prepared = prepared_data(vae_arguments(Job(PLAIN, 0, "standard", "normal"), request))
    scores = {
        name: xr.concat([o.scores for o in found], _seeds(found), combine_attrs="override")
        for name, found in outcomes.items()
    }
    plain = outcomes[PLAIN]
    reasons = xr.concat([o.reasons for o in plain if o.reasons is not None], _seeds(plain))
    seconds = {name: sum(o.seconds for o in found) / len(found) for name, found in outcomes.items()}
    rows, text = table(scores, seconds), sentences(scores, reasons)

    images = scores[PLAIN].sizes["obs_id"]
    over = (
        f"over {recipe.seeds} seeds and the images"
        if recipe.seeds > 1
        else "over the images, for this one seed"
    )
    note = (
        f"{images} test images of {recipe.title}, {prepared.unit}; nats per image. In brackets the standard error, "
        f"{over}. "
        "over plain: less the plain VAE, image by image and seed by seed. gap: IWAE less ELBO of the same model. "
        "CPU s: of one training."
    )
    print("\n" + textwrap.fill(note, WIDTH) + "\n")
    print(table_text(rows) + "\n")
    for paragraph in text:
        print(textwrap.fill(paragraph, WIDTH) + "\n")
    command = f"One of these VAEs: {recipe.command} --prior flow --posterior flow"
    print(textwrap.fill(command, WIDTH, break_on_hyphens=False) + "\n")

    figure, netcdf = (request.output / f"{recipe.stem}.{suffix}" for suffix in ("png", "nc"))
    draw(scores, reasons, _pictures(outcomes, prepared), recipe.title, figure)
    tree(outcomes, scores, reasons, prepared).to_netcdf(netcdf, engine="h5netcdf")
    print(f"Figure: {figure}\nArviZ data: {netcdf} (arviz.from_netcdf opens it)")
    return Comparison(rows, text, scores, reasons, figure, netcdf)


def _train(request: Request) -> dict[str, list[Outcome]]:
    """The outcomes of every model, by seed, in the order of the table."""
    start, jobs, outcomes = time.perf_counter(), jobs_of(request), []
    for outcome in run_all(request, jobs):
        outcomes.append(outcome)
        steps = len(outcome.history.get("step", ()))
        how = f"{steps} steps, {outcome.seconds:.0f} CPU s" if steps else "closed form"
        minutes = (time.perf_counter() - start) / 60
        print(
            f"[{len(outcomes)}/{len(jobs)}, {minutes:.1f} min] {outcome.job.name}, seed {outcome.job.seed}: {how}",
            file=sys.stderr,
            flush=True,
        )
    outcomes.sort(key=lambda outcome: outcome.job.seed)
    return {name: [o for o in outcomes if o.job.name == name] for name in model_names(request)}


def _seeds(outcomes: Sequence[Outcome]) -> pd.Index:
    return pd.Index([outcome.job.seed for outcome in outcomes], name="seed")


def _pictures(outcomes: Mapping[str, Sequence[Outcome]], prepared: Prepared) -> dict:
    if prepared.image_shape is None:
        raise ValueError(f"Expected images, got {prepared.name}")
    names = [PLAIN, BOTH, *(name for name in (SPLINE_FLOW, GAUSSIAN) if name in outcomes)]
    drawn = {name: torch.from_numpy(outcomes[name][0].samples) for name in names}
    return {
        name: images.reshape(-1, *prepared.image_shape).numpy()
        for name, images in ({"real": prepared.test} | drawn).items()
    }


def tree(
    outcomes: Mapping[str, Sequence[Outcome]],
    scores: Mapping[str, xr.Dataset],
    reasons: xr.Dataset,
    prepared: Prepared,
) -> xr.DataTree:
    """All numbers as a DataTree with flat groups.

    ``observed_data`` has the test images; a group per model has its scores by seed and image; another, ``training_``
    and the model's name, its objective by seed and step; ``reasons`` what of the plain VAE a flow could mend.
    """
    rows = prepared.test[: scores[PLAIN].sizes["obs_id"]]
    pixels = xr.Dataset({"x": (("obs_id", "pixel"), rows.numpy())})
    groups = {
        "observed_data": pixels.assign_coords(obs_id=range(len(rows))),
        "reasons": reasons.assign_attrs(model=PLAIN),
    }
    for name, found in outcomes.items():
        groups[group(name)] = scores[name].assign_attrs(model=name)
        if found[0].history:
            curves = xr.concat([_training(o) for o in found], _seeds(found), join="outer")
            groups[f"training_{group(name)}"] = curves.assign_attrs(model=name)
    return xr.DataTree.from_dict(groups)


def group(name: str) -> str:
    """Name of a model's group in a netCDF file."""
    return "".join(c if c.isalnum() else "_" for c in name.replace(", ", "_")).lower()


def _training(outcome: Outcome) -> xr.Dataset:
    history, validation = dict(outcome.history), outcome.validation
    coords = {"step": history.pop("step"), "validation_step": validation["step"]}
    curves = {key: ("step", values) for key, values in history.items()}
    curves |= {"validation_elbo": ("validation_step", validation["elbo"])}
    curves = xr.Dataset(curves, coords)
    for name in ("elbo", "validation_elbo"):
        curves[name].attrs["units"] = "nats per image"
    return curves
