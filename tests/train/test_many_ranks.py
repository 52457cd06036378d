"""Training with several processes (gloo): the same run as one process's, whatever the layout.

One process's run and one of each layout are made once and compared; resumed runs start from copies of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from qwench import cli, config
from qwench.parallel.launch import connected, run_job
from qwench.parallel.layout import Layout
from qwench.run import read_metrics
from qwench.train import checkpoint, job, prepare, work
from qwench.train.compile import compile_blocks
from qwench.train.config import PretrainConfig
from qwench.train.pretrain import pretrain

pytestmark = [pytest.mark.multi, pytest.mark.usefixtures("warm_processes")]

STEPS = 12
HALF = STEPS // 2
LAYOUTS = {
    "one": [],
    "shard 2": ["gpus=2"],
    "replicate 2": ["gpus=2", "parallel.replicate=2"],
    "context 2": ["gpus=2", "parallel.context=2"],
    "tensor 2": ["gpus=2", "parallel.tensor=2"],
    "shard 2 x tensor 2": ["gpus=4", "parallel.tensor=2"],
    "shard 2 x context 2": ["gpus=4", "parallel.context=2"],
    "replicate 2 x shard 2": ["gpus=4", "parallel.replicate=2", "parallel.shard=2"],
    "replicate 2 x tensor 2": ["gpus=4", "parallel.replicate=2", "parallel.tensor=2"],
    "replicate 2 x context 2": ["gpus=4", "parallel.replicate=2", "parallel.context=2"],
    "pipeline 2": ["gpus=2", "parallel.pipeline=2"],
}
FILES = ("model/model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="session")
def options(pretrain_arguments: Callable[..., list[str]], tiny_shards: Path) -> Callable[..., list[str]]:
    """Arguments of 12 steps, each of two micro-batches on two ranks, and a validation that does not divide."""

    def arguments(out: Path, *further: str) -> list[str]:
        return pretrain_arguments(
            out, f"val_shards={tiny_shards / 'val'}", "loop.eval_every=6", "loop.eval_rows=3", f"loop.steps={STEPS}",
            "loop.batch_rows=8", "loop.micro_batch_rows=2", f"checkpoint.every_steps={HALF}", "checkpoint.keep_last=9",
            *further,
        )  # fmt: skip

    return arguments


@pytest.fixture(scope="session")
def runs(options: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of a layout, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = root / name.replace(" ", "_")
            assert cli.main(["pretrain", *options(made[name], *LAYOUTS[name])]) == 0
        return made[name]

    return run


def saved(run: Path, step: int = STEPS) -> Path:
    return run / "checkpoints" / f"step_{step:09d}"


def halved(run: Path, to: Path) -> Path:
    """A copy of a finished run as it was in the middle."""
    shutil.copytree(run, to)
    shutil.rmtree(saved(to))
    shutil.rmtree(to / "model")
    return to


def values_of(run: Path) -> list[list[float]]:
    names = ("step", "loss", "grad_norm", "lr", "tokens", "val_loss")
    return [[record.get(name, 0.0) for name in names] for record in read_metrics(run)]


def assert_same_run(run: Path, other: Path) -> None:
    """Equal to rounding: every loss, gradient norm and validation, the weights, and the means of the gradients."""
    np.testing.assert_allclose(values_of(run), values_of(other), rtol=2e-5, atol=1e-7)
    for name in ("model/model.safetensors", "optimizer.safetensors"):
        left, right = load_file(saved(run) / name), load_file(saved(other) / name)
        assert left.keys() == right.keys()
        # A bias of the keys shifts all scores of a query alike: its gradient is rounding, which AdamW makes a step of.
        for key in (key for key in left if not key.endswith("k_proj.bias")):
            scale = float(right[key].abs().max())
            torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-4 * scale, msg=f"{name} {key}")
    states = [json.loads((saved(path) / "state.json").read_text()) for path in (run, other)]
    assert states[0]["loader"] == states[1]["loader"]
    assert states[0]["tokens"] == states[1]["tokens"]


def assert_same_bits(run: Path, other: Path) -> None:
    for name in FILES:
        assert (saved(run) / name).read_bytes() == (saved(other) / name).read_bytes(), name
    assert (run / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    assert values_of(run) == values_of(other)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_every_layout_is_the_same_run(name: str, runs) -> None:
    assert_same_run(runs(name), runs("one"))
    layout = json.loads((runs(name) / "provenance.json").read_text())["layout"]
    assert {axis: size for axis, size in layout.items() if size > 1} == {
        axis: int(size) for axis, size in (part.split() for part in name.split(" x "))
    }


@pytest.mark.usefixtures("cold_processes")
def test_resumed_bit_for_bit(runs, options, tmp_path: Path) -> None:
    run = halved(runs("shard 2"), tmp_path / "run")
    assert cli.main(["pretrain", *options(run, *LAYOUTS["shard 2"])]) == 0
    assert_same_bits(run, runs("shard 2"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("shard 2", "one"),
        ("shard 2 x tensor 2", "one"),
        ("tensor 2", "pipeline 2"),
        ("pipeline 2", "shard 2"),
        ("one", "replicate 2 x shard 2"),
    ],
)
def test_resumed_with_another_layout(before: str, after: str, runs, options, tmp_path: Path) -> None:
    """No resume=force: how many GPUs there are is not what the recipe computes."""
    run = halved(runs(before), tmp_path / "run")
    assert cli.main(["pretrain", *options(run, *LAYOUTS[after])]) == 0
    assert_same_run(run, runs("one"))


def compiles_blocks(recipe: PretrainConfig) -> float:
    """Traced and partitioned as for a GPU, and run without a compiler."""
    prepare.compile_blocks = functools.partial(compile_blocks, backend="aot_eager")
    return pretrain(recipe).train_loss


def test_compiled_blocks_under_fsdp(runs, options, tmp_path: Path) -> None:
    """FSDP gathers what a compiled block reads. Blocks cut by tensor parallelism: tests/parallel/test_axes.py."""
    run = tmp_path / "run"
    recipe = recipe_of(options(run, "loop.compile=on", *LAYOUTS["shard 2"]))
    run_job(compiles_blocks, (recipe,), gpus=2, on_gpu=False, logs=run / "logs")
    facts = json.loads((run / "provenance.json").read_text())
    assert facts["compiled"] is True
    assert facts["remat"] == "elementwise"
    assert_same_run(run, runs("one"))


def test_gradients_scattered_after_every_micro_batch(runs, options, tmp_path: Path) -> None:
    """The other way of accumulating, and weights that stay gathered, from uneven micro-batches."""
    further = ("parallel.accumulate=shards", "parallel.reshard_after_forward=false", "loop.micro_batch_rows=3")
    run = halved(runs("one"), tmp_path / "run")
    assert cli.main(["pretrain", *options(run, *LAYOUTS["shard 2"], *further, "resume=force")]) == 0
    assert_same_run(run, runs("one"))


def test_a_pipeline_that_mostly_waits(options, tmp_path: Path, capsys) -> None:
    for rows, warned in ((2, False), (8, True)):
        recipe = recipe_of(options(tmp_path, *LAYOUTS["pipeline 2"], f"loop.micro_batch_rows={rows}"))
        shape = recipe.model.config
        assert shape is not None
        job.check_pipeline(recipe, Layout(pipeline=2), lambda _, shape=shape: shape)
        said = " ".join(capsys.readouterr().err.split())
        assert ("1 micro-batch a step for a pipeline of 2 ranks: a rank waits 100% as long as" in said) == warned


def test_muon_orthogonalises_whole_matrices(options, tmp_path: Path) -> None:
    """Its iteration runs in bf16, so the runs agree to less; pieces of matrices for themselves differ by percents."""
    for name in ("one", "shard 2"):
        further = ("optim.kind=muon", f"loop.steps={HALF}", *LAYOUTS[name])
        assert cli.main(["pretrain", *options(tmp_path / name.replace(" ", "_"), *further)]) == 0
    values = [values_of(tmp_path / name) for name in ("shard_2", "one")]
    np.testing.assert_allclose(values[0], values[1], rtol=5e-4)


def test_sft_from_a_checkpoint(runs, sft_arguments, conversations: Path, tmp_path: Path) -> None:
    """Rows of uneven lengths and weights; fewer validation rows than fit; weights read from a model directory."""
    for out, further in (("one", []), ("two", ["gpus=2"]), ("context", ["gpus=2", "parallel.context=2"])):
        arguments = sft_arguments(tmp_path / out, "loop.steps=6", f'val_data=["{conversations}"]', *further)
        arguments = [word for word in arguments if not word.startswith("model.config=")]
        assert cli.main(["sft", *arguments, f"model.path={runs('one') / 'model'}"]) == 0
    for other in ("two", "context"):
        np.testing.assert_allclose(values_of(tmp_path / "one"), values_of(tmp_path / other), rtol=2e-5)


def test_torchrun(runs, options, tmp_path: Path) -> None:
    """The same command without gpus=N under torchrun: the same bits."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "qwench.cli", "pretrain"]
    done = subprocess.run([*command, *options(tmp_path / "run")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "run", runs("shard 2"))
    assert done.stdout.count("model: ") == 1, "rank 0 alone reports"


def test_background_saving(runs, options, tmp_path: Path) -> None:
    further = ("checkpoint.background=on", "checkpoint.every_steps=1", "checkpoint.keep_last=1")
    assert cli.main(["pretrain", *options(tmp_path / "run", *LAYOUTS["shard 2"], *further)]) == 0
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (
        runs("shard 2") / "model/model.safetensors"
    ).read_bytes()
    assert (saved(tmp_path / "run") / FILES[1]).read_bytes() == (saved(runs("shard 2")) / FILES[1]).read_bytes()
    best = json.loads((saved(tmp_path / "run") / "state.json").read_text())["best_step"]
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == sorted({f"step_{step:09d}" for step in (best, STEPS)})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_weights_of_a_checkpoint(runs) -> None:
    """torch.distributed.checkpoint opens what several ranks wrote."""
    stored = load_file(saved(runs("shard 2")) / "model/model.safetensors")
    state = {name: torch.zeros_like(value) for name, value in stored.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(saved(runs("shard 2")) / "model")), no_dist=True)
    assert all(torch.equal(state[name], value) for name, value in stored.items())


