"""A decode in fp16: within the floors, the model as it was, and never a picture that overflowed."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn

import vae_accel
from tests.offloads import grouped
from tests.snapshots import assert_identical, snapshot
from tests.subjects import everything, plan
from tests.vaes import TABLE, Tiny
from vae_accel.edits import Ledger, Pen, ledger_of
from vae_accel.metrics import compare, lowered_holds
from vae_accel.platforms import ALL, Cuda, NoSite, Step, base
from vae_accel.rewrites.fused_norm_act import FusedNormAct
from vae_accel.rewrites.half_decode import AGAIN, HalfDecode

TINY = {tiny.id: tiny for tiny in TABLE}
CPU = torch.device("cpu")
# Between them: a cache, tiles in time, cached convolutions, two norms, attention of both kinds, buffers, a mask.
MODELS = (
    "wan2.1",
    "hunyuan-video",
    "cogvideox",
    "ltx-0.9.0",
    "mochi",
    "cosmos",
    "flux.1",
    "dc-ae",
    "asymmetric-masked",
)
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return TINY[name].build(dtype=dtype)


def half(model: nn.Module) -> nn.Module:
    return vae_accel.optimize_vae(model, platform="cpu", only="half_decode", tier="lowered")


def odd(tiny: Tiny) -> Tensor:
    """Two latents where the class takes two, one row taller than the table's."""
    latent = tiny.latent("picture", batch=2 if tiny.batch else None)
    return latent if "masked" in tiny.id else torch.cat([latent, latent[..., -1:, :]], -2)


def decode(name: str, vae: nn.Module, latent: Tensor | None = None) -> Tensor:
    latent = TINY[name].latent("picture") if latent is None else latent
    return TINY[name].decode(vae, latent.to(next(vae.parameters()).dtype))


def overflowing(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Weights that fp16 holds, activations that it does not; the norm after them makes it the same picture in bf16."""
    vae = build("sd", dtype)
    vae.decoder.conv_in.weight.mul_(3e4 / vae.decoder.conv_in.weight.abs().max())
    vae.post_quant_conv.weight.mul_(100)
    return vae


def counts(vae: nn.Module) -> dict[str, int]:
    return next(o.counts for o in ledger_of(vae).outcomes if o.name == "half_decode")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_floors_of_its_tier_hold_and_bf16_is_left_behind(name, dtype):
    latent = odd(TINY[name])
    golden = decode(name, build(name, dtype).double(), latent.to(dtype))
    stock, ours = decode(name, build(name, dtype), latent), decode(name, half(build(name, dtype)), latent)
    assert ours.dtype == stock.dtype and not torch.equal(ours, stock)
    measured = compare(ours, golden, peak=2.0)
    assert lowered_holds(measured) == (True, "")
    if dtype == torch.bfloat16:
        # 3 bits more inside; what bf16 can write of frames in [-1, 1] (56 dB at the worst) bounds the rest.
        assert measured.rms < 0.75 * compare(stock, golden, peak=2.0).rms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_plan_runs_in_it(dtype):
    """Rewritten forwards are partials on the instances: they see the copies as stock's do."""
    vae, steps = build("wan2.1", dtype), everything(Cuda).vae
    base.run(vae, Cuda(), steps, "vae", {"strict": True, "tier": "lowered"})
    assert {"half_decode", "fused_norm_act"} <= {o.name for o in ledger_of(vae).outcomes if o.taken}
    golden = decode("wan2.1", build("wan2.1", dtype).double(), TINY["wan2.1"].latent("picture").to(dtype))
    assert lowered_holds(compare(decode("wan2.1", vae), golden, peak=2.0)) == (True, "")


@pytest.mark.parametrize("name", ["wan2.1", "sd"])
def test_the_model_stays_what_it_is(name, tmp_path):
    vae = build(name)
    before, held = snapshot(vae), {n: (p, p.data_ptr()) for n, p in vae.named_parameters()}
    seen = []
    conv = next(m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d))
    hook = conv.register_forward_pre_hook(lambda module, args: seen.append((module.weight.dtype, args[0].dtype)))
    encoded = TINY[name].encode(vae, TINY[name].pixels("picture").bfloat16())
    half(vae)
    decode(name, vae)
    hook.remove()
    assert set(seen) == {(torch.float16, torch.float16)}
    assert vae.dtype == torch.bfloat16
    assert all(vae.get_parameter(n) is p and p.data_ptr() == pointer for n, (p, pointer) in held.items())
    assert torch.equal(TINY[name].encode(vae, TINY[name].pixels("picture").bfloat16()), encoded)
    vae.save_pretrained(tmp_path)
    loaded = type(vae).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in vae.state_dict().items())
    vae_accel.restore(vae)
    assert_identical(vae, before)


