"""What the plates of a model say about minibatches.

A minibatch of B out of N rows estimates the full-data ELBO only if the observed plate scales its
log-probabilities by N / B:

    with pyro.plate("data", N, subsample_size=len(batch)): ...

With ``pyro.plate("data", len(batch))`` the likelihood weighs B / N of what it should against the
prior of global latents: wrong, and silent. With local latents alone it is merely counted per datum.
"""

import math
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_flowkit.programs.sites import (
    enumerated_names,
    guided_names,
    latent_names,
    scored_sites,
)


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


def check_plates(
    model_trace: Any, guide_trace: Any, batch_size: int, data_size: int, whole_size: int
) -> None:
    """Raises unless the plates scale a batch up to the data, or a scale does not matter.

    It does not where all sites of model and guide are in one plate, as in a VAE: another size then multiplies the
    objective by a number, and per datum it is the same.

    Args:
        model_trace: Trace of the model on one batch.
        guide_trace: Trace of the guide on the same batch.
        batch_size: Rows in the batch.
        data_size: Rows in the training data.
        whole_size: The same with what ``val_fraction`` took off.

    Raises:
        ValueError: If an observed site (or a site of the guide in a plate of the same name) lies in
            a plate of the batch's length whose full size is neither that of the data nor the whole, or no observed
            site lies in such a plate though the data are minibatched.
    """
    if _all_in_one_plate(model_trace, guide_trace, batch_size):
        return
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
                (frame.full_size or frame.size) not in (data_size, whole_size) for frame in frames
            ):
                frame = frames[0]
                raise ValueError(
                    f"Expected plate {frame.name!r} of the {program} (site {name!r}) to have size "
                    f"{whole_size} = len(data), got {frame.full_size or frame.size} with batches of "
                    f"{batch_size}: the ELBO would be wrongly scaled. Write "
                    f"pyro.plate({frame.name!r}, {whole_size}, subsample_size=len(batch)){advice}"
                )
            plates.update(frame.name for frame in frames)
    if batch_size < data_size and not plates:
        raise ValueError(
            f"Expected an observed site inside a plate of size {whole_size} = len(data) that is "
            f"subsampled to batches of {batch_size}, got none: the ELBO would be wrongly scaled"
            f"{advice}"
        )


def check_guided(model_trace: Any, guide_trace: Any) -> None:
    """Raises unless the guide has a site for each latent of the model, and no other.

    Raises:
        ValueError: With the names. A latent without one would be drawn from its prior in every step.
    """
    latents = latent_names(model_trace)
    missing = [name for name in latents if name not in guide_trace.nodes]
    if missing:
        raise ValueError(
            f"Expected a site in the guide for every latent of the model, got none for {missing}"
        )
    of_model = set(latents) | set(enumerated_names(model_trace))
    others = [name for name in guided_names(guide_trace) if name not in of_model]
    if others:
        raise ValueError(
            f"Expected the guide's sites to be latents of the model, got {others} besides; auxiliary ones say so "
            "with infer={'is_auxiliary': True}"
        )


class TrainingRows(Messenger):
    """Lets plates of all rows stand for those that are trained on.

    Args:
        data_size: Rows in the training data.
        whole_size: The same with what ``val_fraction`` took off.
    """

    def __init__(self, data_size: int, whole_size: int) -> None:
        super().__init__()
        self._rows, self._whole = data_size, whole_size

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            fn = msg["fn"]
            if msg["value"] is None and (fn.size, fn.subsample_size) == (self._whole, self._rows):
                msg["value"] = torch.arange(
                    self._rows, device=fn.device
                )  # all that there are, the same at every run
            return
        frames = msg["cond_indep_stack"]
        whole = [frame.full_size == self._whole and frame.size < self._whole for frame in frames]
        if any(whole):
            msg["cond_indep_stack"] = tuple(
                frame._replace(full_size=self._rows) if is_whole else frame
                for frame, is_whole in zip(frames, whole, strict=True)
            )
            msg["scale"] = msg["scale"] * self._rows / self._whole


def _all_in_one_plate(model_trace: Any, guide_trace: Any, batch_size: int) -> bool:
    plates = [
        {(f.name, f.full_size or f.size) for f in site["cond_indep_stack"] if f.size == batch_size}
        for trace in (model_trace, guide_trace)
        for _, site in scored_sites(trace)
    ]
    return bool(plates) and bool(set.intersection(*plates))


def _scaled(scale: Any, batch_size: int, data_size: int) -> bool:
    """Whether poutine.scale does by hand what the plate's size would do."""
    return (
        isinstance(scale, (int, float))
        and scale != 1.0
        and math.isclose(scale * batch_size, data_size, rel_tol=1e-6)
    )
