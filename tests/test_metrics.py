import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vae_accel import metrics
from vae_accel.metrics import Comparison, compare, compare_embeddings, lowered_holds, rounding_holds


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(2, 3, 4, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noisy(x: torch.Tensor, rms: float, seed: int = 1) -> torch.Tensor:
    return x + rms * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def test_figures_equal_their_definitions(clip):
    test = noisy(clip, 0.01)
    error = test.double().numpy() - clip.double().numpy()
    mse = np.mean(error**2)
    assert metrics.psnr(test, clip, peak=2.0) == pytest.approx(10 * math.log10(4 / mse), abs=1e-9)
    assert metrics.sqnr(clip, test) == pytest.approx(
        10 * math.log10(np.sum(clip.double().numpy() ** 2) / np.sum(error**2)), abs=1e-9
    )
    assert metrics.max_abs(test, clip) == np.abs(error).max()
    assert metrics.rms_error(test, clip) == pytest.approx(math.sqrt(mse), rel=1e-12)
    assert metrics.mean_error(test, clip) == pytest.approx(error.mean(), rel=1e-9)


def test_psnr_agrees_with_scikit_image(clip):
    from skimage.metrics import peak_signal_noise_ratio

    test = noisy(clip, 0.05)
    expected = peak_signal_noise_ratio(clip.double().numpy(), test.double().numpy(), data_range=2.0)
    assert metrics.psnr(test, clip, peak=2.0) == pytest.approx(expected, abs=1e-9)


def test_bf16_against_fp64_is_not_rounded_again(clip):
    test = clip.bfloat16()
    exact = (test.double() - clip.double()).square().mean().sqrt().item()
    assert metrics.rms_error(test, clip.double()) == pytest.approx(exact, rel=1e-12)


def test_worst_frame_is_found_in_clips_and_images(clip):
    test = noisy(clip, 0.001)
    test[1, :, 2] += 0.1
    value, index = metrics.worst_frame_psnr(test, clip, peak=2.0)
    assert index == 4 + 2
    assert value == pytest.approx(metrics.psnr(test[1:, :, 2], clip[1:, :, 2], peak=2.0), abs=1e-9)
    assert metrics.worst_frame_psnr(test[:, :, 2], clip[:, :, 2], peak=2.0)[1] == 1


def test_ssim_is_the_lowest_frame(clip):
    test = clip.clone()
    assert metrics.ssim(test, clip, peak=2.0) == pytest.approx(1.0)
    test[0, :, 3] = noisy(clip[0, :, 3], 0.5)
    assert metrics.ssim(test, clip, peak=2.0) == metrics.ssim(test[:1, :, 3], clip[:1, :, 3], peak=2.0) < 0.9


def test_identical_frames_are_infinitely_good(clip):
    result = compare(clip.clone(), clip, peak=2.0)
    assert (result.psnr, result.worst_frame_psnr, result.sqnr) == (math.inf,) * 3
    assert (result.max_abs, result.rms, result.mean) == (0.0,) * 3
    assert lowered_holds(result) == (True, "")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["test", "golden"])
def test_what_is_not_finite_never_passes(clip, bad, where):
    broken = clip.clone()
    broken[1, 0, 3, 5, 7] = bad
    result = compare(*((broken, clip) if where == "test" else (clip, broken)), peak=2.0)
    assert result.worst_frame == 4 + 3
    assert not result.worst_frame_psnr > 0
    good = compare(noisy(clip, 0.01), clip, peak=2.0)
    assert not lowered_holds(result)[0]
    assert "not finite" in rounding_holds(result, good)[1]
    assert "not finite" in rounding_holds(good, result)[1]


def test_both_infinite_alike_is_not_equality(clip):
    broken = clip.clone()
    broken[0, 0, 0, 0, 0] = math.inf
    assert math.isnan(metrics.psnr(broken, broken.clone(), peak=2.0))


def test_rounding_takes_an_error_no_larger_than_stocks(clip):
    stock = compare(noisy(clip, 1e-3), clip, peak=2.0, ssim=False)
    assert stock.ssim is None
    assert rounding_holds(compare(noisy(clip, 1.02e-3, seed=2), clip, peak=2.0, ssim=False), stock) == (True, "")
    assert rounding_holds(compare(clip, clip, peak=2.0, ssim=False), stock) == (True, "")


def test_rounding_refuses_and_says_why(clip):
    stock = compare(noisy(clip, 1e-3), clip, peak=2.0, ssim=False)
    larger = compare(noisy(clip, 1.2e-3, seed=2), clip, peak=2.0, ssim=False)
    assert "RMS error" in rounding_holds(larger, stock)[1]

    one_frame = noisy(clip, 0.9e-3, seed=2)
    one_frame[1, :, 2] += torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(3)) * 1.2e-3
    assert rounding_holds(compare(one_frame, clip, peak=2.0, ssim=False), stock)[1].startswith("worst frame 6 is")

    biased = compare(noisy(clip, 0.9e-3, seed=2) + 3e-4, clip, peak=2.0, ssim=False)
    assert "mean error +3" in rounding_holds(biased, stock)[1]
    assert rounding_holds(biased, replace(stock, mean=-4e-4))[0], "no more biased than stock itself"