def test_a_decode_that_fails_leaves_the_model_as_it_was():
    vae = half(build("sd"))

    def fail(module, args):
        raise RuntimeError("no room")

    hook = vae.decoder.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no room"):
        decode("sd", vae)
    hook.remove()
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_overflow_is_decoded_again_and_told(dtype):
    golden = decode("sd", overflowing(dtype).double())
    alone = decode("sd", overflowing(dtype).half())
    assert not lowered_holds(compare(alone, golden, peak=2.0))[0], "the model overflows, and the floor sees it"
    stock, vae = decode("sd", overflowing(dtype)), half(overflowing(dtype))
    for times in (1, 2):
        with pytest.warns(RuntimeWarning, match="half_decode: AutoencoderKL decoded again .* not finite in fp16"):
            assert torch.equal(decode("sd", vae), stock)
        assert counts(vae) == {AGAIN: times}
    assert f"2 x {AGAIN}" in str(vae_accel.report(vae))
    assert vae_accel.report(vae).as_dict()["AutoencoderKL"]["rewrites"][-1]["counts"] == {AGAIN: 2}


@pytest.mark.parametrize("name", [t.id for t in TABLE if t.id in ("vidtok", "kvae-video", "allegro", "rae", *MODELS)])
def test_what_was_decoded_again_is_stock_bit_for_bit(name):
    """State that a first decode left behind would show in the second."""
    stock, vae = decode(name, build(name)), half(build(name))
    vae.decoder.register_forward_hook(lambda m, args, out: spoilt(out) if first(out) == torch.float16 else out)
    with pytest.warns(RuntimeWarning, match="decoded again"):
        assert torch.equal(decode(name, vae), stock)


def first(out) -> torch.dtype:
    out = getattr(out, "logits", out)
    return (out[0] if isinstance(out, tuple) else out).dtype


def spoilt(out):
    if hasattr(out, "logits"):
        return type(out)(logits=out.logits * float("nan"))
    return (out[0] * float("nan"), *out[1:]) if isinstance(out, tuple) else out * float("nan")


def test_weights_beyond_fp16_are_refused_by_name_and_value():
    vae = build("sd")
    vae.decoder.conv_in.bias[3] = -1e5
    with pytest.raises(NoSite, match=r"decoder\.conv_in\.bias holds 99840, beyond fp16's 65504"):
        half(vae)
    vae = build("sd")
    vae.encoder.conv_in.bias[3] = 1e5
    assert ledger_of(half(vae)).edits


def test_weights_that_leave_the_range_later_are_seen_in_the_picture():
    vae, stock = half(build("sd")), build("sd")
    for model in (vae, stock):
        model.decoder.conv_in.bias[3] = 1e5
    with pytest.warns(RuntimeWarning, match="decoded again"):
        assert torch.equal(decode("sd", vae), decode("sd", stock))


def test_copies_are_never_stale():
    vae = half(build("sd"))
    decode("sd", vae)
    for parameter in vae.decoder.parameters():
        parameter.data += 0.1 * parameter.data  # PEFT's merge: no version is bumped, no pointer moves
    fresh = build("sd")
    fresh.load_state_dict(vae.state_dict())
    assert torch.equal(decode("sd", vae), decode("sd", half(fresh)))


@pytest.mark.parametrize(
    "name, why",
    [
        ("ltx-2.3", "squares in fp16"),
        ("ltx-2-audio", "squares in fp16"),
        ("easyanimate", "keep frames from call to call"),
        ("svd", "has no _decode"),
    ],
)
def test_what_could_be_wrong_unseen_is_refused(name, why):
    with pytest.raises(NoSite, match=why):
        half(build(name))


def test_a_norm_that_squares_in_fp32_lifts_the_refusal():
    vae = build("ltx-2.3")
    made = plan((Step(FusedNormAct(), "on", "test"), Step(HalfDecode(), "on", "test")))
    base.run(vae, made, made.vae, "vae", {"strict": True, "tier": "lowered"})
    golden = decode("ltx-2.3", build("ltx-2.3").double())
    assert ledger_of(vae).outcomes[1].taken
    assert lowered_holds(compare(decode("ltx-2.3", vae), golden, peak=2.0)) == (True, "")


def sequential(vae):
    accelerate.cpu_offload(vae, CPU, offload_buffers=True)


def casting(vae):
    kept = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    apply_layerwise_casting(vae, **kept, skip_modules_pattern=("norm",))


