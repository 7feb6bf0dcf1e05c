from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vae_accel.kernels import segment_attention as module
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.rotary import rotary
from vae_accel.kernels.segment_attention import Tile, columns_of, reference, segment_attention

WINDOWS = (64, 64, 16, 1, 4)
LENGTHS = {"windows": WINDOWS, "one": (70,), "long": (5, 150, 1, 33), "equal": (20, 20, 20), "ones": (1, 1, 1)}


def packed(lengths, heads, D, device, dtype=torch.float16):
    """qkv, cos, sin, cu_seqlens. fp16, since the interpreter multiplies bf16 as integers."""
    L = sum(lengths)
    qkv = (torch.randn(L, 3, heads, D, device=device) * 1.5).to(dtype)
    freqs = torch.randn(L, D // 2, device=device).repeat(1, 2) * 5
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return qkv, freqs.cos(), freqs.sin(), ends


def rms(x):
    return float(x.double().square().mean().sqrt())


def assert_right(out, q, k, v, ends, scale):
    """Within the rounding of the weights and of the result: together 1.5 of one."""
    golden = reference(q.double(), k.double(), v.double(), ends, scale)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert rms(out.double() - golden) <= 1.5 * torch.finfo(q.dtype).eps * rms(golden)
    assert float((out.double() - golden).abs().max()) <= 4 * torch.finfo(q.dtype).eps * float(golden.abs().max())


@pytest.mark.parametrize("D", [16, 64, 72, 80, 128])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_matches_fp64(device, lengths, D):
    qkv, _, _, ends = packed(lengths, 2, D, device)
    q, k, v = qkv.unbind(1)
    out = segment_attention(q, k, v, ends, max(lengths), D**-0.5)
    assert LazyKernel.bound
    assert_right(out, q, k, v, ends, D**-0.5)


@pytest.mark.parametrize("D", [16, 72, 80, 128])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_turned_in_the_loads_as_by_the_kernel_of_its_own(device, lengths, D):
    qkv, cos, sin, ends = packed(lengths, 2, D, device)
    q, k = rotary(qkv, cos, sin)
    v = qkv[:, 2]
    out = segment_attention(*qkv.unbind(1), ends, max(lengths), D**-0.5, cos, sin)
    assert_right(out, q, k, v, ends, D**-0.5)
    whole = segment_attention(q, k, v, ends, max(lengths), D**-0.5)
    torch.testing.assert_close(out, whole, rtol=2e-3, atol=2e-3)


def test_reference_is_a_loop_over_segments():
    qkv, _, _, ends = packed(LENGTHS["long"], 2, 16, "cpu", torch.float64)
    q, k, v = qkv.unbind(1)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(*(t[a:b].transpose(0, 1) for t in (q, k, v)), scale=0.3)
        for a, b in pairwise(ends)
    ]
    torch.testing.assert_close(reference(q, k, v, ends, 0.3), torch.cat(parts, 1).transpose(0, 1))


def test_large_logits_do_not_overflow(device):
    qkv, _, _, ends = packed((70, 9), 1, 32, device)
    q, k, v = (qkv * 25).unbind(1)
    assert_right(segment_attention(q, k, v / 25, ends, 70, 1.0), q, k, v / 25, ends, 1.0)


def test_the_weights_add_up_to_one(device):
    qkv, _, _, ends = packed((150, 31), 2, 16, device)
    q, k, v = qkv.unbind(1)
    same = torch.full_like(v, 0.8125)
    assert torch.equal(segment_attention(q, k, same, ends, 150, 0.5), same)


def test_a_looser_bound_and_empty_segments_change_nothing(device):
    """What a graph captured for a bucket is replayed with: the bound of the bucket, segments of no tokens behind."""
    qkv, cos, sin, ends = packed((20, 33, 7), 2, 16, device)
    want = segment_attention(*qkv.unbind(1), ends, 64, 0.25, cos, sin)
    padded = torch.cat((ends[:1], ends, ends[-1:], ends[-1:])).long()
    assert torch.equal(segment_attention(*qkv.unbind(1), padded, 64, 0.25, cos, sin), want)


def test_what_is_behind_the_segments_is_never_read(device):
    qkv, cos, sin, ends = packed((20, 33), 2, 16, device)
    want = segment_attention(*qkv.unbind(1), ends, 64, 0.25, cos, sin)
    room = torch.full((64, *qkv.shape[1:]), float("nan"), device=device).half()
    room[:53] = qkv
    out = segment_attention(
        *room.unbind(1), ends, 64, 0.25, *(torch.nn.functional.pad(t, (0, 0, 0, 11)) for t in (cos, sin))
    )
    assert torch.equal(out[:53], want)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_segments(device, data):
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=6))
    heads, D = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([8, 24, 48, 80]))
    tile = Tile(data.draw(st.sampled_from([16, 64])), data.draw(st.sampled_from([16, 32, 64])), 4, 1)
    qkv, cos, sin, ends = packed(lengths, heads, D, device)
    out = module._launch(*qkv.unbind(1), cos, sin, ends, max(lengths), D**-0.5, tile)
    assert_right(out, *rotary(qkv, cos, sin), qkv[:, 2], ends, D**-0.5)


@given(st.integers(1, 128))
def test_a_head_is_covered_with_little_to_spare(D):
    columns = columns_of(D)
    assert D <= columns <= max(32, 2 * D) and columns & (columns - 1) == 0


def test_more_than_16_bits_are_the_references(device):
    qkv, cos, sin, ends = packed((9, 4), 2, 16, device, torch.float32)
    out = segment_attention(*qkv.unbind(1), ends, 9, 0.25, cos, sin)
    assert torch.equal(out, reference(*qkv.unbind(1), ends, 0.25, cos, sin))


def test_gradients_are_the_references(device):
    qkv, _, _, ends = packed((9, 4), 2, 16, device)
    grads = []
    for function in (lambda *t: segment_attention(*t, ends, 9, 0.25), lambda *t: reference(*t, ends, 0.25)):
        leaf = qkv.clone().requires_grad_()
        function(*leaf.unbind(1)).float().square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_no_tokens(device):
    q = torch.empty(0, 2, 16, device=device).half()
    assert segment_attention(q, q, q, torch.zeros(1, dtype=torch.int32, device=device), 0, 0.25).shape == (0, 2, 16)


def test_traces_whole(device):
    qkv, cos, sin, ends = packed((9, 4), 2, 16, device)
    torch.library.opcheck(
        torch.ops.vae_accel.segment_attention.default,
        (*(t.contiguous() for t in qkv.unbind(1)), cos, sin, ends, 9, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )
    function = torch.compile(lambda q, k, v: segment_attention(q, k, v, ends, 9, 0.25), fullgraph=True, backend="eager")
    assert torch.equal(function(*qkv.unbind(1)), segment_attention(*qkv.unbind(1), ends, 9, 0.25))


def test_bad_arguments_are_named():
    x = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="one shape and dtype"):
        segment_attention(x, x, x.half(), torch.tensor([0, 4]), 4, 1.0)
