r"""Affine maps of the blocks of a vector given the blocks before them, as one node of the autograd graph.

With b the number of a block, o the output of a small perceptron with ReLU plus a linear map, both of the blocks before,
and numbers a and c for each of its dimensions:

.. math::

    (l_b, r_b) &= o_b(v(y_{<b})), \qquad t_b = \tanh(r_b / 15), \qquad w_b = \sigma(-2 (15 t_b + c_b)) \\
    m_b &= w_b l_b + (1 - w_b) a_b, \qquad s_b = 15 t_b + \tfrac12 \log w_b - \tfrac12 \log \sigma(-2 c_b) \\
    y_b &= m_b + \exp(s_b) \odot x_b

Of a standard normal x this is the product of two Gaussians: one whose location l and log scale 15 t follow the blocks
before, as a prior given its parameters does, and one that is always the same, N(a, exp(-2 c)), as a likelihood is (in
units in which the map is the identity where l, t and a are 0). As c falls to minus infinity, the first is left.

v(y) = y up to \|y\| = 5 and sign(y) (5 + log(\|y\| - 4)) from there on. A block whose scale is the exponential of
a line in another has tails as heavy as a log-normal's; one that follows this block in turn would have the exponential
of those, and one draw in ten thousand would decide an ELBO. By the logarithm, tails of tails grow as powers do.

Blocks follow one another, and each takes twenty small operations, whose bookkeeping costs PyTorch more than their
arithmetic. Here they run without a graph, and the derivatives are written out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flowkit.ops.eager import differentiate, is_plain_eager, was_made_by
from pyro_flowkit.ops.layout import Layout

# a scale that follows a line would overflow far outside
MAX_LOG_SCALE = 15.0
# in standard deviations of a block at the start; from here on the blocks after it see its logarithm
LINEAR_UNTIL = 5.0


@dataclass(frozen=True)
class Block:
    """What makes the location and the scale of a block, beside its parameters.

    Args:
        start: number of columns before it.
        size: number of its columns.
        layout: of the perceptron, ``start`` to ``2 * size``.
        of_network, of_line: what the outputs of the perceptron and of the linear map are multiplied by.
    """

    start: int
    size: int
    layout: Layout
    of_network: float
    of_line: float


Blocks = tuple[Block, ...]
# of every block: the perceptron's weights and biases, the linear map, which may be missing, and a and c, ``(2, size)``
Parameters = Sequence[Tensor | None]
_PER_BLOCK = 3


def make_blocks(sizes: Sequence[int], layouts: Sequence[Layout]) -> Blocks:
    """All blocks but the first, which is left as it is; the sizes are of all."""
    starts = list(accumulate(sizes))
    return tuple(
        Block(start, size, layout, layout.sizes[-2] ** -0.5, start**-0.5)
        for start, size, layout in zip(starts, sizes[1:], layouts, strict=False)
    )


def block_affine(x: Tensor, blocks: Blocks, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Values ``(*batch, D)`` and log-dets ``(*batch,)`` (nats) of vectors ``(*batch, D)``; all of one dtype."""
    tensors = (x, *parameters)
    if not is_plain_eager(*tensors) or torch.is_autocast_enabled(x.device.type):
        return _composed(blocks, x, *parameters)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, ladj = cast(tuple[Tensor, Tensor], _BlockAffine.apply(blocks, rows, *parameters))
    else:
        y, ladj, *_ = _forward(blocks, rows, parameters)
    return (y, ladj) if x.dim() == 2 else (y.view(x.shape), ladj.view(x.shape[:-1]))


def location_and_log_scale(
    before: Tensor, block: Block, packed: Tensor, weight: Tensor | None, likelihood: Tensor
) -> tuple[Tensor, Tensor]:
    """m and s of a block, in PyTorch's own operations."""
    before, _ = _seen(before)
    h = before
    *hidden, output = block.layout.unpack(packed)
    for layer in hidden:
        h = F.relu(F.linear(h, *layer))
    h = block.of_network * F.linear(h, *output)
    if weight is not None:
        h = h + block.of_line * F.linear(before, weight)
    loc, raw = h.chunk(2, dim=-1)
    return _with_likelihood(likelihood, loc, MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE))


