"""Talking through the page: streaming, stop, regenerate, edit, tools, and what is there after a reload."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from page_driver import MARKDOWN, WEATHER, ChatPage, PageServer
from served import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page


def test_an_answer_streams_and_is_shown_as_markdown(chat: ChatPage) -> None:
    chat.page.evaluate("""() => {
      window.lengths = [];
      new MutationObserver(() => window.lengths.push(document.querySelector(".answer .md")?.textContent.length ?? 0))
        .observe(document.querySelector("#turns"), {childList: true, subtree: true, characterData: true});
    }""")
    chat.ask("Show.")
    answer = chat.answers.last
    assert answer.locator("h3.h2").inner_text() == "Plan"
    assert answer.locator("ol > li > ul > li").inner_text() == "inner"
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator(".code .lang").inner_text() == "python"
    assert answer.locator(".code code").text_content() == "def f(x):\n    return x  # c\n"
    assert answer.locator("pre .hl-k").all_inner_texts() == ["def", "return"]
    assert answer.locator("td").all_inner_texts() == ["x", "1"]
    assert answer.locator("img, script").count() == 0
    assert "<img src=x onerror=alert(1)><script>alert(2)</script>" in answer.inner_text()
    lengths = sorted(set(chat.page.evaluate("window.lengths")))
    assert len(lengths) > 5, "the answer came in one piece"


def test_figures_of_an_answer_are_the_servers(chat: ChatPage, page_server: PageServer) -> None:
    chat.ask("Who are you?")
    stats = chat.answers.last.locator(".stats").inner_text()
    service = page_server.server.service
    prompt = len(service.engine.tokenizer.render([{"role": "user", "content": "Who are you?"}]))
    [conversation] = chat.stored()
    [answer] = [node for node in conversation["nodes"].values() if node["role"] == "assistant"]
    assert answer["stats"]["prompt"] == prompt
    assert answer["stats"]["out"] == len(service.engine.tokenizer.encode("A tiny model.")) + 1
    assert 0 < answer["stats"]["first_s"] <= answer["stats"]["total_s"]
    first = re.search(r"first token ([\d.]+) s", stats)
    assert first is not None
    assert float(first[1]) == pytest.approx(answer["stats"]["first_s"], abs=0.006)
    assert f"{answer['stats']['out']} tokens" in stats
    assert f"prompt {prompt}" in stats


def test_the_model_sees_the_whole_conversation(chat: ChatPage) -> None:
    sent: list[dict] = []
    chat.page.on("request", lambda r: sent.append(json.loads(r.post_data or "{}")) if r.method == "POST" else None)
    chat.set_open("system").locator("textarea").fill("Be brief.")
    first = chat.ask("Who are you?")
    chat.ask("And now?")
    assert [(m["role"], m["content"]) for m in sent[1]["messages"]] == [
        ("system", "Be brief."), ("user", "Who are you?"), ("assistant", first), ("user", "And now?"),
    ]  # fmt: skip
    assert sent[1]["stream"] is True
    assert sent[1]["model"] == "talker"


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_has_come(chat: ChatPage, page_server: PageServer, how: str) -> None:
    chat.ask_for_long_answer()
    if how == "button":
        chat.page.get_by_role("button", name="Stop").click()
    else:
        chat.input.press("Escape")
    text = chat.finished()
    assert text.startswith("[")
    assert text.count("lalala") >= 3
    assert chat.answers.last.locator(".note").inner_text() == "Stopped"
    service = page_server.server.service
    wait_until(lambda: service.slots.in_use == 0, "the server to give the answer up")
    [conversation] = chat.stored()
    [stats] = [node["stats"] for node in conversation["nodes"].values() if node["role"] == "assistant"]
    speed = re.search(r"≈ ([\d,.]+) tokens/s", chat.answers.last.locator(".stats").inner_text())
    assert speed is not None
    assert float(speed[1].replace(",", "")) == pytest.approx((stats["chunks"] - 1) / stats["write_s"], abs=0.6)
    chat.load()
    assert chat.answers.last.locator(".md").inner_text().strip() == text


def test_regenerate_adds_a_version_and_both_can_be_shown(chat: ChatPage) -> None:
    chat.ask("Who are you?")
    chat.set_open("sampling").get_by_label("Max tokens").fill("2")
    chat.answers.last.get_by_role("button", name="Regenerate").click()
    short = chat.finished()
    assert "A tiny model.".startswith(short)
    assert short != "A tiny model."
    assert chat.answers.count() == 1
    assert chat.answers.last.locator(".note").inner_text() == "Cut off at the token limit"
    assert chat.page.locator(".answer .versions").inner_text() == "2/2"
    chat.page.get_by_role("button", name="Previous version").click()
    assert chat.answers.last.locator(".md").inner_text() == "A tiny model."


def test_editing_a_turn_goes_on_from_it(chat: ChatPage) -> None:
    chat.ask("And now?")
    chat.ask("And now?")
    chat.questions.first.hover()
    chat.page.locator(".turn.user .edit").first.click()
    area = chat.page.get_by_label("Edit message")
    assert area.input_value() == "And now?"
    area.fill("Who are you?")
    area.press("Enter")
    assert chat.finished() == "A tiny model."
    assert chat.questions.all_inner_texts() == ["Who are you?"]
    chat.page.get_by_role("button", name="Previous version").click()
    assert chat.questions.all_inner_texts() == ["And now?", "And now?"]


def test_a_tool_call_is_a_card_that_takes_the_result(chat: ChatPage) -> None:
    """One card for each call; how many there are is the model's choice."""
    sent: list[dict] = []
    chat.page.on("request", lambda r: sent.append(json.loads(r.post_data or "{}")) if r.method == "POST" else None)
    tools = chat.set_open("tools")
    tools.get_by_label("Tool definitions").fill(WEATHER)
    tools.get_by_role("radio", name="Always").check()
    chat.send("Who are you?")
    cards = chat.page.locator(".tool-card")
    boxes = cards.get_by_role("textbox")
    boxes.first.wait_for()
    chat.finished()
    count = boxes.count()
    assert cards.locator(".tool-name").all_inner_texts() == ["get_weather"] * count
    assert [json.loads(text) for text in cards.locator("code").all_inner_texts()] == [{"city": "Oslo"}] * count
    chat.send("And now?")  # not before the results
    assert "result first" in chat.page.locator("#toast").inner_text()
    assert len(sent) == 1
    chat.input.fill("")
    tools.get_by_role("radio", name="Never").check()
    for box in boxes.all():
        box.fill('{"sky": "<b>grey</b>"}')
    chat.set_open("sampling").locator("#set-max_tokens").fill("40")  # this model may never end by itself
    chat.page.get_by_role("button", name="Send results").click()
    chat.finished()
    assert cards.locator("code").last.text_content() == '{\n  "sky": "<b>grey</b>"\n}\n'
    roles = [message["role"] for message in sent[1]["messages"]]
    assert roles == ["user", "assistant", *["tool"] * count]
    call, *results = sent[1]["messages"][1:]
    assert [result["tool_call_id"] for result in results] == [one["id"] for one in call["tool_calls"]]
    assert {result["content"] for result in results} == {'{"sky": "<b>grey</b>"}'}
    chat.load()
    assert cards.locator(".tool-name").all_inner_texts() == ["get_weather"] * count
    assert chat.answers.count() == 2


