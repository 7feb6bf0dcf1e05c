"""How far one result is from another, and the floors of each tier.

Every figure is accumulated in fp64 on the tensors' own device, one frame at a time: the fp64 copy of a whole
81-frame 720p clip would take 1.8 GB. Frames are `[N, C, H, W]` or `[N, C, T, H, W]`, embeddings `[..., D]`. A NaN
in either tensor makes every figure it touches NaN, and no floor holds on a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

# The floors of tier `rounding`, relative to the error of the stock model against the same golden.
ROUNDING_RMS_RATIO = 1.05
ROUNDING_WORST_FRAME_DB = 0.5
ROUNDING_MEAN_PER_RMS = 0.25
# Of embeddings: SQNR, and 1 - cosine, which also grows as the square of an error. Of stock's 1e-5 in bf16 it is 5e-7.
ROUNDING_EMBEDDING_DB = 0.2
# Stock can equal its golden to the last bit (an fp64 model). fp64 arithmetic leaves 260-320 dB, fp32 at most about
# 150 dB, so beyond 240 dB a difference is fp64 rounding and nothing else.
ROUNDING_EXACT_SQNR_DB = 240.0
# The floors of tier `lowered`, absolute.
LOWERED_WORST_FRAME_DB = 40.0
LOWERED_SSIM = 0.99

SSIM_WINDOW = 7  # pixels; the side of scikit-image's default uniform window


@dataclass(frozen=True)
class Comparison:
    """Frames, or embeddings, against a golden. PSNR and SQNR in dB (`inf` when identical), the rest in the data's unit.

    `ssim` is the lowest SSIM of any frame, `min_cosine` the lowest cosine of any embedding and `cosine_distance` the
    mean of 1 - cosine (None where they say nothing), `mean` the mean signed error, `values` how many numbers were
    compared and `frames` in how many frames.
    """

    psnr: float
    worst_frame_psnr: float
    worst_frame: int
    ssim: float | None
    sqnr: float
    max_abs: float
    rms: float
    mean: float
    values: int
    frames: int = 1
    min_cosine: float | None = None
    cosine_distance: float | None = None


@dataclass(frozen=True)
class _Sums:
    """Per-slab sums of `test - golden`: squares, signed values, largest magnitude, and the golden's own squares."""

    squared: Tensor
    signed: Tensor
    largest: Tensor
    signal: Tensor
    slab_size: int

    @property
    def count(self) -> int:
        return self.slab_size * self.squared.numel()


def _check_pair(test: Tensor, golden: Tensor) -> None:
    if test.shape != golden.shape:
        raise ValueError(f"cannot compare shapes {tuple(test.shape)} and {tuple(golden.shape)}: they must be equal")
    if test.device != golden.device:
        raise ValueError(f"cannot compare tensors on {test.device} and {golden.device}: move one to the other's device")
    if test.numel() == 0:
        raise ValueError(f"cannot compare empty tensors of shape {tuple(test.shape)}")


def _frames(x: Tensor) -> Sequence[Tensor]:
    """Views `[C, H, W]` of every frame, clip by clip."""
    if x.ndim == 4:
        return x.unbind(0)
    if x.ndim == 5:
        return [frame for clip in x.unbind(0) for frame in clip.unbind(1)]
    raise ValueError(f"frames are [N, C, H, W] or [N, C, T, H, W], not {tuple(x.shape)}")


def _sums(test: Sequence[Tensor], golden: Sequence[Tensor]) -> _Sums:
    columns: list[list[Tensor]] = [[], [], [], []]
    for t, g in zip(test, golden, strict=True):
        reference = g.detach().double()
        error = t.detach().double() - reference
        parts = (error.square().sum(), error.sum(), error.abs().amax(), reference.square().sum())
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    squared, signed, largest, signal = (torch.stack(column).cpu() for column in columns)
    return _Sums(squared, signed, largest, signal, test[0].numel())


def _pair_sums(test: Tensor, golden: Tensor) -> _Sums:
    _check_pair(test, golden)
    return _sums(_frames(test), _frames(golden)) if test.ndim in (4, 5) else _sums([test], [golden])


def _frame_sums(test: Tensor, golden: Tensor) -> _Sums:
    _check_pair(test, golden)
    return _sums(_frames(test), _frames(golden))


def _decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise): `inf` without noise, `-inf` for noise without signal, NaN kept."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def _check_peak(peak: float) -> None:
    if not (peak > 0 and math.isfinite(peak)):
        raise ValueError(f"peak is the range of the pixels (2.0 for [-1, 1], 255 for uint8), not {peak}")


