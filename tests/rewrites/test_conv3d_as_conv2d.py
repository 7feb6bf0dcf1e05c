from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.vaes import TABLE
from vae_accel.edits import ledger_of
from vae_accel.platforms import Cpu, NoSite, base
from vae_accel.rewrites.conv3d_as_conv2d import Conv3dAsConv2d

NAME = "conv3d_as_conv2d"
TINY = {tiny.id: tiny for tiny in TABLE}
FORMS = ("stack", "sum", "auto")


def rewritten(module: nn.Module, **options) -> nn.Module:
    """A copy of `module` with the rewrite on it."""
    return rewrite(copy.deepcopy(module), **options)


def rewrite(module: nn.Module, **options) -> nn.Module:
    steps = [base.Step(Conv3dAsConv2d(**options), "on", "test")]
    base.run(module, Cpu(), steps, "vae", {"only": NAME})
    return module


def conv3d(*args, dtype: torch.dtype = torch.float64, **kwargs) -> nn.Conv3d:
    return nn.Conv3d(*args, **kwargs).to(dtype).requires_grad_(False)


def agree(conv: nn.Conv3d, x: Tensor, **options) -> Tensor:
    expected, actual = conv(x), rewritten(conv, **options)(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert actual.is_contiguous(memory_format=memory_format(x))
    return actual


def memory_format(x: Tensor) -> torch.memory_format:
    last = x.stride(-4) == 1 and x.shape[-4] > 1
    return torch.channels_last_3d if last else torch.contiguous_format


KERNELS = ((3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1), (2, 2, 2), (4, 3, 2), (5, 1, 3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "circular"])
def test_kernels_in_every_padding_mode(form, kernel, mode):
    x = torch.randn(2, 4, 6, 7, 5, dtype=torch.float64)
    for padding in (0, (1, 2, 1), (2, 0, 1), "same", "valid"):
        agree(conv3d(4, 6, kernel, padding=padding, padding_mode=mode), x, form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("dilation", [1, 2, (3, 1, 2)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_stride_dilation_and_groups(form, stride, dilation, groups):
    x = torch.randn(2, 4, 9, 8, 9, dtype=torch.float64)
    conv = conv3d(4, 8, 3, stride=stride, dilation=dilation, groups=groups, padding=(2, 1, 1), bias=groups == 1)
    agree(conv, x, form=form)


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.sampled_from(FORMS),
    st.sampled_from(["zeros", "replicate", "reflect", "circular"]),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 2)] * 3),
    st.integers(1, 3),
    st.booleans(),
)
def test_any_convolution(data, form, mode, kernel, stride, dilation, groups, bias):
    padding = (
        data.draw(st.sampled_from(["valid", "same"])) if stride == (1, 1, 1) and data.draw(st.booleans()) else None
    )
    padding = padding or tuple(data.draw(st.integers(0, 2)) for _ in range(3))
    sizes = tuple(data.draw(st.integers(max(d * (k - 1) + 1, 3), 10)) for k, d in zip(kernel, dilation, strict=True))
    try:
        conv = conv3d(
            2 * groups, 3 * groups, kernel, stride, padding, dilation, groups=groups, bias=bias, padding_mode=mode
        )
        x = torch.randn(data.draw(st.integers(1, 2)), 2 * groups, *sizes, dtype=torch.float64)
        conv(x)
    except RuntimeError:  # a pad wider than the input that reflect and circular do not do
        return
    agree(conv, x, form=form, budget=data.draw(st.sampled_from([1, 5000, 1 << 28])))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_batches_and_few_frames(form, batch, frames):
    x = torch.randn(batch, 3, frames, 4, 5, dtype=torch.float64)
    agree(conv3d(3, 4, 3, padding=1), x, form=form)
    agree(conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), x, form=form)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_unbatched_input(mode):
    agree(conv3d(3, 4, 3, padding=1, padding_mode=mode), torch.randn(3, 4, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [1, 1000, 3000])
def test_walking_over_time_gives_the_same(form, budget):
    x = torch.randn(2, 3, 7, 4, 5, dtype=torch.float64)
    agree(conv3d(3, 4, 3, padding=1), x, form=form, budget=budget)
    agree(
        conv3d(3, 4, 3, stride=(2, 1, 1), padding=1),
        x.to(memory_format=torch.channels_last_3d),
        form=form,
        budget=budget,
    )


def test_the_walk_bounds_the_copies(monkeypatch):
    sizes, cat = [], torch.cat
    x = torch.randn(1, 4, 9, 8, 8, dtype=torch.float64)
    fast = rewritten(conv3d(4, 4, 3), form="stack", budget=3 * x[:, :, :2].nbytes)
    monkeypatch.setattr(torch, "cat", lambda *args: sizes.append((out := cat(*args)).nbytes) or out)
    fast(x)
    assert len(sizes) == 4 and max(sizes) <= 3 * x[:, :, :2].nbytes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("input_last", [False, True])
def test_memory_formats(form, kernel, weights_last, input_last):
    conv = conv3d(4, 6, kernel, padding=1)
    x = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    if weights_last:
        conv = conv.to(memory_format=torch.channels_last_3d)
    if input_last:
        x = x.to(memory_format=torch.channels_last_3d)
    for channels_last in (False, True):
        actual = rewritten(conv, form=form, channels_last=channels_last)(x)
        torch.testing.assert_close(actual, conv(x), rtol=0, atol=1e-12)
        assert actual.is_contiguous(memory_format=memory_format(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2],
        lambda x: x[:, 1:5],
        lambda x: x.transpose(3, 4),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[:1].expand(2, -1, -1, -1, -1),
        lambda x: x[..., 1:-1, 1:-1],
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_are_not_contiguous(form, view):
    x = view(torch.randn(2, 6, 8, 6, 6, dtype=torch.float64))
    conv = conv3d(x.shape[1], 4, 3, padding=1)
    torch.testing.assert_close(rewritten(conv, form=form)(x), conv(x), rtol=0, atol=1e-12)


def test_the_input_is_not_written_to():
    x = torch.randn(1, 4, 5, 6, 7)
    before = x.clone()
    for form in FORMS:
        rewritten(conv3d(4, 4, 3, dtype=torch.float32), form=form)(x)
    assert torch.equal(x, before)


def relative_error(form: str, dtype: torch.dtype, groups: int = 1, channels_last: bool = True) -> float:
    """RMS error against fp64 over that of stock in the same dtype, on a convolution as wide as a real decoder's."""
    golden = conv3d(64, 64, 3, padding=1, groups=groups)
    x = torch.randn(1, 64, 6, 16, 16, dtype=dtype)
    conv = copy.deepcopy(golden).to(dtype)
    golden.load_state_dict(conv.state_dict())
    truth = golden(x.double())
    fast = rewritten(conv, form=form, channels_last=channels_last)
    stock, ours = ((y.double() - truth).square().mean().sqrt() for y in (conv(x), fast(x)))
    return float(ours / stock)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_sixteen_bits_lose_nothing_by_default(dtype, groups):
    assert relative_error("stack", dtype, groups) <= 1.05
    assert relative_error("auto", dtype, groups) <= 1.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_of_rounded_taps_is_bounded_in_sixteen_bits(dtype):
    assert 1.05 < relative_error("sum", dtype) <= 1.5


@pytest.mark.parametrize("form", FORMS)
def test_fp32_loses_nothing_on_a_contiguous_weight(form):
    assert relative_error(form, torch.float32, channels_last=False) <= 1.05


@pytest.mark.parametrize("form", FORMS)
def test_fp32_on_a_channels_last_weight_is_as_good_as_the_convolution_of_the_backend(form):
    """oneDNN adds 1728 products in order where the Conv3d of stock is a blocked GEMM: 2.9 measured."""
    assert relative_error(form, torch.float32) <= 3.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_compute_dtype_rounds_to_it_and_returns_the_dtype_of_the_model(form, bias):
    conv = conv3d(4, 6, 3, padding=1, dtype=torch.float32, bias=bias)
    x = torch.randn(1, 4, 5, 6, 7)
    actual = rewritten(conv, form=form, compute_dtype=torch.bfloat16)(x)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, conv(x), rtol=0.05, atol=0.05)
    assert not torch.allclose(actual, conv(x), rtol=0, atol=1e-5)
    half = conv.to(torch.bfloat16)  # already as narrow: nothing to lower
    assert torch.equal(
        rewritten(half, form=form, compute_dtype=torch.bfloat16)(x.bfloat16()), rewritten(half, form=form)(x.bfloat16())
    )


class OwnArithmetic(nn.Conv3d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) * 2


class OwnPadding(nn.Conv3d):
    """Causal as diffusers does it: `padding` is reset after construction and `forward` pads."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.left = self.padding[0] * 2
        self.padding = (0, *self.padding[1:])

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 0, 0, 0, self.left, 0)))


def test_a_subclass_with_its_own_padding_is_taken_and_keeps_it():
    conv = OwnPadding(4, 6, 3, padding=1).double().requires_grad_(False)
    agree(conv, torch.randn(1, 4, 5, 6, 7, dtype=torch.float64))


def refusal(module: nn.Module) -> str:
    with pytest.raises(NoSite) as error:
        rewrite(module)
    assert ledger_of(module) is None
    return str(error.value)


def test_refusals_say_why():
    assert "OwnArithmetic has arithmetic of its own" in refusal(OwnArithmetic(2, 2, 3))
    assert "not known yet" in refusal(nn.LazyConv3d(2, 3))
    assert "parametrization" in refusal(nn.utils.parametrizations.weight_norm(nn.Conv3d(2, 2, 3)))
    patched = nn.Conv3d(2, 2, 3)
    patched._conv_forward = lambda input, weight, bias: input
    assert "replaced on the instance" in refusal(patched)
    with pytest.raises(NoSite, match="wider than 8 channels"):
        rewrite(nn.Conv3d(4, 16, 3), max_channels=8)


def test_a_wrong_input_gets_the_error_of_stock():
    conv = conv3d(4, 6, 3)
    for wrong in (torch.randn(1, 5, 4, 4, 4).double(), torch.randn(1, 4, 2, 4, 4).double(), torch.randn(4, 4).double()):
        with pytest.raises(RuntimeError) as stock:
            conv(wrong)
        with pytest.raises(RuntimeError) as ours:
            rewritten(conv)(wrong)
        assert str(ours.value) == str(stock.value)
    with pytest.raises(RuntimeError, match="same"):
        rewritten(conv)(torch.randn(1, 4, 4, 4, 4))  # fp32 into fp64


def test_the_meta_device_gives_shapes():
    conv = rewritten(conv3d(4, 6, 3, padding=1))
    weight, x = conv.weight.to("meta"), torch.empty(1, 4, 5, 6, 7, dtype=torch.float64, device="meta")
    assert conv._conv_forward(x, weight, None).shape == (1, 6, 5, 6, 7)


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_weight_is_honoured(form):
    x = torch.randn(1, 4, 5, 6, 7, dtype=torch.float64)
    stock = conv3d(4, 6, 3, padding=1)
    fast = rewritten(stock, form=form)

    def same():
        torch.testing.assert_close(fast(x), stock(x), rtol=0, atol=1e-12)

    for conv in (stock, fast):
        conv(x)
        conv.weight.mul_(2)
    same()
    for conv in (stock, fast):  # what PEFT's merge does; it bumps no version
        conv.weight.data += 0.25
        conv.bias.data = conv.bias.data + 1
    same()
    state = conv3d(4, 6, 3).state_dict()
    for conv in (stock, fast):
        conv.load_state_dict(state)
    same()
    for conv in (stock, fast):
        conv.load_state_dict({k: v + 1 for k, v in state.items()}, assign=True)
    same()
    for conv in (stock, fast):
        conv.to(torch.float32).to(torch.float64)
    same()
    for conv in (stock, fast):
        conv.weight = nn.Parameter(torch.ones_like(conv.weight), requires_grad=False)
    same()


def test_training_runs_stock_arithmetic():
    stock = nn.Conv3d(4, 6, 3, padding=1)
    fast = rewritten(stock)
    x = torch.randn(1, 4, 5, 6, 7)
    for conv in (stock, fast):
        conv(x).square().sum().backward()
    assert torch.equal(stock.weight.grad, fast.weight.grad) and torch.equal(stock.bias.grad, fast.bias.grad)


def test_autocast_keeps_its_dtype():
    stock = conv3d(4, 6, 3, padding=1, dtype=torch.float32)
    fast, x = rewritten(stock), torch.randn(1, 4, 5, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16 and torch.equal(fast(x), stock(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [1, 1 << 28])
def test_compiles_into_one_graph(form, budget):
    conv = conv3d(4, 6, 3, padding=1, padding_mode="replicate")
    x = torch.randn(1, 4, 5, 6, 7, dtype=torch.float64)
    compiled = torch.compile(rewritten(conv, form=form, budget=budget), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), conv(x), rtol=0, atol=1e-12)


def test_survives_torch_save():
    fast = rewritten(conv3d(4, 6, 3, padding=1))
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded._conv_forward.func is fast._conv_forward.func and loaded._conv_forward.args[0] is loaded
    x = torch.randn(1, 4, 5, 6, 7, dtype=torch.float64)
    assert torch.equal(loaded(x), fast(x))


# How many Conv3d each class has that this pass must take: all of them.
FAMILIES = (
    "wan2.1",
    "wan2.2-5b",
    "qwen-image",
    "hunyuan-video",
    "hunyuan-video-1.5",
    "hunyuan-image-refiner",
    "cogvideox",
    "ltx-0.9.0",
    "ltx-0.9.1",
    "ltx-2.0",
    "ltx-2.3",
    "mochi",
    "cosmos",
    "easyanimate",
    "allegro",
    "svd",
    "kvae-video",
    "kandinsky6-sr",
    "vidtok",
)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_takes_every_conv3d_of_a_family(family):
    tiny = TINY[family]
    vae = tiny.build(dtype=torch.float64)
    latent = tiny.latent("ramp").double()
    stock = tiny.decode(vae, latent)
    rewrite(vae)
    (outcome,) = ledger_of(vae).outcomes
    convolutions = [path for path, m in vae.named_modules() if isinstance(m, nn.Conv3d)]
    assert outcome.taken == convolutions and not outcome.refused and len(convolutions) > 1
    calls = []
    for path in outcome.taken:
        conv = vae.get_submodule(path)
        conv.register_forward_hook(lambda conv, args, out: calls.append(conv))
    torch.testing.assert_close(tiny.decode(vae, latent), stock, rtol=0, atol=1e-9)
    assert calls
