"""Compiled blocks give the uncompiled losses and gradients, are compiled once, and keep what the table says."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.ops import elementwise_train
from qwench.ops.attention import AttnMeta
from qwench.ops.attention_train import Stream
from qwench.ops.dispatch import forced
from qwench.ops.rope import Rope, inverse_frequencies
from qwench.train.batch import Batch
from qwench.train.compile import Remat, compile_blocks, kept_bytes_per_token, rematerialise, repeated_flops_per_token
from qwench.train.copies import ComputeCopies
from qwench.train.loss import next_token_loss

REMATS: tuple[Remat, ...] = get_args(Remat)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, qkv_bias=True,
    )  # fmt: skip


def batch(seq_lens: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(seq_lens)
    tokens = torch.randint(128, (total,), generator=generator)
    return Batch(
        tokens_T=tokens,
        targets_T=tokens.roll(-1),
        positions_T=torch.cat([torch.arange(n) for n in seq_lens]),
        loss_weights_T=torch.rand(total, generator=generator),
        meta=AttnMeta.packed(seq_lens),
    )


BATCHES = [[20, 12, 32], [64], [1] * 10 + [54], [32, 32]]
"""The same number of tokens in other sequences."""


def gradients(model: CausalLM, rows: list[int], meta: AttnMeta | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    given = batch(rows)
    loss = next_token_loss(model, given if meta is None else replace(given, meta=meta))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return {"loss": loss.detach(), **found}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = float((got[name] - value).norm() / value.norm().clamp_min(1e-12))
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("remat", REMATS)
def test_compiled_once_for_all_layers_and_batches(
    remat: Remat, config: ModelConfig, make_model: Callable[..., CausalLM]
) -> None:
    """fp32: equal to the uncompiled losses and gradients, one graph, no break, for any lengths of sequences."""
    plain, model = make_model(config).train(), make_model(config).train()
    backend = CompileCounterWithBackend("inductor")
    compile_blocks(model, remat, backend=backend)
    for rows in BATCHES:
        assert_same(gradients(model, rows), gradients(plain, rows), 2e-5)
    assert backend.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@dataclass(frozen=True)
class Chosen:
    """Keys by their number, as context parallelism gathers them from other ranks."""

    rows: Tensor

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.index_select(0, self.rows), v.index_select(0, self.rows)


def test_gathered_keys(config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    """Queries that are the last of more keys, whose number changes: still one graph."""
    plain, model = make_model(config).train(), make_model(config).train()
    backend = CompileCounterWithBackend("inductor")
    compile_blocks(model, "elementwise", backend=backend)
    for query_lens, key_lens in (([20, 44], [30, 50]), ([10, 14, 40], [10, 16, 55]), ([64], [64])):
        rows = torch.randint(64, (sum(key_lens),), generator=torch.Generator().manual_seed(len(key_lens)))
        found = []
        for one in (model, plain):
            meta = AttnMeta.packed(query_lens, key_lens=key_lens, gather=Chosen(rows))
            found.append(gradients(one, query_lens, meta))
        assert_same(found[0], found[1], 2e-5)
    assert backend.frame_count == 1


def test_mixed_precision(config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    """bf16 activations over fp32 master weights: gradients arrive in fp32, as near to fp32's as uncompiled ones."""
    exact = gradients(make_model(config).train(), BATCHES[0])
    errors = []
    for compiled in (False, True):
        model = make_model(config).train()
        model.set_compute_dtype(torch.bfloat16)
        if compiled:
            compile_blocks(model)
        got = gradients(model, BATCHES[0])
        assert all(value.dtype == torch.float32 for value in got.values())
        errors.append(max(float((got[name] - x).norm() / x.norm()) for name, x in exact.items()))
    assert errors[1] < max(0.05, 1.2 * errors[0])


def test_validation_and_generation(config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    """Without a gradient there is one more graph, with a cache none."""
    plain, model = make_model(config), make_model(config)
    backend = CompileCounterWithBackend("inductor")
    compile_blocks(model, "full", backend=backend)
    rows = batch(BATCHES[0])
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(model, rows), next_token_loss(plain, rows))
        assert backend.frame_count == 1
        meta = AttnMeta(
            cu_q=torch.tensor([0, 5], dtype=torch.int32), max_q=5, lens_k=torch.tensor([5], dtype=torch.int32), max_k=5,
            block_table=torch.zeros(1, 1, dtype=torch.int32), slots=torch.arange(5),
        )  # fmt: skip
        outs = []
        for one in (model, plain):
            caches = [(torch.zeros(1, 16, 2, config.d_head), torch.zeros(1, 16, 2, config.d_head)) for _ in range(3)]
            outs.append(one(rows.tokens_T[:5], torch.arange(5), meta, caches))
        torch.testing.assert_close(outs[0], outs[1])
    assert backend.frame_count == 1


