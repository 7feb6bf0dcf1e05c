import pytest
import torch
import torch.nn.functional as F

from tests.kernels.clips import SMALL, assert_bordered, weights
from tests.kernels.layouts import DTYPES, LAYOUTS, is_channels_last
from tests.tolerances import assert_close
from vae_accel.kernels import bordered, conv
from vae_accel.kernels import group_norm_modulate_act as kernel
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.group_norm_modulate_act import group_norm_modulate_act, reference


def inputs(device, size=(3, 12, 10), latent=(2, 6, 5), channels=4, batch=2, dtype=torch.float32):
    x = torch.randn(batch, channels, *size, device=device).to(dtype) * 2 + 1
    scale, shift = (torch.randn(batch, channels, *latent, device=device).to(dtype) for _ in range(2))
    return x, scale, shift, *(torch.randn(channels, device=device).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "latent"), [((3, 12, 10), (2, 6, 5)), ((1, 13, 7), (1, 5, 3)), ((4, 8, 8), (4, 8, 8))]
)
def test_matches_fp64(device, size, latent, layout, dtype):
    x, scale, shift, weight, bias = inputs(device, size, latent, dtype=dtype)
    x, frames = LAYOUTS[layout](x), [t * latent[0] // size[0] for t in range(size[0])]
    out = group_norm_modulate_act(x, 2, weight, bias, 1e-6, scale, shift, frames, act=True)
    oracle = reference(x.double(), 2, weight, bias, 1e-6, scale, shift, frames, act=True)
    assert LazyKernel.bound and out.dtype == dtype
    assert is_channels_last(out) if x.stride(1) == 1 else out.is_contiguous()
    assert_close(out, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "latent"),
    [((3, 12, 10), (2, 6, 5)), ((1, 13, 7), (1, 5, 3)), ((5, 1, 2), (3, 1, 2)), ((2, 70, 3), (1, 7, 3))],
)
def test_a_bordered_clip_stays_bordered(device, size, latent, dtype):
    x, scale, shift, weight, bias = inputs(device, size, latent, channels=8, dtype=dtype)
    frames = [t * latent[0] // size[0] for t in range(size[0])]
    out = group_norm_modulate_act(bordered.bordered(x), 2, weight, bias, 1e-6, scale, shift, frames, act=True)
    assert_bordered(out)
    assert_close(out, reference(x.double(), 2, weight, bias, 1e-6, scale, shift, frames, act=True))


def test_a_border_of_pixels_is_left_behind(device):
    x, scale, shift, *_ = inputs(device)
    x = bordered.bordered(x, border="replicate")
    out = group_norm_modulate_act(x, 2, None, None, 1e-6, scale, shift, [0, 1, 1], act=True)
    assert not bordered.is_bordered(out)
    assert_close(out, reference(x.double(), 2, None, None, 1e-6, scale, shift, [0, 1, 1], act=True))


def test_reads_the_statistics_of_the_convolution_before_it(device, monkeypatch):
    x, scale, shift, weight, bias = inputs(device, channels=64, dtype=torch.float16)
    taps, offset = weights(64, 64, 3, 3, 3, device=device)
    x = conv._launch(x, taps, offset, 2, None, None, 1, time="replicate", statistics=True, tile=SMALL)
    monkeypatch.setattr(kernel, "group_statistics", None)
    monkeypatch.setattr("vae_accel.kernels.group_statistics.group_statistics", None)
    out = group_norm_modulate_act(x, 8, weight, bias, 1e-6, scale, shift, [0, 1, 1], act=True)
    assert_close(out, reference(x.double(), 8, weight, bias, 1e-6, scale, shift, [0, 1, 1], act=True))


def test_without_affine_or_act(device):
    x, scale, shift, *_ = inputs(device)
    out = group_norm_modulate_act(x, 2, None, None, 1e-6, scale, shift, [0, 1, 1], act=False)
    assert_close(out, reference(x.double(), 2, None, None, 1e-6, scale, shift, [0, 1, 1], act=False))


@pytest.mark.parametrize(("frames", "latents"), [(5, 3), (4, 2), (1, 1)])
def test_reference_is_cogvideox_spatial_norm(frames, latents):
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

    stock = CogVideoXSpatialNorm3D(8, 4, groups=2)
    torch.nn.init.normal_(stock.norm_layer.weight)
    x, zq = torch.randn(1, 8, frames, 11, 9), torch.randn(1, 4, latents, 4, 5)
    whole, _ = stock(x, zq)
    scale, shift = stock.conv_y.conv(zq), stock.conv_b.conv(zq)
    # the first frame apart where their number is odd, the rest twice each
    index = [0, 1, 1, 2, 2] if frames == 5 else [t // 2 for t in range(frames)]
    norm = stock.norm_layer
    ours = reference(x, 2, norm.weight, norm.bias, norm.eps, scale, shift, index, act=True)
    torch.testing.assert_close(ours, F.silu(whole), rtol=1e-5, atol=1e-5)


def test_empty_batch(device):
    x, scale, shift, *_ = inputs(device, batch=0)
    assert group_norm_modulate_act(x, 2, None, None, 1e-6, scale, shift, [0, 0, 1], act=True).shape == x.shape


def test_gradients_are_the_references(device):
    x, scale, shift, *_ = inputs(device)
    scale.requires_grad_()
    group_norm_modulate_act(x, 2, None, None, 1e-6, scale, shift, [0, 0, 1], act=False).sum().backward()
    norm = F.group_norm(x, 2, eps=1e-6)
    assert_close(scale.grad[:, :, 1], norm[:, :, 2].unflatten(-1, (5, 2)).unflatten(-3, (6, 2)).double().sum((-1, -3)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traces_whole_with_the_real_strides(device, layout):
    x, scale, shift, weight, bias = inputs(device)
    arguments = (LAYOUTS[layout](x), 2, weight, bias, 1e-6, scale, shift, [0, 1, 1])
    torch.library.opcheck(
        torch.ops.vae_accel.group_norm_modulate_act.default,
        (*arguments, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(group_norm_modulate_act, fullgraph=True, backend="eager")(*arguments, act=True)
    eager = group_norm_modulate_act(*arguments, act=True)
    assert torch.equal(compiled, eager) and compiled.stride() == eager.stride()


@pytest.mark.parametrize("frames", [[0, 1], [0, 1, 2], [-1, 0, 1]])
def test_bad_frames_are_named(frames):
    x, scale, shift, *_ = inputs("cpu")
    with pytest.raises(ValueError, match="frames must hold 3 indices below 2"):
        group_norm_modulate_act(x, 2, None, None, 1e-6, scale, shift, frames, act=True)


def test_bad_shapes_are_named():
    x, scale, shift, *_ = inputs("cpu")
    with pytest.raises(ValueError, match="scale and shift"):
        group_norm_modulate_act(x, 2, None, None, 1e-6, scale[:, :2], shift, [0, 0, 1], act=True)
