"""Settings, keys, languages, themes, narrow screens, and what the page says when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from page_driver import LONG, ChatPage, PageServer
from served import wait_until

from qwench.serve.limits import key_digest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def requests_of(chat: ChatPage) -> list[dict[str, Any]]:
    """Bodies of the chat requests from now on."""
    sent: list[dict[str, Any]] = []
    chat.page.on("request", lambda r: sent.append(json.loads(r.post_data or "{}")) if r.method == "POST" else None)
    return sent


# ------------------------------------------------------------------------------------------------------------ settings
def test_settings_are_sent_shown_and_kept(chat: ChatPage) -> None:
    sent = requests_of(chat)
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1,
        "presence_penalty": -0.5, "frequency_penalty": 0.25, "max_tokens": 5, "seed": 7,
    }  # fmt: skip
    sampling = chat.set_open("sampling")
    assert sampling.locator("#set-temperature").get_attribute("placeholder") == "0", "the server's own default"
    for name, value in given.items():
        sampling.locator(f"#set-{name}").fill(str(value))
    sampling.locator("#set-stop").fill("END\n\\n\\n")
    chat.ask("Who are you?")
    assert {name: sent[0][name] for name in given} == given
    assert sent[0]["stop"] == ["END", "\n\n"]
    assert chat.page.locator("#chips").inner_text() == "10 sampling settings"
    chat.load()
    assert chat.set_open("sampling").locator("#set-top_k").input_value() == "20"
    chat.page.get_by_role("button", name="Reset to defaults").click()
    assert chat.set_open("sampling").locator("#set-top_k").input_value() == ""
    chat.ask("Who are you?")
    assert not set(given) & set(sent[1])
    assert "stop" not in sent[1]


def test_a_setting_out_of_range_is_named_and_not_sent(chat: ChatPage) -> None:
    sent = requests_of(chat)
    chat.set_open("sampling").locator("#set-top_p").fill("3")
    chat.send("Who are you?")
    error = chat.page.locator(".error-settings")
    assert "top_p" in error.inner_text()
    assert sent == []
    chat.page.locator("#set-top_p").fill("1")
    error.get_by_role("button", name="Retry").click()
    assert chat.finished() == "A tiny model."


def test_wrong_json_is_named_while_it_is_typed(chat: ChatPage) -> None:
    tools = chat.set_open("tools")
    area = tools.get_by_label("Tool definitions")
    area.fill('[{"name": ]')
    assert tools.locator(".problem").inner_text().startswith("Not valid JSON")
    area.fill('[{"description": "no name"}]')
    assert "function's name" in tools.locator(".problem").inner_text()
    area.fill("")
    tools.get_by_role("button", name="Insert an example").click()
    assert tools.locator(".problem").inner_text() == ""
    assert chat.page.locator("#chips").inner_text() == "tools: 1"


def test_a_json_schema_holds_the_answer(chat: ChatPage) -> None:
    output = chat.set_open("output")
    output.get_by_role("radio", name="JSON that follows a schema").check()
    schema = {
        "type": "object",
        "properties": {"ok": {"const": True}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    output.get_by_label("JSON schema").fill(json.dumps(schema))
    chat.set_open("sampling").locator("#set-max_tokens").fill("400")
    assert json.loads(chat.ask("Show.")) == {"ok": True}


# ---------------------------------------------------------------------------------------------------- keys and reading
def test_keys(chat: ChatPage) -> None:
    page = chat.page
    assert page.evaluate("document.activeElement.id") == "input", "one can type at once"
    page.keyboard.type("Who are")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you?")
    assert chat.input.input_value() == "Who are\nyou?"
    chat.input.fill("Who are you?")
    page.keyboard.press("Enter")
    chat.finished()
    assert chat.input.input_value() == ""
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edit message"
    page.keyboard.press("Escape")
    assert chat.questions.all_inner_texts() == ["Who are you?"]
    chat.input.focus()
    page.keyboard.press("Control+k")
    assert chat.questions.count() == 0
    assert page.evaluate("document.activeElement.id") == "input"


def test_enter_that_ends_a_composition_does_not_send(chat: ChatPage) -> None:
    chat.input.focus()
    session = chat.page.context.new_cdp_session(chat.page)
    session.send("Input.imeSetComposition", {"text": "你好", "selectionStart": 2, "selectionEnd": 2})
    session.send(
        "Input.dispatchKeyEvent", {"type": "keyDown", "key": "Process", "code": "Enter", "windowsVirtualKeyCode": 229}
    )
    chat.page.keyboard.press("Enter")
    assert chat.questions.count() == 0
    session.send("Input.insertText", {"text": "你好"})
    assert "你好" in chat.input.input_value()
    chat.page.keyboard.press("Enter")
    assert chat.questions.count() == 1
    chat.finished()


def test_every_control_has_a_name_and_the_focus_can_be_seen(chat: ChatPage) -> None:
    chat.ask("Show.")
    for section in ("system", "sampling", "output", "tools", "page"):
        chat.set_open(section)
    nameless = chat.page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, select, a, nav")]
      .filter((e) => !e.hidden && e.type !== "file" && !e.closest("[hidden]"))
      .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()))
      .map((e) => e.outerHTML)""")
    assert nameless == []
    chat.page.keyboard.press("Tab")
    focus = chat.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert focus == "solid"
    assert chat.page.locator("#live").inner_text() == "The answer is complete"


