"""The kernels around linear layers compile for Hopper, on any machine, and keep the rules of dependent launch.

The interpreter accepts programs that the compiler refuses (types that differ between branches, say). No GPU is needed:
Triton brings its own assembler. What is checked in the PTX: one wait, no store before it, and wide loads of weights
before it.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

from qwench.ops.triton_launch import interpreted

if interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

LINEAR_TYPES = {
    "x_ptr": "*bf16", "w_ptr": "*bf16", "bias_ptr": "*bf16", "norm_ptr": "*bf16", "res_ptr": "*bf16",
    "out_ptr": "*bf16", "part_ptr": "*fp32", "counter_ptr": "*i32", "N": "i32", "T": "i32", "stride_wn": "i32",
    "stride_xt": "i32", "stride_rt": "i32",
    "eps": "fp32",
}  # fmt: skip
ROPE_TYPES = {
    "q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "positions_ptr": "*i64", "slots_ptr": "*i64",
    "inv_freq_ptr": "*fp32", "stride_qt": "i32", "stride_qh": "i32", "stride_kt": "i32", "stride_kh": "i32",
    "stride_vt": "i32", "stride_vh": "i32", "stride_keys": "i32", "stride_keys_head": "i32", "stride_values": "i32",
    "stride_values_head": "i32",
}  # fmt: skip


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int, num_stages: int = 3) -> str:
    """PTX for compute capability 9.0, every pointer and integer being divisible by 16 as in the real models."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] in "*i" and name != "T"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},  # pyright: ignore[reportArgumentType]
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},  # pyright: ignore[reportArgumentType]
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": True}
    built = triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["cubin"]
    return built.asm["ptx"]


def split_at_wait(ptx: str) -> tuple[str, str]:
    assert len(re.findall(r"griddepcontrol\.wait", ptx)) == 1
    assert len(re.findall(r"griddepcontrol\.launch_dependents", ptx)) == 1
    before, after = ptx.split("griddepcontrol.wait")
    assert "st.global" not in before
    assert "st.global" in after
    return before, after


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(
    ("size", "block_n", "block_k", "num_warps", "steps"),
    [(896, 4, 1024, 4, 1), (3584, 1, 4096, 4, 1), (896, 8, 1024, 4, 9), (4864, 2, 2048, 4, 0)],
)
def test_gemv(size: int, block_n: int, block_k: int, num_warps: int, steps: int, swiglu: bool) -> None:
    from qwench.ops import linear_triton

    kernel = linear_triton._gemv_rows_kernel if steps else linear_triton._gemv_long_kernel
    constants: dict[str, Any] = {
        "K": size, "BLOCK_N": block_n, "BLOCK_K": block_k, "HAS_NORM": not (swiglu and steps == 0), "HAS_BIAS": True,
        "SWIGLU": swiglu, "HAS_RES": True, "USE_PDL": True,
    }  # fmt: skip
    before, _ = split_at_wait(
        compiled(kernel, LINEAR_TYPES, constants | ({"STEPS": steps} if steps else {}), num_warps)
    )
    loads = block_n * block_k // (num_warps * 32 * 8) * (2 if swiglu else 1)
    assert len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", before)) >= min(loads, block_n), "weights are not under way"


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("tile", [(16, 16, 128, 2, 4), (16, 32, 256, 2, 4), (64, 64, 64, 4, 4)])
def test_matmul(tile: tuple[int, int, int, int, int], swiglu: bool) -> None:
    from qwench.ops import linear_triton

    block_m, block_n, block_k, num_warps, num_stages = tile
    constants = {
        "K": 896, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "NUM_STAGES": num_stages,
        "SPLIT_K": 1 if swiglu else 4, "HAS_BIAS": True, "SWIGLU": swiglu, "HAS_RES": True, "PRECISION": "ieee",
        "PREFETCH_LINES": 16 if block_m == 16 else 0, "USE_PDL": True,
    }  # fmt: skip
    before, after = split_at_wait(
        compiled(linear_triton._matmul_kernel, LINEAR_TYPES, constants, num_warps, num_stages)
    )
    assert ("prefetch.global.L2" in before) == (block_m == 16)
    assert "mma" in after
    assert "cp.async" in after


@pytest.mark.parametrize("cache", ["*bf16", "*fp16", "*fp32", "*fp8e4nv"])
@pytest.mark.parametrize(("heads", "kv_heads", "half"), [(14, 2, 32), (28, 4, 64)])
def test_rope_and_store(cache: str, heads: int, kv_heads: int, half: int) -> None:
    from qwench.ops import elementwise_triton

    types = ROPE_TYPES | {"keys_ptr": cache, "values_ptr": cache}
    constants = {
        "H": heads, "K": kv_heads, "R": half, "HEADS": 8, "BLOCK_K": kv_heads, "BLOCK_R": half, "HAS_CACHE": True,
        "USE_PDL": True,
    }  # fmt: skip
    before, _ = split_at_wait(compiled(elementwise_triton._rope_and_store_kernel, types, constants, 1))
    assert len(re.findall(r"ld\.global", before)) == 1, "only the frequencies are constant"


