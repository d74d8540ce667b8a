r"""Act norm: a shift and a scale of every dimension, which start at those of the first batch of data.

.. math:: y = m + e^s x, \qquad \log|\det dy/dx| = \textstyle\sum s

m and s are ordinary parameters, 0 at first. The first batch of data that comes in while the layer trains gives them
their values: the data then leave the inverse with mean 0 and standard deviation 1 in every dimension, whatever the
layers between them and the layer make of them. That a layer has started is read off its parameters, which are not all
0 any more; so a layer that was saved, in whatever way, does not start twice.

Reference:
    Diederik P. Kingma, Prafulla Dhariwal. Glow: Generative Flow with Invertible 1x1 Convolutions. NeurIPS 2018,
    section 3.1.
"""

import torch
from torch import Tensor, nn

from pyro_flowkit.transforms.base import FlowTransformModule
from pyro_flowkit.transforms.first_batch import StartsByBatch, moments
from pyro_flowkit.transforms.linear import working_dtype


class ActNorm(StartsByBatch, FlowTransformModule):
    """``y = loc + exp(log_scale) * x``, started by the first batch of data, and learned from there on.

    Data come in by the inverse, as they do in ``log_prob``. The layer starts at the first inverse call that has
    gradients on, in training mode, of at least two rows which are finite and not all the same. A layer that has made
    draws for training before (forward, with gradients) is trained by its draws: it stays the identity. So it does in
    traces, under ``torch.func`` and under ``torch.compile``: call ``log_prob`` once before these.

    In several processes (a ``torch.distributed`` group) all take the mean and the standard deviation of the rows of
    all, so every one of them must make that call.

    Args:
        input_dim: size D of the event.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats, the same for every input.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> y, log_det = T.ActNorm(3).call_and_ladj(torch.randn(5, 3))
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    is_affine = True

    def __init__(self, input_dim: int):
        super().__init__(input_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._may_start = False
        dtype = working_dtype(x, self.loc)
        log_scale = self.log_scale.to(dtype)
        y = torch.addcmul(self.loc.to(dtype), x.to(dtype), log_scale.exp())
        return y.to(x.dtype), log_scale.sum().to(x.dtype).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        if self._may_start and self._trains(y, self.loc, self.log_scale):
            self._start(y.detach())
        dtype = working_dtype(y, self.loc)
        log_scale = self.log_scale.to(dtype)
        x = (y.to(dtype) - self.loc.to(dtype)) * (-log_scale).exp()
        return x.to(y.dtype), (-log_scale.sum()).to(y.dtype).expand(y.shape[:-1])

    @torch.no_grad()
    def pushed_derivative(self, x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
        log_scale = self.log_scale.to(working_dtype(y, self.loc))
        return (derivative.to(log_scale.dtype) * (-log_scale).exp()).to(derivative.dtype)

    @torch.no_grad()
    def _start(self, y: Tensor) -> None:
        if bool(self.loc.any()) or bool(self.log_scale.any()):
            self._may_start = False
            return
        rows = y.reshape(-1, self.input_dim).to(torch.float64)
        count, mean, squares = moments(rows)
        if count < 2 or not bool(mean.isfinite().all() & squares.isfinite().all()):
            return
        deviation = (squares / count).sqrt()
        if bool((deviation == 0).all()):
            return
        self.loc.copy_(mean)
        # of what does not vary there is nothing to divide by
        self.log_scale.copy_(torch.where(deviation > 0, deviation, 1.0).log())
        self._may_start = False

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}"


def act_norm(input_dim: int) -> ActNorm:
    """An :class:`ActNorm` layer, the identity until it has seen data.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.act_norm(3)
        >>> x = torch.randn(5, 3)
        >>> y, log_det = transform.call_and_ladj(x)
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    return ActNorm(input_dim)
