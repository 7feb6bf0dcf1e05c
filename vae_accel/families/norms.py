"""The norms of diffusers 0.42's VAEs, and the blocks in which SiLU follows each of them.

A pair says: in this block every use of this activation module comes after one of these norms (perhaps with a reshape or
a nearest upsampling between them, which commute), and every use of these norms comes before it. Read off the `forward`
of each class. Only diffusers' own classes are believed: an activation wrongly silenced would be a wrong picture.

Cosmos, Kandinsky6SR, KVAEVideo and MiniMaxH3 call `F.silu`: their norms are taken alone. The SiLU that ends Mochi's
decoder follows no norm. VidTok's LayerNorm has no fused form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vae_accel.families import causal
from vae_accel.families.match import estranged, known_as

# How a norm computes: by class name of the module, the nn.GroupNorm of torch by exact type.
#   group: GroupNorm.                     frames: GroupNorm of each frame of [N, C, T, H, W].
#   l2: x / |x| * sqrt(C) * gamma + bias. mean: x / sqrt(mean(x²) + eps). last: the same over the last dimension.
#   l2_fp32, last: squares in fp32 whatever the input's dtype, fp64 included.
NORMS: dict[str, str] = {
    "GroupNorm": "group",
    "MiniMaxH3VideoGroupNorm": "frames",
    "WanRMS_norm": "l2",
    "QwenImageRMS_norm": "l2",
    "QwenImage21RMS_norm": "l2",
    "HunyuanVideo15RMS_norm": "l2",
    "HunyuanImageRefinerRMS_norm": "l2",
    "Kandinsky6VAERMSNorm": "l2_fp32",
    "PerChannelRMSNorm": "mean",
    "RMSNorm": "last",
}

# They square in the activation's own dtype: in fp16 anything above 255 is divided by infinity, and comes out as 0.
OVERFLOWING = ("PerChannelRMSNorm", "LTX2AudioPixelNorm")

# Modules around a GroupNorm: class name -> what they do with it, and the attribute that holds it.
#   by_frame: cut a clip into frames.  modulated: scale and shift by 1x1x1 convolutions of the enlarged latent.
WRAPPERS: dict[str, tuple[str, str]] = {
    "MochiChunkedGroupNorm3D": ("by_frame", "norm_layer"),
    "CosmosCausalGroupNorm": ("by_frame", "norm"),
    "CogVideoXSpatialNorm3D": ("modulated", "norm_layer"),
}

# Where diffusers' RMSNorm normalises channels that were moved to the end (elsewhere it serves attention heads).
CHANNELS_LAST_RMS: dict[str, tuple[str, ...]] = {
    "LTXVideoResnetBlock3d": ("norm1", "norm2"),
    "LTXVideoEncoder3d": ("norm_out",),
    "LTXVideoDecoder3d": ("norm_out",),
    "ResBlock": ("norm",),
    "GLUMBConv": ("norm",),
    "SanaMultiscaleLinearAttention": ("norm_out",),
    "Decoder": ("norm_out",),
}

_RESNET = (("norm1", "norm2"), "nonlinearity")
_CONV_NORM_OUT = (("conv_norm_out",), "conv_act")
_NORM_OUT = (("norm_out",), "conv_act")
_NORM_OUT_SHARED = (("norm_out",), "nonlinearity")

# Class name -> the norms, and the activation that follows each of them; a class may come in several forms.
BLOCKS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    **dict.fromkeys(
        (
            "ResnetBlock2D",
            "TemporalResnetBlock",
            "CogVideoXResnetBlock3D",
            "EasyAnimateResidualBlock3D",
            "HunyuanImageRefinerResnetBlock",
            "HunyuanImageResnetBlock",
            "HunyuanVideo15ResnetBlock",
            "HunyuanVideoResnetBlockCausal3D",
            "KVAEResnetBlock2D",
            "LTXVideoResnetBlock3d",
            "LTX2VideoResnetBlock3d",
            "MochiResnetBlock3D",
            "QwenImageResidualBlock",
            "QwenImage21ResidualBlock",
            "WanResidualBlock",
        ),
        (_RESNET,),
    ),
    **dict.fromkeys(
        (
            "AllegroEncoder3D",
            "AllegroDecoder3D",
            "EasyAnimateEncoder",
            "EasyAnimateDecoder",
            "Encoder",
            "HunyuanVideoEncoder3D",
            "HunyuanVideoDecoder3D",
            "MaskConditionDecoder",
            "TemporalDecoder",
        ),
        (_CONV_NORM_OUT,),
    ),
    "Decoder": (_CONV_NORM_OUT, _NORM_OUT),  # AutoencoderKL's, DC-AE's
    **dict.fromkeys(
        (
            "CogVideoXEncoder3D",
            "CogVideoXDecoder3D",
            "HunyuanImageRefinerEncoder3D",
            "HunyuanImageRefinerDecoder3D",
            "HunyuanVideo15Encoder3D",
            "HunyuanVideo15Decoder3D",
            "LTXVideoEncoder3d",
            "LTXVideoDecoder3d",
            "LTX2VideoEncoder3d",
            "LTX2VideoDecoder3d",
        ),
        (_NORM_OUT,),
    ),
    **dict.fromkeys(
        (
            "HunyuanImageEncoder2D",
            "HunyuanImageDecoder2D",
            "KVAEEncoder2D",
            "KVAEDecoder2D",
            "MochiEncoder3D",
            "QwenImageEncoder3d",
            "QwenImageDecoder3d",
            "QwenImage21Encoder3d",
            "QwenImage21Decoder3d",
            "WanEncoder3d",
            "WanDecoder3d",
        ),
        (_NORM_OUT_SHARED,),
    ),
    "AllegroTemporalConvLayer": tuple(((f"conv{i}.0",), f"conv{i}.1") for i in (1, 2, 3, 4)),
}

# Set where a block is conditioned on a time step: it scales between norm and activation, or activates the embedding.
_CONDITIONED = ("time_emb_proj", "temb_proj", "scale_shift_table", "time_embedder")


@dataclass(frozen=True)
class Pair:
    """The paths of the norms of one block, and of the SiLU that follows each of them."""

    norms: tuple[str, ...]
    act: str


def pairs(root: nn.Module) -> Iterator[Pair]:
    """Every place in `root` where SiLU, as a module, follows norms and nothing else."""
    for path, block in root.named_modules():
        name = known_as(block, BLOCKS)
        if name is None or not type(block).__module__.startswith("diffusers.") or _is_conditioned(block):
            continue
        for norms, act in BLOCKS[name]:
            if all(_follows(_get(block, norm)) for norm in norms) and type(_get(block, act)) is nn.SiLU:
                yield Pair(tuple(_join(path, norm) for norm in norms), _join(path, act))


def kind_of(module: nn.Module | None) -> str | None:
    """How a module normalises (a value of NORMS), or None for what is no norm known here."""
    if module is None:
        return None
    name = known_as(module, NORMS)
    if name == "GroupNorm" and type(module) is not nn.GroupNorm:
        return None
    return None if name is None else NORMS[name]


def refusal(module: nn.Module) -> str | None:
    """Why a module that looks like a norm known here is none, or None."""
    return None if kind_of(module) is not None else estranged(module, NORMS)


def overflows_unseen(module: nn.Module) -> bool:
    """Whether an overflow in this norm's own forward is finite again when it leaves."""
    return known_as(module, OVERFLOWING) is not None