def test_a_tool_call_that_is_cut_off_takes_no_result(chat: ChatPage) -> None:
    tools = chat.set_open("tools")
    tools.get_by_label("Tool definitions").fill(WEATHER)
    tools.get_by_role("radio", name="Always").check()
    limit = chat.set_open("sampling").get_by_label("Max tokens")
    chat.ask("Who are you?")
    [conversation] = chat.stored()
    [whole] = [node["stats"]["out"] for node in conversation["nodes"].values() if node["role"] == "assistant"]
    limit.fill(str(whole - 6))
    chat.answers.last.get_by_role("button", name="Regenerate").click()
    chat.finished()
    chat.page.locator(".note", has_text="Cut off").wait_for()
    assert chat.page.locator(".tool-card textarea").count() == 0
    limit.fill("")
    tools.get_by_role("radio", name="Never").check()
    chat.ask("And now?")
    assert chat.page.locator(".error").count() == 0, "half a call was sent back to the server"


def test_conversations_survive_a_reload_and_are_found(chat: ChatPage) -> None:
    chat.ask("Who are you?")
    chat.page.keyboard.press("Control+k")
    assert chat.answers.count() == 0
    chat.ask("And now?")
    chat.load()
    assert chat.questions.all_inner_texts() == ["And now?"], "the conversation that was open is open again"
    rows = chat.page.locator("#conversations li .open")
    assert rows.all_inner_texts() == ["And now?", "Who are you?"]
    chat.page.fill("#search", "TINY MODEL")
    assert rows.all_inner_texts() == ["Who are you?"]
    rows.first.click()
    assert chat.questions.all_inner_texts() == ["Who are you?"]
    assert chat.answers.last.locator(".md").inner_text() == "A tiny model."


