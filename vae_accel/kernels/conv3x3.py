"""Convolutions with 3x3 taps in space on Hopper, by a kernel in CUDA C++ (conv3x3.cu says how).

The law is that of `kernels/conv.py` and, by pairs of frames, of `kernels/winograd.py`, whose forms in Triton run where
this one does not: on other cards, for channels it has no form for, without NVRTC.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from . import _dispatch, bordered, nvrtc
from .group_statistics import empty_partials, layout_of, neighbours_of, note
from .nvrtc import Program, TensorMap
from .tile_io import weight_matrix

SOURCE, MACHINE = Path(__file__).with_suffix(".cu"), Path(__file__).with_name("sm90.cuh")
NAME, ARCH = "conv3x3", "sm_90a"
SHARED = 227 << 10  # bytes a program may have
KINDS = ("direct", "pairs", "upsample", "lines")  # the macros of conv3x3.cu
OPERANDS = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class Form(NamedTuple):
    """columns: of a tile; kind: one of KINDS; consumers: warpgroups that multiply."""

    columns: int
    kind: str
    consumers: int

    @property
    def step(self) -> int:
        """Input channels at a time, in bytes."""
        return 192 if self.columns == 96 else 128

    @property
    def blocks(self) -> int:
        """Sums of 64 pixels that a warpgroup holds: one for each, two by F(2, 3) and where it upsamples."""
        return 4 if self.columns == 96 and self.kind != "direct" else 2

    @property
    def rows(self) -> int:
        """Pixels of a warpgroup."""
        return 64 * (self.blocks if self.kind == "direct" else self.blocks // 2)

    @property
    def stages(self) -> tuple[int, int]:
        """How many tiles of pixels and of weights are on their way: what shared memory holds, weights three a tile."""
        direct, two_sums = {96: ((2, 5), (2, 5)), 128: ((2, 5), (3, 6)), 192: ((3, 4), (4, 4))}[self.columns]
        return direct if self.kind == "direct" else two_sums

    def shared(self, channels_out: int) -> int:
        pixels, weights = self.stages
        part = -(-(self.rows + 2) // 8) * 8 * self.step
        chunk = 64 if self.columns == 128 else 96
        tiles = pixels * self.consumers * part + weights * self.columns * self.step + self.consumers * 64 * chunk * 2
        return 1024 + tiles + 16 * (pixels + weights) + 2 * channels_out

    def program(self, operands: torch.dtype, result: torch.dtype, neighbours: int) -> Program:
        """`neighbours`: channels that share a part of the statistics it gathers; 0 where it gathers none."""
        pixels, weights = self.stages
        macros = {"N": self.columns, "KIND": KINDS.index(self.kind), "CONSUMERS": self.consumers, "BLOCKS": self.blocks}
        macros |= {"NA": pixels, "NB": weights, "NEIGHBOURS": neighbours, "BRAIN": int(result == torch.bfloat16)}
        macros |= {"OPERANDS": OPERANDS.index(operands)}
        source = MACHINE.read_text() + _products(self.columns) + SOURCE.read_text()
        return Program(source, NAME, tuple(f"-D{name}={value}" for name, value in macros.items()), ARCH)


class _Sizes(ctypes.Structure):
    """`Sizes` of conv3x3.cu."""

    names = "frames T S KT before kept repeat tiles_m tiles_n FRAME ROW H W first I O residual units chunks across"
    _fields_: ClassVar = [(name, ctypes.c_int) for name in names.split()]


def columns_of(channels_in: int, channels_out: int, operands: torch.dtype = torch.float16) -> int | None:
    """Columns of a tile that divide the output channels, with a step of K that divides the input's; or None.

    e4m3 has no form for 96 columns, whose convolutions Winograd's transform in fp16 makes as fast.
    """
    wide = channels_in % (128 // operands.itemsize) == 0
    if wide and channels_out % 192 == 0:
        return 192
    if wide and channels_out % 128 == 0:
        return 128
    return 96 if operands.itemsize == 2 and channels_in % 96 == 0 and channels_out % 96 == 0 else None


def has_form(channels_in: int, channels_out: int, device: torch.device, operands: torch.dtype = torch.float16) -> bool:
    """Whether there is a form for these channels on this card."""
    return columns_of(channels_in, channels_out, operands) is not None and is_ready(device)


def takes(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a convolution of ours, by `kernels.eligible`, has a form here: 3x3 taps in space, 16 bits in and out."""
    if weight.shape[-1] != 3 or x.dtype.itemsize != 2 or dtype.itemsize != 2:
        return False
    return has_form(x.shape[1], weight.shape[0], x.device)


