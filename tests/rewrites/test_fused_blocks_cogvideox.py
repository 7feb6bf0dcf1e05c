"""Blocks of CogVideoX on the fused convolution: frames handed on, clips up and down, and what goes to stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_cogvideox as cogvideox
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn

from tests.rewrites.fused import ALONE, BESIDE, NORMS, TINY, clip, optimized, outcome_of
from tests.subjects import plan
from vae_accel.edits import Ledger, Pen
from vae_accel.families import clip_conv
from vae_accel.families.blocks import block_of
from vae_accel.kernels import bordered, group_statistics
from vae_accel.platforms import base
from vae_accel.workloads.weights import randomise

CASE = TINY["cogvideox"]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "bordered": bordered.bordered,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def frozen(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    return randomise(module, dtype=dtype, device="cpu").requires_grad_(False)


def residual(out: int = 32, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    more = {"temb_channels": 0, "spatial_norm_dim": 4, **more}
    return frozen(cogvideox.CogVideoXResnetBlock3D(32, out, **more), dtype).eval()


def assert_same(actual: Any, expected: Any) -> None:
    """Nested caches, of which ours need not keep what nobody reads."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            if key not in ("conv_y", "conv_b"):
                assert_same(actual[key], expected[key])
    elif expected is not None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_every_block_is_taken_and_no_convolution_is_given_a_padded_clip() -> None:
    vae: Any = optimized(CASE.build(dtype=torch.bfloat16))
    names = ("CogVideoXResnetBlock3D", "CogVideoXUpsample3D", "CogVideoXDownsample3D")
    blocks = [path for path, module in vae.named_modules() if type(module).__name__ in names]
    assert len(blocks) == 22 and {*blocks, "encoder", "decoder"} == set(outcome_of(vae).taken)
    given: dict[str, Tensor] = {}
    for path, module in vae.named_modules():
        if path.endswith(("conv1.conv", "conv2.conv")):
            module.register_forward_pre_hook(lambda _, args, path=path: given.update({path: args[0]}))
    CASE.decode(vae, CASE.latent().bfloat16())
    CASE.encode(vae, CASE.pixels().bfloat16())
    for path, x in given.items():
        assert x.shape[2] in (3, 5, 9) and x.shape[-1] in (3, 6, 12, 24), path
        # Weights bound an encoder's norms; a decoder's are scaled by the latent.
        assert x.dtype == (torch.float16 if path.startswith("encoder") else torch.bfloat16), path