@pytest.mark.parametrize("hook", [sequential, grouped, casting])
def test_weights_that_hooks_fetch_or_cast_are_left_to_them(hook):
    dtype = torch.float32 if hook is casting else torch.bfloat16
    stock, vae, late = build("sd", dtype), half(build("sd", dtype)), build("sd", dtype)
    hook(stock), hook(vae)
    latent = TINY["sd"].latent("picture").to(dtype)
    assert torch.equal(TINY["sd"].decode(vae, latent), TINY["sd"].decode(stock, latent))
    hook(late)
    (site,) = HalfDecode().sites(late, Ledger())
    assert site.refused == "its weights wait elsewhere until a hook fetches them"


def test_a_hook_that_moves_the_whole_model_is_no_obstacle():
    expected, vae = decode("sd", half(build("sd"))), half(build("sd"))
    accelerate.cpu_offload_with_hook(vae, CPU)
    assert torch.equal(decode("sd", vae), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_run_as_before(dtype):
    assert torch.equal(decode("sd", half(build("sd", dtype))), decode("sd", build("sd", dtype)))


def test_gradients_and_autocast_run_as_before():
    stock, vae = build("sd", torch.float32), half(build("sd", torch.float32))
    with torch.enable_grad():
        out = decode("sd", vae.requires_grad_(True))
        out.sum().backward()
        assert torch.equal(out, decode("sd", stock)) and vae.decoder.conv_in.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode("sd", vae), decode("sd", stock))


def test_a_compiled_decode_is_one_graph_and_as_before():
    torch._dynamo.reset()
    vae, latent = half(build("sd", torch.float32)), TINY["sd"].latent("picture")
    compiled = torch.compile(lambda z: vae._decode(z).sample, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(latent), decode("sd", build("sd", torch.float32)), rtol=0, atol=1e-5)


def test_tiles_slices_and_tuples():
    golden, vae = build("sd").double(), half(build("sd"))
    latent = TINY["sd"].latent("picture", batch=2)
    for model in (golden, vae):
        TINY["sd"].tile(model).enable_slicing()
    assert lowered_holds(compare(decode("sd", vae, latent), decode("sd", golden, latent.bfloat16()), peak=2.0))[0]
    (frames,) = vae._decode(latent.bfloat16(), return_dict=False)
    assert frames.dtype == torch.bfloat16 and vae._decode(latent.bfloat16()).sample.dtype == torch.bfloat16


def test_threads_take_turns():
    """Copies stand in for the parameters of one model: a second decode that began meanwhile would keep them."""
    vae, latents = half(build("sd")), [TINY["sd"].latent("noise", seed=seed) for seed in range(4)]
    expected, results = [decode("sd", vae, latent) for latent in latents], {}

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                results[i] = TINY["sd"].decode(vae, latents[i].bfloat16())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(latents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], out) for i, out in enumerate(expected))
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}


def test_a_copy_decodes_and_counts_by_itself():
    vae = half(overflowing())
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        with pytest.warns(RuntimeWarning, match="decoded again"):
            decode("sd", other)
        assert counts(other) == {AGAIN: 1} and not counts(vae)


def test_it_goes_over_what_decodes_in_chunks():
    def chunks(module, below, z, *args, **kwargs):
        return below(z, *args, **kwargs)

    vae = build("sd")
    ledger = Ledger()
    Pen(vae, ledger, "latent_chunks").method("", "_decode", chunks)
    (site,) = HalfDecode().sites(vae, ledger)
    assert site.refused is None
    Pen(vae, ledger, "another", over=("latent_chunks",)).method("", "_decode", chunks)
    (site,) = HalfDecode().sites(vae, ledger)
    assert site.refused == "_decode is owned by another"


@pytest.mark.parametrize("name", ALL)
def test_it_is_asked_for_by_name_and_by_tier(name, monkeypatch):
    def state() -> str:
        vae = vae_accel.optimize_vae(build("sd"), platform=name)
        return next(o.state for o in ledger_of(vae).outcomes if o.name == "half_decode")

    monkeypatch.setenv("VAE_ACCEL_TIER", "lowered")
    assert state() == "off"
    monkeypatch.setenv("VAE_ACCEL_HALF_DECODE", "1")
    assert state() == "on"
    monkeypatch.setenv("VAE_ACCEL_TIER", "rounding")
    with pytest.raises(NoSite, match="its tier is lowered"):
        state()


def test_nothing_is_warned_where_nothing_overflows():
    vae = half(build("sd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode("sd", vae)
    assert not counts(vae) and replace(HalfDecode()) == HalfDecode()
