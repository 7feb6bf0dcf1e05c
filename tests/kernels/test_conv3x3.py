"""The convolution in CUDA C++: on a CPU what its host side asks for, and that it compiles; on a Hopper card all."""

import itertools
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.clips import assert_bordered, assert_noted, normal, weights
from tests.kernels.hopper import Card
from vae_accel.kernels import bordered, conv, conv3x3, nvrtc, upsample_conv, winograd
from vae_accel.kernels.conv3x3 import Form, columns_of

FORMS = [
    *(Form(columns, kind, 2) for columns, kind in itertools.product((96, 128, 192), conv3x3.KINDS)),
    *(Form(128, kind, 3) for kind in conv3x3.KINDS),
]
CHANNELS = [(96, 96), (64, 128), (128, 256), (64, 192), (192, 96)]
SHAPES = [(1, 4, 5, 6), (2, 2, 3, 5), (1, 2, 1, 1), (1, 2, 9, 31)]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A card of Python in the place of the real one, or a Hopper card. What a kernel does not write is NaN."""
    if request.param == "cpu":
        Card().install(monkeypatch)
    elif not HOPPER:
        pytest.skip("no Hopper card")
    empty = bordered.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        bordered.pixels_of(x).fill_(float("nan"))
        return x

    monkeypatch.setattr(bordered, "empty", poisoned)
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


def assert_near(ours, oracle, zeros=True):
    """One rounding of the result, and the fp16 taps of a bf16 model, which are exact."""
    error = (ours.double() - oracle).square().mean().sqrt() / oracle.square().mean().sqrt()
    assert error < (5e-4 if ours.dtype == torch.float16 else 2.2e-3), float(error)
    assert bordered.is_bordered(ours)
    if zeros:  # a border that repeats pixels is open
        assert_bordered(ours)


def oracle(x, weight, bias, **around):
    around = {name: double(value) if isinstance(value, torch.Tensor) else value for name, value in around.items()}
    return conv.reference(x.double(), weight.double(), double(bias), **around)


def clips(channels_in, channels_out, shape, device, dtype=torch.bfloat16, kernel=(3, 3, 3)):
    n, t, h, w = shape
    x = normal(n, channels_in, t, h, w, device=device)
    weight, bias = weights(channels_out, channels_in, *kernel, device=device, dtype=dtype)
    return x, weight, bias, normal(n, channels_out, t, h, w, device=device, dtype=dtype)


def double(x):
    return None if x is None else x.double()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kept", [None, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_clips_behind_frames_of_a_cache(device, channels, shape, kept, residual):
    x, weight, bias, more = clips(*channels, shape, device)
    history = None if kept is None else normal(shape[0], channels[0], kept, *shape[2:], device=device)
    given = {"padding": (1, 1), "before": 2, "history": history, "residual": more if residual else None}
    assert_near(conv.conv(x, weight, bias, **given), oracle(x, weight, bias, **given))


@pytest.mark.parametrize("space", bordered.BORDERS)
@pytest.mark.parametrize("around", [(2, 0), (1, 1), (0, 2), (0, 0)], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5, 6), (2, 4, 3, 5), (1, 1, 2, 2)], ids=str)
def test_clips_between_repeated_frames(device, shape, around, space):
    before, after = around
    x, weight, bias, more = clips(64, 128, shape, device)
    if shape[1] + sum(around) < 3:
        pytest.skip("no frame is left")
    given = {"padding": (1, 1), "before": before, "after": after, "time": "replicate", "space": space}
    more = more[:, :, : shape[1] + sum(around) - 2]
    given["residual"] = more if more.shape[2] == shape[1] + sum(around) - 2 else None
    ours = conv.conv(x, weight, bias, **given)
    assert_near(ours, oracle(x, weight, bias, **given), zeros=space == "zeros")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_pairs_of_frames(device, channels, shape, residual):
    x, weight, bias, more = clips(*channels, shape, device)
    residual = bordered.bordered(more) if residual else None
    golden = oracle(x, weight, bias, padding=(1, 1), before=2, residual=residual)
    v = winograd.reference(F.pad(x.double(), (0, 0, 0, 0, 2, 0))).half()
    ours = conv3x3.conv_pairs(bordered.bordered(v), taps_of(weight), bias, residual, weight.dtype)
    assert_near(ours, golden)


def taps_of(weight):
    """What `winograd.transformed_taps` writes, in torch."""
    g = weight.float().movedim(1, -1).flatten(3).unbind(1)
    order = ((g[0] + g[2] + g[1]) / 2, (g[0] + g[2] - g[1]) / 2, g[0], -g[2])
    return torch.stack(order, 1).flatten(1).half().contiguous()


@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_pictures(device, dtypes, bias):
    operands, result = (getattr(torch, name) for name in dtypes)
    for channels in CHANNELS:
        x, weight, some, _ = clips(*channels, (2, 1, 7, 6), device, result, (3, 3))
        x, some = x[:, :, 0].to(operands), some if bias else None
        golden = F.conv2d(x.double(), weight.double(), double(some), padding=1)
        assert_near(conv.conv(x, weight, some, padding=(1, 1)), golden)


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (2, 2, 3, 5), (1, 1, 1, 1), (1, 3, 9, 31)], ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_upsampled(device, channels, shape):
    x, weight, bias, _ = clips(*channels, shape, device, kernel=(3, 3))
    golden = upsample_conv.reference(x.double(), weight.double(), bias.double())
    assert_near(upsample_conv.upsample_conv(x, weight, bias), golden)


@pytest.mark.parametrize("of", ["conv", "upsample_conv"])
@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize("channels", [(64, 128), (64, 384), (96, 96), (96, 192)], ids=str)
def test_statistics_of_the_next_norm(device, channels, offset, of):
    x, weight, bias, _ = clips(*channels, (2, 1, 11, 14), device, kernel=(3, 3))
    if of == "conv":
        y = conv.conv(x[:, :, 0], weight, bias + offset, padding=(1, 1), statistics=True)
    else:
        y = upsample_conv.upsample_conv(x[:, :, 0], weight, bias + offset, statistics=True)
    assert_noted(y)


def test_fewer_warpgroups_where_more_would_wait(device):
    """512 channels of 128 x 128: with two, 264 tiles on 132 processors are two rounds; with three as many of longer."""
    frame = bordered.Geometry(1, 128, 128).frame
    assert conv3x3._form(128, "direct", frame, 4, 132) == Form(128, "direct", 2)
    assert conv3x3._form(128, "direct", bordered.Geometry(1, 1024, 1024).frame, 1, 132) == Form(128, "direct", 3)


@pytest.mark.parametrize(
    ("channels", "columns"),
    [((96, 96), 96), ((384, 384), 192), ((512, 512), 128), ((64, 576), 192), ((96, 192), 96), ((288, 288), 96)],
    ids=str,
)
def test_tiles_waste_no_column(channels, columns):
    assert columns_of(*channels) == columns and channels[1] % columns == 0


@pytest.mark.parametrize("channels", [(16, 384), (144, 160), (96, 3), (96, 128), (4, 512)], ids=str)
def test_other_channels_are_for_tritons_form(channels):
    assert columns_of(*channels) is None


def test_what_it_takes(device):
    x, weight, _, _ = clips(64, 128, (1, 2, 4, 5), device)
    assert conv3x3.takes(x, weight, torch.bfloat16) and conv3x3.takes(x, weight.float(), torch.float16)
    assert not conv3x3.takes(x, weight, torch.float32) and not conv3x3.takes(x.float(), weight, torch.bfloat16)
    assert not conv3x3.takes(x, weight[..., :1, :1], torch.bfloat16)
    assert not conv3x3.takes(x[:, :40], weight, torch.bfloat16)


def refuse(program, shared, card):
    raise nvrtc.CompileError("conv3x3 for sm_90a: unknown architecture")


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("unavailable", lambda: "libnvrtc.so.13: cannot open", r"libnvrtc\.so\.13"),
        ("load", refuse, "unknown architecture"),
    ],
    ids=["none", "old"],
)
def test_without_a_compiler_a_warning_says_so_once(monkeypatch, name, broken, words):
    for cached in (conv3x3.is_ready, conv3x3._kernel):
        cached.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, name, broken)
    with pytest.warns(UserWarning, match=f"Triton's form, which is slower: .*{words}"):
        assert not conv3x3.has_form(96, 96, torch.device("cuda", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not conv3x3.has_form(96, 96, torch.device("cuda", 0))
    conv3x3.is_ready.cache_clear()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("neighbours", [0, 1, 2])
def test_compiles_for_sm_90a_without_spills_and_fits(form, neighbours):
    try:
        nvrtc._nvrtc()
    except OSError as missing:
        pytest.skip(f"{missing}")
    if neighbours and (form.kind == "pairs" or (neighbours == 1 and form.columns != 96)):
        pytest.skip("no norm with statistics follows a pair, and multiples of 64 channels share parts by two")
    assert_compiles(form, torch.float16, neighbours)
    assert form.shared(channels_out=1152) <= conv3x3.SHARED


@pytest.mark.parametrize("form", [f for f in FORMS if f.kind == "direct" and f.columns != 96], ids=str)
@pytest.mark.parametrize("neighbours", [0, 2])
def test_operands_of_8_bits_compile_without_spills(form, neighbours):
    try:
        nvrtc._nvrtc()
    except OSError as missing:
        pytest.skip(f"{missing}")
    assert_compiles(form, torch.float8_e4m3fn, neighbours)


def assert_compiles(form, operands, neighbours):
    code, log = nvrtc.compile(form.program(operands, torch.bfloat16, neighbours))
    assert code.startswith(b"\x7fELF")
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", log), log


def test_a_compiler_that_refuses_is_quoted():
    try:
        nvrtc._nvrtc()
    except OSError as missing:
        pytest.skip(f"{missing}")
    program = nvrtc.Program("__global__ void broken() { undeclared(); }", "broken", (), "sm_90a")
    with pytest.raises(nvrtc.CompileError, match="undeclared"):
        nvrtc.compile(program)


class Driver:
    """Loads what begins with "good"."""

    def __init__(self):
        self.loaded = []

    def cuModuleLoadData(self, module, code):
        self.loaded.append(code)
        return 0 if code.startswith(b"good") else 200

    def __getattr__(self, name):
        return lambda *args: 0


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A driver and a compiler of which `made` tells."""
    driver = Driver()
    driver.made = []
    monkeypatch.setattr(nvrtc, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "compile", lambda program: driver.made.append(program) or (b"good", ""))
    return driver