@pytest.mark.parametrize("kernel", [1, 3, (5, 3, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(3, 2, 2), (9, 8), (1, 1, 2, 1, 5), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_frames_are_handed_on_as_stock_hands_them(kernel: Any, lengths: tuple[int, ...], layout: str) -> None:
    stock, ours = (frozen(cogvideox.CogVideoXCausalConv3d(4, 5, kernel)) for _ in range(2))
    holder = nn.ModuleDict({"conv": ours})
    for hand in clip_conv.hands(holder, "conv"):
        Pen(holder, Ledger(), "fused_blocks").method(hand.path, hand.slot, hand.function, *hand.facts)
    given = theirs = None
    for step, frames in enumerate(lengths):
        x = clip(2, 4, frames, 3, 5, seed=step)
        mine = LAYOUTS[layout](x.clone())
        y, given = ours(mine, conv_cache=given)
        expected, theirs = stock(x, conv_cache=theirs)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        if kernel == 1:
            assert given is None  # stock clones the clip, and never reads the clone
            continue
        torch.testing.assert_close(given, theirs, rtol=0, atol=0)
        if layout != "bordered":
            mine.fill_(float("nan"))  # the caller's, who may use it for the next step
            torch.testing.assert_close(given, theirs, rtol=0, atol=0)


@torch.inference_mode()
def test_a_long_clip_is_not_kept_alive() -> None:
    vae, kept = optimized(CASE.build(), NORMS), []
    for module in vae.encoder.modules():
        if type(module).__name__ == "CogVideoXCausalConv3d":
            module.register_forward_hook(lambda m, args, y: kept.append((args[0], y[1])))
    CASE.encode(vae, CASE.pixels())
    for x, frames in kept:
        assert frames.shape[2] == 2
        assert x.shape[2] <= 3 or frames.untyped_storage().nbytes() * 3 < x.untyped_storage().nbytes() * 2


@pytest.mark.parametrize(
    "more", [{}, {"out": 64}, {"out": 64, "conv_shortcut": True}, {"spatial_norm_dim": None}], ids=str
)
@pytest.mark.parametrize("steps", [ALONE, NORMS, BESIDE], ids=["alone", "norms", "beside"])
@torch.no_grad()
def test_residual_blocks_over_several_steps(more: dict[str, Any], steps: base.Platform) -> None:
    stock, ours = residual(**more), optimized(residual(**more), steps)
    given = theirs = None
    for step, frames in enumerate((3, 2, 1, 4)):
        x, zq = clip(2, 32, frames, 4, 6, seed=step), clip(2, 4, frames, 2, 3, seed=step)
        zq = zq if stock.spatial_norm_dim else None
        y, given = ours(x, None, zq, conv_cache=given)
        expected, theirs = stock(x, None, zq, conv_cache=theirs)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
        assert_same(given, theirs)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_step_for_a_gradient_reads_what_ours_left_and_the_reverse(ours_first: bool) -> None:
    stock, ours = (residual(spatial_norm_dim=None) for _ in range(2))
    optimized(ours, NORMS)
    results = []
    for block in (stock, ours):
        first, second = clip(1, 32, 3, 4, 6), clip(1, 32, 2, 4, 6, seed=1)
        (second if ours_first else first).requires_grad_()
        _, kept = block(first)
        z, _ = block(second, conv_cache=kept)
        results.append((z, *torch.autograd.grad(z.square().sum(), second if ours_first else first)))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_step_under_autocast_reads_frames_that_a_norm_wrote_in_fp16() -> None:
    ours = optimized(residual(dtype=torch.bfloat16, spatial_norm_dim=None), NORMS)
    x = clip(1, 32, 3, 4, 6, dtype=torch.bfloat16)
    y, kept = ours(x)
    assert kept["conv1"].dtype == torch.float16 and y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y, kept = ours(x, conv_cache=kept)
    assert kept["conv1"].dtype == torch.bfloat16 and y.isfinite().all()
    assert ours(x, conv_cache=kept)[0].isfinite().all()


@each_layout
@pytest.mark.parametrize("compress_time", [True, False])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
@torch.no_grad()
def test_up_and_down(frames: int, compress_time: bool, layout: str) -> None:
    for kind, more in ((CogVideoXUpsample3D, {}), (CogVideoXDownsample3D, {"padding": 0})):
        stock, ours = (frozen(kind(8, 16, compress_time=compress_time, **more)) for _ in range(2))
        x = clip(2, 8, frames, 4, 5)
        y, expected = optimized(ours, ALONE)(LAYOUTS[layout](x)), stock(x)
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [2, 3])
def test_frames_written_twice_stay_bordered_and_keep_their_statistics(frames: int) -> None:
    from vae_accel.families.cogvideox import _twice

    x = bordered.bordered(clip(2, 8, frames, 3, 5, dtype=torch.float32))
    partials = torch.arange(3 * 2 * frames * 8 * 2, dtype=torch.float32).view(3, 2 * frames, 8, 2)
    y, alone = _twice(x, partials, frames % 2), frames % 2
    index = [*range(alone), *(t for t in range(alone, frames) for _ in range(2))]
    assert torch.equal(y, x[:, :, index]) and bordered.is_bordered(y)
    pixels = bordered.pixels_of(y).clone()
    bordered.view(pixels, y.shape).zero_()
    assert not pixels.count_nonzero()
    noted = group_statistics.noted(y, 8)
    assert noted is not None and torch.equal(noted.unflatten(1, (2, -1)), partials.unflatten(1, (2, -1))[:, :, index])


def test_halves_are_added_not_sums_halved() -> None:
    """Where fp16 holds a mean but not the sum."""
    block = optimized(frozen(CogVideoXDownsample3D(4, 4, compress_time=True), torch.float16), ALONE)
    seen: list[Tensor] = []
    block.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        block(torch.full((1, 4, 2, 2, 2), 60000.0, dtype=torch.float16))
    assert seen[0].amax() == 60000


@pytest.mark.parametrize("trained", ["conv1.conv", "conv2.conv", "norm1.norm_layer", "input"])
def test_gradients_are_stocks(trained: str) -> None:
    results = []
    for block in (residual(), optimized(residual(), NORMS)):
        x, zq = clip(1, 32, 3, 4, 6).requires_grad_(trained == "input"), clip(1, 4, 3, 2, 3)
        parameter = x if trained == "input" else block.get_submodule(trained).weight.requires_grad_()
        results.append(torch.autograd.grad(block(x, None, zq)[0].square().sum(), parameter)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


class Adapter(nn.Module):
    """What adds to a convolution, as LoRA's layers do."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs) + x.mean()


@pytest.mark.parametrize("which", ["conv1", "conv2", "conv_shortcut", "upsamplers.0", "conv_in", "conv_out"])
@torch.no_grad()
def test_an_adapter_sees_what_it_sees_in_stock(which: str) -> None:
    stock, ours = CASE.build(dtype=torch.float64), optimized(CASE.build(dtype=torch.float64), NORMS)
    for vae in (stock, ours):
        for path, module in list(vae.decoder.named_modules()):
            if path.endswith(which) and isinstance(getattr(module, "conv", None), nn.Conv2d | nn.Conv3d):
                module.conv = Adapter(module.conv)
            elif path.endswith(which):
                parent, _, name = path.rpartition(".")
                setattr(vae.decoder.get_submodule(parent), name, Adapter(module))
    latent = clip(1, 4, 5, 2, 3)
    torch.testing.assert_close(CASE.decode(ours, latent), CASE.decode(stock, latent), rtol=0, atol=1e-11)


@torch.no_grad()
def test_an_adapter_that_hides_the_weight_is_given_what_the_norm_wrote() -> None:
    """fp16, in front of a convolution in bf16."""
    stock, ours = (residual(dtype=torch.bfloat16, spatial_norm_dim=None) for _ in range(2))
    optimized(ours, NORMS)
    for block in (stock, ours):
        block.conv1.conv = Adapter(block.conv1.conv)
    x = clip(1, 32, 3, 4, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(x)[0], stock(x)[0], rtol=0.1, atol=0.1)


@torch.no_grad()
def test_where_ours_does_not_run_the_rewrites_beneath_it_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, and cards other than Hopper: bit for bit the plan without these blocks."""
    for place in ("clip_conv", "cogvideox", "image_conv"):
        monkeypatch.setattr(f"vae_accel.families.{place}.runs", lambda x: False)
    without = plan(tuple(step for step in BESIDE.vae if step.rewrite.name != "fused_blocks"))
    ours, others = optimized(CASE.build()), CASE.build()
    base.run(others, without, without.vae, "vae", {"strict": True})
    for latent in (CASE.latent(), CASE.single_frame_latent(), clip(1, 4, 5, 2, 3, dtype=torch.float32)):
        assert torch.equal(CASE.decode(ours, latent), CASE.decode(others, latent))
    for pixels in (CASE.pixels(), CASE.pixels()[:, :, :1], clip(1, 3, 17, 8, 16, dtype=torch.float32)):
        assert torch.equal(CASE.encode(ours, pixels), CASE.encode(others, pixels))


@torch.no_grad()
def test_a_time_embedding_and_dropout_are_stocks() -> None:
    more = {"temb_channels": 16, "spatial_norm_dim": None, "dropout": 0.5}
    stock, ours = residual(**more), optimized(residual(**more), ALONE)
    x, temb = clip(1, 32, 2, 3, 5), clip(1, 16)
    torch.testing.assert_close(ours(x, temb)[0], stock(x, temb)[0], rtol=0, atol=1e-12)
    results = []
    for block in (stock, ours):
        torch.manual_seed(0)
        results.append(block.train()(x)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_cache_that_does_not_fit_is_stocks_to_refuse() -> None:
    messages = []
    for block in (residual(), optimized(residual(), NORMS)):
        with pytest.raises(RuntimeError) as caught:
            block(clip(1, 32, 2, 4, 6), None, clip(1, 4, 2, 2, 3), conv_cache={"conv1": clip(1, 32, 2, 4, 5)})
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_what_is_no_such_block_is_refused_with_the_reason() -> None:
    block = residual(64)
    block.conv_shortcut = Adapter(block.conv_shortcut)
    assert block_of(block) == "conv_shortcut: Adapter is no Conv3d"
    block.conv1.conv = nn.Conv3d(32, 64, 3, stride=2)
    block.conv_shortcut = nn.Conv3d(32, 64, 1)
    assert block_of(block) == "conv1: stride, dilation or groups"
    up = CogVideoXUpsample3D(8, 8)
    up.conv = Adapter(up.conv)
    assert block_of(up) == "conv: Adapter is no Conv2d"


@pytest.mark.parametrize("zq", [True, False])
@torch.no_grad()
def test_compiles_as_one_graph(zq: bool) -> None:
    block = optimized(residual(64, torch.float32, spatial_norm_dim=4 if zq else None), NORMS)
    given = clip(1, 32, 3, 4, 6, dtype=torch.float32), None, clip(1, 4, 3, 2, 3, dtype=torch.float32) if zq else None
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given)[0], block(*given)[0])