def test_names_of_parameters_stay(config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    model = make_model(config)
    before = list(model.state_dict())
    compile_blocks(model, "mlp")
    assert list(model.state_dict()) == before


def test_forced_implementations_are_refused(config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    model = make_model(config)
    with forced({"swiglu": "fused"}), pytest.raises(ValueError, match=r"ops\.swiglu=fused"):
        compile_blocks(model)
    with forced({"attention": "reference"}), pytest.raises(ValueError, match=r"ops\.attention=reference"):
        compile_blocks(model)
    with forced({"swiglu": "reference"}), pytest.raises(ValueError, match=r"ops\.swiglu=reference"):
        compile_blocks(model)
    with forced({"rms_norm": "reference", "cross_entropy": "reference"}):
        compile_blocks(model)
    with pytest.raises(ValueError, match="none, elementwise, mlp, attention, full"):
        rematerialise(model, "some")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("remat", REMATS)
def test_rematerialised_without_compilation(
    remat: Remat, config: ModelConfig, make_model: Callable[..., CausalLM]
) -> None:
    plain, model = make_model(config).train(), make_model(config).train()
    rematerialise(model, remat)
    assert_same(gradients(model, BATCHES[0]), gradients(plain, BATCHES[0]), 1e-6)


@pytest.mark.parametrize("remat", ["elementwise", "full"])
def test_computed_again_as_forced(remat: Remat, config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    """With the implementations of the forward pass, although autograd's thread, as on a GPU, is another one."""
    choices = dict.fromkeys(("attention", "rms_norm", "swiglu"), "reference")
    plain, model = make_model(config).train(), make_model(config).train()
    rematerialise(model, remat)
    with forced(choices):
        want = gradients(plain, BATCHES[0])
        loss = next_token_loss(model, batch(BATCHES[0]))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same({"loss": loss.detach(), **got}, want, 1e-6)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("remat", REMATS)
def test_kept_bytes(
    remat: Remat, on_gpu: bool, make_model: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the compiler's forward graph of a block hands to its backward graph is what the table says, also with the
    operations that are opaque on a GPU."""
    config = ModelConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, qkv_bias=True,
    )  # fmt: skip
    if on_gpu:  # the graph is made, not run
        monkeypatch.setattr(elementwise_train, "_suits", lambda *tensors: True)
    model = make_model(config).train()
    kept: list[int] = []
    compile_blocks(model, remat, backend=_recording(kept))
    num_tokens = 256
    meta_batch = batch([100, 156])
    rope = Rope.at(meta_batch.positions_T, inverse_frequencies(1e4, 16), torch.bfloat16)
    x = torch.randn(num_tokens, 64).bfloat16().requires_grad_()
    with pytest.raises(_Noted):
        model.model.layers[0](x, rope, Stream.of(meta_batch.meta), None)
    assert len(kept) == 1
    per_token = kept[0] / num_tokens
    # The compiler adds some numbers a row (a norm's scale).
    assert kept_bytes_per_token(config, remat) <= per_token <= kept_bytes_per_token(config, remat) + 16


class _Noted(Exception):
    """In place of a run of the graph."""


def _recording(kept: list[int]) -> Callable[..., Any]:
    """A backend that partitions as inductor does, and notes the bytes that grow with the tokens between the graphs.

    Of a view all bytes of the tensor under it count: that is what stays in memory.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def forward(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        outputs = graph.graph.find_nodes(op="output")[0].args[0]
        saved = [node for node in outputs[1:] if isinstance(node, torch.fx.Node)]
        values = {node: node.meta["val"] for node in saved if isinstance(node.meta["val"], Tensor)}
        # Parameters, positions and bounds are there anyway; of the inputs, the activations alone are kept for this.
        storages = {
            _base(node): _base(node).meta["val"]
            for node, value in values.items()
            if math.prod(value.shape[:1]) == 256 or value.shape[-1:] == (256,)
            if node.op != "placeholder" or value.shape == (256, 64)
        }
        kept.append(sum(value.numel() * value.element_size() for value in storages.values()))

        def run(*inputs: Any) -> Any:
            raise _Noted

        return make_boxed_func(run)

    return aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, example: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )


_VIEWS = {
    getattr(torch.ops.aten, name)
    for name in ("view", "reshape", "slice", "split", "split_with_sizes", "t", "transpose", "permute", "unsqueeze")
}


def _base(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose result `node` is a view of, or itself."""
    while node.op == "call_function" and (
        getattr(node.target, "overloadpacket", None) in _VIEWS
        or (node.target is operator.getitem and _base(node.all_input_nodes[0]) is not node.all_input_nodes[0])
    ):
        node = node.all_input_nodes[0]
    return node


def test_formulas() -> None:
    """The published 0.5B shape: what each choice keeps and does again."""
    config = ModelConfig(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2,
    )  # fmt: skip
    kept = [kept_bytes_per_token(config, remat) for remat in REMATS]
    assert kept == [
        24 * (2 * 20_224 + 56),
        24 * (2 * 13_568 + 56),
        24 * (2 * 3_840 + 56),
        24 * (2 * 1_792 + 56),
        24 * 1_792,
    ]
    again = [repeated_flops_per_token(config, remat, 4096) for remat in REMATS]
    assert again == sorted(again)
    assert again[:2] == [0, 0]
    assert again[2] == 24 * 2 * 896 * 2 * 4864


@pytest.mark.parametrize("compiled", [False, True])
def test_copies_of_weights(compiled: bool, config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    """Two steps of two micro-batches each: casts once a step give the gradients and weights of casts in every one."""
    results = []
    for copied in (False, True):
        model = make_model(config).train()
        model.set_compute_dtype(torch.bfloat16)
        names = list(model.state_dict())
        copies = ComputeCopies(model, torch.bfloat16) if copied else None
        if compiled:
            compile_blocks(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            for rows in BATCHES[:2]:
                next_token_loss(model, batch(rows)).backward()
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
            optimizer.step()
            if copies is not None:
                copies.refresh()
        assert list(model.state_dict()) == names
        parameters = dict(model.named_parameters())
        results.append({name: p.detach().clone() for name, p in parameters.items()})
        results[-1] |= {f"gradient of {name}": p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    assert_same(results[1], results[0], 1e-6)
