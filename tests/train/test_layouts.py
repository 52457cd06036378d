"""Layouts chosen from the memory plan, and `qwench plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwench import cli, config
from qwench.model.presets import preset
from qwench.parallel.layout import Layout, check_model, plan_layout
from qwench.tokenizer import Tokenizer
from qwench.train import layouts
from qwench.train.config import PretrainConfig
from qwench.train.job import run_stage, sizes_of
from qwench.train.layouts import choose_layout, pick_free, settle, step_cost, workload_of
from qwench.train.memory import GIB, Workload, memory_plan, usable_bytes

STEP = {"seq_len": 4096, "batch_rows": 1024}


@pytest.mark.parametrize(
    ("name", "world", "memory"),
    [("qwen2.5-0.5b", 1, 80), ("qwen2.5-7b", 8, 80), ("qwen2.5-32b", 8, 80)],
)
def test_a_choice_fits_and_divides(name: str, world: int, memory: int) -> None:
    shape = preset(name)
    choice = choose_layout(shape, world, memory * GIB, **STEP)
    assert choice.layout.world == world
    assert choice.layout.tensor <= 8
    check_model(choice.layout, shape, **STEP)
    assert 1024 // choice.layout.data % choice.micro_batch_rows == 0
    assert choice.plan.total <= usable_bytes(memory * GIB, world)
    assert choice.cost < 1.5


def test_simple_layouts_win_while_they_fit() -> None:
    small = choose_layout(preset("qwen2.5-1.5b"), 8, 80 * GIB, **STEP)
    assert small.layout == Layout(shard=8)
    assert small.remat == "none"
    long = choose_layout(preset("qwen2.5-7b"), 8, 80 * GIB, seq_len=32_768, batch_rows=128)
    assert long.layout.context > 1, "a row of 32,768 tokens is too long for one GPU"
    given = choose_layout(preset("qwen2.5-1.5b"), 8, 80 * GIB, **STEP, micro_batch_rows=2, remat="full")
    assert (given.micro_batch_rows, given.remat) == (2, "full")
    for rows, taken in ((3, 3), (4096, 128)):  # the last micro-batch is filled up; a rank has 128 rows
        given = choose_layout(preset("qwen2.5-0.5b"), 8, 4096 * GIB, **STEP, micro_batch_rows=rows)
        assert given.micro_batch_rows == taken


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"does not fit on 8 GPUs of 80 GiB: the smallest layout needs 1\d\d GiB"):
        choose_layout(preset("qwen2.5-72b"), 8, 80 * GIB, **STEP)
    with pytest.raises(ValueError, match="no layout of 3 GPUs divides"):
        choose_layout(preset("qwen2.5-0.5b"), 3, 80 * GIB, **STEP)


def test_costs_have_an_order() -> None:
    """More work, slower links and waiting cost more."""

    def cost(tokens: int = 16_384, **given) -> float:
        return step_cost(Workload(config=preset("qwen2.5-7b"), tokens=tokens, micro_batches=8, **given), 4096)

    host = cost(layout=Layout(shard=8), remat="elementwise")
    assert 1 < host < cost(layout=Layout(shard=8), remat="mlp") < cost(layout=Layout(shard=8), remat="full")
    assert host < cost(layout=Layout(shard=4, tensor=2), remat="elementwise")
    assert host < cost(layout=Layout(pipeline=8), remat="elementwise")
    assert cost(1024, layout=Layout(shard=8)) < cost(1024, layout=Layout(shard=64))
    assert cost(1024, layout=Layout(replicate=8, shard=8)) < cost(1024, layout=Layout(shard=64))


def recipe(*further: str) -> PretrainConfig:
    given = ["out=x", "tokenizer=x", "train_shards=x", "seq_len=4096", "loop.steps=2", "loop.batch_rows=64"]
    return config.load(PretrainConfig, [*given, "model.preset=qwen2.5-7b", "parallel.auto=true", *further])


def test_auto_is_written_out() -> None:
    shape = preset("qwen2.5-7b")
    settled = settle(recipe(), shape, 8, 80 * GIB)
    assert (settled.parallel.shard, settled.parallel.auto) == (8, False)
    assert settled.loop.micro_batch_rows is not None
    assert settled.loop.remat != "auto"
    kept = settle(recipe("loop.micro_batch_rows=1", "loop.remat=mlp"), shape, 8, 80 * GIB)
    assert (kept.loop.micro_batch_rows, kept.loop.remat) == (1, "mlp")
    assert settle(recipe(), shape, 2, None).parallel.shard == -1
    with pytest.raises(ValueError, match="does not fit on 1 GPU"):
        settle(recipe(), shape, 1, 80 * GIB)
    # fp32 activations and uncompiled blocks keep more: what is chosen fits those.
    for further in (("loop.precision=fp32",), ("loop.compile=off",)):
        layout, dear = Layout(shard=8), settle(recipe(*further), shape, 8, 80 * GIB)
        assert plan_layout(8, **sizes_of(dear.parallel)) == layout
        assert memory_plan(workload_of(dear, shape, layout)).total <= usable_bytes(80 * GIB, 8)


def test_a_growing_batch_begins_with_small_micro_batches() -> None:
    grows = recipe("loop.batch_warmup={start_rows=8, tokens=1000000}")
    work = workload_of(grows, preset("qwen2.5-7b"), Layout(shard=8))
    assert (work.tokens, work.micro_batches) == (4096, 8)


def test_remat_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto: by the plan where the device's memory is known, the usual on a CPU; what is given stays."""
    shape, cpu = preset("qwen2.5-0.5b"), torch.device("cpu")
    given = recipe("model.preset=qwen2.5-0.5b", "loop.batch_rows=16")
    picked = [pick_free(given, shape, Layout(), cpu, compiled) for compiled in (True, False)]
    assert picked == [("elementwise", True), ("none", True)]
    assert pick_free(recipe("loop.remat=full"), shape, Layout(), cpu, True)[0] == "full"
    for size, kind in ((141, "none"), (60, "elementwise"), (40, "mlp"), (17, "full")):
        monkeypatch.setattr(layouts, "device_memory", lambda device, size=size: size * GIB)
        assert pick_free(given, shape, Layout(), cpu, True)[0] == kind


