"""Where a step's time goes: traces of known content, a real run on the CPU, and its report.html."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qwench import cli
from qwench.ops.hardware import matmul_flops, peak_flops, sustained_flops
from qwench.run import read_metrics
from qwench.train import report
from qwench.train.profile import (
    CATEGORIES,
    STEP,
    cpu_category,
    gpu_category,
    missing_shares,
    read_trace,
    shares_of_time,
)

KERNELS = {
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "matrix products",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm>>": "matrix products",
    "triton_tem_fused_mm_3": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7": "attention",
    "kernel_cutlass_kernel_flash_attncuteflash_fwdFlashAttentionForwardSm90_object_at_": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
    "triton_tem_fused_flex_attention_0": "attention",
    "_cross_entropy_kernel": "loss",
    "triton_red_fused__log_softmax_exp_sub_5": "loss",
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2": "norms and elementwise",
    "triton_poi_fused__to_copy_mm_mul_silu_4": "norms and elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::AUnaryFunctor>": "norms and elementwise",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser",
    "Memcpy DtoD (Device -> Device)": "copies",
    "void at::native::direct_copy_kernel_cuda": "copies",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
}  # fmt: skip


@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_by_name(name: str) -> None:
    assert gpu_category(name, in_optimiser=False) == KERNELS[name]
    inside = "communication" if KERNELS[name] == "communication" else "optimiser"
    assert gpu_category(name, in_optimiser=True) == inside, "Muon's products are the optimiser's"


def span(category: str, name: str, begin: float, end: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "tid": tid, "args": args}


def test_every_moment_of_a_gpu_has_one_category() -> None:
    """Hidden communication is not counted; what the optimiser launched is its own wherever it runs."""
    events = [
        span("user_annotation", STEP, 0, 100),
        span("user_annotation", STEP, 200, 300),
        span("user_annotation", "Optimizer.step#AdamW.step", 60, 70),
        span("cuda_runtime", "cudaLaunchKernel", 62, 63, correlation=9),
        span("kernel", "nvjet_tst_128", 10, 40, 7, correlation=1),
        span("kernel", "ncclDevKernel_AllGather", 30, 60, 8, correlation=2),
        span("kernel", "void at::native::vectorized_elementwise_kernel", 90, 210, 7, correlation=9),
        span("kernel", "flash_fwd", 120, 190, 7, correlation=3),  # between the steps
        span("gpu_memcpy", "Memcpy HtoD", 250, 260, 9, correlation=4),
        span("gpu_user_annotation", STEP, 0, 300, 7),
        {"ph": "i", "name": "something else"},
    ]
    windows, busy = read_trace(events)
    assert windows == [(0, 100), (200, 300)]
    shares = shares_of_time(busy.intervals, windows)
    assert list(shares) == list(CATEGORIES)
    wanted = {"matrix products": 0.15, "communication": 0.1, "optimiser": 0.1, "copies": 0.05, "idle": 0.6}
    assert shares == pytest.approx(dict.fromkeys(CATEGORIES, 0.0) | wanted)
    missing = missing_shares(shares, 0.12, 0.0)
    assert missing["matrix products"] == pytest.approx(0.03)
    assert sum(missing.values()) == pytest.approx(1 - 0.12)


def test_operations_of_a_cpu_by_what_calls_them() -> None:
    events = [
        span("user_annotation", STEP, 0, 100),
        span("cpu_op", "aten::linear", 0, 20),
        span("cpu_op", "aten::addmm", 2, 18),
        span("cpu_op", "aten::copy_", 4, 6),
        span("cpu_op", "qwench::packed_attention", 20, 40),
        span("cpu_op", "aten::bmm", 22, 30),
        span("cpu_op", "MulBackward0", 40, 60),
        span("cpu_op", "aten::mul", 45, 60),
        span("user_annotation", "Optimizer.step#AdamW.step", 60, 80),
        span("cpu_op", "aten::mul", 62, 70),
    ]
    windows, busy = read_trace(events)
    shares = shares_of_time(busy.intervals, windows)
    wanted = {"matrix products": 0.2, "attention": 0.2, "norms and elementwise": 0.15, "optimiser": 0.2, "idle": 0.25}
    assert shares == pytest.approx(dict.fromkeys(CATEGORIES, 0.0) | wanted)
    assert cpu_category("aten::_log_softmax", None) == "loss"
    assert cpu_category("SomethingBackward0", None) is None


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, pretrain_arguments, tiny_shards: Path) -> Path:
    """A run of 8 steps whose steps 4 to 6 were profiled."""
    run = tmp_path_factory.mktemp("profiled") / "a <b> run"
    further = [f"val_shards={tiny_shards / 'val'}", "loop.steps=8", "loop.eval_every=3", "loop.profile_step=4"]
    assert cli.main(["pretrain", *pretrain_arguments(run, *further)]) == 0
    return run


def test_profile_of_a_run(profiled: Path) -> None:
    run = profiled
    result = json.loads((run / "profile.json").read_text())
    assert (result["first_step"], result["steps"]) == (4, 3)
    assert sum(result["shares"].values()) == pytest.approx(1.0)
    assert sum(result["missing"].values()) == pytest.approx(1 - result["mfu_of_gemm"])
    assert result["mfu"] == pytest.approx(
        result["flops_per_step"] / result["seconds_per_step"] / result["peak_flops"]["value"]
    )
    for name in ("matrix products", "optimiser", "loss", "norms and elementwise", "idle"):
        assert result["shares"][name] > 0, name
    assert result["shares"]["communication"] == 0
    assert any(entry["name"] == "aten::mm" for entry in result["largest"])
    names = {
        event["name"]
        for event in json.loads(gzip.decompress((run / "profile.trace.json.gz").read_bytes()))["traceEvents"]
    }
    assert STEP in names
    assert "profile of steps 4 to 6: MFU" in (run / "logs/run.log").read_text()
    records = [record for record in read_metrics(run) if "loss" in record]
    assert len(records) == 8
    assert all(record["mfu_of_gemm"] > 0 for record in records)


def test_a_profile_that_comes_too_late_is_cut(tmp_path: Path, pretrain_arguments, capsys) -> None:
    run = tmp_path / "run"
    assert cli.main(["pretrain", *pretrain_arguments(run, "loop.steps=2", "loop.profile_step=1")]) == 0
    assert json.loads((run / "profile.json").read_text())["steps"] == 2
    assert cli.main(["pretrain", *pretrain_arguments(tmp_path / "none", "loop.steps=2", "loop.profile_step=9")]) == 2
    assert "give 0 (off) or the number of a step up to 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12)],
)
def test_datasheets_by_name(name: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16)[0] == rate


def test_the_rate_of_products_on_a_cpu() -> None:

    assert sustained_flops(torch.device("cpu"), torch.float32) == matmul_flops("cpu", torch.float32) > 1e8


# ----------------------------------------------------------------------------------------------------------- the report
def test_report_of_a_run(profiled: Path, capsys) -> None:
    assert cli.main(["report", str(profiled)]) == 0
    assert f"report: {profiled / 'report.html'}" in capsys.readouterr().out
    page = (profiled / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "Run a &lt;b&gt; run" in page
    for words in (
        "training loss",
        "held out",
        "MFU",
        "Where the time goes",
        "matrix products",
        "aten::mm",
        "seq_len = 48",
    ):
        assert words in page, words
    assert page.count("<svg") == 2
    outside = [link for link in re.findall(r'(?:src|href)="([^"]+)"', page) if not link.startswith("#")]
    assert not outside, "one offline file"
    assert "<script" not in page


def test_a_run_with_everything(tmp_path: Path) -> None:
    """Per-source losses, skipped steps, memory; a long run is thinned out to means."""
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 5001):
            record = {
                "step": step,
                "loss": 9 / step,
                "grad_norm": 1.0,
                "lr": 1e-3,
                "peak_memory_gib": 61.5,
                "tokens_per_s": 7.0,
            }
            record["loss_by_source"] = {"web": 2.0, "code": None if step % 2 else 1.0}
            if step == 4000:
                record |= {"loss": None, "skipped": "loss is <nan>"}
            file.write(json.dumps(record) + "\n")
    page = report.write_report(tmp_path).read_text()
    assert "61.5 GiB" in page
    assert "loss is &lt;nan&gt;" in page
    assert "5,000 recorded steps" in page
    assert len(page) < 600_000
    steps, values = report._points([{"step": n, "x": float(n)} for n in range(1, 4001)], "x")
    assert (steps[0], values[0]) == (2, 1.5)
    assert len(steps) == report.POINTS


def test_nothing_to_report(tmp_path: Path, capsys) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has not recorded a step yet" in capsys.readouterr().err
