"""Bordered clips for the convolutions' tests: whether a border is still zero, small tiles, and random weights."""

import torch

from vae_accel.kernels import bordered
from vae_accel.kernels.conv import Tile

SMALL = Tile(32, 16, 0, 32, 2, 4)  # many tiles in a small picture, none of which it divides into


def normal(*shape, device, dtype=torch.float16):
    return torch.randn(shape, device=device).to(dtype)


def weights(channels_out, channels_in, *kernel, device, dtype=torch.float16):
    """A kernel and a bias that keep the variance of what they are given; channels-last, as the models' are laid out."""
    weight = torch.randn(channels_out, *kernel, channels_in, device=device).movedim(-1, 1)
    return (weight * weight[0].numel() ** -0.5).to(dtype), normal(channels_out, device=device, dtype=dtype)


def assert_bordered(x):
    """Marked, and zeros in all of its memory that is not picture: before, between and behind the frames."""
    assert bordered.is_bordered(x)
    pixels = bordered.pixels_of(x).clone()
    bordered.view(pixels, x.shape).zero_()
    assert not pixels.count_nonzero() and not pixels.isnan().any()