@functools.cache
def is_ready(device: torch.device) -> bool:
    """Whether this is a Hopper card on which a form compiles and loads; said once where it does not."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    reason = nvrtc.unavailable()
    if reason is None:
        try:
            _kernel(Form(128, "direct", 2), torch.float16, torch.bfloat16, 0, 128, device.index or 0)
        except RuntimeError as error:
            reason = str(error)
    if reason is not None:
        warnings.warn(f"convolutions run in Triton's form, which is slower: {reason}", stacklevel=2)
    return reason is None


def conv_pairs(x: Tensor, taps: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[N, O, T, H, W]` of what `rms_norm_pairs` made, bordered `[N, I, 2 T, H, W]`, and its `transformed_taps`."""
    n, _, t, h, w = x.shape
    out = bordered.empty((n, taps.shape[0], t // 2, h, w), dtype, x.device)
    return _launch("pairs", x, None, taps, bias, residual, out, _Sizes(frames=n * t // 4, T=1, KT=3))


def conv_lines(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    statistics: bool = False,
) -> Tensor:
    """`[N, O, H, W]` of what `norm_lines` made, bordered `[N, I, 4, H / 2, W]`, and its `transformed_taps`."""
    n, _, _, h, w = x.shape
    out = bordered.empty((n, taps.shape[0], 2 * h, w), dtype, x.device, versions=statistics)
    return _launch("lines", x, None, taps, bias, residual, out, _Sizes(frames=n, T=1, KT=1), statistics=statistics)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: int,
    history: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    repeat: bool = False,
    statistics: bool = False,
) -> Tensor:
    """Into `out`, as `kernels.conv.conv` for a padding of 1; all bordered alike. `repeat`: frames beyond those of `x`
    are its first and last."""
    frames, kernel = (out.shape[2], x.shape[2]) if x.dim() == 5 else (1, 1), weight.shape[2:]
    sizes = _Sizes(frames=x.shape[0] * frames[0], T=frames[0], S=frames[1], KT=kernel[0] if len(kernel) == 3 else 1)
    sizes.before, sizes.kept, sizes.repeat = before, 0 if history is None else history.shape[2], int(repeat)
    taps = weight_matrix(weight, x.dtype, 1)
    return _launch("direct", x, history, taps, bias, residual, out, sizes, statistics=statistics)


def conv_quantized(
    x: Tensor,
    taps: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    statistics: bool = False,
) -> Tensor:
    """Into `out`: bordered pictures `x` `[N, I, H, W]` by `taps` `[O, 9 I]`, both e4m3, each channel of the sum times
    its own of `scales`, fp32 `[O]`, before bias and residual are added."""
    sizes = _Sizes(frames=x.shape[0], T=1, S=1, KT=1)
    return _launch("direct", x, None, taps, bias, residual, out, sizes, scales=scales, statistics=statistics)


def upsample_conv(x: Tensor, taps: Tensor, bias: Tensor | None, out: Tensor, *, statistics: bool = False) -> Tensor:
    """Into `out`, twice as high and wide as the bordered `x`, by `folded_taps` of the operands' dtype."""
    sizes = _Sizes(frames=bordered.geometry(x).frames, T=1, KT=1)
    return _launch("upsample", x, None, taps, bias, None, out, sizes, statistics=statistics)


def _launch(
    kind: str,
    x: Tensor,
    history: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    sizes: _Sizes,
    *,
    scales: Tensor | None = None,
    statistics: bool = False,
) -> Tensor:
    place, channels, outputs = bordered.geometry(x), x.shape[1], out.shape[1]
    columns, phases = columns_of(channels, outputs, x.dtype), 2 if kind == "upsample" else 1
    processors = _processors(x.device)
    assert columns is not None
    rows = Form(columns, kind, 2).rows
    sizes.across = -(-place.width // rows)
    pixels = place.height * sizes.across * rows if kind == "lines" else place.frame
    form = _form(columns, kind, pixels, sizes.frames * phases * outputs // columns, processors)
    sizes.tiles_m, sizes.tiles_n = -(-pixels // (form.consumers * form.rows)), outputs // columns
    sizes.FRAME, sizes.ROW, sizes.H, sizes.W = place.frame, place.row, place.height, place.width
    sizes.first, sizes.I, sizes.O = bordered.geometry(out).first, channels, outputs
    sizes.residual = int(residual is not None)
    partials = empty_partials(out, phases * sizes.tiles_m * form.consumers) if statistics else None
    sizes.units, sizes.chunks = layout_of(partials)
    memory, box, tail = bordered.pixels_of(out), form.rows + 2, columns == 96
    x_maps = _rows(bordered.pixels_of(x), box, tail)
    maps = (
        *x_maps,
        *(x_maps if history is None else _rows(bordered.pixels_of(history), box, tail)),
        *_rows(taps, columns, tail),
        *(x_maps if residual is None else _rows(bordered.pixels_of(residual), box, tail)),
        *_identity(columns, out.dtype, x.device),
        x_maps[0] if kind == "upsample" else _lines(out) if kind == "lines" else _frames(out),
    )
    *pointers, scale = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (bias, memory, partials, scales))
    grid = min(sizes.tiles_m * sizes.tiles_n * sizes.frames * phases, processors)
    if _dispatch.tally is not None:  # by pairs as many as the direct convolution, for a rate that compares
        per_output = channels * (4 if kind == "upsample" else 9 * sizes.KT)
        _dispatch.tally(NAME, 2 * out.numel() * per_output, 0)
    neighbours, card = neighbours_of(outputs) if statistics else 0, x.device.index or 0
    with torch.cuda.device_of(x):
        kernel = _kernel(form, x.dtype, out.dtype, neighbours, outputs, card)
        threads, shared = 128 * (form.consumers + 1), form.shared(outputs)
        nvrtc.launch(kernel, grid, threads, shared, (*maps, *pointers, sizes, scale), card)
    if partials is not None:
        note(out, partials)
    return out


@functools.cache
def _kernel(
    form: Form, operands: torch.dtype, result: torch.dtype, neighbours: int, channels_out: int, card: int
) -> ctypes.c_void_p:
    return nvrtc.load(form.program(operands, result, neighbours), form.shared(channels_out), card)


@functools.lru_cache(maxsize=1024)
def _form(columns: int, kind: str, pixels: int, others: int, processors: int) -> Form:
    """With two warpgroups or three, whichever leaves fewer processors waiting for the last tiles."""
    forms = [Form(columns, kind, consumers) for consumers in ((3, 2) if columns == 128 else (2,))]
    return min(forms, key=lambda f: -(-(-(-pixels // (f.consumers * f.rows)) * others) // processors) * f.consumers)


def _rows(matrix: Tensor, box: int, tail: bool) -> tuple[TensorMap, TensorMap]:
    """A matrix of dense rows in boxes of 128 bytes, and of 64 where a step of K has a `tail` (else unread)."""
    sizes, strides = [matrix.shape[1], matrix.shape[0]], [matrix.stride(0)]
    wide = TensorMap(matrix, sizes, strides, [128 // matrix.element_size(), box])
    return wide, TensorMap(matrix, sizes, strides, [32, box]) if tail else wide


def _frames(out: Tensor) -> TensorMap:
    """The frames from their first picture pixel on: a tile that reaches over a frame's end is cut off there."""
    place, channels = bordered.geometry(out), out.shape[1]
    sizes, strides = [channels, place.frame, place.frames], [channels, place.frame * channels]
    return TensorMap(bordered.pixels_of(out)[place.first :], sizes, strides, [32, 64, 1])


def _lines(out: Tensor) -> TensorMap:
    """The lines of all frames from their first picture pixel on, the one below each frame too: one is cut off at its
    end, where its border is."""
    place, channels = bordered.geometry(out), out.shape[1]
    sizes, strides = [channels, place.row, place.frames * (place.height + 1)], [channels, place.row * channels]
    return TensorMap(bordered.pixels_of(out)[place.first :], sizes, strides, [32, 64, 1])


@functools.cache
def _identity(columns: int, dtype: torch.dtype, device: torch.device) -> tuple[TensorMap, TensorMap]:
    with torch.inference_mode(False):
        return _rows(torch.eye(columns, dtype=dtype, device=device), columns, columns == 96)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _products(columns: int) -> str:
    """wgmma m64 x columns of each of `OPERANDS`, 32 bytes deep, sums in `d`: one operand for each register."""
    registers = columns // 2
    names = ", ".join(f"%{i}" for i in range(registers))
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(registers))
    head = (
        f"__device__ __forceinline__ void wgmma%s(float (&d)[{registers}], unsigned long long a, unsigned long long b)"
    )
    text = [f"template <int kind> {head % ''};"]
    # The last immediates say that neither operand of 16 bits is transposed, which one of 8 bits cannot be.
    for number, (kind, end) in enumerate(
        (("k16.f32.f16.f16", ", 0, 0"), ("k16.f32.bf16.bf16", ", 0, 0"), ("k32.f32.e4m3.e4m3", ""))
    ):
        product = f"wgmma.mma_async.sync.aligned.m64n{columns}{kind}"
        operands = f"{{{names}}}, %{registers}, %{registers + 1}, 1, 1, 1{end};"
        text.append(f"template <> {head % f'<{number}>'} {{")
        text.append(f'  asm volatile("{product} {operands}" : {sums} : "l"(a), "l"(b)); }}')
    return "\n".join(text) + "\n"
