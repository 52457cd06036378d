"""What tests of the chat page hold in their hands: a server, the page with its controls, and a watch over it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from served import PATIENCE_S

from qwench.serve.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Dialog, Locator, Page

NAME = "talker"
MARKDOWN = """## Plan
1. **bold** and `code`
   - inner

```python
def f(x):
    return x  # c
```

| a | b |
|---|--:|
| x | 1 |

<img src=x onerror=alert(1)><script>alert(2)</script> [l](javascript:alert(3))
"""
LESSONS = [("Show.", MARKDOWN), ("Who are you?", "A tiny model."), ("And now?", "Still tiny.")]
"""Questions and the answers that the server's model gives to them, greedily."""
LONG = '{"type": "array", "items": {"enum": ["lalala"]}, "minItems": 2000}'
"""A JSON schema whose shortest answer takes the model long enough to be stopped."""
WEATHER = (
    '[{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, '
    '"required": ["city"], "additionalProperties": false}}]'
)
ATTACKS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload=window.hacked=1><iframe src='javascript:parent.hacked=1'></iframe>",
    "<iframe src='https://example.com/'></iframe>",
    "[a](javascript:window.hacked=1) [b](  JaVaScRiPt:window.hacked=1) [c](java&#115;cript:window.hacked=1)",
    "[d](data:text/html,<script>window.hacked=1</script>) [e](vbscript:x) [f](file:///etc/passwd) [g](//example.com)",
    "![i](https://example.com/i.png) ![j](javascript:window.hacked=1)",
    '<javascript:window.hacked=1> <https://example.com/" onmouseover="window.hacked=1>',
    '[k](https://example.com/"onclick="window.hacked=1)',
    "```<img src=x onerror=window.hacked=1>\n</code></pre><img src=x onerror=window.hacked=1>\n```",
    "| <img src=x onerror=window.hacked=1> | b |\n|---|---|\n| </td><script>window.hacked=1</script> | `<b>` |",
    "$\\href{javascript:window.hacked=1}{x}$ $$<img src=x onerror=window.hacked=1>$$",
    "- <style>body{display:none}</style>\n> <form action=https://example.com><input autofocus onfocus=window.hacked=1>",
    "<link rel=stylesheet href=https://example.com/x.css><meta http-equiv=refresh content='0;https://example.com'>",
    "&lt;script&gt;window.hacked=1&lt;/script&gt; &#60;img src=x onerror=window.hacked=1&#62;",
]


@dataclass(frozen=True)
class PageServer:
    """A server in a thread of the test's process."""

    url: str
    port: int
    server: Server
    thread: threading.Thread

    def wait_until_idle(self) -> None:
        """Until the server has noticed that the clients that left are gone."""
        deadline = time.monotonic() + PATIENCE_S
        while self.server.service.slots.in_use:
            assert time.monotonic() < deadline, "the server still makes an answer"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.drain()
        self.thread.join(30)
        assert not self.thread.is_alive()


class Watched:
    """Notes what no page may do: failing scripts, violations of the policy, dialogs, requests to other hosts."""

    def __init__(self, context: BrowserContext, origin: str) -> None:
        self.context = context
        self.problems: list[str] = []
        context.on("request", lambda request: self._request(request.url, origin))
        context.on("weberror", lambda error: self.problems.append(f"script: {error.error}"))
        context.on("dialog", self._dialog)
        context.on("console", lambda message: self._console(message.type, message.text))

    def _request(self, url: str, origin: str) -> None:
        if not url.startswith((origin + "/", "blob:" + origin)):
            self.problems.append(f"request: {url}")

    def _dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _console(self, kind: str, text: str) -> None:
        # what the browser itself logs for an answer with status 4xx, or for a server that is down, is no fault here
        if kind == "error" and not text.startswith("Failed to load resource"):
            self.problems.append(f"console: {text}")

    def close(self) -> None:
        self.context.close()


class ChatPage:
    """The page, by what a user sees and does."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.load()

    def load(self) -> None:
        self.page.goto(self.url + "/")
        self.page.wait_for_selector("body.ready")
        self.until("document.querySelector('#model').value || !document.querySelector('#banner').hidden")

    @property
    def input(self) -> Locator:
        return self.page.locator("#input")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".turn.answer")

    @property
    def questions(self) -> Locator:
        return self.page.locator(".turn.user .bubble")

    def send(self, text: str) -> None:
        self.input.fill(text)
        self.input.press("Enter")

    def ask(self, text: str) -> str:
        """Send, wait for the end of the answer, and return what it shows."""
        self.send(text)
        return self.finished()

    def finished(self) -> str:
        """Wait until the last answer is at its end; its text as the page shows it."""
        self.page.wait_for_selector(".turn.answer.last:not(.streaming) .turn-foot .regenerate:not([disabled])")
        return self.answers.last.locator(".md").inner_text().strip()

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true. (Playwright's own way needs `eval`, which the page forbids.)"""
        deadline = time.monotonic() + PATIENCE_S
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"waited in vain: {expression}"
            self.page.wait_for_timeout(20)

    def set_open(self, section: str) -> Locator:
        """Unfold a section of the settings drawer."""
        if self.page.locator("#drawer-toggle").get_attribute("aria-expanded") == "false":
            self.page.click("#drawer-toggle")
        found = self.page.locator(f"[data-section={section}]")
        if found.get_attribute("open") is None:
            found.locator("summary").click()
        return found

    def ask_for_long_answer(self) -> None:
        """Begin an answer that takes seconds, and wait until some of it is there."""
        output = self.set_open("output")
        output.get_by_role("radio", name="JSON that follows a schema").check()
        output.get_by_label("JSON schema").fill(LONG)
        self.send("Go.")
        self.until("document.querySelector('.turn.answer.last .md')?.textContent.length > 40")

    def stored(self) -> Any:
        """All conversations as they stand in the browser's database."""
        return self.page.evaluate(
            """() => new Promise((resolve, reject) => {
              const open = indexedDB.open("qwench-chat");
              open.onerror = () => reject(open.error);
              open.onsuccess = () => {
                const all = open.result.transaction("conversations").objectStore("conversations").getAll();
                all.onsuccess = () => { open.result.close(); resolve(all.result); };
              };
            })"""
        )