@torch.no_grad()
def pushed_derivative(y: Tensor, derivative: Tensor) -> Tensor | None:
    """A derivative of the log-density through the map, by what its forward pass kept.

    Args:
        y: what :func:`block_affine` returned.
        derivative: with respect to its input, of the log-density of the input; the parameters are held fixed.

    Returns:
        The derivative with respect to y of the log-density of y; None where ``y`` came without a graph.
    """
    node: Any = y.grad_fn
    if y.dim() != 2 and node is not None:  # the view that gave back the shape
        node = node.next_functions[0][0]
    if not was_made_by(node, _BlockAffine) or derivative.dtype != y.dtype:
        return None
    x, seen, slope, *rest = node.saved_tensors
    parameters, kept = _split(rest, node.num_parameters)
    given = derivative.reshape(x.shape)
    pushed, of_seen = given.clone(), torch.zeros_like(seen)
    for b, block in enumerate(node.blocks):
        columns = slice(block.start, block.start + block.size)
        *hidden, loc, t, scale = kept[b]
        of_block = given[:, columns]
        of_loc = torch.div(of_block, scale, out=pushed[:, columns]).neg()
        of_log_scale = torch.addcmul(of_block.new_tensor(-1.0), of_block, x[:, columns], value=-1.0)
        packed, weight, likelihood = parameters_of_block(parameters, b)
        of_output, _ = _through_likelihood(likelihood, loc, t, of_loc, of_log_scale)
        _backward_through(block, of_output, seen, hidden, packed, weight, of_seen, None)
    pushed[:, : seen.shape[-1]].addcmul_(of_seen, slope)
    return pushed.view(y.shape)


class _BlockAffine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, blocks: Blocks, x: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, ladj, (seen, slope), kept = _forward(blocks, x, parameters)
        ctx.set_materialize_grads(False)
        ctx.blocks, ctx.num_parameters = blocks, len(parameters)
        activations = (t for of_block in kept for t in of_block)
        ctx.save_for_backward(x, seen, slope, *parameters, *activations)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, seen, slope, *rest = ctx.saved_tensors
        parameters, kept = _split(rest, ctx.num_parameters)
        if torch.is_grad_enabled():

            def again(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor]:
                return _composed(ctx.blocks, x, *parameters)

            return (None, *differentiate(again, (x, *parameters), grads))
        grad_y, grad_ladj = grads
        grad_x = torch.zeros_like(x) if grad_y is None else grad_y.clone()
        of_seen = torch.zeros_like(seen)
        found: list[Tensor | None] = []
        for b, block in reversed(list(enumerate(ctx.blocks))):
            columns = slice(block.start, block.start + block.size)
            *hidden, loc, t, scale = kept[b]
            of_loc = grad_x[:, columns].clone()
            of_scaled = grad_x[:, columns].mul_(scale)
            of_log_scale = of_scaled * x[:, columns]
            if grad_ladj is not None:
                of_log_scale = of_log_scale + grad_ladj.unsqueeze(-1)
            packed, weight, likelihood = parameters_of_block(parameters, b)
            of_output, of_likelihood = _through_likelihood(likelihood, loc, t, of_loc, of_log_scale)
            of_packed = torch.empty_like(packed)
            _backward_through(block, of_output, seen, hidden, packed, weight, of_seen, of_packed)
            of_weight = None
            if weight is not None:
                of_weight = (block.of_line * of_output).mT @ seen[:, : block.start]
            found = [of_packed, of_weight, of_likelihood, *found]
            # whatever reads the block before it is through
            previous = slice(ctx.blocks[b - 1].start if b else 0, block.start)
            grad_x[:, previous].addcmul_(of_seen[:, previous], slope[:, previous])
        return (None, grad_x, *found)


def _forward(
    blocks: Blocks, x: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], list[list[Tensor]]]:
    """Values and log-dets of rows; v of all blocks but the last, with its derivative; and of every block but the first
    the activations, l, tanh(r / 15) and exp(s)."""
    y, ladj = x.clone(), x.new_zeros(len(x))
    seen, slope = x.new_empty(2, len(x), blocks[-1].start)
    begin = 0
    kept: list[list[Tensor]] = []
    for b, block in enumerate(blocks):
        packed, weight, likelihood = parameters_of_block(parameters, b)
        own = y[:, block.start : block.start + block.size]
        previous = slice(begin, begin := block.start)
        seen[:, previous], slope[:, previous] = _seen(y[:, previous])
        before = seen[:, : block.start]
        *hidden, (rows, bias) = block.layout.unpack(packed)
        activations, h = [], before
        for layer in hidden:
            h = F.linear(h, *layer).relu_()
            activations.append(h)
        output = F.linear(h, rows, bias)
        if weight is None:
            output = output.mul_(block.of_network)
        else:
            beta, alpha = block.of_network, block.of_line
            output = torch.addmm(output, before, weight.mT, beta=beta, alpha=alpha)
        loc, raw = output.chunk(2, dim=-1)
        t = (raw / MAX_LOG_SCALE).tanh_()
        moved, log_scale = _with_likelihood(likelihood, loc, MAX_LOG_SCALE * t)
        scale = log_scale.exp()
        own.mul_(scale).add_(moved)
        ladj.add_(log_scale.sum(-1))
        kept.append([*activations, loc, t, scale])
    return y, ladj, (seen, slope), kept


