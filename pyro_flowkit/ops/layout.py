"""The weights and biases of a network as one vector: the autograd graph and an optimizer have a price per tensor."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the layers of a network are in one vector: weight, then bias, layer after layer.

    Args:
        shapes: of the weights, ``(outputs, inputs)``.
    """

    shapes: tuple[tuple[int, int], ...]

    lengths: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Of every weight and bias, in their order."""
    offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Where each of them starts."""
    sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Inputs of the first layer, then outputs of every layer."""
    num_weights: int = field(init=False, repr=False, compare=False)
    """Numbers in all the weights: products for each row that a perceptron takes."""

    def __post_init__(self) -> None:
        lengths = tuple(n for rows, columns in self.shapes for n in (rows * columns, rows))
        offsets = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        sizes = (self.shapes[0][1], *(rows for rows, _ in self.shapes))
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "num_weights", sum(lengths[::2]))

    def unpack(self, packed: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every layer, as views of the vector."""
        parts = packed.split(self.lengths)
        return [
            (weight.view(shape), bias)
            for shape, weight, bias in zip(self.shapes, parts[::2], parts[1::2], strict=True)
        ]