def _psnr(sums: _Sums, peak: float) -> float:
    return _decibel(peak**2, sums.squared.sum().item() / sums.count)


def _worst_frame(sums: _Sums, peak: float) -> tuple[float, int]:
    index = int(sums.squared.nan_to_num(nan=math.inf).argmax())
    return _decibel(peak**2, sums.squared[index].item() / sums.slab_size), index


def _sqnr(sums: _Sums) -> float:
    return _decibel(sums.signal.sum().item(), sums.squared.sum().item())


def _rms(sums: _Sums) -> float:
    return math.sqrt(sums.squared.sum().item() / sums.count)


def psnr(a: Tensor, b: Tensor, *, peak: float) -> float:
    """Peak signal-to-noise ratio over all frames, in dB. `peak` is the pixels' range: 2.0 for [-1, 1]."""
    _check_peak(peak)
    return _psnr(_frame_sums(a, b), peak)


def worst_frame_psnr(a: Tensor, b: Tensor, *, peak: float) -> tuple[float, int]:
    """The lowest PSNR of any frame in dB, and that frame's index (counted clip by clip)."""
    _check_peak(peak)
    return _worst_frame(_frame_sums(a, b), peak)


def _lowest_ssim(a: Tensor, b: Tensor, peak: float) -> float:
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW}, not {tuple(a.shape[-2:])}")
    if not bool(a.isfinite().all() and b.isfinite().all()):
        return math.nan
    from skimage.metrics import structural_similarity

    def similarity(x: Tensor, y: Tensor) -> float:
        arrays = (frame.detach().float().cpu().numpy() for frame in (x, y))
        return float(structural_similarity(*arrays, win_size=SSIM_WINDOW, channel_axis=0, data_range=peak))

    # 0.07 s a frame of 480x832 on one core; scipy's filters release the GIL.
    with ThreadPoolExecutor() as pool:
        return min(pool.map(similarity, _frames(a), _frames(b)))


def ssim(a: Tensor, b: Tensor, *, peak: float) -> float:
    """The lowest structural similarity of any frame (scikit-image, 7x7 uniform window, on fp32 copies).

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    _check_peak(peak)
    _check_pair(a, b)
    return _lowest_ssim(a, b, peak)


def sqnr(reference: Tensor, test: Tensor) -> float:
    """Signal to (quantisation) noise ratio in dB: `10 log10(sum reference^2 / sum (test - reference)^2)`."""
    return _sqnr(_pair_sums(test, reference))


def max_abs(a: Tensor, b: Tensor) -> float:
    """The largest magnitude of `a - b`."""
    return _pair_sums(a, b).largest.amax().item()


def rms_error(a: Tensor, b: Tensor) -> float:
    """The root of the mean square of `a - b`."""
    return _rms(_pair_sums(a, b))


def mean_error(test: Tensor, golden: Tensor) -> float:
    """The mean of `test - golden`, with its sign: the bias."""
    sums = _pair_sums(test, golden)
    return sums.signed.sum().item() / sums.count


def cosine_distances(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of every two rows of `[..., D]`, as `[...]` in fp64: of two zero rows 0, of a zero row and another 1.

    Half the squared distance of the rows brought to length 1: subtracted from 1, a cosine in fp32 has no digits left.
    """
    _check_pair(a, b)
    x, y = a.detach().double(), b.detach().double()
    norms = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    x, y = (row / torch.where(norm == 0, 1.0, norm) for row, norm in zip((x, y), norms, strict=True))
    one_is_zero = ((norms[0] == 0) ^ (norms[1] == 0)).squeeze(-1)
    return torch.where(one_is_zero, 1.0, (x - y).square().sum(-1) / 2)


def compare(test: Tensor, golden: Tensor, *, peak: float, ssim: bool = True) -> Comparison:
    """Frames `[N, C, H, W]` or `[N, C, T, H, W]` against a golden of the same shape and device.

    `ssim=False` leaves out SSIM, which runs on the CPU and costs far more than the rest.
    """
    _check_peak(peak)
    sums = _frame_sums(test, golden)
    worst, index = _worst_frame(sums, peak)
    return Comparison(
        psnr=_psnr(sums, peak),
        worst_frame_psnr=worst,
        worst_frame=index,
        ssim=_lowest_ssim(test, golden, peak) if ssim else None,
        sqnr=_sqnr(sums),
        max_abs=sums.largest.amax().item(),
        rms=_rms(sums),
        mean=sums.signed.sum().item() / sums.count,
        values=sums.count,
        frames=sums.squared.numel(),
    )


