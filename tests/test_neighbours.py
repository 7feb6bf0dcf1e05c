"""Files, compilers, autocast, threads, adapters, dtypes and devices: what else happens to an autoencoder."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vae_accel
from tests.snapshots import assert_equal_values, assert_identical, snapshot
from tests.subjects import dtype_of, everything
from tests.tiny import Tiny
from tests.vaes import TABLE
from vae_accel.edits import ledger_of
from vae_accel.platforms import ALL, Platform, base

FULL: Platform = max((everything(cls) for cls in ALL.values()), key=lambda platform: len(platform.vae))
TINY = {tiny.id: tiny for tiny in TABLE}
FEW = [TINY[id] for id in ("wan2.1", "hunyuan-video", "sd", "ltx-0.9.0")]
each_tiny = pytest.mark.parametrize("tiny", TABLE, ids=lambda tiny: tiny.id)
few = pytest.mark.parametrize("tiny", FEW, ids=lambda tiny: tiny.id)


def optimized(vae: nn.Module, **options) -> nn.Module:
    base.run(vae, FULL, FULL.vae, "vae", {"strict": True, **options})
    return vae


def decode(tiny: Tiny, vae: nn.Module) -> Tensor:
    return tiny.decode(vae, tiny.latent("ramp").to(dtype_of(vae)))


@each_tiny
def test_saved_files_are_those_of_stock_and_load_as_stock(tiny, tmp_path):
    vae = tiny.build()
    before = snapshot(vae)
    vae.save_pretrained(tmp_path / "stock")
    optimized(vae).save_pretrained(tmp_path / "ours")
    names = sorted(file.name for file in (tmp_path / "stock").iterdir())
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == names
    for name in names:
        stock, ours = (tmp_path / folder / name for folder in ("stock", "ours"))
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(stock.read_text())
        else:
            assert_same_tensors(ours, stock)
    loaded = type(vae).from_pretrained(tmp_path / "ours")
    assert ledger_of(loaded) is None
    assert_equal_values(snapshot(loaded), before)
    optimized(loaded)
    assert_equal_values(snapshot(loaded), before)


def assert_same_tensors(ours: Path, stock: Path) -> None:
    a, b = load_file(ours), load_file(stock)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@each_tiny
def test_a_strict_load_after_optimizing_is_honoured(tiny):
    vae, other = tiny.build(seed=0), tiny.build(seed=1)
    optimized(vae)
    missing = vae.load_state_dict(other.state_dict(), strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    vae_accel.restore(vae)
    with torch.no_grad():
        assert torch.equal(decode(tiny, vae), decode(tiny, other))


@each_tiny
@torch.no_grad()
def test_dtypes_round_trip_as_the_sdxl_pipeline_does(tiny):
    """`force_upcast`: fp16 -> fp32 for the decode -> fp16 again, at every call."""
    stock = tiny.build(dtype=torch.float16)
    vae = optimized(copy.deepcopy(stock))
    before = snapshot(stock)
    for _ in range(2):
        outputs = [decode(tiny, model.to(torch.float32)) for model in (vae, stock)]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-3 * float(outputs[1].abs().max()))
        vae.to(torch.float16), stock.to(torch.float16)
    vae_accel.restore(vae)
    assert_equal_values(snapshot(vae), before)
    assert snapshot(vae).strides == before.strides


def test_devices_round_trip():
    tiny = TINY["wan2.1"]
    vae = optimized(tiny.build(), only="conv3d_as_conv2d")
    vae.to("meta")
    with torch.no_grad():
        shape = decode_on_meta(tiny, vae)
    vae.to_empty(device="cpu")
    vae.load_state_dict(tiny.build().state_dict())
    with torch.no_grad():
        expected = decode(tiny, tiny.build())
        assert shape == expected.shape
        torch.testing.assert_close(decode(tiny, vae), expected, rtol=1e-4, atol=1e-5)
    vae_accel.restore(vae)
    assert torch.equal(decode(tiny, vae.requires_grad_(False)), expected)


def decode_on_meta(tiny: Tiny, vae: nn.Module) -> torch.Size:
    return tiny.decode(vae, tiny.latent().to("meta")).shape


@few
@torch.no_grad()
def test_autocast_keeps_the_dtypes_and_values_of_stock(tiny):
    vae = tiny.build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = decode(tiny, vae)
        optimized(vae)
        ours = decode(tiny, vae)
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock, rtol=0, atol=0.02 * float(stock.abs().max()))


@few
def test_two_threads_decode_one_autoencoder(tiny):
    """Wan keeps its feature cache on the module: stock itself wants one decode at a time there."""
    vae = optimized(tiny.build())
    latents = [tiny.latent("noise", seed=seed) for seed in range(4)]
    lock = threading.Lock() if hasattr(vae, "clear_cache") else None
    with torch.no_grad():
        expected = [tiny.decode(vae, latent) for latent in latents]
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                if lock is not None:
                    with lock:
                        results[i] = tiny.decode(vae, latents[i])
                else:
                    results[i] = tiny.decode(vae, latents[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(latents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], out) for i, out in enumerate(expected))


def test_two_threads_call_one_convolution():
    """No state between calls: many threads inside one rewritten module at once."""
    conv = nn.Conv3d(8, 8, 3, padding=1).requires_grad_(False)
    vae_accel.optimize_vae(conv, platform="cpu", only="conv3d_as_conv2d")
    inputs = [torch.randn(1, 8, 4, 6, 6) for _ in range(8)]
    expected = [conv(x) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(conv(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


COMPILED = [TINY[id] for id in ("sd", "cosmos", "mochi", "hunyuan-video", "ltx-0.9.0", "dc-ae")]


@pytest.mark.parametrize("tiny", COMPILED, ids=lambda tiny: tiny.id)
@torch.no_grad()
def test_the_decoder_compiles_into_one_graph_where_stock_does(tiny):
    """Against stock compiled: dynamo alone changes what Cosmos decodes to (torch 2.13, by 4.9 in fp64)."""
    stock, vae = tiny.build(dtype=torch.float64), optimized(tiny.build(dtype=torch.float64))
    for model in (stock, vae):
        torch._dynamo.reset()
        model.decoder.compile(fullgraph=True, backend="eager")
    expected = decode(tiny, stock)
    torch.testing.assert_close(decode(tiny, vae), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("tiny", FEW[1:], ids=lambda tiny: tiny.id)  # Wan's first, repeated and steady graphs take 10 s
@torch.no_grad()
def test_optimizing_what_was_compiled(tiny):
    """The compiled graph is of the code that was there: its answer stays right, and `restore` comes back to it."""
    vae = tiny.build(dtype=torch.float64)
    torch._dynamo.reset()
    vae.decoder = torch.compile(vae.decoder, backend="eager")
    stock = decode(tiny, vae)
    optimized(vae)
    torch.testing.assert_close(decode(tiny, vae), stock, rtol=0, atol=1e-7 * float(stock.abs().max()))
    vae_accel.restore(vae)
    torch.testing.assert_close(decode(tiny, vae), stock, rtol=0, atol=1e-12)


@few
@torch.no_grad()
def test_a_lora_merged_by_peft_is_honoured(tiny):
    """PEFT adds the update to `weight.data`, which bumps no version and moves no pointer."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    def adapted(vae: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        plain = [n for n, m in vae.decoder.named_modules(prefix="decoder") if type(m) in (nn.Conv2d, nn.Conv3d)]
        targets = [n for n in plain if set(vae.get_submodule(n).kernel_size) == {3}][-6:]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), vae)
        return vae.double().requires_grad_(False).eval()

    def merge(vae: nn.Module) -> Tensor:
        for module in vae.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        return decode(tiny, vae)

    stock = adapted(tiny.build())
    plain, merged = decode(tiny, stock), merge(stock)
    assert not torch.allclose(decode(tiny, tiny.build().double()), merged, rtol=0, atol=1e-3)
    before, after = optimized(adapted(tiny.build())), adapted(optimized(tiny.build()))
    for vae in (before, after):
        scale = 1e-6 * float(plain.abs().max())
        torch.testing.assert_close(decode(tiny, vae), plain, rtol=0, atol=scale)
        torch.testing.assert_close(merge(vae), merged, rtol=0, atol=scale)


@few
@torch.no_grad()
def test_training_mode_and_inference_mode(tiny):
    vae = tiny.build()
    stock = decode(tiny, vae)
    before = snapshot(vae)
    optimized(vae)
    with torch.inference_mode():
        ours = decode(tiny, vae)
    torch.testing.assert_close(ours.clone(), stock, rtol=1e-3, atol=1e-4)
    vae.train().eval()
    vae_accel.restore(vae)
    assert_identical(vae, before)


@few
def test_an_encoder_that_was_dropped(tiny):
    """Pipelines that only decode drop the encoder to save memory."""
    vae = optimized(tiny.build()).requires_grad_(False)
    vae.encoder = None
    expected = decode(tiny, tiny.build().requires_grad_(False))
    torch.testing.assert_close(decode(tiny, vae), expected, rtol=1e-3, atol=1e-4)
    vae_accel.restore(vae)
    assert torch.equal(decode(tiny, vae), expected)