def wrapper_of(module: nn.Module | None) -> tuple[str, str] | None:
    """What a module around a GroupNorm does and the attribute that holds it (a value of WRAPPERS); None: no wrapper."""
    name = None if module is None else known_as(module, WRAPPERS)
    if module is None or name is None:
        return None
    how, attribute = WRAPPERS[name]
    if kind_of(_get(module, attribute)) != "group":
        return None
    if how == "modulated":
        return (how, attribute) if _is_pointwise(module, "conv_y") and _is_pointwise(module, "conv_b") else None
    # Cosmos normalises frames apart only with a single group.
    return (how, attribute) if getattr(module, "num_groups", 1) == 1 else None


def channels_last_rms(root: nn.Module) -> set[str]:
    """The paths of every RMSNorm of diffusers that normalises channels."""
    found = set()
    for path, block in root.named_modules():
        for attribute in CHANNELS_LAST_RMS.get(known_as(block, CHANNELS_LAST_RMS) or "", ()):
            if kind_of(_get(block, attribute)) == "last":
                found.add(_join(path, attribute))
    return found


def _follows(norm: nn.Module | None) -> bool:
    return kind_of(norm) is not None or wrapper_of(norm) is not None


def _is_pointwise(module: nn.Module, attribute: str) -> bool:
    """Whether a causal convolution sees one position at a time, and so commutes with nearest upsampling."""
    wrapper = _get(module, attribute)
    row = None if wrapper is None else causal.causal_of(wrapper)
    if wrapper is None or row is None or any(row.pad):
        return False
    conv = _get(wrapper, row.conv)
    return isinstance(conv, nn.Conv3d) and {*conv.kernel_size, *conv.stride} == {1}


def _is_conditioned(block: Any) -> bool:
    if any(getattr(block, attribute, None) is not None for attribute in _CONDITIONED):
        return True
    return getattr(block, "time_embedding_norm", None) == "scale_shift"


def _get(block: nn.Module, path: str) -> nn.Module | None:
    module: Any = block
    for attribute in path.split("."):
        module = getattr(module, "_modules", {}).get(attribute)
    return module


def _join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute
