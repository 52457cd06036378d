"""What a score carries: the setting that it was measured with, its error, and what the run cost.

The same model scores many points apart with another prompt or another way of reading its answer, so a number alone says
little. All of this goes into results.json; nothing is computed again from it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_SHOWN_PROMPT = 20_000
"""Characters of the first prompt that are kept; the samples have all."""


def setting_of(
    task: Any,
    instances: Sequence[Any],
    *,
    chat: bool,
    system: str | None,
    multiturn: bool,
    template: str | None,
    generation: Mapping[str, Any] | None,
    seed: int,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """How one lm-eval task was run, from the task itself and the requests that it made."""
    config = task.config
    prompts = [str(instance.args[0]) for instance in instances]
    together = hashlib.sha256()
    for prompt in prompts:
        together.update(prompt.encode("utf-8", "surrogatepass") + b"\0")
    first = prompts[0] if prompts else ""
    return {
        "task": config.task,
        "version": task.VERSION,
        "output_type": task.OUTPUT_TYPE,
        "num_fewshot": config.num_fewshot or 0,
        "data": dict(source),
        "prompt_digest": together.hexdigest(),
        "first_prompt": first[:MAX_SHOWN_PROMPT],
        "prompt_is_cut": len(first) > MAX_SHOWN_PROMPT,
        "description": _said(config.description),
        "question": _said(config.doc_to_text),
        "target": _said(config.doc_to_target),
        "target_delimiter": config.target_delimiter,
        "answer_prefix": _said(config.gen_prefix),
        "chat_template": hashlib.sha256((template or "").encode()).hexdigest() if chat else None,
        "chat": chat,
        "system": system,
        "multiturn": multiturn if chat else None,
        "generation": dict(generation) if generation is not None else None,
        "stop": list(generation["until"]) if generation is not None else None,
        "extraction": _plain(config.filter_list) or "the answer as it is",
        "metrics": _plain(config.metric_list),
        "repeats": config.repeats,
        "seed": seed,
    }


def scored_documents(entries: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Documents behind each "metric,filter" of one task: some metrics are of a part of the documents."""
    return Counter(f"{metric},{entry['filter']}" for entry in entries for metric in entry["metrics"])


def metrics_of(
    values: Mapping[str, Any], higher: Mapping[str, bool | None], count: int, counts: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """lm-eval's "metric,filter" and "metric_stderr,filter" of one task or group, as one entry a metric. `count`:
    documents of those that `counts` does not name."""
    names = [name for name in values if "," in name and not name.split(",")[0].endswith("_stderr")]
    filters = {name.split(",", 1)[1] for name in names}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        metric, chosen = name.split(",", 1)
        found[metric if len(filters) == 1 else name] = {
            "value": _number(values[name]),
            "stderr": _number(values.get(f"{metric}_stderr,{chosen}")),
            "n": counts.get(name, count),
            "filter": chosen,
            "higher_is_better": higher.get(metric, True),
        }
    return found


def samples_of(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval's record of each document and filter, as one record a document."""
    found: dict[int, dict[str, Any]] = {}
    filters = list(dict.fromkeys(entry["filter"] for entry in entries))
    for entry in entries:
        record = found.setdefault(entry["doc_id"], _sample(entry))
        extracted = [_plain(answer) for answer in entry["filtered_resps"]]
        if "response" in record:
            one = extracted[0] if len(extracted) == 1 else extracted
            record["extracted"] = one if len(filters) == 1 else {**record.get("extracted", {}), entry["filter"]: one}
        for metric in entry["metrics"]:
            name = metric if len(filters) == 1 else f"{metric},{entry['filter']}"
            record["metrics"][name] = _plain(entry[metric])
    return [found[number] for number in sorted(found)]


def _sample(entry: Mapping[str, Any]) -> dict[str, Any]:
    arguments, answers = entry["arguments"], entry["resps"]
    record: dict[str, Any] = {"id": entry["doc_id"], "doc": _plain(entry["doc"]), "prompt": str(arguments[0][0])}
    if len(arguments[0]) == 2 and isinstance(arguments[0][1], str):
        contexts = {str(context) for context, _ in arguments}
        record["choices"] = [
            {
                "text": str(text),
                "logprob": answer[0][0],
                "greedy": bool(answer[0][1]),
                **({"context": str(context)} if len(contexts) > 1 else {}),
            }
            for (context, text), answer in zip(arguments, answers, strict=True)
        ]
    elif len(arguments[0]) == 1:
        record["logprob"] = answers[0][0]
    else:
        record["response"] = [str(text) for answer in answers for text in answer]
    record["target"], record["metrics"] = _plain(entry["target"]), {}
    return record


def _said(value: Any) -> Any:
    return f"{value.__module__.rsplit('/', 1)[-1]}.{value.__name__}" if _is_named(value) else _plain(value)


def _is_named(value: Any) -> bool:
    return isinstance(value, Callable) and hasattr(value, "__name__")


def _plain(value: Any) -> Any:
    """What JSON can hold: functions by name, numpy's numbers as Python's, everything else as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item") and callable(value.item):
        return _plain(value.item())
    return _said(value) if _is_named(value) else str(value)


def _number(value: Any) -> float | None:
    """A finite number, or None: lm-eval writes "N/A" where there is no error."""
    if isinstance(value, bool | int | float) or hasattr(value, "item"):
        number = float(value)
        return number if math.isfinite(number) else None
    return None
