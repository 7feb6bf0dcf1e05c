import pytest
import torch
import torch.nn.functional as F

from tests.kernels.layouts import DTYPES
from tests.tolerances import ULPS
from vae_accel.kernels import bilinear_pos_embed as module
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.bilinear_pos_embed import PADDINGS, bilinear_pos_embed, reference

SIDE, WIDTH, MERGE = 48, 6, 2
GRIDS = [
    *[(1, n, n) for n in (4, 16, 32, 48, 128)],
    *[(1, 8, 16), (1, 14, 20), (1, 32, 48), (1, 60, 80), (1, 96, 128), (3, 16, 16)],
]


@pytest.fixture
def table():
    return torch.randn(SIDE * SIDE, WIDTH) * 0.25


@pytest.fixture(autouse=True)
def few_programs(monkeypatch, request):
    """A program takes as long as a patch in the interpreter, so that 128 x 128 patches would take 2 minutes.

    On a GPU the tile stays as it ships: one of 1024 patches takes the compiler minutes.
    """
    module._plan.cache_clear()
    if "cuda" not in request.node.name:
        monkeypatch.setattr(module, "ROWS", 1024)
    yield
    module._plan.cache_clear()


def ulps(actual, oracle):
    """Error in units in the last place of `actual`'s dtype at the oracle's magnitude."""
    spacing = torch.finfo(actual.dtype).eps * 2.0 ** oracle.abs().clamp(min=2.0**-14).log2().floor()
    return ((actual.double() - oracle).abs() / spacing).max()


@pytest.mark.parametrize("grid", [*[[g] for g in GRIDS], [(1, 2, 2), (3, 16, 8), (2, 4, 30), (1, 14, 20)]], ids=str)
def test_issue_grids(device, table, grid):
    table = table.to(device)
    out = bilinear_pos_embed(table, grid, SIDE, MERGE)
    assert LazyKernel.bound
    oracle = reference(table.double(), grid, SIDE, MERGE)
    assert (out.double() - oracle).abs().max() <= 1e-5
    half = table.bfloat16()
    assert (
        ulps(bilinear_pos_embed(half, grid, SIDE, MERGE), reference(half.double(), grid, SIDE, MERGE)) <= ULPS[device]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("merge", [1, 2])
def test_every_form_matches_fp64(device, table, merge, align_corners, padding, dtype):
    table, form = table.to(device, dtype), {"align_corners": align_corners, "padding": padding}
    grid = [(1, 6, 4), (2, 60, 2), (1, 2, 72)]
    out = bilinear_pos_embed(table, grid, SIDE, merge, **form)
    oracle = reference(table.double(), grid, SIDE, merge, **form)
    assert out.dtype == dtype
    assert (out.double() - oracle).abs().max() <= 1e-5 if dtype == torch.float32 else ulps(out, oracle) <= ULPS[device]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("grid", [[(1, 1, 1)], [(1, 1, 7), (2, 7, 1)], [(1, 49, 47)]], ids=str)
def test_sizes_of_one(device, table, grid, align_corners, padding):
    form = {"align_corners": align_corners, "padding": padding}
    out = bilinear_pos_embed(table.to(device), grid, SIDE, 1, **form)
    assert (out.cpu().double() - reference(table.double(), grid, SIDE, 1, **form)).abs().max() <= 1e-5


def test_frames_repeat_exactly(device, table):
    out = bilinear_pos_embed(table.to(device), [(3, 16, 16)], SIDE, MERGE).view(3, 256, WIDTH)
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("align_corners", [True, False])
def test_reference_is_transformers(table, align_corners, padding):
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    grid = torch.tensor([(1, 14, 20), (3, 16, 8), (1, 96, 128)])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, SIDE, mode="bilinear", align_corners=align_corners, spatial_merge_size=MERGE, padding=padding
    )
    stock = (F.embedding(indices, table) * weights[:, :, None]).sum(1)
    ours = reference(table, grid, SIDE, MERGE, align_corners=align_corners, padding=padding)
    assert (ours - stock).abs().max() <= 1e-5  # stock's fp32 coordinates are themselves up to 7e-6 off


@pytest.mark.parametrize("align_corners", [True, False])
def test_reference_is_interpolate(table, align_corners):
    square = table.view(1, SIDE, SIDE, WIDTH).movedim(-1, 1).double()
    stock = F.interpolate(square, size=(14, 70), mode="bilinear", align_corners=align_corners)
    ours = reference(table.double(), [(1, 14, 70)], SIDE, 1, align_corners=align_corners)
    torch.testing.assert_close(ours, stock.flatten(2)[0].T)


def test_a_grid_seen_before_costs_no_copy(device, table):
    module._plan.cache_clear()
    for _ in range(3):
        bilinear_pos_embed(table.to(device), torch.tensor([(1, 4, 6), (1, 2, 2)]), SIDE, MERGE)
    assert module._plan.cache_info()[:2] == (2, 1)  # hits, misses


def test_no_images(device, table):
    assert bilinear_pos_embed(table.to(device), [], SIDE, MERGE).shape == (0, WIDTH)


def test_gradients_are_the_references(device, table):
    table = table.to(device).requires_grad_()
    bilinear_pos_embed(table, [(1, 4, 4)], SIDE, MERGE).sum().backward()
    assert torch.allclose(table.grad.sum(), torch.tensor(16.0 * WIDTH, device=device))


def test_traces_whole(device, table):
    table, grid = table.to(device), [(1, 4, 6), (2, 2, 2)]
    torch.library.opcheck(
        torch.ops.vae_accel.bilinear_pos_embed.default,
        (table, [1, 4, 6, 2, 2, 2], SIDE, MERGE, True, "border", torch.bfloat16),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(lambda t: bilinear_pos_embed(t, grid, SIDE, MERGE), fullgraph=True, backend="eager")
    assert torch.equal(compiled(table), bilinear_pos_embed(table, grid, SIDE, MERGE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "reflect"}, "padding"),
        ({"side": 47}, "table must be"),
        ({"grid_thw": [(1, 3, 4)]}, "multiples of merge=2"),
    ],
)
def test_bad_arguments_are_named(table, arguments, message):
    with pytest.raises(ValueError, match=message):
        bilinear_pos_embed(table, **{"grid_thw": [(1, 4, 4)], "side": SIDE, "merge": MERGE, **arguments})