def _seen(y: Tensor) -> tuple[Tensor, Tensor]:
    """What the blocks after it see of a block, v(y), and its derivative."""
    near = y.clamp(-LINEAR_UNTIL, LINEAR_UNTIL)
    slope = (1 + (y - near).abs()).reciprocal()
    return near - y.sign() * slope.log(), slope


def _backward_through(
    block: Block,
    of_output: Tensor,
    seen: Tensor,
    hidden: list[Tensor],
    packed: Tensor,
    weight: Tensor | None,
    of_seen: Tensor,
    of_packed: Tensor | None,
) -> None:
    """Add to ``of_seen[:, :start]`` the derivative through the maps of a block; write that of the perceptron's
    parameters into ``of_packed``, where it is given."""
    before, target = seen[:, : block.start], of_seen[:, : block.start]
    layers = block.layout.unpack(packed)
    found = layers if of_packed is None else block.layout.unpack(of_packed)
    grad = block.of_network * of_output
    inputs = [before, *hidden]
    for i in range(len(layers) - 1, -1, -1):
        if of_packed is not None:
            torch.mm(grad.mT, inputs[i], out=found[i][0])
            torch.sum(grad, 0, out=found[i][1])
        if i == 0:
            target.addmm_(grad, layers[0][0])
        else:
            grad = torch.ops.aten.threshold_backward(grad @ layers[i][0], inputs[i], 0)
    if weight is not None:
        target.addmm_(of_output, weight, alpha=block.of_line)


def _with_likelihood(likelihood: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """m and s from location l and log scale 15 t of the prior."""
    place, half = likelihood.unbind(0)
    log_share = F.logsigmoid(-2 * (log_scale + half))
    moved = torch.lerp(place.expand_as(loc), loc, log_share.exp())
    return moved, log_scale + 0.5 * (log_share - F.logsigmoid(-2 * half))


def _through_likelihood(
    likelihood: Tensor, loc: Tensor, t: Tensor, of_loc: Tensor, of_log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """From the derivatives with respect to m and s those with respect to (l, r), and to (a, c), summed over rows."""
    place, half = likelihood.unbind(0)
    share = torch.sigmoid(-2 * torch.add(half, t, alpha=MAX_LOG_SCALE))
    rest = 1 - share
    of_share = 2 * share * rest * (loc - place) * of_loc
    of_raw = torch.ops.aten.tanh_backward(share * of_log_scale - of_share, t)
    of_half = (share - torch.sigmoid(-2 * half)) * of_log_scale - of_share
    of_likelihood = torch.stack([(rest * of_loc).sum(0), of_half.sum(0)])
    return torch.cat([share * of_loc, of_raw], dim=-1), of_likelihood


def _composed(blocks: Blocks, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's own operations."""
    y = x[..., : blocks[0].start]
    ladj = y.new_zeros(y.shape[:-1])
    for b, block in enumerate(blocks):
        own = x[..., block.start : block.start + block.size]
        loc, log_scale = location_and_log_scale(y, block, *parameters_of_block(parameters, b))
        y = torch.cat([y, torch.addcmul(loc, own, log_scale.exp())], dim=-1)
        ladj = ladj + log_scale.sum(-1)
    return y, ladj


def parameters_of_block(parameters: Parameters, b: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Those of the b-th block."""
    packed, weight, likelihood = parameters[_PER_BLOCK * b : _PER_BLOCK * (b + 1)]
    return cast(Tensor, packed), weight, cast(Tensor, likelihood)


def _split(tensors: list[Any], count: int) -> tuple[list[Any], list[list[Tensor]]]:
    """The parameters, and what was kept of every block."""
    parameters, kept = tensors[:count], tensors[count:]
    each = len(kept) // (count // _PER_BLOCK)
    return parameters, [kept[i : i + each] for i in range(0, len(kept), each)]
