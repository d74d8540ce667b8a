r"""How far the marginals of a guide's draws move when they are weighted.

A guide may be a little off in one latent with a gap that looks small: by 0.3 of a standard deviation
at 0.045 nats, of 0.8 times the right scale at 0.043. The weights know it. Every latent is looked at
in normal scores of its own ranks among the draws, ``s = Phi^-1((rank - 1/2) / S)``, which are standard
normal whatever its distribution, with or without moments. With normalised weights p,

    m = sum p s,   v = sum p (s - m)^2,   shift = -m,   scale ratio = sqrt(v_0 / v),

where v_0 = mean s^2 is 1 but for ties: how far the guide is from the posterior, in its own standard
deviations, and its scale as a ratio to the right one. The standard errors are those of the delta
method, of the difference between weighted and plain draws: none where the weights are equal. They take the ranks
as given, and are up to half as large again as the spread over seeds.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MAX_LATENTS = 2000
"""The most elements that are looked at, evenly spaced among all."""

_AT_ONCE = 2_000_000  # scores


class Columns:
    """The elements of the latents that are looked at, of particles that come in chunks."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._chosen: Tensor | None = None
        self._parts: list[Tensor] = []

    def add(self, latents: Mapping[str, Tensor]) -> None:
        """Values by site, each ``(draws, *shape)``."""
        flat = [value.reshape(len(value), -1).double().cpu() for value in latents.values()]
        if not flat:
            return
        if self._chosen is None:
            labels = [label for name, value in latents.items() for label in _labels(name, value)]
            count = min(len(labels), MAX_LATENTS)
            self._chosen = torch.linspace(0, len(labels) - 1, count).round().long()
            self.labels = [labels[i] for i in self._chosen.tolist()]
        self._parts.append(torch.cat(flat, -1)[:, self._chosen])

    def values(self) -> Tensor:
        """Shape ``(draws, latents)``."""
        return torch.cat(self._parts)


def moved(values: Tensor, log_weights: Tensor) -> dict[str, Tensor]:
    """``shift``, ``scale_ratio`` and the standard errors of the first and of the log of the second.

    Args:
        values: draws of the guide, shape ``(draws, latents)``.
        log_weights: smoothed, shape ``(draws,)``.

    Returns:
        Shapes ``(latents,)``.
    """
    weights = (log_weights - log_weights.logsumexp(-1)).exp()[:, None]
    parts = [_moved(part, weights) for part in values.split(max(1, _AT_ONCE // len(values)), -1)]
    names = ("shift", "shift_se", "scale_ratio", "scale_ratio_se")
    return dict(zip(names, map(torch.cat, zip(*parts, strict=True)), strict=True))


def _moved(values: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    scores = _normal_scores(values)
    mean = (weights * scores).sum(0)
    squares = (scores - mean).square()
    variance, plain = (weights * squares).sum(0), scores.square().mean(0)
    share = 1.0 / len(scores)
    mean_se = (weights * (scores - mean) - share * scores).square().sum(0).sqrt()
    relative = weights * (squares / variance - 1) - share * (scores.square() / plain - 1)
    return -mean, mean_se, (plain / variance).sqrt(), 0.5 * relative.square().sum(0).sqrt()


def _normal_scores(values: Tensor) -> Tensor:
    """Of the ranks in each column, of mean 0; ties have that of their mean rank."""
    count = len(values)
    columns = values.T.contiguous()
    ordered, _ = columns.sort(-1)
    below = torch.searchsorted(ordered, columns)
    up_to = torch.searchsorted(ordered, columns, right=True)
    scores = torch.special.ndtri((below + up_to).double().T / (2 * count))
    return scores - scores.mean(0)


def _labels(name: str, value: Tensor) -> list[str]:
    shape = value.shape[1:]
    if not shape:
        return [name]
    indices = torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist()
    return (
        [f"{name}[{', '.join(map(str, index))}]" for index in indices] if math.prod(shape) else []
    )
