"""The lm-eval task of `schemas` with constrained decoding: every request carries its document's schema as a grammar.

Imported by the YAML file that names it, when lm-eval is loaded anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask


class ConstrainedSchemas(ConfigurableTask):
    """Generation settings are the task's, and `grammar` beside them."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str | list[str], **kwargs: Any) -> list[Instance] | Instance:
        made = super().construct_requests(doc, ctx, **kwargs)
        assert isinstance(made, Instance)
        prompt, settings, *_ = [*made.args]
        made.arguments = (prompt, {**settings, "grammar": {"kind": "json_schema", "value": doc["schema"]}})
        return made
