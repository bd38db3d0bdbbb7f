"""Models of images, in torch alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import case, images, rows

FAMILY = "plain torch, images"
batch = images(8, name="input")  # as nn.Sequential calls it


def _convolution(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.BatchNorm2d(outputs), nn.ReLU())


@case(FAMILY, batch, mixes=True)
def cnn_with_batch_norm() -> nn.Module:
    """In training: the statistics of the batch are taken as given."""
    return nn.Sequential(
        _convolution(3, 4), nn.MaxPool2d(2), _convolution(4, 6, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip


class _Evaluated(nn.Sequential):
    """Batch normalisation by the running statistics, whatever the mode."""

    def train(self, mode: bool = True) -> "_Evaluated":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


@case(FAMILY, batch)
def cnn_with_frozen_batch_norm() -> nn.Module:
    return _Evaluated(_convolution(3, 4), _convolution(4, 6, stride=2), nn.Flatten(), nn.Linear(96, 4))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


@case(FAMILY, batch, mixes=True)
def residual_network() -> nn.Module:
    return nn.Sequential(
        _convolution(3, 4),
        _Residual(4, 4, 1),
        _Residual(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self._block(3, 4), self._block(4, 6)
        self.bottom = self._block(6, 8)
        self.up_two, self.up_one = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1)
        self.join_two, self.join_one = self._block(12, 6), self._block(8, 4)
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect"), nn.GroupNorm(2, outputs), nn.SiLU()
        )

    def forward(self, input: Tensor) -> Tensor:
        first = self.first(input)
        second = self.second(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(second, 2))
        two = self.join_two(torch.cat([self.up_two(bottom), second], 1))
        return self.head(self.join_one(torch.cat([self.up_one(two), first], 1)))


@case(FAMILY, batch)
def u_net() -> nn.Module:
    return _UNet()


class _SqueezeAndExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class _InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, squeeze and excite, narrow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
            _SqueezeAndExcite(wide), nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@case(FAMILY, batch, mixes=True)
def mobile_net() -> nn.Module:
    return nn.Sequential(
        _convolution(3, 4, stride=2),
        _InvertedResidual(4),
        nn.Flatten(),
        nn.Dropout(0.0, inplace=True),
        nn.Linear(64, 4),
    )


class _MixerBlock(nn.Module):
    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(patches, 6), nn.GELU(), nn.Linear(6, patches))
        self.along = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm2(x))


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks, self.norm, self.head = (
            nn.Sequential(_MixerBlock(4, 8), _MixerBlock(4, 8)),
            nn.LayerNorm(8),
            nn.Linear(8, 4),
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(input).flatten(2).transpose(1, 2))).mean(1))


@case(FAMILY, batch)
def mlp_mixer() -> nn.Module:
    return _Mixer()


@case(FAMILY, rows(5, name="input"), mixes=True)
def gan_generator() -> nn.Module:
    """Transposed convolutions with batch normalisation."""
    return nn.Sequential(
        nn.Unflatten(1, (5, 1, 1)),
        nn.ConvTranspose2d(5, 6, 4, 1, 0, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 2, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


@case(FAMILY, batch, fallback=("*.weight.original",))
def spectral_normed_discriminator() -> nn.Module:
    """Weights divided by their largest singular value."""
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, 4, 4, 2, 1)), nn.LeakyReLU(0.2), norm(nn.Conv2d(4, 6, 4, 2, 1)), nn.LeakyReLU(0.2),
        nn.Flatten(), norm(nn.Linear(24, 1)),
    )  # fmt: skip


class _VariationalAutoencoder(nn.Module):
    """The noise is an input, so that a sample's is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 8), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(8, 2), nn.Linear(8, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.PReLU(8), nn.Linear(8, 12))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


@case(FAMILY, lambda num: {"x": torch.randn(num, 12), "noise": torch.randn(num, 2)}, tuple)
def variational_autoencoder() -> nn.Module:
    return _VariationalAutoencoder()


@case(FAMILY, lambda num: {"input": torch.randn(num, 2, 4, 6, 6)})
def video_network() -> nn.Module:
    """Convolutions in three dimensions, dilated and grouped."""
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, groups=2), nn.InstanceNorm3d(4, affine=True), nn.PReLU(),
        nn.Conv3d(4, 4, (1, 3, 3), dilation=(1, 2, 2), padding="same"), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip
