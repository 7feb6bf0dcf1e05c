import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vae_accel.kernels import attention, wide_head
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.attention import KEY_TILE, reference, wide_head_attention

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 128, 64), (2, 77, 48), (3, 33, 96), (1, 200, 384)]


@pytest.fixture(params=["ours", "vendor"])
def form(request, monkeypatch):
    """Both products: ours, and the vendor's with which other cards do. bf16 is the vendor's in the interpreter."""
    if request.param == "vendor":
        monkeypatch.setattr(wide_head, "suits", lambda q: False)
    return request.param


def heads(shape, dtype, device, spread=1.7):
    q, k, v = (torch.randn(shape, device=device) for _ in range(3))
    return (q * spread).to(dtype), (k * spread).to(dtype), v.to(dtype)


def rms(x):
    return float(x.double().square().mean().sqrt())


def assert_right(out, q, k, v, scale):
    """Within the rounding of the probabilities and of the result: 2^-8 of bf16, 2^-11 of fp16, together 1.5 of one."""
    golden = reference(q.double(), k.double(), v.double(), scale)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert rms(out.double() - golden) <= 1.5 * torch.finfo(q.dtype).eps * rms(golden)
    assert float((out.double() - golden).abs().max()) <= 4 * torch.finfo(q.dtype).eps * float(golden.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(device, form, shape, dtype):
    q, k, v = heads(shape, dtype, device)
    out = wide_head_attention(q, k, v)
    assert LazyKernel.bound
    assert_right(out, q, k, v, shape[2] ** -0.5)


def test_large_logits_do_not_overflow(device, form):
    """Logits of a few thousand, one key far above the rest: the result is that key's value."""
    q, k, v = heads((1, 70, 64), torch.float16, device, spread=40)
    assert_right(wide_head_attention(q, k, v, 1.0), q, k, v, 1.0)


def test_the_weights_add_up_to_one(device, form):
    """Of equal values the mean is that value, whatever the probabilities were rounded to."""
    q, k, v = heads((1, 150, 64), torch.float16, device)
    out = wide_head_attention(q, k, torch.full_like(v, 0.8125))
    assert torch.equal(out, torch.full_like(v, 0.8125))


def test_slices_of_a_fused_projection_are_read_in_place(device, form):
    q, k, v = torch.randn(2, 40, 3 * 64, device=device).to(torch.float16).chunk(3, -1)
    assert_right(wide_head_attention(q, k, v), q, k, v, 64**-0.5)


@pytest.mark.parametrize("length", [1, KEY_TILE - 1, KEY_TILE, KEY_TILE + 1, wide_head.KEYS, wide_head.KEYS + 1])
def test_keys_that_pad_a_row_weigh_nothing(device, form, length):
    """Logits far below zero: keys of zeros, which fill rows up to a multiple, would be all there is."""
    q, v = (torch.rand(1, length, 32, device=device).add(0.5).half() for _ in range(2))
    assert_right(wide_head_attention(q, -q, v, 10.0), q, -q, v, 10.0)


def test_rows_longer_than_a_program_holds_are_read_twice(device, monkeypatch):
    q, k, v = heads((1, 150, 64), torch.bfloat16, device)
    whole = wide_head_attention(q, k, v)
    monkeypatch.setattr(attention, "ROW_BLOCK", 64)
    torch.testing.assert_close(wide_head_attention(q, k, v), whole)


def test_several_chunks_are_one(device):
    q, k, v = heads((3, 300, 32), torch.float16, device)
    whole = attention._in_chunks(q, k, v, 32**-0.5)
    for budget in (1, 4 * 300 * 128, 4 * 300 * 300 * 2):
        torch.testing.assert_close(attention._in_chunks(q, k, v, 32**-0.5, budget), whole)


def test_several_chunks_of_ours_are_one(device):
    q, k, v = heads((3, 300, 32), torch.float16, device)
    whole = wide_head.attend(q, k, v, 32**-0.5)
    for budget in (1, 2 * 256 * 384, 2 * 300 * 384 * 2):
        assert torch.equal(wide_head.attend(q, k, v, 32**-0.5, budget=budget), whole)


def test_a_sample_that_is_not_a_number_spoils_no_other(device):
    q, k, v = heads((3, 77, 32), torch.float16, device)
    whole = wide_head.attend(q, k, v, 32**-0.5)
    for tensor in (q, k, v):
        tensor[1] = float("nan")
    spoilt = wide_head.attend(q, k, v, 32**-0.5)
    assert torch.equal(spoilt[::2], whole[::2]) and spoilt[1].isnan().all()


def test_a_peak_far_from_a_tile_s_own(device):
    """Tiles of keys whose logits lie hundreds below the row's largest weigh nothing, and lose nothing elsewhere."""
    q, k, v = heads((1, 300, 32), torch.float16, device)
    k[:, :130] *= 60
    assert_right(wide_head.attend(q, k, v, 1.0), q, k, v, 1.0)


@given(st.integers(1, 30), st.integers(1, 100000), st.integers(0, 1 << 20))
def test_chunks_cover_every_row_once(batch, rows, room):
    found = wide_head.chunks(batch, rows, room)
    sizes = [(s.stop - s.start) * (r.stop - r.start) for s, r in found]
    assert sum(sizes) == batch * rows and len(set(map(str, found))) == len(found)
    assert max(sizes) <= max(room, min(rows, wide_head.ROWS))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, form, data):
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150)), data.draw(st.sampled_from([16, 48, 80])))
    q, k, v = heads(shape, torch.float16, device)
    assert_right(wide_head_attention(q, k, v), q, k, v, shape[2] ** -0.5)


def stock(q, k, v):
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_more_than_16_bits_are_stocks(device, dtype):
    q, k, v = heads((1, 20, 48), dtype, device)
    assert torch.equal(wide_head_attention(q, k, v), stock(q, k, v))


def test_gradients_are_stocks(device):
    q, k, v = (t.requires_grad_() for t in heads((1, 20, 48), torch.float16, device))
    ours, theirs = (torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (wide_head_attention, stock))
    assert all(map(torch.equal, ours, theirs))


def test_empty_batch(device):
    assert wide_head_attention(*(torch.empty(0, 8, 32, device=device),) * 3).shape == (0, 8, 32)


def test_traces_whole_with_the_real_strides(device):
    q, k, v = heads((2, 20, 32), torch.float16, device)
    torch.library.opcheck(
        torch.ops.vae_accel.wide_head_attention.default,
        (q, k, v, 0.2),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(lambda *t: wide_head_attention(*t), fullgraph=True, backend="eager")
    eager = wide_head_attention(q, k, v)
    assert torch.equal(compiled(q, k, v), eager) and compiled(q, k, v).stride() == eager.stride()


def test_bad_arguments_are_named():
    x = torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match="one shape and dtype"):
        wide_head_attention(x, x, x[:, :2])
    with pytest.raises(ValueError, match="one shape and dtype"):
        wide_head_attention(x, x, x.half())