# ------------------------------------------------------------------------------------------------------------- signals
@pytest.mark.usefixtures("cold_processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_ranks_after_one_save(number: int, options, tmp_path: Path, capfd) -> None:
    """Sent to the starting process alone; the run goes on later where it stopped."""
    run, further = tmp_path / "run", ("loop.steps=2000", "checkpoint.every_steps=5000", "loop.eval_every=0")
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120

    def interrupt() -> None:
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert cli.main(["pretrain", *options(run, *LAYOUTS["shard 2"], *further)]) == 130
    thread.join()
    [checkpoint] = (run / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert 3 <= step < 2000
    assert [record["step"] for record in read_metrics(run)] == list(range(1, step + 1))
    said = capfd.readouterr().err
    assert said.count("stopping after this step") == 1, said
    assert "Traceback" not in said


def test_ranks_end_with_the_process_that_started_them(options, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = options(run, *LAYOUTS["shard 2"], "loop.steps=100000", "checkpoint.every_steps=100000")
    command = [sys.executable, "-m", "qwench.cli", "pretrain", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    process.kill()
    process.wait()
    while any(is_running(pid) for pid in ranks):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.01)


def is_running(pid: str) -> bool:
    """Neither gone nor a zombie that waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ------------------------------------------------------------------------------------------------------------ failures
def recipe_of(arguments: list[str]) -> PretrainConfig:
    return config.load(PretrainConfig, arguments)


def dies_in_second_save(recipe: PretrainConfig) -> None:
    """Rank 1 is shot after it has written half of its share of the second checkpoint."""
    write, calls = checkpoint.TensorFiles.write, []

    def write_some(self, blocks):
        blocks = list(blocks)
        calls.append(len(blocks))
        if os.environ["RANK"] == "1" and len(calls) == 2:
            write(self, blocks[: len(blocks) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, blocks)

    checkpoint.TensorFiles.write = write_some
    pretrain(recipe)


@pytest.mark.parametrize("background", ["on", "off"])
def test_a_rank_shot_while_saving(background: str, runs, options, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = options(run, *LAYOUTS["shard 2"], f"checkpoint.background={background}")
    with pytest.raises(ChildProcessError, match=r"rank 1 of 2 was ended by SIGKILL .* run the same command again"):
        run_job(dies_in_second_save, (recipe_of(arguments),), gpus=2, on_gpu=False, logs=run / "logs")
    [whole] = (run / "checkpoints").glob("step_*")
    assert whole.name == f"step_{HALF:09d}"
    assert (whole / "COMPLETE").exists()
    if background == "off":
        assert cli.main(["pretrain", *arguments]) == 0
        for name in FILES[:2]:
            assert (saved(run) / name).read_bytes() == (saved(runs("shard 2")) / name).read_bytes()
        assert not list((run / "checkpoints").glob(".step_*"))


def poisons_a_step(recipe: PretrainConfig) -> tuple[int, list[float]]:
    """Rank 1's share of step 3 has a loss that is no number."""
    make_batch, calls = work.make_batch, []

    def poisoned(*arguments, **options):
        batch = make_batch(*arguments, **options)
        calls.append(0)
        if os.environ["RANK"] == "1" and len(calls) in (5, 6):
            batch = dataclasses.replace(batch, loss_weights_T=batch.loss_weights_T * float("nan"))
        return batch

    work.make_batch = poisoned
    result = pretrain(recipe)
    return result.skipped_steps, [result.train_loss]


def test_all_ranks_skip_a_bad_step(runs, options, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = recipe_of(options(run, *LAYOUTS["shard 2"], "loop.eval_every=0"))
    skipped, [loss] = run_job(poisons_a_step, (recipe,), gpus=2, on_gpu=False, logs=run / "logs")
    assert skipped == 1
    assert np.isfinite(loss)
    records = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in records if "skipped" in record] == [3]
    assert records[2]["skipped"] == "loss is nan"
    assert [r["loss"] for r in records[:2]] == [r["loss"] for r in read_metrics(runs("shard 2"))[:2]]
    kept = np.load(run / "bad_batches/step_000000003.npz")
    assert {name for name in kept if name.startswith("tokens_")} == {f"tokens_{row}" for row in range(8)}
    assert all(bool(torch.isfinite(value).all()) for value in load_file(run / "model/model.safetensors").values())


def fails(rank: int, kind: str) -> str:
    """`rank` fails while the others wait for it."""
    with connected(torch.device("cpu")) as place:
        if place.rank == rank:
            if kind == "bug":
                raise ZeroDivisionError("the reason")
            if kind == "user":
                raise ValueError("no such file; give another")
            if kind == "exit":
                os._exit(7)
        dist.barrier()
    return "done"


@pytest.mark.parametrize(
    ("rank", "kind", "error", "message"),
    [
        (
            1,
            "bug",
            ChildProcessError,
            r"(?s)rank 1 of 2 failed with ZeroDivisionError.*Traceback.*in fails.*the reason",
        ),
        (1, "user", ValueError, r"^no such file; give another$"),
        (0, "exit", ChildProcessError, r"rank 0 of 2 ended with exit code 7"),
    ],
)
def test_a_failing_rank_ends_the_job(rank: int, kind: str, error, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        run_job(fails, (rank, kind), gpus=2, on_gpu=False, logs=tmp_path / "logs")
    if kind == "bug":
        assert "the reason" in (tmp_path / "logs/rank_1.log").read_text()


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["gpus=3"], "loop.batch_rows is 8, which does not divide over 3 data-parallel ranks"),
        (["gpus=2", "parallel.replicate=3"], "do not divide into such groups"),
        (["parallel.shard=2"], "start gpus=2"),
        (["gpus=2", "parallel.tensor=2", "parallel.shard=3"], "needs 6 processes, but there are 2"),
        (["gpus=4", "parallel.tensor=4"], "parallel.tensor is 4: a model with num_attention_heads 4"),
        (["gpus=3", "parallel.pipeline=3"], "parallel.pipeline is 3, but the model has only 2 layers"),
        (["gpus=2", "parallel.pipeline=2", "parallel.virtual_stages=2"], "a pipeline of 4 stages"),
        (
            ["gpus=2", "parallel.pipeline=2", "parallel.virtual_stages=2", "loop.batch_rows=6"],
            "a step has 3 on each pipeline",
        ),
        (["parallel.virtual_stages=2"], "parallel.virtual_stages is 2, but parallel.pipeline is 1"),
        (["gpus=2", "parallel.tensor=2", "optim.kind=muon"], "optim.kind=muon needs whole matrices"),
        (["gpus=0"], "gpus is 0"),
    ],
)
def test_bad_layouts_start_nothing(further: list[str], message: str, options, tmp_path: Path, capsys) -> None:
    assert cli.main(["pretrain", *options(tmp_path / "run", *further)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
