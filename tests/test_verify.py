"""The proof as a whole: green where the promise holds, red where it is broken, and no speed behind a red one."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import vae_accel
from vae_accel import bench, calls, platforms, results, verify, workloads
from vae_accel.cli import app
from vae_accel.kernels.bilinear_pos_embed import reference
from vae_accel.rewrites import conv3d_as_conv2d
from vae_accel.rewrites.conv3d_as_conv2d import conv_forward

TINY = {name: workloads.get(name) for name in ("qwen-image", "sd1.5")}


@pytest.fixture
def wrong(monkeypatch):
    """A rewrite whose convolutions are 5 % too large: far beyond bf16's rounding of a whole decode."""

    def off(conv, below, *args):
        return conv_forward(conv, below, *args) * 1.05

    monkeypatch.setattr(conv3d_as_conv2d, "conv_forward", off)


def prove(name: str, dtype=torch.bfloat16, **options) -> verify.Proof:
    workload = TINY[name]
    return verify.verify(workload, workload.tiny(), dtype=dtype, device="cpu", platform="cuda", **options)


@pytest.mark.parametrize("name", TINY)
def test_every_rewrite_and_the_whole_plan_are_green(name):
    proof = prove(name)
    subjects = {line.subject for line in proof.lines} | set(proof.alone)
    assert proof.green and subjects == {verify.WHOLE_PLAN, *proof.rewrites}
    assert {(line.direction, line.kind) for line in proof.lines} == {
        (d, k) for d in ("decode", "encode") for k in verify.KINDS
    }
    assert json.loads(json.dumps(proof.as_dict()))["green"]


def test_bf16_convolutions_inside_an_fp32_model_are_lowered_and_reach_the_floor():
    proof = prove("qwen-image", torch.float32, each=False, bf16=True, directions=("decode",))
    assert proof.green and {line.tier for line in proof.lines} == {"lowered"}
    assert all(40 < line.ours.worst_frame_psnr < 90 < line.stock.worst_frame_psnr for line in proof.lines)


def test_what_lowers_decoding_alone_is_not_held_against_encoding():
    """A switch that is 1 applies beside every rewrite that is proved by itself."""
    # Without channels_last, which oneDNN adds up less exactly in fp32.
    options = {"half_decode": "1", "tier": "lowered", "channels_last": "0"}
    proof = prove("sd1.5", torch.float32, kinds=("noise",), **options)
    assert proof.green and {line.subject for line in proof.lines} > {"half_decode", "fused_norm_act"}
    assert {line.tier for line in proof.lines if line.direction == "decode"} == {"lowered"}
    assert "lowered" not in {line.tier for line in proof.lines if line.direction == "encode"}


def test_a_broken_promise_is_red_and_named(wrong):
    proof = prove("qwen-image", only="conv3d_as_conv2d", directions=("decode",), kinds=("noise",))
    assert not proof.green and "stock's" in proof.red[0].why


def test_no_speed_behind_a_red_proof(wrong):
    workload = TINY["qwen-image"]
    with pytest.raises(bench.RedProof, match="no speed is reported"):
        bench.bench(workload, workload.tiny(), device="cpu", only="conv3d_as_conv2d", runs=1)


def test_the_command_exits_1_on_red_and_0_on_green(wrong, tmp_path):
    arguments = ["verify", "qwen-image", "--size", "tiny"]
    red = CliRunner().invoke(app, [*arguments, "--only", "conv3d_as_conv2d", "--json", str(tmp_path / "red.json")])
    assert red.exit_code == 1 and "red" in red.output and "conv3d_as_conv2d" in red.output
    assert not json.loads((tmp_path / "red.json").read_text())["green"]
    assert CliRunner().invoke(app, [*arguments, "--only", "single_frame_conv"]).exit_code == 0


def test_a_result_is_written_and_read_back_by_its_schema(tmp_path):
    workload = TINY["sd1.5"]
    result = bench.bench(workload, workload.tiny(), device="cpu", platform="cuda", runs=2, commit="test")
    path = results.write(result, tmp_path)
    assert results.load(tmp_path) == [result]
    assert result.rewrites["folded_upsample"] == 3 and result.speed[0].stock.runs == 2 and result.calls
    path.write_text(path.read_text().replace('"commit"', '"comit"'))
    with pytest.raises(ValueError, match="comit"):
        results.load(tmp_path)


def test_towers_are_proved_by_their_embeddings():
    tower = workloads.get("qwen3-vl")
    shallow = {**tower.config, "depth": 2, "deepstack_visual_indexes": [1]}
    tower = dataclasses.replace(tower, config=shallow)
    proof = verify.verify(tower, tower.tiny(), device="cpu", platform="cuda", each=False)
    taken = {"patch_embed_as_linear": 1, "vision_metadata": 1, "bilinear_pos_embed": 1, "packed_attention": 2}
    taken |= {"fused_elementwise": 6, "residual_norm": 2}
    assert proof.green and proof.rewrites == taken
    assert all(line.ours.min_cosine > 0.999 for line in proof.lines)


def test_what_is_small_beside_a_tower_is_timed_by_itself(monkeypatch):
    monkeypatch.setattr(calls, "SQUARES", (4, 8))
    tower = workloads.get("qwen3-vl")
    tower = dataclasses.replace(tower, config={**tower.config, "depth": 1, "deepstack_visual_indexes": [0]})
    result = bench.bench(tower, tower.size("2*1x4x6"), device="cpu", platform="cuda", runs=1, commit="test")
    timed = {call.what: call for call in result.calls if call.rewrite != "native_reshape"}
    assert list(timed) == ["patch_embed.proj on 48x3x2x16x16", "pos_embed to 4x4", "pos_embed to 8x8"]
    assert all(call.stock_us > 0 and call.ours_us > 0 for call in timed.values())
    (row,) = result.proof
    assert row.ours_sqnr > 40 and row.stock_min_cosine > 0.999 and 0 < row.ours_cosine_distance < 1e-4

    stock, ours = (tower.build(torch.bfloat16, "cpu") for _ in range(2))
    vae_accel.optimize_encoder(ours, platform="cuda", only="bilinear_pos_embed")
    monkeypatch.setattr(calls.kernel, "bilinear_pos_embed", lambda *args, **options: reference(*args, **options) * 1.01)
    with pytest.raises(ValueError, match=r"positions of 4x4 are .* off"):
        calls.of(tower, stock, ours, "embed", tower.size("1x4x6"))


@pytest.mark.parametrize("arguments", [["list"], ["list", "--platform", "rocm"], ["env"]], ids=" ".join)
def test_the_tables_print(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    if "rocm" in arguments:
        assert "not measured on hardware" in result.output and platforms.Cuda.name not in result.output.split()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["verify", "nothing"], "choose one of"),
        (["verify", "wan2.1", "--size", "3x3"], "multiple of 8"),
        (["verify", "wan2.1", "--size", "tiny", "--dtype", "int8"], "bf16, fp16, fp32"),
        (["verify", "sd1.5", "--size", "tiny", "--only", "causal_padding"], "takes nothing"),
        (["verify", "sd1.5", "--size", "tiny", "--platform", "tpu"], "cuda, rocm, npu, cpu"),
        pytest.param(
            ["verify", "cosmos", "--size", "tiny"],
            "choose another dtype",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU pools bf16"),
        ),
    ],
)
def test_the_command_says_what_is_wrong(arguments, told):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and told in " ".join(result.output.split())
