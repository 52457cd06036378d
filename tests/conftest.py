"""What many tests share: a small tokenizer, shards of some of Python's library, a tiny model, and recipes for it.

Everything is made by qwench itself at its normal entrances. Sizes are chosen so that a training step takes some
milliseconds and 20 steps cross the end of an epoch in the middle of a batch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported; also by subprocesses of the tests

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401

from qwench.tokenizer import Tokenizer, train
from qwench.types import Document

if TYPE_CHECKING:
    from qwench.model.config import ModelConfig
    from qwench.model.decoder import CausalLM

LIBRARY = Path(os.__file__).parent
PRELOADED = ["qwench.train.pretrain", "qwench.train.sft", "qwench.engine.replicas", "torch._dynamo"]
PRELOADED += ["torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"]
SHAPE = (
    "{hidden_size = 32, intermediate_size = 48, num_hidden_layers = 2, num_attention_heads = 4, "
    "num_key_value_heads = 2, tie_word_embeddings = true}"
)
DIALOGUES = [
    ("What does len do?", "It counts: len('naïve') is 5."),
    ("Say something in Japanese.", "日本語で話します。🙂🙃"),
    ("Who are you?", "A tiny model.\n\nEND of answer"),
]


LONGEST = [
    "tests/train/test_many_ranks.py", "tests/test_interpreted_kernels.py", "tests/engine/test_speculate.py",
    "tests/invariants/test_engine_oracle.py", "tests/engine/test_engine.py", "tests/data/pipeline/test_command.py",
    "tests/train/test_compile.py", "tests/invariants/test_resume.py", "tests/invariants/test_crash.py",
    "tests/parallel/test_axes.py", "tests/serve/page/test_page_markdown.py", "tests/serve/page/test_page_controls.py",
    "tests/serve/test_errors.py", "tests/ops/test_linear_cpu.py", "tests/train/test_prepare.py",
]  # fmt: skip
"""The files that take longest: begun first, so that no process is left with one of them when the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; tests marked `gpu` are skipped on a machine without one."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    texts = [(LIBRARY / name).read_text(encoding="utf-8") for name in ("abc.py", "bisect.py", "this.py", "heapq.py")]
    return train(texts, 512)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_shards(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with shards in `train` (about 27 rows of 48 tokens) and `val`."""
    from qwench.data.encode import encode_documents

    text = (LIBRARY / "bisect.py").read_text(encoding="utf-8")
    blocks = [block for block in text.split("\n\n") if block.strip()]
    documents = [Document(id=str(number), text=block) for number, block in enumerate(blocks)]
    out = tmp_path_factory.mktemp("shards") / "all"
    encode_documents(documents, tiny_tokenizer, out, workers=1, val_fraction=0.1)
    return out


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: Tokenizer) -> ModelConfig:
    from qwench.model.config import ModelConfig

    return ModelConfig(
        vocab_size=tiny_tokenizer.padded_vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.eod_id, eos_token_id=tiny_tokenizer.eod_id,
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_model() -> Callable[..., CausalLM]:
    """A model with random weights large enough that every part of it matters to the logits."""
    import torch

    from qwench.model.decoder import CausalLM

    def make(config: ModelConfig, seed: int = 0, std: float = 0.2) -> CausalLM:
        model = CausalLM(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, std, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(
    make_model: Callable[..., CausalLM],
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint with its tokenizer, as a server or an evaluation is given one. Not to be written to."""
    from qwench.model.weights import save_pretrained

    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(make_model(tiny_config), directory, tokenizer=tiny_tokenizer)
    return directory


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., CausalLM], tiny_config: ModelConfig) -> CausalLM:
    return make_model(tiny_config)


@pytest.fixture(scope="session")
def pretrain_arguments(tiny_shards: Path, tiny_tokenizer_dir: Path) -> Callable[..., list[str]]:
    """Arguments of `qwench pretrain` for 20 steps into `out`; further ones win."""

    def arguments(out: Path, *further: str) -> list[str]:
        return [
            f"out={out}", f"tokenizer={tiny_tokenizer_dir}", f"train_shards={tiny_shards / 'train'}", "seq_len=48",
            f"model.config={SHAPE}", "loop.steps=20", "loop.batch_rows=4", "loop.precision=fp32", "loop.device=cpu",
            "optim.lr=3e-3", "schedule.warmup_steps=4", *further,
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short conversations as JSONL."""
    path = tmp_path_factory.mktemp("conversations") / "chat.jsonl"
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in DIALOGUES]
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in turns]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sft_arguments(conversations: Path, tiny_tokenizer_dir: Path) -> Callable[..., list[str]]:
    """Arguments of `qwench sft` from random weights for 20 steps into `out`; further ones win."""

    def arguments(out: Path, *further: str) -> list[str]:
        return [
            f"out={out}", f"tokenizer={tiny_tokenizer_dir}", f'train_data=["{conversations}"]', "seq_len=96",
            f"model.config={SHAPE}", "loop.steps=20", "loop.batch_rows=2", "loop.precision=fp32", "loop.device=cpu",
            "optim.lr=3e-3", "schedule.warmup_steps=4", *further,
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="session")
def dialogues() -> list[tuple[str, str]]:
    """Questions and the answers that `parrot` has learnt."""
    return DIALOGUES


@pytest.fixture(scope="session")
def parrot(sft_arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has learnt the three conversations by heart."""
    from qwench import config
    from qwench.train.config import SFTConfig
    from qwench.train.sft import sft

    out = tmp_path_factory.mktemp("parrot") / "run"
    further = ("loop.steps=150", "loop.batch_rows=1", "seq_len=512", "optim.lr=1e-2", "schedule.min_ratio=0.1")
    result = sft(config.load(SFTConfig, sft_arguments(out, *further)))
    assert result.train_loss < 0.05, "the parrot has not learnt its lines"
    return out


@pytest.fixture(scope="module")
def warm_processes() -> Iterator[pytest.MonkeyPatch]:
    """What asks for spawned processes gets forks of a server that has imported torch and qwench: 3 s less a process.

    They are as new as spawned ones: nothing of the test's process is in them, and what they run is pickled. Their
    standard streams are the server's, so they cannot be captured. `cold_processes` undoes it for a test.
    """
    start = multiprocessing.get_context
    server = start("forkserver")
    server.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            multiprocessing, "get_context", lambda method=None: server if method == "spawn" else start(method)
        )
        yield patch


@pytest.fixture
def cold_processes(warm_processes: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes are spawned, as they are outside the tests."""
    warm = multiprocessing.get_context
    warm_processes.undo()
    yield
    warm_processes.setattr(multiprocessing, "get_context", warm)


@pytest.fixture(autouse=True)
def _no_forced_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    """QWENCH_DEBUG in the developer's shell would turn expected one-line errors into tracebacks."""
    monkeypatch.delenv("QWENCH_DEBUG", raising=False)
