"""What the plates of a model say about minibatches and particles.

A minibatch of B out of N rows estimates the full-data ELBO only if the observed plate scales its
log-probabilities by N / B:

    with pyro.plate("data", N, subsample_size=len(batch)): ...

With `pyro.plate("data", len(batch))` the likelihood weighs B / N of what it should against the
prior of global latents: wrong, and silent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine

Program = Callable[..., Any]


def trace_pair(model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """Runs the guide, then the model against it, without gradients; returns both traces."""
    with torch.no_grad(), poutine.block(hide_types=["sample"]):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
    return model_trace, guide_trace


def sample_sites(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and sites of a trace's samples, without those that only draw a subsample."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not (site["infer"] or {}).get("_do_not_score"):
            if not poutine.util.site_is_subsample(site):
                yield name, site


def latent_names(model_trace: Any) -> list[str]:
    """Latent sites of a model that a guide has to cover (not those to be enumerated)."""
    enumerated = set(enumerated_names(model_trace))
    return [
        name
        for name, site in sample_sites(model_trace)
        if not site["is_observed"] and name not in enumerated
    ]


def enumerated_names(trace: Any) -> list[str]:
    """Sites that are to be enumerated."""
    return [name for name, site in sample_sites(trace) if (site["infer"] or {}).get("enumerate")]


def effective_size(model_trace: Any, batch_size: int) -> float:
    """Number of data that the observed log-probability stands for: scale times batch size.

    Falls back to `batch_size` where no observed site lies in a plate of the batch's length.
    """
    for _, site in sample_sites(model_trace):
        if site["is_observed"] and any(
            frame.size == batch_size for frame in site["cond_indep_stack"]
        ):
            scale = site["scale"]
            if not isinstance(scale, torch.Tensor) or scale.numel() == 1:
                return float(scale) * batch_size
    return float(batch_size)


def check_plates(model_trace: Any, guide_trace: Any, batch_size: int, data_size: int) -> None:
    """Raises unless the plates scale a batch up to the data.

    Args:
        model_trace: Trace of the model on one batch.
        guide_trace: Trace of the guide on the same batch.
        batch_size: Rows in the batch.
        data_size: Rows in the training data.

    Raises:
        ValueError: If an observed site (or a site of the guide in a plate of the same name) lies in
            a plate of the batch's length whose full size is not that of the data, or no observed
            site lies in such a plate though the data are minibatched.
    """
    advice = "; check_plates=False leaves this check out"
    plates: set[str] = set()
    for trace, program in ((model_trace, "model"), (guide_trace, "guide")):
        for name, site in sample_sites(trace):
            frames = [
                frame
                for frame in site["cond_indep_stack"]
                if frame.size == batch_size and (site["is_observed"] or frame.name in plates)
            ]
            if not frames:
                continue
            if not _scaled(site["scale"], batch_size, data_size) and all(
                (frame.full_size or frame.size) != data_size for frame in frames
            ):
                frame = frames[0]
                raise ValueError(
                    f"expected plate {frame.name!r} of the {program} (site {name!r}) to have size "
                    f"{data_size} = len(data), got {frame.full_size or frame.size} with batches of "
                    f"{batch_size}: the ELBO would be wrongly scaled. Write "
                    f"pyro.plate({frame.name!r}, {data_size}, subsample_size=len(batch)). "
                    f"len(data) counts the training rows, val_fraction taken off{advice}"
                )
            plates.update(frame.name for frame in frames)
    if batch_size < data_size and not plates:
        raise ValueError(
            f"expected an observed site inside a plate of size {data_size} = len(data) that is "
            f"subsampled to batches of {batch_size}, got none: the ELBO would be wrongly scaled"
            f"{advice}"
        )


def _scaled(scale: Any, batch_size: int, data_size: int) -> bool:
    """Whether poutine.scale does by hand what the plate's size would do."""
    return (
        isinstance(scale, (int, float))
        and scale != 1.0
        and math.isclose(scale * batch_size, data_size, rel_tol=1e-6)
    )


def vectorized_nesting(model: Program, guide: Program, args: tuple, kwargs: dict) -> int | None:
    """Plate nesting left of which particles can run in one plate without changing the ELBO.

    Runs two particles in an outer plate, then each of them alone with the same values, and compares
    the summed log-probabilities of the model and of the guide.

    Returns:
        The number of nested plates, or None where the comparison fails.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return _vectorized_nesting(model, guide, args, kwargs)
    except Exception:  # whatever a model not written for an outer plate may raise
        return None


def _vectorized_nesting(model: Program, guide: Program, args: tuple, kwargs: dict) -> int | None:
    alone = trace_pair(model, guide, args, kwargs)
    dims = [
        frame.dim
        for trace in alone
        for _, site in sample_sites(trace)
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    dim = min(dims, default=0) - 1
    particles = pyro.plate("num_particles_vectorized", 2, dim=dim)
    together = trace_pair(particles(model), particles(guide), args, kwargs)
    for program, single, both in zip((model, guide), alone, together, strict=True):
        total = both.log_prob_sum()
        separate = torch.zeros_like(total)
        for particle in range(2):
            replayed = both.copy()
            for name, site in sample_sites(single):
                if site["is_observed"]:
                    continue
                vectorized = both.nodes[name]
                value = vectorized["value"].select(dim - vectorized["fn"].event_dim, particle)
                replayed.nodes[name] = {**vectorized, "value": value.reshape(site["value"].shape)}
            with poutine.block():
                run = poutine.trace(poutine.replay(program, trace=replayed))
                separate = separate + run.get_trace(*args, **kwargs).log_prob_sum()
        tolerance = 1e-4 * (1.0 + abs(float(separate)))
        if not abs(float(total) - float(separate)) <= tolerance:
            return None
    return -1 - dim
