import pytest
import torch

from tests.tolerances import assert_close
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.rotary import reference, rotary

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(7, 3, 80), (1, 16, 72), (33, 2, 64), (5, 1, 128), (4, 5, 6)]


def packed(shape, dtype, device):
    length, heads, D = shape
    qkv = torch.randn(length, 3, heads, D, device=device).to(dtype)
    freqs = torch.randn(length, D // 2, device=device).repeat(1, 2) * 5
    return qkv, freqs.cos(), freqs.sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angles", [torch.float32, None], ids=["fp32 angles", "the model's angles"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(device, shape, angles, dtype):
    qkv, cos, sin = packed(shape, dtype, device)
    cos, sin = (t.to(angles or dtype) for t in (cos, sin))
    q, k = rotary(qkv, cos, sin)
    assert LazyKernel.bound and q.dtype == k.dtype == dtype
    for out, golden in zip((q, k), reference(qkv.double(), cos, sin), strict=True):
        assert out.shape == shape and out.is_contiguous()
        assert_close(out, golden)


def test_reference_is_transformers():
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    for dtype in DTYPES:
        qkv, cos, sin = packed((9, 3, 20), dtype, "cpu")
        want = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
        assert all(torch.equal(a, b) for a, b in zip(reference(qkv, cos, sin), want, strict=True))


def test_views_are_read_in_place(device):
    """A projection with columns to spare, as a padded GEMM leaves it, and angles that are halves of one tensor."""
    qkv, cos, sin = packed((6, 2, 20), torch.float16, device)
    room = torch.full((6, 130), float("nan"), device=device).half()
    room[:, :120] = qkv.flatten(1)
    angles = torch.stack((cos, sin), 1)
    got = rotary(room[:, :120].unflatten(1, (3, 2, 20)), angles[:, 0], angles[:, 1])
    assert all(torch.equal(a, b) for a, b in zip(got, rotary(qkv, cos, sin), strict=True))


def test_angles_of_different_strides(device):
    qkv, cos, sin = packed((6, 2, 20), torch.float16, device)
    want = rotary(qkv, cos, sin)
    for other in (rotary(qkv, cos.T.contiguous().T, sin), rotary(qkv, torch.stack((cos, sin), 1)[:, 0], sin)):
        assert all(torch.equal(a, b) for a, b in zip(other, want, strict=True))


def test_gradients_are_the_references(device):
    qkv, cos, sin = packed((4, 2, 8), torch.float32, device)
    grads = []
    for function in (rotary, reference):
        leaf = qkv.clone().requires_grad_()
        q, k = function(leaf, cos, sin)
        (q.square().sum() + k.sum()).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_nothing_to_turn(device):
    q, k = rotary(torch.empty(0, 3, 2, 8, device=device), *(torch.empty(0, 8, device=device),) * 2)
    assert q.shape == k.shape == (0, 2, 8)


def test_traces_whole(device):
    qkv, cos, sin = packed((4, 2, 8), torch.float32, device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vae_accel.rotary.default, (qkv, cos, sin), test_utils=tests)
    compiled = torch.compile(lambda *t: rotary(*t), fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(qkv, cos, sin), rotary(qkv, cos, sin), strict=True))


def test_bad_arguments_are_named():
    qkv, cos, sin = packed((4, 2, 8), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"qkv must be \[L, 3"):
        rotary(qkv[:, :2], cos, sin)
    with pytest.raises(ValueError, match="even D"):
        rotary(qkv[..., :7], cos, sin)
    with pytest.raises(ValueError, match="cos and sin"):
        rotary(qkv, cos[:3], sin)
