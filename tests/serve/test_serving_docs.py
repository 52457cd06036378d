"""docs/serving.md is true: its quick start runs, and fields, routes, options and figures are the real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from served import NAME, Running

from qwench.serve import command
from qwench.serve.app import STATIC
from qwench.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def text() -> str:
    return DOCS.read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def block(text: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_the_quick_start_runs(text: str, running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    start = section(text, "Quick start")
    curl = block(start, "bash")
    body = json.loads(curl[curl.index("'{") + 1 : curl.rindex("}") + 1]) | {"model": NAME, "max_tokens": 8}
    path = re.search(r"http://127\.0\.0\.1:8000(\S+)", curl)
    assert path
    response = running.post(path[1], body)
    assert response.status_code == 200
    assert response.text.endswith("data: [DONE]\n\n")

    code = (
        block(start, "python")
        .replace("http://127.0.0.1:8000", running.url)
        .replace("stream=True", "stream=True, max_tokens=8")
    )
    exec(compile(code, str(DOCS), "exec"), {})
    ids = running.engine.tokenizer.encode(capsys.readouterr().out)
    assert ids, "it prints the answer"


def test_every_field_is_described(text: str) -> None:
    fields = section(text, "Fields") + section(text, "Routes")
    for request in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        for name in request.model_fields:
            assert re.search(rf"`{name}(`|:|\.|=)", fields), f"{request.__name__}.{name}"


def test_every_route_is_described(text: str, running: Running) -> None:
    routes = section(text, "Routes")
    pages = {f"/{file.relative_to(STATIC).as_posix()}" for file in STATIC.rglob("*")}
    app = running.server.config.app
    for route in app.routes:  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]
        if isinstance(route, APIRoute) and route.path not in pages:
            assert f"{route.path.replace('{name:path}', '{id}')}`" in routes, route.path


def test_every_option_is_real(text: str) -> None:
    known = set(command._parser()._option_string_actions)
    lines = [line for line in text.partition("\n## How it is built")[0].splitlines() if "pip" not in line]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    assert len(named) > 5
    assert named <= known, named - known


def test_every_figure_is_real(text: str, running: Running) -> None:
    served = {name.removesuffix("_total") for name in re.findall(r"# TYPE (\w+) ", running.get("/metrics").text)}
    served = {name for name in served if not name.endswith("_created")}  # times that prometheus_client adds
    table = section(text, "Metrics")
    for name in served:
        assert re.search(rf"`{name}(_total)?[`{{]", table), name
    for name in re.findall(r"`(qwench_\w+)", table):
        assert name.removesuffix("_total") in served, name
