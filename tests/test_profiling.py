"""The profile: nothing is counted twice or lost, and the rates come from shapes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from vae_accel import bench, profiling, results, workloads
from vae_accel.cli import app
from vae_accel.profiling import (
    OTHER,
    SMALLEST_SHARE,
    Cost,
    Counter,
    Work,
    by_kernel,
    by_operation,
    profile,
    short,
    table,
)

CPU = torch.device("cpu")


def count(call) -> dict[str, Work]:
    with torch.inference_mode(), Counter() as counter:
        call()
    return counter.work


def of(rows, by: str):
    return [row for row in rows if row.by == by]


@pytest.mark.parametrize("grad", [False, True])
def test_convolutions_are_two_operations_a_multiply_add(grad):
    conv, x = nn.Conv3d(6, 8, (3, 3, 3), padding=(0, 1, 1), groups=2), torch.randn(2, 6, 5, 7, 9)
    with torch.inference_mode(not grad), Counter() as counter:
        conv(x)
    assert counter.work["aten::convolution"].flop == 2 * (2 * 8 * 3 * 7 * 9) * (3 * 27)


def test_a_transposed_convolution_is_counted_by_its_input():
    conv, x = nn.ConvTranspose2d(4, 6, 2, stride=2), torch.randn(1, 4, 5, 7)
    assert count(lambda: conv(x))["aten::convolution"].flop == 2 * x.numel() * 6 * 4


def test_our_own_convolution_is_counted_by_its_output():
    x, weight, out = torch.empty(1, 16, 4, 8, 8), torch.empty(32, 16, 3, 3, 3), torch.empty(1, 32, 4, 8, 8)
    assert profiling.flop("vae_accel::conv", None, (x, weight), {}, out) == 2 * 32 * 4 * 64 * 16 * 27


def test_products_are_counted_and_a_composite_only_in_its_parts():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    work = count(lambda: torch.matmul(a, b))
    assert work["aten::mm"].flop == 2 * 3 * 5 * 7 and "aten::matmul" not in work


def test_bytes_are_read_once_and_written_once():
    x = torch.randn(4, 6)
    assert count(lambda: F.silu(x))["aten::silu"] == Work(0, 2 * 4 * 24)
    assert count(lambda: x + x[:, :1].expand(4, 6))["aten::add"].bytes == 3 * 4 * 24
    assert not count(lambda: x.view(24)) and not count(lambda: torch.empty(9))


def test_a_product_that_is_told_its_dtype_counts_as_any_other():
    a, b = torch.zeros(2, 8, 16), torch.zeros(2, 16, 4)
    out = torch.zeros(2, 8, 4)
    assert profiling.flop("aten::bmm", torch.ops.aten.bmm, (a, b, torch.float32), {}, out) == 2 * 2 * 8 * 16 * 4


def test_the_rates_are_work_by_time():
    costs = {"aten::convolution": Cost(2, 1000.0), "aten::silu": Cost(1, 500.0), "aten::view": Cost(1, 500.0)}
    work = {"aten::convolution": Work(flop=3 * 10**9, bytes=5), "aten::silu": Work(bytes=10**6)}
    convolution, silu, view = table(costs, work)
    assert convolution == {"name": "aten::convolution", "calls": 2, "ms": 1.0, "share": 0.5, "tflops": 3.0}
    assert silu["gbps"] == 2.0 and "tflops" not in silu
    assert not {"gbps", "tflops"} & view.keys()


def test_small_rows_are_summed():
    costs = {"large": Cost(1, 1000.0), **{f"small {i}": Cost(2, 4.0) for i in range(3)}}
    large, other = table(costs, {})
    assert (large["name"], other["name"], other["calls"], other["ms"]) == ("large", OTHER, 6, 0.012)
    assert table({}, {}) == []


def event(name, own, parent=None, kernels=()):
    return SimpleNamespace(
        name=name,
        self_cpu_time_total=own,
        cpu_parent=parent,
        kernels=[SimpleNamespace(duration=us) for us in kernels],
        device_type=torch.autograd.DeviceType.CPU,
    )


def test_what_an_operation_calls_is_its_own():
    outer = event("aten::conv3d", 1.0)
    convolution = event("aten::convolution", 2.0, outer)
    inner = event("aten::cudnn_convolution", 3.0, convolution, kernels=(70.0,))
    bias = event("aten::add_", 4.0, convolution, kernels=(20.0, 5.0))
    silu = event("aten::silu", 5.0, kernels=(8.0,))
    launch = event("cudaLaunchKernel", 0.0, silu, kernels=(70.0,))  # another's: its number is that operation's
    events = [outer, convolution, inner, bias, silu, launch]
    counted = {"aten::convolution": Work(), "aten::add_": Work(), "aten::silu": Work()}
    assert by_operation(events, counted, accelerated=True) == {
        "aten::convolution": Cost(1, 95.0),
        "aten::silu": Cost(1, 8.0),
    }
    assert by_operation(events, counted, accelerated=False) == {
        "aten::conv3d": Cost(1, 1.0),
        "aten::convolution": Cost(1, 9.0),
        "aten::silu": Cost(1, 5.0),
    }


def launched(name, us, annotation=False):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
        device_type=torch.autograd.DeviceType.CUDA,
        is_user_annotation=annotation,
    )


def test_kernels_are_what_ran_on_the_card():
    events = [
        event("aten::silu", 5.0, kernels=(8.0,)),
        launched("_rms_norm", 3.0),
        launched("void cutlass::Kernel<Gemm, 3>(Gemm::Params)", 4.0),
        launched("void cutlass::Kernel<Gemm, 4>(Gemm::Params)", 5.0),
        launched("a span", 12.0, annotation=True),
    ]
    assert by_kernel(events, accelerated=True) == {"_rms_norm": Cost(1, 3.0), "Kernel": Cost(2, 9.0)}
    assert by_kernel(events[:1], accelerated=False) == {"aten::silu": Cost(1, 5.0)}
    assert by_operation(events, {"aten::silu": Work()}, accelerated=True) == {"aten::silu": Cost(1, 8.0)}


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel"
            "(at::TensorIteratorBase&)::{lambda()#1}, std::array<char*, 2ul>>(int, std::array<char*, 2ul>)",
            "vectorized_elementwise_kernel",
        ),
        ("void (anonymous namespace)::elementwise_kernel_with_index<int>(int)", "elementwise_kernel_with_index"),
        ("_ZN7cutlass6KernelI4GemmEEvNT_6ParamsE", "Kernel"),
        ("_rms_norm", "_rms_norm"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("sm90_xmma_fprop_" + "x" * 99, "sm90_xmma_fprop_" + "x" * 56),
    ],
)
def test_names_are_short(name, expected):
    assert short(name) == expected


def test_rows_sum_to_the_whole():
    layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(1, 4, 32, 32)
    with torch.inference_mode():
        layers(x)
        rows = profile(lambda: layers(x), CPU, direction="decode", model="ours")
    kernels, operations = of(rows, "kernel"), of(rows, "operation")
    for view in (kernels, operations):
        assert sum(row.share for row in view) == pytest.approx(1.0)
        assert all(row.share >= SMALLEST_SHARE for row in view if row.name != OTHER)
    assert sum(row.ms for row in kernels) == pytest.approx(sum(row.ms for row in operations))
    (convolution,) = [row for row in operations if row.name == "aten::convolution"]
    flop = 2 * (8 * 30 * 30 * 4 * 9 + 4 * 30 * 30 * 8)
    assert convolution.calls == 2 and convolution.tflops == pytest.approx(flop / convolution.ms / 1e9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_kernel_of_a_card_belongs_to_an_operation():
    conv = nn.Conv3d(64, 64, 3, padding=1).cuda().half().requires_grad_(False)
    x = torch.randn(1, 64, 8, 64, 64, device="cuda").half()
    rows = profile(lambda: F.silu(conv(x)), x.device, direction="decode", model="ours")
    operations = {row.name: row for row in of(rows, "operation")}
    assert profiling.UNTRACED not in operations
    assert operations["aten::convolution"].tflops > 1 and operations["aten::silu"].gbps > 1
    assert sum(row.ms for row in of(rows, "kernel")) == pytest.approx(sum(row.ms for row in operations.values()))


def test_bench_keeps_the_profile_of_both_and_a_file_without_one_stays_valid(tmp_path):
    workload = workloads.get("sd1.5")
    result = bench.bench(workload, workload.tiny(), device="cpu", runs=1, commit="test", profile=True)
    views = {(row.direction, row.model, row.by) for row in result.profile}
    assert views == {("decode", model, by) for model in ("stock", "ours") for by in ("kernel", "operation")}
    path = results.write(result, tmp_path)
    assert results.load(tmp_path) == [result]
    without = result.model_dump(mode="json", exclude={"profile"})
    assert results.Result.model_validate(without).profile == [] and path.exists()


def test_the_command_prints_the_tables():
    result = CliRunner().invoke(app, ["bench", "sd1.5", "--size", "tiny", "--runs", "1", "--profile"])
    assert result.exit_code == 0, result.output
    for told in ("decode, stock", "decode, ours", "by kernel", "by operation", "TFLOP/s", "aten::convolution"):
        assert told in result.output
