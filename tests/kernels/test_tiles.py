import json
import subprocess
import sys
import warnings
from functools import partial
from itertools import product

import pytest
import torch

from tests.kernels.clips import SMALL, normal, weights
from vae_accel.kernels import conv, downsample_conv, thin_conv, tile_choice, tiles, upsample_conv, winograd
from vae_accel.kernels._dispatch import LazyKernel
from vae_accel.kernels.tile_choice import Card, answering, choose, use, write
from vae_accel.kernels.tiles import KERNELS, Key, Tile, candidates, fits, key_of

CPU = torch.device("cpu")
KEY = Key("conv", 8, 16, 9, "float16", "float16", 5)
OTHER = Tile(64, 32, 0, 32, 3, 4)


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("triton")
    yield tmp_path / "cache" / "tiles.json"
    use(tmp_path / "none")


@pytest.fixture
def card(monkeypatch):
    """Says of the CPU that it is another card, or has other versions."""

    def become(**fields):
        there = Card("cpu", "", "1", "3")._replace(**fields)
        monkeypatch.setattr(tile_choice, "card_of", lambda device: there)
        tile_choice._sections.cache_clear()
        tile_choice._found.cache_clear()

    become()
    yield become
    monkeypatch.undo()
    tile_choice._sections.cache_clear()
    tile_choice._found.cache_clear()


def test_a_key_tells_apart_what_a_tile_depends_on():
    def key(kernel="conv", shape=(1, 8, 4, 6), out=16, taps=(3, 3), operands=torch.float16, result=torch.bfloat16):
        x, weight = torch.empty(shape, dtype=operands), torch.empty(out, shape[1], *taps, dtype=result)
        return key_of(kernel, x, weight)

    base = key()
    assert base == Key("conv", 8, 16, 9, "float16", "bfloat16", 4)
    others = [
        key(kernel="thin_conv"), key(shape=(1, 16, 4, 6)), key(out=8), key(taps=(1, 1)), key(operands=torch.bfloat16),
        key(result=torch.float16), key(shape=(1, 8, 8, 6)), key(shape=(1, 8, 3, 4, 6), taps=(3, 3, 3)),
    ]  # fmt: skip
    assert len({base, *others}) == len(others) + 1
    assert key(shape=(2, 8, 2, 6)) == key(shape=(1, 8, 5, 6)) == base, "16 to 31 pixels are one class"
    assert key(shape=(1, 8, 4096, 4096)).size == tiles.LARGEST == key(shape=(1, 8, 1024, 1024)).size


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels", [3, 96, 128, 192, 256, 384, 512])
def test_candidates_are_few_fit_and_start_with_the_present_one(kernel, channels):
    key = Key(kernel, 192, channels, 27, "float16", "bfloat16", 18)
    first = shipped_rule(key)
    if first is None:
        pytest.skip("no such convolution")
    found = candidates(key, first)
    assert found[0] == first and 3 < len(found) <= 15 and len(set(found)) == len(found)
    assert all(fits(key, tile) for tile in found), "what ships fits by the same rule"
    assert kernel != "thin_conv" or {tile.cols for tile in found} == {first.cols}


def test_what_does_not_fit_is_no_candidate():
    assert not fits(KEY, Tile(256, 256, 0, 64, 4, 8)), "too much shared memory"
    assert not fits(KEY, Tile(256, 256, 0, 32, 2, 8)), "too many sums a thread"
    assert not fits(KEY._replace(kernel="winograd"), Tile(256, 128, 0, 32, 2, 8))


def test_weights_in_two_terms_have_tiles_of_their_own(card):
    """What ships was measured with one term; the rules' tiles fit with two."""
    card(gpu="NVIDIA H200", capability="9.0")
    for i in (96, 128, 192, 256, 384, 512, 1024):
        for o in (3, 12, 96, 128, 192, 256, 384, 512, 1024):
            for kernel, taps in product(("conv", "upsample_conv"), (9, 27)):
                key = Key(kernel, i, o, taps, "float16", "float32", 18)
                tile = conv.tile_of(i, o, key.taps, 2) if key.kernel == "conv" else upsample_conv.tile_of(i, o, 2)
                assert fits(key, tile) and tile.stages >= 2 and choose(key, tile, CPU) == tile, key
    assert all(
        fits(Key("thin_conv", 256, o, 27, "float16", "float32", 18), thin_conv.tile_of(256, o, 2)) for o in (3, 12)
    )
    assert not fits(KEY._replace(result="float32"), Tile(256, 128, 0, 64, 4, 8))


def shipped_rule(key):
    i, o = key.channels_in, key.channels_out
    if key.kernel == "thin_conv":
        return thin_conv.tile_of(i, o) if o <= thin_conv.MOST else None
    if key.kernel == "upsample_conv":
        return upsample_conv.tile_of(i, o)
    if key.kernel == "downsample_conv":
        return downsample_conv.tile_of(i, o)
    if key.kernel == "winograd":
        return winograd.tile_of(o, i)
    if key.kernel == "conv_pixel_pairs":
        return conv.tile_of(i, 2 * o, key.taps) if o == 96 else None
    return conv.tile_of(i, o, key.taps)


def test_what_ships_changes_nothing(card):
    card(gpu="NVIDIA H200", capability="9.0")
    changed = 0
    for choice in tile_choice._shipped()[0].choices:
        for channels_in in (96, 128, 192, 256, 384, 512, 768, 1024):
            for taps in (1, 3, 9, 27):
                key = Key(choice.kernel, channels_in, choice.channels_out or 96, taps, "float16", "bfloat16", 18)
                if (rule := shipped_rule(key)) is not None and choice.holds(key):
                    assert choose(key, SMALL, CPU) == rule, key
                    changed += 1
    assert changed >= 4 * 13  # every shipped row, for each number of taps
    card(gpu="NVIDIA A100", capability="8.0")
    assert choose(Key("conv", 192, 192, 27, "float16", "bfloat16", 18), SMALL, CPU) is SMALL


