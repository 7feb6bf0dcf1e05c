"""Bordered clips for the convolutions' tests: whether a border is still zero, small tiles, and random weights."""

import torch

from vae_accel.kernels import bordered, group_statistics
from vae_accel.kernels.conv import Tile

SMALL = Tile(32, 16, 0, 32, 2, 4)  # many tiles in a small picture, none of which it divides into


def normal(*shape, device, dtype=torch.float16):
    return torch.randn(shape, device=device).to(dtype)


def weights(channels_out, channels_in, *kernel, device, dtype=torch.float16):
    """A kernel and a bias that keep the variance of what they are given; channels-last, as the models' are laid out."""
    weight = torch.randn(channels_out, *kernel, channels_in, device=device).movedim(-1, 1)
    return (weight * weight[0].numel() ** -0.5).to(dtype), normal(channels_out, device=device, dtype=dtype)


def assert_bordered(x, border="zeros"):
    """Marked, and zeros in all of its memory that is not picture: before, between and behind the frames. Or around each
    frame what `F.pad` puts there, where a border to be repeated is not open."""
    assert bordered.is_bordered(x) and bordered.geometry(x).border == border
    if border != "zeros":
        if bordered.is_filled(x):
            assert torch.equal(surrounded(x), padded_frames(x, border))
        return
    pixels = bordered.pixels_of(x).clone()
    bordered.view(pixels, x.shape).zero_()
    assert not pixels.count_nonzero() and not pixels.isnan().any()


def surrounded(x):
    """`[N T, C, H + 2, W + 2]`: the frames of a clip whose borders are their own, with them."""
    place, pixels = bordered.geometry(x), bordered.pixels_of(x)
    frames = pixels[: place.frames * place.frame].view(place.frames, place.height + 2, place.row, -1)
    return frames[:, :, : place.width + 2].movedim(-1, 1)


def padded_frames(x, border):
    frames = x.transpose(1, 2).flatten(0, 1) if x.dim() == 5 else x
    return torch.nn.functional.pad(frames, (1, 1, 1, 1), mode=border)


def assert_noted(y):
    """The parts noted beside `y` are mean, squared deviations and number of what it holds, of 32 groups or of all."""
    mean, m2, count = group_statistics.noted(y, 32 if y.shape[1] > 96 else 1).double()
    parts = y.double().unflatten(1, (mean.shape[1], -1))
    parts = parts.movedim(2, 1).flatten(3).transpose(1, 2).flatten(2) if y.dim() == 5 else parts.flatten(2)
    total = count.sum(-1)
    assert (total == parts.shape[-1]).all()
    whole = (mean * count).sum(-1) / total
    squares = (m2 + count * (mean - whole[..., None]).square()).sum(-1)
    torch.testing.assert_close(whole, parts.mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares / total, parts.var(-1, unbiased=False), rtol=1e-4, atol=1e-6)