@pytest.mark.parametrize("size", [896, 1536, 3584])
def test_row_kernels(size: int) -> None:
    from qwench.ops import elementwise_triton

    types = {"x_ptr": "*bf16", "weight_ptr": "*fp32", "out_ptr": "*bf16", "stride_xt": "i32", "eps": "fp32"}
    block = 1 << (size - 1).bit_length()
    split_at_wait(
        compiled(elementwise_triton._rms_norm_kernel, types, {"D": size, "BLOCK_D": block, "USE_PDL": True}, 4)
    )
    types = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "stride_t": "i32", "F": "i32"}
    before, _ = split_at_wait(compiled(elementwise_triton._swiglu_kernel, types, {"BLOCK_F": 1024, "USE_PDL": True}, 4))
    assert "ld.global" not in before


@pytest.mark.parametrize("whole_blocks", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(14, 2, 64), (12, 2, 128)])
def test_decode_attention(heads: int, kv_heads: int, size: int, whole_blocks: bool) -> None:
    """Whole blocks come by TMA, straight into shared memory."""
    from qwench.ops import attention_triton

    block = 32
    constants: dict[str, Any] = {
        "H": heads, "G": heads // kv_heads, "D": size, "P": block, "M": 16, "N": block, "SPLITS": 4, "WINDOWED": False,
        "WHOLE_BLOCKS": whole_blocks, "STAGES": 3, "USE_PDL": True,
    }  # fmt: skip
    types = {name: "i32" for name in attention_triton._decode_kernel.arg_names}
    types |= dict.fromkeys(("q", "k", "v", "keys", "values", "out"), "*bf16")
    types |= dict.fromkeys(("k_blocks", "v_blocks"), f"tensordesc<bf16[{block}, {size}]>" if whole_blocks else "*bf16")
    types |= dict.fromkeys(("inv_freq_ptr", "part_out", "part_lse"), "*fp32")
    types |= dict.fromkeys(("position_ptr", "slots"), "*i64") | dict.fromkeys(("table", "lens", "counters"), "*i32")
    types["scale"] = "fp32"
    ptx = compiled(attention_triton._decode_kernel, types, constants, num_warps=1)
    assert ("cp.async.bulk.tensor" in ptx) == whole_blocks
    assert ("cp.async.cg" in ptx) != whole_blocks


@pytest.mark.parametrize("vocabulary", [151_936, 152_064])
def test_cross_entropy(vocabulary: int) -> None:
    """Wide loads and stores, kept or dropped in the L2 cache as meant."""
    from qwench.ops import cross_entropy_triton

    types = {
        "logits_ptr": "*bf16", "targets_ptr": "*i64", "weights_ptr": "*fp32", "losses_ptr": "*fp32",
        "logsumexp_ptr": "*fp32", "stride_row": "i32", "num_rows": "i32", "z_loss": "fp32",
    }  # fmt: skip
    block, num_warps = cross_entropy_triton.launch_shape(vocabulary)
    assert (block, num_warps) == (16384, 32)
    constants = {"V": vocabulary, "BLOCK": block, "WITH_GRADIENT": True}
    ptx = compiled(cross_entropy_triton._cross_entropy_kernel, types, constants, num_warps)
    assert len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)) >= 4  # two of 8 logits a thread in each sweep
    assert len(re.findall(r"st\.global[.\w:]*\.v4\.b32", ptx)) >= 2
    assert "evict_last" in ptx
    assert "evict_first" in ptx


@pytest.mark.parametrize("aligned", [True, False])
def test_adamw(aligned: bool) -> None:
    """Addresses from a table give wide loads and stores where they are known to be aligned."""
    import triton.language as tl

    from qwench.train import adamw_triton

    types = {
        "tensors_ptr": "*i64", "numbers_ptr": "*fp32", "chunks_ptr": "*i64", "skip_ptr": "*fp32", "factor_ptr": "*fp32",
        "beta1": "fp32", "beta2": "fp32", "eps": "fp32",
    }  # fmt: skip
    for kernel, constants in (
        (adamw_triton._adamw_kernel, {"STATE": tl.bfloat16, "ALIGNED": aligned, "STEPS": 8, "BLOCK": 1024}),
        (adamw_triton._adamw_8bit_kernel, {"ALIGNED": aligned, "STEPS": 8, "RUNS": 8}),
    ):
        ptx = compiled(kernel, types, constants, 4)
        assert bool(re.search(r"ld\.global[.\w:]*\.v4\.b32", ptx)) == aligned
        assert bool(re.search(r"st\.global[.\w:]*\.v4\.b32", ptx)) == aligned


def test_swiglu_backward() -> None:
    from qwench.ops import elementwise_train_triton

    types = dict.fromkeys(("gate_up_ptr", "d_out_ptr", "d_gate_up_ptr"), "*bf16") | {"F": "i32"}
    ptx = compiled(elementwise_train_triton._swiglu_backward_kernel, types, {"BLOCK_F": 1024}, 4)
    assert len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)) >= 3
    assert len(re.findall(r"st\.global[.\w:]*\.v4\.b32", ptx)) >= 2


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "half"), [(14, 2, 32), (28, 4, 64)])
def test_rotation_for_training(heads: int, kv_heads: int, half: int, backward: bool) -> None:
    from qwench.ops import elementwise_train_triton

    kernel = elementwise_train_triton._rotate_kernel
    types = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    constants = {
        "H": heads, "K": kv_heads, "R": half, "BLOCK_H": 16 if heads == 14 else 32, "BLOCK_R": half,
        "BACKWARD": backward,
    }  # fmt: skip
    ptx = compiled(kernel, types, constants, 2)
    assert re.search(r"ld\.global[.\w:]*\.v[24]\.b32", ptx)
    assert re.search(r"st\.global[.\w:]*\.v[24]\.b32", ptx)