def test_a_bias_of_few_values_is_granted_its_uncertainty(clip):
    """Two standard errors of the mean, 2/sqrt(n), and no more."""
    stock = compare(noisy(clip, 1e-3), clip, peak=2.0, ssim=False)
    granted = 0.25 + 2 / math.sqrt(stock.values)
    assert rounding_holds(replace(stock, mean=0.99 * granted * stock.rms), replace(stock, mean=0.0)) == (True, "")
    assert "mean error" in rounding_holds(replace(stock, mean=1.01 * granted * stock.rms), replace(stock, mean=0.0))[1]


def test_rounding_when_stock_is_the_golden(clip):
    golden = clip.double()
    stock = compare(golden.clone(), golden, peak=2.0, ssim=False)
    assert rounding_holds(stock, stock)[0]
    assert rounding_holds(compare(golden * (1 + 1e-14), golden, peak=2.0, ssim=False), stock)[0]
    held, reason = rounding_holds(compare(golden * (1 + 1e-7), golden, peak=2.0, ssim=False), stock)
    assert not held and "higher precision" in reason


def test_lowered_floors():
    good = Comparison(45.0, 40.0, 3, 0.99, 40.0, 0.1, 0.01, 0.0, values=10**6)
    assert lowered_holds(good) == (True, "")
    assert "worst frame 3 is 39.99 dB" in lowered_holds(replace(good, worst_frame_psnr=39.99))[1]
    assert "SSIM 0.9890" in lowered_holds(replace(good, ssim=0.989))[1]
    assert "not measured" in lowered_holds(replace(good, ssim=None))[1]
    assert not lowered_holds(replace(good, ssim=math.nan))[0]


def test_embeddings():
    golden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    test = golden.clone()
    assert compare_embeddings(test, golden).min_cosine == pytest.approx(1.0)
    test[1, 3] = -test[1, 3]
    result = compare_embeddings(test, golden)
    assert result.min_cosine == pytest.approx(-1.0)
    assert result.sqnr == pytest.approx(metrics.sqnr(golden, test))
    assert result.max_abs == pytest.approx(2 * golden[1, 3].abs().max().item())


def test_embeddings_hold_to_stocks_sqnr_and_cosine():
    golden = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(400, 64, generator=torch.Generator().manual_seed(1)).double()
    along = (noise * golden).sum(-1, keepdim=True) / golden.square().sum(-1, keepdim=True) * golden
    aside = noise - along  # all of an error that turns a row
    stock = compare_embeddings(golden + 1e-3 * noise, golden)
    assert stock.cosine_distance == pytest.approx(
        0.5e-6 * (aside / golden.norm(dim=-1, keepdim=True)).square().sum(-1).mean().item(), rel=1e-3
    )
    assert rounding_holds(compare_embeddings(golden + 1.01e-3 * noise, golden), stock) == (True, "")
    assert rounding_holds(stock, stock) == (True, "")
    held, why = rounding_holds(compare_embeddings(golden + 1.045e-3 * noise, golden), stock)
    assert not held and why.startswith("SQNR") and "more than 0.31 dB below stock's" in why
    turned = replace(stock, cosine_distance=1.1 * stock.cosine_distance)  # 0.41 dB
    held, why = rounding_holds(turned, stock)
    assert not held and why.startswith("1 - cosine") and "0.31 dB above" in why
    assert rounding_holds(replace(stock, cosine_distance=1.07 * stock.cosine_distance), stock)[0]  # 0.29 dB
    assert not rounding_holds(replace(stock, cosine_distance=math.nan), stock)[0]


def test_cosine_distance_has_digits_where_a_cosine_has_none():
    golden = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).double()
    near = golden + 1e-9 * torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    assert 0 < compare_embeddings(near, golden).cosine_distance < 1e-17


def test_cosine_of_zero_rows():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert metrics.cosine_distances(zero, zero).tolist() == [0.0]
    assert metrics.cosine_distances(zero, one).tolist() == [1.0]
    assert math.isnan(metrics.cosine_distances(one * math.nan, one))


def test_bad_arguments_name_themselves(clip):
    with pytest.raises(ValueError, match=r"shapes \(2, 3, 3, 16, 24\) and \(2, 3, 4, 16, 24\)"):
        compare(clip[:, :, 1:], clip, peak=2.0)
    with pytest.raises(ValueError, match="frames are"):
        compare(clip[0, 0, 0], clip[0, 0, 0], peak=2.0)
    with pytest.raises(ValueError, match="peak"):
        metrics.psnr(clip, clip, peak=0)
    with pytest.raises(ValueError, match="empty"):
        metrics.rms_error(clip[:0], clip[:0])
    with pytest.raises(ValueError, match="7x7"):
        metrics.ssim(clip[..., :6], clip[..., :6], peak=2.0)
    with pytest.raises(ValueError, match="meta"):
        metrics.max_abs(clip, clip.to("meta"))