PROGRAM = nvrtc.Program("text", "name", ("-DN=96",), "sm_90a")


def test_what_was_compiled_is_read_again_and_what_is_broken_is_compiled_again(driver):
    for _ in range(2):
        nvrtc.load(PROGRAM, 1024, 0)
    assert driver.made == [PROGRAM] and driver.loaded == [b"good"] * 2
    nvrtc.load(PROGRAM._replace(options=("-DN=128",)), 1024, 0)
    assert len(driver.made) == 2
    nvrtc._path(PROGRAM).write_bytes(b"half a file")
    nvrtc.load(PROGRAM, 1024, 0)
    assert len(driver.made) == 3 and driver.loaded[-2:] == [b"half a file", b"good"]
    assert nvrtc._path(PROGRAM).read_bytes() == b"good"


def test_what_does_not_load_says_so(driver, monkeypatch):
    monkeypatch.setattr(nvrtc, "compile", lambda program: (b"bad", ""))
    with pytest.raises(RuntimeError, match="CUDA error 200: name to load"):
        nvrtc.load(PROGRAM, 1024, 0)


def test_a_cache_that_cannot_be_written_is_no_obstacle(driver, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(nvrtc, "cache_directory", lambda: tmp_path / "file")
    nvrtc.load(PROGRAM, 1024, 0)
    assert driver.made == [PROGRAM]