def test_weights_stay_gathered_where_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputation is chosen first; a recipe that says which it wants is heard."""
    shape, cpu, four = preset("qwen2.5-1.5b"), torch.device("cpu"), Layout(shard=4)
    keys = ("model.preset=qwen2.5-1.5b", "loop.batch_rows=32", "loop.micro_batch_rows=4")
    monkeypatch.setattr(layouts, "device_memory", lambda device: 141 * GIB)
    assert pick_free(recipe(*keys), shape, four, cpu, True) == ("none", False)
    assert pick_free(recipe(*keys, "parallel.reshard_after_forward=true"), shape, four, cpu, True)[1]
    work = dataclasses.replace(workload_of(recipe(*keys), shape, four), remat="elementwise")
    kept = dataclasses.replace(work, reshard_after_forward=False)
    between = (memory_plan(work).total + memory_plan(kept).total) // 2
    monkeypatch.setattr(layouts, "usable_bytes", lambda memory, world: between)
    assert pick_free(recipe(*keys, "loop.remat=elementwise"), shape, four, cpu, True) == ("elementwise", True)


def test_a_job_on_the_cpu_takes_auto(pretrain_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    from qwench.train.pretrain import pretrain

    loaded = config.load(PretrainConfig, pretrain_arguments(tmp_path / "run", "parallel.auto=true", "loop.steps=2"))
    assert pretrain(loaded).steps == 2
    further = ("loop.batch_rows=6", "loop.batch_warmup={start_rows=3, tokens=500}", "gpus=2")
    wrong = config.load(PretrainConfig, pretrain_arguments(tmp_path / "no", *further))
    with pytest.raises(ValueError, match="start_rows is 3, which does not divide over 2"):
        run_stage(print, wrong, lambda given: given.model.config)  # pyright: ignore[reportArgumentType]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "pretrain-qwen2.5-7b", "gpus=8", "--gpu-memory", "80"]) == 0
    out = capsys.readouterr().out
    for said in ("4,194,304", "shard 8", "optimizer", "elementwise", "usable", "44.89 GFLOP"):
        assert said in out
    fixed = ["parallel.auto=false", "loop.remat=none", "loop.micro_batch_rows=128"]
    assert cli.main(["plan", "pretrain-qwen2.5-7b", "gpus=8", "--gpu-memory", "80", *fixed]) == 1
    assert "does not fit" in capsys.readouterr().out
    fixed = ["parallel.auto=false", "loop.micro_batch_rows=8"]  # remat=auto takes what fits, as training does
    assert cli.main(["plan", "pretrain-qwen2.5-7b", "gpus=8", "--gpu-memory", "80", *fixed]) == 0
    assert "(remat attention)" in capsys.readouterr().out
    assert cli.main(["plan", "pretrain-qwen2.5-72b", "--gpu-memory", "80"]) == 2
    assert "take more GPUs" in capsys.readouterr().err
    assert cli.main(["plan", "pretrain-qwen2.5-7b", "gpus=0", "--gpu-memory", "80"]) == 2
    assert "gpus is 0; give 1 or more" in capsys.readouterr().err


def test_rows_of_the_tokenizer(capsys: pytest.CaptureFixture[str], tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A shape of one's own has the rows that training would give it."""
    tiny_tokenizer.save(tmp_path / "tokenizer")
    for given, rows in (([f"tokenizer={tmp_path / 'tokenizer'}"], tiny_tokenizer.padded_vocab_size), ([], 151_936)):
        assert cli.main(["plan", "pretrain-small", *given, "--gpu-memory", "80"]) == 0
        assert f"with {rows:,} rows" in capsys.readouterr().out
