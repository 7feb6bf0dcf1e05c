"""Channels-last only where the path keeps it: what each convolution sees, what is refused, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from tests.vaes import TABLE, Tiny
from vae_accel.edits import Ledger, ledger_of
from vae_accel.platforms import Cpu, base
from vae_accel.rewrite import Rewrite
from vae_accel.rewrites.causal_padding import CausalPadding
from vae_accel.rewrites.channels_last import FORMATS, ChannelsLast
from vae_accel.rewrites.conv3d_as_conv2d import Conv3dAsConv2d
from vae_accel.rewrites.fused_norm_act import FusedNormAct

BEFORE = (FusedNormAct(), CausalPadding())
# Convolutions of the decoder that see NCHW all the same: one a level, after a depth-to-space or a nearest upsampling.
MISSES = {"sd": 0, "flux.1": 0, "flux.2": 0, "vq": 0, "dc-ae": 0, "dc-ae-shuffle": 0, "tiny": 0, "svd": 0,
          "hunyuan-image": 2, "wan2.1": 3, "wan2.2-5b": 3, "qwen-image": 3, "hunyuan-video": 3, "hunyuan-video-1.5": 4,
          "hunyuan-image-refiner": 4, "cogvideox": 0, "mochi": 3, "cosmos": 2, "ltx-0.9.0": 3, "ltx-2.3": 4,
          "allegro": 4}  # fmt: skip
SINGLE = {"ltx-0.9.0", "ltx-0.9.1", "ltx-0.9.5", "kandinsky6-sr", "dc-ae", "dc-ae-shuffle"}  # stock squares in fp32
SAME = [case for case in TABLE if case.id not in {"rae", "asymmetric-masked"}]


def tiny(name: str) -> Tiny:
    return next(case for case in TABLE if case.id == name)


def optimized(model: nn.Module, *rewrites: Rewrite) -> nn.Module:
    base.run(model, Cpu(), [base.Step(rewrite, "on", "test") for rewrite in rewrites], "vae", {})
    return model


def outcome(model: nn.Module) -> base.Outcome:
    return next(o for o in ledger_of(model).outcomes if o.name == "channels_last")


@contextmanager
def as_on_cudnn(model: nn.Module, seen: dict[str, bool]) -> Iterator[None]:
    """Convolutions give channels-last where the weight or the input is so, as cuDNN does and the CPU does not in 3D."""

    def watched(path: str, conv: nn.Module) -> None:
        stock = conv._conv_forward

        def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            layout = FORMATS[weight.dim()]
            seen[path] = seen.get(path, True) and x.is_contiguous(memory_format=layout)
            return stock(x, weight, bias).contiguous(memory_format=layout)

        conv._conv_forward = forward

    convs = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)}
    for path, conv in convs.items():
        watched(path, conv)
    yield
    for conv in convs.values():
        del conv._conv_forward


@pytest.mark.parametrize("name", MISSES)
@torch.inference_mode()
def test_convolutions_see_channels_last(name: str) -> None:
    case = tiny(name)
    vae = optimized(case.build(), *BEFORE, ChannelsLast())
    assert outcome(vae).taken == ["encoder", "decoder"]
    seen: dict[str, bool] = {}
    with as_on_cudnn(vae, seen):
        case.decode(vae, case.latent())
    inside = {path: kept for path, kept in seen.items() if path.startswith("decoder.")}
    assert len(inside) - sum(inside.values()) == MISSES[name]
    assert len(inside) >= 10


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.id)
@torch.inference_mode()
def test_the_same_function_in_fp64(case: Tiny) -> None:
    vae = case.build(dtype=torch.float64)
    latent, pixels = case.latent("picture").double(), case.pixels("picture").double()
    decoded, encoded = case.decode(vae, latent), case.encode(vae, pixels)
    optimized(vae, *BEFORE, ChannelsLast())
    with as_on_cudnn(vae, {}):
        ours, latents = case.decode(vae, latent), case.encode(vae, pixels)
    tolerance = 1e-6 if case.id in SINGLE else 1e-9
    assert (ours - decoded).norm() < tolerance * decoded.norm()
    assert (latents - encoded).norm() < tolerance * encoded.norm()


@torch.inference_mode()
def test_what_comes_out_can_be_viewed() -> None:
    for name in ("flux.1", "hunyuan-video", "cosmos"):
        case = tiny(name)
        vae = optimized(case.build(), *BEFORE, ChannelsLast())
        assert case.decode(vae, case.latent()).is_contiguous()


def test_each_encoder_and_decoder_is_refused_for_the_first_thing_that_breaks_the_layout() -> None:
    alone = optimized(tiny("flux.1").build(), ChannelsLast())
    assert set(outcome(alone).refused) == {"encoder", "decoder"} and not ledger_of(alone).edits
    assert outcome(alone).refused["decoder"] == (
        "decoder.up_blocks.0.resnets.0.norm1: GroupNorm copies to NCHW unless fused_norm_act takes it, "
        "and 13 more like it"
    )
    unpadded = optimized(tiny("hunyuan-video").build(), FusedNormAct(), ChannelsLast())
    assert "unless causal_padding takes it" in outcome(unpadded).refused["decoder"]
    reflected = optimized(tiny("ltx-2.0").build(), *BEFORE, ChannelsLast())
    assert outcome(reflected).taken == ["encoder"]
    assert "pads in mode reflect" in outcome(reflected).refused["decoder"]
    stateful = optimized(tiny("easyanimate").build(), *BEFORE, ChannelsLast())
    assert "EasyAnimateCausalConv3d pads by replication" in outcome(stateful).refused["decoder"]


@torch.inference_mode()
def test_weights_that_come_and_go_are_laid_out_before_or_not_at_all() -> None:
    case = tiny("flux.1")
    decoded = case.decode(case.build(), case.latent())
    before, after = optimized(case.build(), *BEFORE, ChannelsLast()), case.build()
    cpu_offload(before, execution_device=torch.device("cpu"))
    cpu_offload(after, execution_device=torch.device("cpu"))
    optimized(after, *BEFORE, ChannelsLast())
    assert outcome(before).taken and not outcome(after).taken
    assert "optimize before offloading" in outcome(after).refused["decoder"]
    seen: list[Tensor] = []
    before.decoder.conv_in.register_forward_hook(lambda conv, args, y: seen.append(y))
    for vae in (before, after):
        torch.testing.assert_close(case.decode(vae, case.latent()), decoded, rtol=1e-4, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_a_platform_without_channels_last_3d_takes_pictures_alone() -> None:
    image = optimized(tiny("flux.1").build(), *BEFORE, ChannelsLast(clips=False))
    assert outcome(image).taken == ["encoder", "decoder"]
    video = optimized(tiny("wan2.1").build(), *BEFORE, ChannelsLast(clips=False))
    assert "no channels_last_3d on this platform" in outcome(video).refused["decoder"]


@torch.inference_mode()
def test_weights_that_another_rewrite_laid_out_stay_as_they_are() -> None:
    case = tiny("wan2.1")
    vae = case.build()
    decoded = case.decode(vae, case.latent())
    optimized(vae, *BEFORE, Conv3dAsConv2d(), ChannelsLast())
    ledger = ledger_of(vae)
    owners = {ledger.owner(p, "weight") for p, m in vae.decoder.named_modules(prefix="decoder") if type(m) is nn.Conv2d}
    assert owners == {"channels_last"}
    assert ledger.owner("decoder.mid_block.resnets.0.conv1", "weight") == "conv3d_as_conv2d"
    torch.testing.assert_close(case.decode(vae, case.latent()), decoded, rtol=1e-4, atol=1e-4)


def test_a_decoder_alone_and_a_lone_patch_embedding() -> None:
    decoder = tiny("flux.1").build().decoder
    site = next(iter(ChannelsLast().sites(optimized(decoder, *BEFORE), ledger_of(decoder))))
    assert (site.path, site.refused) == ("", None)
    assert not list(ChannelsLast().sites(nn.Sequential(nn.Conv2d(3, 8, 14, 14)), Ledger()))


def test_fp32_is_refused_where_a_platform_says_so():
    vae = tiny("sd").build()
    refused = {site.path: site.refused for site in ChannelsLast(fp32=False).sites(vae, Ledger())}
    assert refused and all("fp32" in reason for reason in refused.values())
    in_16_bits = [site.refused for site in ChannelsLast(fp32=False).sites(vae.bfloat16(), Ledger())]
    assert not any("fp32" in (reason or "") for reason in in_16_bits)