def test_rename_delete_and_undo(chat: ChatPage) -> None:
    chat.ask("Who are you?")
    row = chat.page.locator("#conversations li")
    row.hover()
    row.get_by_role("button", name="Rename").click()
    chat.page.locator("#conversations li input").fill("About <b>it</b>")
    chat.page.keyboard.press("Enter")
    assert row.locator(".open").inner_text() == "About <b>it</b>"
    row.hover()
    row.get_by_role("button", name="Delete").click()
    assert chat.page.locator("#conversations li").count() == 0
    chat.page.get_by_role("button", name="Undo").click()
    assert row.locator(".open").inner_text() == "About <b>it</b>"
    assert chat.questions.all_inner_texts() == ["Who are you?"]
    row.hover()
    row.get_by_role("button", name="Delete").click()
    chat.load()
    assert chat.page.locator("#conversations li").count() == 0
    assert chat.stored() == []


def test_export_and_import(
    chat: ChatPage, open_page: Callable[..., ChatPage], page_server: PageServer, tmp_path: Path
) -> None:
    chat.ask("Show.")
    chat.set_open("system").locator("textarea").fill("Be brief.")
    with chat.page.expect_download() as download:
        chat.page.get_by_role("button", name="Export", exact=True).click()
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    other = open_page(page_server)
    other.page.locator("#file").set_input_files(file)
    other.answers.last.locator(".code").wait_for()
    assert other.questions.all_inner_texts() == ["Show."]
    nodes = json.loads(file.read_text(encoding="utf-8"))["conversations"][0]["nodes"].values()
    assert [node["content"].strip() for node in nodes if node["role"] == "assistant"] == [MARKDOWN.strip()]
    assert other.set_open("system").locator("textarea").input_value() == "Be brief."
    (tmp_path / "bad.json").write_text('{"format": "qwench-chat", "version": 9}', encoding="utf-8")
    other.page.locator("#file").set_input_files(tmp_path / "bad.json")
    other.page.get_by_text("no conversations: version 9").wait_for()


def test_openai_messages_can_be_imported(chat: ChatPage, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "grey"},
        {"role": "assistant", "content": "It is *grey*."},
    ]  # fmt: skip
    file = tmp_path / "messages.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages}) for _ in range(2)), encoding="utf-8")
    chat.page.locator("#file").set_input_files(file)
    chat.page.locator(".tool-card").wait_for()
    assert chat.page.locator("#conversations li").count() == 2
    assert chat.page.locator(".tool-answer code").text_content() == "grey\n"
    assert chat.answers.last.locator("em").inner_text() == "grey"


def test_two_tabs_show_the_same(chat: ChatPage) -> None:
    other = chat.page.context.new_page()
    other.goto(chat.url + "/")
    other.wait_for_selector("body.ready")
    chat.ask("Who are you?")
    other.locator("#conversations li .open").click()
    other.locator(".answer .md", has_text="A tiny model.").wait_for()


def test_an_answer_goes_on_while_another_conversation_is_open(chat: ChatPage) -> None:
    chat.ask_for_long_answer()
    chat.page.keyboard.press("Control+k")
    assert chat.page.locator("#conversations .pulse").count() == 1
    chat.set_open("output").get_by_role("radio", name="Text", exact=True).check()
    assert chat.ask("Who are you?") == "A tiny model."
    chat.page.locator("#conversations li .open", has_text="Go.").click()
    length = "document.querySelector('.answer .md').textContent.length"
    before = chat.page.evaluate(length)
    chat.until(f"{length} > {before}")
    chat.input.press("Escape")
    chat.finished()


def _scroll(page: Page) -> tuple[float, float]:
    top, left = page.evaluate("""() => {
      const log = document.querySelector("#log");
      return [log.scrollTop, log.scrollHeight - log.clientHeight - log.scrollTop];
    }""")
    return top, left


def test_the_page_follows_the_text_until_the_user_scrolls_up(
    open_page: Callable[..., ChatPage], page_server: PageServer
) -> None:
    chat = open_page(page_server, viewport={"width": 1000, "height": 420})
    chat.ask_for_long_answer()
    chat.page.click("#drawer-close")
    log = "document.querySelector('#log')"
    chat.until(f"{log}.scrollHeight > {log}.clientHeight + 150")
    assert _scroll(chat.page)[1] < 60
    chat.page.hover("#log")
    chat.page.mouse.wheel(0, -100)
    chat.page.wait_for_selector("#latest:not([hidden])")
    top, height = _scroll(chat.page)[0], chat.page.evaluate(f"{log}.scrollHeight")
    chat.until(f"{log}.scrollHeight > {height}")
    assert _scroll(chat.page)[0] == top, "the text ran away under the reader"
    chat.page.get_by_role("button", name="Jump to the latest").click()
    height = chat.page.evaluate(f"{log}.scrollHeight")
    chat.until(f"{log}.scrollHeight > {height}")
    assert _scroll(chat.page)[1] < 60
    chat.input.press("Escape")
    chat.finished()
