"""What the plates of a model say about minibatches.

A minibatch of B out of N rows estimates the full-data ELBO only if the observed plate scales its
log-probabilities by N / B:

    with pyro.plate("data", N, subsample_size=len(batch)): ...

With ``pyro.plate("data", len(batch))`` the likelihood weighs B / N of what it should against the
prior of global latents: wrong, and silent.
"""

import math
from typing import Any

import torch

from pyro_flowkit.programs.sites import scored_sites


def effective_size(model_trace: Any, batch_size: int) -> float:
    """Number of data that the observed log-probability stands for: scale times batch size.

    Falls back to ``batch_size`` where no observed site lies in a plate of the batch's length.
    """
    for _, site in scored_sites(model_trace):
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
        for name, site in scored_sites(trace):
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