def test_the_users_file_then_what_ships_then_the_rule(path, card):
    card(gpu="NVIDIA H100 80GB HBM3", capability="9.0")
    known = Key("conv", 192, 192, 27, "float16", "bfloat16", 18)
    use(path)
    assert choose(known, SMALL, CPU) == conv.tile_of(192, 192, 27)
    assert choose(KEY, SMALL, CPU) is SMALL
    write(path, CPU, {known: OTHER})
    use(path)
    assert choose(known, SMALL, CPU) == OTHER
    assert choose(known._replace(size=17), SMALL, CPU) == conv.tile_of(192, 192, 27)


def test_the_file_comes_back_as_it_was_written(path):
    write(path, CPU, {KEY: OTHER})
    write(path, CPU, {KEY._replace(size=6): None})
    write(path, CPU, {KEY._replace(size=7): SMALL, KEY: SMALL})
    use(path)
    found = [choose(KEY._replace(size=size), OTHER, CPU) for size in (5, 6, 7, 8)]
    assert found == [SMALL, None, SMALL, OTHER]
    assert not path.with_suffix(".part").exists()


@pytest.mark.parametrize("other", [{"package": "2"}, {"triton": "4"}])
def test_another_version_is_ignored_told_and_replaced(path, card, other):
    write(path, CPU, {KEY: OTHER})
    card(**other)
    use(path)
    with pytest.warns(UserWarning, match=r"tiles\.json was tuned with vae-accel 1 and Triton 3, and is ignored"):
        assert choose(KEY, SMALL, CPU) is SMALL
    write(path, CPU, {KEY._replace(size=6): OTHER})
    assert len(json.loads(path.read_text())["sections"]) == 1


def test_another_card_keeps_what_is_its(path, card):
    write(path, CPU, {KEY: OTHER})
    card(gpu="another")
    write(path, CPU, {KEY: None})
    use(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(KEY, SMALL, CPU) is None
        card()
        assert choose(KEY, SMALL, CPU) == OTHER


ROW = {"kernel": "conv", "tile": [64, 32, 0, 32, 3, 4]}
BROKEN = {
    "not json": "{",
    "another program's": '{"tiles": []}',
    "an unknown kernel": [{**ROW, "kernel": "matmul"}],
    "rows that are no power of two": [{**ROW, "tile": [100, 32, 0, 32, 3, 4]}],
    "half a tile": [{**ROW, "tile": [64, 32]}],
    "a vendor for winograd": [{"kernel": "winograd", "tile": None}],
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_ignored_and_named(path, what):
    content = BROKEN[what]
    if not isinstance(content, str):
        content = json.dumps({"sections": [{"gpus": ["cpu"], "capability": "", "choices": content}]})
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"cache.tiles\.json holds no tiles and is ignored"):
        use(path)
    assert choose(KEY, SMALL, CPU) is SMALL


def test_a_forward_reads_no_file(path, monkeypatch):
    write(path, CPU, {KEY: OTHER})
    use(path)
    path.unlink()
    assert choose(KEY, SMALL, CPU) == OTHER, "read when a model was optimized"
    with monkeypatch.context() as inside:
        inside.setattr(tile_choice, "_sections", None)
        assert choose(KEY, SMALL, CPU) == OTHER, "found once"


def test_optimize_reads_the_file_the_settings_name(path, monkeypatch):
    from vae_accel import optimize_vae

    write(path, CPU, {KEY: OTHER})
    monkeypatch.setenv("VAE_ACCEL_TILES", str(path))
    optimize_vae(torch.nn.Conv2d(8, 16, 3), platform="cpu")
    assert choose(KEY, SMALL, CPU) == OTHER


@pytest.mark.parametrize("kernel", ["conv", "thin_conv", "upsample_conv", "downsample_conv"])
def test_where_the_vendor_is_faster_it_runs(device, kernel):
    x = normal(1, 8, 4, 6, device=device)
    weight, bias = weights(3 if kernel == "thin_conv" else 16, 8, 3, 3, device=device)
    calls = {
        "conv": lambda: conv.conv(x, weight, bias, padding=(1, 1)),
        "thin_conv": lambda: thin_conv.thin_conv(x, weight, bias),
        "upsample_conv": lambda: upsample_conv.upsample_conv(x, weight, bias),
        "downsample_conv": lambda: downsample_conv.downsample_conv(x, weight, bias),
    }
    asked = []
    with answering(lambda key, tile: asked.append((key, tile))):
        out = calls[kernel]()
    assert [key.kernel for key, _ in asked] == [kernel] and asked[0][1] is not None
    laws = {"upsample_conv": upsample_conv.reference, "downsample_conv": downsample_conv.reference}
    law = laws.get(kernel, partial(conv.reference, padding=(1, 1)))
    assert torch.equal(out, law(x, weight, bias))
    assert not LazyKernel.bound, "no kernel of ours was launched"


def test_a_convolution_runs_with_the_tile_it_is_given(device):
    x = normal(1, 8, 4, 6, device=device)
    weight, bias = weights(16, 8, 3, 3, device=device)
    expected = conv.reference(x.float(), weight.float(), bias.float(), padding=(1, 1))
    for tile in (SMALL, OTHER):
        with answering(lambda key, _, tile=tile: tile):
            torch.testing.assert_close(conv.conv(x, weight, bias, padding=(1, 1)).float(), expected, atol=5e-3, rtol=0)


def test_importing_stays_light():
    code = "import sys, vae_accel.kernels.conv; print(*{'triton', 'diffusers', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
