"""The control tokens of each Qwen generation: names, order, flags. [Qwen2.5 TR 2, tokenization_note]

Their ids follow the regular tokens without a gap, so `<|endoftext|>` is 151643 in the published vocabulary and
`len(regular)` in one trained here. Rows of the embedding beyond them are padding and belong to the model's config.
"""

from __future__ import annotations

from dataclasses import dataclass

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"

_GENERAL = (ENDOFTEXT, IM_START, IM_END)
_VISION = tuple(
    f"<|{name}|>"
    for name in (
        *("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end"),
        *("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)
_TOOL = (TOOL_CALL, TOOL_CALL_END)
_CODE = tuple(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"))

CONTROL_SETS: dict[str, tuple[str, ...]] = {
    "qwen": (*_GENERAL, *(f"<|extra_{number}|>" for number in range(205))),
    "qwen2": _GENERAL,
    "qwen2.5": (*_GENERAL, *_VISION, *_TOOL, *_CODE),
}
"""Generation -> its control tokens in id order: 208, 3 and 22 of them."""

NOT_SPECIAL = frozenset((*_TOOL, *_CODE))
"""Control tokens that `skip_special` leaves in decoded text, because readers of the text need them."""


@dataclass(frozen=True, slots=True)
class ControlToken:
    """One control token: `ControlToken("<|im_end|>", 151645, special=True)`."""

    content: str
    id: int
    special: bool
    """Whether decoding with `skip_special` drops it."""


def control_tokens(generation: str, num_regular: int) -> tuple[ControlToken, ...]:
    """The control tokens of a generation ("qwen", "qwen2", "qwen2.5") behind `num_regular` regular tokens."""
    if generation not in CONTROL_SETS:
        raise ValueError(f"no control tokens are known for {generation!r}; choose one of {', '.join(CONTROL_SETS)}")
    names = CONTROL_SETS[generation]
    return tuple(ControlToken(name, num_regular + i, name not in NOT_SPECIAL) for i, name in enumerate(names))