# ------------------------------------------------------------------------------------------------ language and themes
def test_language_follows_the_browser_and_can_be_switched(
    open_page: Callable[..., ChatPage], page_server: PageServer
) -> None:
    chat = open_page(page_server, locale="zh-CN")
    assert chat.page.locator("#empty h1").inner_text() == "有什么可以帮你？"
    assert chat.page.evaluate("document.documentElement.lang") == "zh-CN"
    chat.ask("Who are you?")
    assert "首词元" in chat.answers.last.locator(".stats").inner_text()
    chat.page.click("#drawer-toggle")
    chat.page.locator("[data-section=page] summary").click()
    chat.page.get_by_role("radio", name="English").check()
    assert "first token" in chat.answers.last.locator(".stats").inner_text()
    assert chat.input.get_attribute("placeholder") == "Ask anything"
    chat.load()
    assert chat.page.get_by_role("button", name="New chat").first.is_visible()


def test_both_languages_have_the_same_words(chat: ChatPage) -> None:
    tables = chat.page.evaluate("""async () => {
      const text = await (await fetch("/i18n.js")).text();
      const part = (name) => text.split(`const ${name} = {`)[1].split("\\n};")[0];
      const keys = (name) => [...part(name).matchAll(/(?:^|[{,\\n]\\s*)"?([\\w.]+)"?: "/g)].map((m) => m[1]).sort();
      const used = [];
      for (const { name } of performance.getEntriesByType("resource")) {
        if (!name.endsWith(".js") || name.endsWith("i18n.js")) continue;
        const code = await (await fetch(name)).text();
        used.push(...[...code.matchAll(/\\bt\\("([\\w.]+)"/g)].map((m) => m[1]));
      }
      used.push(...[...document.querySelectorAll("[data-t]")].map((e) => e.dataset.t));
      return { en: keys("EN"), zh: keys("ZH"), used };
    }""")
    assert len(tables["en"]) > 100
    assert tables["en"] == tables["zh"]
    assert set(tables["used"]) <= set(tables["en"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_system_and_can_be_set(
    open_page: Callable[..., ChatPage], page_server: PageServer, scheme: str
) -> None:
    chat = open_page(page_server, color_scheme=scheme)
    shade = """() => {
      const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number);
      return (r + g + b) / 3;
    }"""
    assert (chat.page.evaluate(shade) > 128) == (scheme == "light")
    other = "dark" if scheme == "light" else "light"
    chat.set_open("page").get_by_role("radio", name=other.capitalize()).check()
    assert (chat.page.evaluate(shade) > 128) == (other == "light")
    chat.load()
    assert (chat.page.evaluate(shade) > 128) == (other == "light")
    chat.set_open("page").get_by_role("radio", name="Auto").first.check()
    chat.page.emulate_media(color_scheme="dark" if other == "dark" else "light")
    chat.until(f"document.documentElement.dataset.theme === '{other}'")
    chat.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    chat.until(f"document.documentElement.dataset.theme === '{scheme}'")


# --------------------------------------------------------------------------------------------------------------- phone
def test_a_phone_has_no_sideways_scroll_and_all_panels(
    open_page: Callable[..., ChatPage], page_server: PageServer
) -> None:
    chat = open_page(page_server, **PHONE)
    wide = """() => [...document.querySelectorAll("body *")].filter((e) => {
      const box = e.getBoundingClientRect();
      return box.width && box.right > innerWidth + 1 && !e.closest("pre, .table, #drawer, #sidebar");
    }).map((e) => e.outerHTML.slice(0, 200))"""
    chat.ask("Show.")
    chat.ask("x" * 400)
    assert chat.page.evaluate(wide) == []
    assert chat.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not chat.page.locator("#sidebar").is_visible()
    chat.page.locator("#sidebar-toggle").tap()
    chat.page.locator("#new").tap()
    chat.page.locator("#sidebar").wait_for(state="hidden")
    assert chat.questions.count() == 0
    chat.page.locator("#drawer-toggle").tap()
    box = chat.page.locator("#drawer").bounding_box()
    assert box is not None
    chat.until("document.querySelector('#drawer').getBoundingClientRect().right <= innerWidth")
    chat.page.keyboard.press("Escape")
    chat.page.locator("#drawer").wait_for(state="hidden")
    assert not chat.page.evaluate("document.querySelector('main').inert")


# -------------------------------------------------------------------------------------------------------------- errors
def test_a_missing_key_is_asked_for_and_not_stored(
    open_page: Callable[..., ChatPage], serve_page: Callable[..., PageServer]
) -> None:
    chat = open_page(serve_page(api_key_digests=(key_digest("secret"),)))
    chat.page.locator("#banner", has_text="API key").wait_for()
    chat.send("Who are you?")
    error = chat.page.locator(".error-auth")
    error.get_by_role("button", name="Enter the key").click()
    assert chat.page.evaluate("document.activeElement.id") == "set-key"
    chat.page.keyboard.type("secret")
    chat.page.keyboard.press("Tab")
    chat.page.locator("#banner").wait_for(state="hidden")
    error.get_by_role("button", name="Retry").click()
    assert chat.finished() == "A tiny model."
    assert "secret" not in chat.page.evaluate("JSON.stringify(localStorage)") + json.dumps(chat.stored())
    chat.load()
    assert chat.ask("Who are you?") == "A tiny model.", "the tab keeps the key"
    other = chat.page.context.new_page()
    other.goto(chat.url)
    other.locator("#banner", has_text="API key").wait_for()


def test_a_busy_server_can_be_asked_again(
    open_page: Callable[..., ChatPage], serve_page: Callable[..., PageServer]
) -> None:
    server = serve_page(max_concurrent=1)
    first, second = open_page(server), open_page(server)
    first.ask_for_long_answer()
    second.send("Who are you?")
    error = second.page.locator(".error-busy")
    error.wait_for()
    assert "Try again in 1 s" in error.inner_text()
    assert "1 answers are in the making" in error.inner_text()
    first.input.press("Escape")
    first.finished()
    server.wait_until_idle()
    error.get_by_role("button", name="Retry").click()
    assert second.finished() == "A tiny model."


def test_a_conversation_that_is_too_long_says_so(chat: ChatPage, page_server: PageServer) -> None:
    too_long = page_server.server.service.engine.max_len + 1
    chat.set_open("system").locator("textarea").fill("x. " * too_long)
    chat.send("Who are you?")
    error = chat.page.locator(".error-context")
    error.wait_for()
    assert "too long for the model" in error.inner_text()
    assert "shorten the prompt" in error.inner_text()


def test_a_server_that_stops_leaves_the_partial_answer_and_is_found_again(
    open_page: Callable[..., ChatPage], serve_page: Callable[..., PageServer]
) -> None:
    server = serve_page()
    chat = open_page(server)
    chat.ask_for_long_answer()
    server.stop()
    text = chat.finished()
    assert "lalala" in text, "what had come is kept"
    assert "the server is stopping" in chat.page.locator(".error").inner_text()
    chat.page.get_by_role("button", name="Retry").click()
    chat.page.locator(".error-network").wait_for()
    chat.page.locator("#banner", has_text="cannot be reached").wait_for()
    serve_page(port=server.port)
    chat.page.locator("#banner").wait_for(state="hidden")
    output = chat.set_open("output")
    output.get_by_role("radio", name="Text", exact=True).check()
    chat.page.get_by_role("button", name="Retry").click()
    chat.finished()
    assert chat.page.locator(".error").count() == 0
    assert chat.page.locator(".answer .versions").inner_text() == "3/3"


def test_closing_the_page_keeps_the_partial_answer(chat: ChatPage) -> None:
    chat.ask_for_long_answer()
    # more than once: the schema that is stored beside the answer has the word too
    wait_until(lambda: json.dumps(chat.stored()).count("lalala") > 4, "the growing answer to be stored")
    chat.load()
    assert "lalala" in chat.finished()
    assert "page was closed" in chat.page.locator(".error").inner_text()
    assert chat.set_open("output").get_by_label("JSON schema").input_value() == LONG


def test_the_policy_forbids_everything_else(browser: Browser, page_server: PageServer) -> None:
    """The server's header, seen from inside: even a script that ran could neither add code nor call home."""
    context = browser.new_context()  # not watched, since it does what no page may do
    chat = ChatPage(context.new_page(), page_server.url)
    violated = chat.page.evaluate("""async () => {
      const seen = [];
      document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
      const add = (tag, fields) => document.body.append(Object.assign(document.createElement(tag), fields));
      add("script", { textContent: "window.inline = 1" });
      add("img", { src: "https://example.com/i.png" });
      add("iframe", { src: "https://example.com/" });
      fetch("https://example.com/").catch(() => {});
      while (seen.length < 4) await new Promise((resolve) => setTimeout(resolve, 10));
      return { inline: window.inline ?? null, seen: seen.sort() };
    }""")
    assert violated == {"inline": None, "seen": ["connect-src", "frame-src", "img-src", "script-src-elem"]}
    context.close()
