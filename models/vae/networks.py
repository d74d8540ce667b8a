"""Encoders and decoders: multilayer perceptrons, and residual convolutional networks for images.

An encoder maps data ``(*batch, D)`` to features ``(*batch, H)``, a decoder codes ``(*batch, L)`` to ``(*batch, D)``;
images are flat on the outside, row by row, with one channel. The convolutional pair has three stages of one
pre-activation residual block each (He et al. 2016); between them the sides are halved, or doubled. Images of 16 pixels
or more are halved before the first stage, for the sake of time: 28 pixels are 14, 7, 4.

References:
    Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. Neural Spline Flows. NeurIPS 2019, appendix B.2.

    Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun. Identity Mappings in Deep Residual Networks. ECCV 2016.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = 3
MIN_HALVED = 16  # pixels of the shorter side


def mlp(
    widths: Sequence[int], dropout: float = 0.0, *, activate_last: bool = False
) -> nn.Sequential:
    """Linear layers of these widths with SiLU, and dropout, between them; after the last one, too, if asked for."""
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (size, next_size) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers.append(nn.Linear(size, next_size))
        if i < last or activate_last:
            layers += [nn.SiLU(), nn.Dropout(dropout)] if dropout else [nn.SiLU()]
    return nn.Sequential(*layers)


class ConvEncoder(nn.Module):
    """Flat images to features.

    Args:
        image_shape: height and width.
        feature_dim: number H of features.
        channels: of the first stage; each stage has twice as many as the one before.
        dropout: probability of dropping a unit inside of a block while training.
    """

    def __init__(
        self, image_shape: tuple[int, int], feature_dim: int, channels: int, dropout: float = 0.0
    ):
        super().__init__()
        self.image_shape = image_shape
        height, width = stage_shapes(image_shape)[-1]
        stride = first_stride(image_shape)
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, stride=stride, padding=1)]
        for stage in range(STAGES):
            size = channels * 2**stage
            layers.append(ResidualBlock(size, dropout))
            if stage < STAGES - 1:
                layers.append(nn.Conv2d(size, 2 * size, 3, stride=2, padding=1))
        layers += [nn.SiLU(), nn.Flatten(), nn.Linear(size * height * width, feature_dim)]
        self.layers = nn.Sequential(*layers, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        features = self.layers(x.reshape(-1, 1, *self.image_shape))
        return features.reshape(*x.shape[:-1], -1)


class ConvDecoder(nn.Module):
    """Codes to flat images; the mirror image of :class:`ConvEncoder`, with the same arguments."""

    def __init__(
        self, latent_dim: int, image_shape: tuple[int, int], channels: int, dropout: float = 0.0
    ):
        super().__init__()
        shapes = stage_shapes(image_shape)
        size = channels * 2 ** (STAGES - 1)
        height, width = shapes[-1]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, size * height * width),
            nn.Unflatten(-1, (size, height, width)),
        ]
        for stage in reversed(range(STAGES)):
            size = channels * 2**stage
            layers.append(ResidualBlock(size, dropout))
            if stage > 0:
                layers += [
                    nn.Upsample(shapes[stage - 1]),
                    nn.Conv2d(size, size // 2, 3, padding=1),
                ]
        stride = first_stride(image_shape)
        layers += [nn.SiLU(), nn.Conv2d(channels, stride**2, 3, padding=1), nn.PixelShuffle(stride)]
        self.layers = nn.Sequential(*layers)
        self.image_shape = image_shape

    def forward(self, z: Tensor) -> Tensor:
        height, width = self.image_shape
        images = self.layers(z.reshape(-1, z.shape[-1]))[..., :height, :width]
        return images.reshape(*z.shape[:-1], height * width)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); the second convolution is zero at first, and the block the identity."""

    def __init__(self, channels: int, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = dropout
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.first(F.silu(x)))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        return x + self.second(h)


def first_stride(image_shape: tuple[int, int]) -> int:
    """2 where images are halved before the first stage, else 1."""
    return 2 if min(image_shape) >= MIN_HALVED else 1


def stage_shapes(image_shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width in every stage."""
    shapes = [image_shape if first_stride(image_shape) == 1 else _halved(image_shape)]
    for _ in range(STAGES - 1):
        shapes.append(_halved(shapes[-1]))
    return shapes


def _halved(shape: tuple[int, int]) -> tuple[int, int]:
    return (shape[0] + 1) // 2, (shape[1] + 1) // 2