def compare_embeddings(test: Tensor, golden: Tensor) -> Comparison:
    """Embeddings `[..., D]` against a golden of the same shape and device; they have no peak but the golden's own."""
    sums = _pair_sums(test, golden)
    decibel = _psnr(sums, float(golden.amax() - golden.amin()) or 1.0)
    apart = cosine_distances(test, golden)
    return Comparison(
        psnr=decibel,
        worst_frame_psnr=decibel,
        worst_frame=0,
        ssim=None,
        sqnr=_sqnr(sums),
        max_abs=sums.largest.amax().item(),
        rms=_rms(sums),
        mean=sums.signed.sum().item() / sums.count,
        values=sums.count,
        min_cosine=1 - float(apart.amax()),
        cosine_distance=float(apart.mean()),
    )


def rounding_holds(ours: Comparison, stock: Comparison) -> tuple[bool, str]:
    """Whether `ours` keeps the promise of tier `rounding` against `stock`, both measured on one golden, and why not.

    No larger an error than stock's own: RMS within 5 %, worst frame within 0.5 dB, and no bias that stock lacks. All
    are estimates from a finite number of values: two equal errors on n values, or their means, differ by 1/sqrt(n) (one
    standard error), so twice that is granted on top. It is 10 % for a latent of 400 values and 0.1 % for a 720p frame.
    """
    if not all(map(math.isfinite, (ours.rms, ours.mean))):
        return False, "the output is not finite where the golden is"
    if not all(map(math.isfinite, (stock.rms, stock.mean))):
        return False, "stock's own output is not finite: there is nothing to hold to"
    if ours.sqnr >= ROUNDING_EXACT_SQNR_DB:
        return True, ""
    if stock.rms == 0:
        return False, (
            f"stock equals the golden and ours is {ours.sqnr:.1f} dB from it: "
            "take a golden of higher precision to tell rounding from error"
        )
    ratio = ROUNDING_RMS_RATIO + 2 / math.sqrt(ours.values)
    if ours.rms > ratio * stock.rms:
        return False, f"RMS error {ours.rms:.3e} is {ours.rms / stock.rms:.3f}x stock's (floor {ratio:.3f}x)"
    lost = stock.worst_frame_psnr - ours.worst_frame_psnr
    most = ROUNDING_WORST_FRAME_DB + 20 * math.log10(1 + 2 * math.sqrt(ours.frames / ours.values))
    if not lost <= most:
        return False, (
            f"worst frame {ours.worst_frame} is {ours.worst_frame_psnr:.2f} dB, {lost:.2f} dB below stock's "
            f"(floor {most:.2f} dB)"
        )
    bias = ROUNDING_MEAN_PER_RMS + 2 / math.sqrt(ours.values)
    if abs(ours.mean) > max(bias * ours.rms, abs(stock.mean)):
        return False, (
            f"mean error {ours.mean:+.3e} is {abs(ours.mean) / ours.rms:.2f} of the RMS error "
            f"(floor {bias:.2f}, or stock's own {stock.mean:+.3e})"
        )
    return _embeddings_hold(ours, stock)


def _embeddings_hold(ours: Comparison, stock: Comparison) -> tuple[bool, str]:
    """SQNR and mean cosine no further from the golden's than stock's are; true of frames, which have no cosine."""
    if ours.cosine_distance is None or stock.cosine_distance is None:
        return True, ""
    most = ROUNDING_EMBEDDING_DB + 20 * math.log10(1 + 2 / math.sqrt(ours.values))
    if not stock.sqnr - ours.sqnr <= most:
        return False, f"SQNR {ours.sqnr:.2f} dB is more than {most:.2f} dB below stock's {stock.sqnr:.2f} dB"
    if not ours.cosine_distance <= stock.cosine_distance * 10 ** (most / 10):
        return (
            False,
            f"1 - cosine {ours.cosine_distance:.3e} is {most:.2f} dB above stock's {stock.cosine_distance:.3e}",
        )
    return True, ""


def lowered_holds(ours: Comparison) -> tuple[bool, str]:
    """Whether `ours` reaches the floors of tier `lowered` against its golden, and why not."""
    if not ours.worst_frame_psnr >= LOWERED_WORST_FRAME_DB:
        return False, (
            f"worst frame {ours.worst_frame} is {ours.worst_frame_psnr:.2f} dB (floor {LOWERED_WORST_FRAME_DB:.0f} dB)"
        )
    if ours.ssim is None:
        return False, "SSIM was not measured"
    if not ours.ssim >= LOWERED_SSIM:
        return False, f"SSIM {ours.ssim:.4f} is below {LOWERED_SSIM}"
    return True, ""
