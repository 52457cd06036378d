"""Markdown, formulas and colours as the page draws them; and no text becomes an element or an address by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_driver import ChatPage, PageServer

LONG_ANSWER = """# Title with `code`
Intro **bold _both_**, *em*, ~~gone~~ and a [link](https://example.com/a_(b) "t").

1. one
   - nested
     deeper text
2. two

   ```js
   const a = `x`; // c

   b();
   ```
3. three

- [ ] open
- [x] done

> quoted
continued
> > twice

| a | b |
|:--|--:|
| `x|y` | 1 |
| c \\| d | 2 |

Setext
------
$$
\\frac{a+b}{2}
$$
***
~~~diff
+new
-old
~~~
A line
#tag and not a heading
```code``` and not a fence
***bold*** and not a rule
The end: 2 * 3 * 4, a_b_c, $5 and $10.
"""
OUTLINES = [
    ("a\nb", "p(a br() b)"),
    ("# A\n### B ###", "h2(A) h4(B)"),
    ("A\n=\nB\n-", "h2(A) h3(B)"),
    ("**a _b_** *c* ~~d~~ `e`", "p(strong(a em(b)) em(c) del(d) code(e))"),
    ("**重点：**后面", "p(strong(重点：) 后面)"),
    ("2 * 3 * 4 a_b_c **open", "p(2 * 3 * 4 a_b_c **open)"),
    ("\\*no\\* &amp; &lt;b&gt;", "p(*no* & <b>)"),
    ("- a\n- b\n  - c\n\n1) d", "ul(li(p(a)) li(p(b) ul(li(p(c))))) ol(li(p(d)))"),
    ("1. a\n  - b\n2. c", "ol(li(p(a) ul(li(p(b)))) li(p(c)))"),
    ("- a\n\n  b", "ul(li(p(a) p(b)))"),
    ("3. a", "ol(li(p(a)))"),
    ("> a\nb\n\nc", "blockquote(p(a br() b)) p(c)"),
    ("---\n***", "hr() hr()"),
    ("$x^2$ and $5, $6", "p(span(x sup(2)) and $5, $6)"),
    ("\\(a_{ij}\\)", "p(span(a sub(ij)))"),
    ("$$\\frac{a+b}{2} \\leq \\sqrt{\\alpha}$$", "div((a+b)/2 ≤ √α)"),
    ("[a](https://e.com/x) <https://e.com> https://e.com/y).", "p(a(a) a(https://e.com) a(https://e.com/y) ).)"),
    ("a<br>b <b>c</b>", "p(a br() b <b>c</b>)"),
    ("![alt](https://e.com/i.png)", "p(a(alt))"),
]
DRAW = """async ([source, steps]) => {
  const { MarkdownView } = await import("/mdview.js");
  const view = new MarkdownView();
  document.querySelector("#turns").replaceChildren(view.element);
  for (const end of steps) view.update(source.slice(0, end), true);
  view.update(source, false);
  return view.element.innerHTML;
}"""
OUTLINE = """() => {
  document.querySelector(".md").normalize();
  const outline = (node) => {
    if (node.nodeType === 3) return node.data.trim();
    return node.localName + "(" + [...node.childNodes].map(outline).filter(Boolean).join(" ") + ")";
  };
  return [...document.querySelector(".md").childNodes].map(outline).join(" ");
}"""


@pytest.fixture(scope="module")
def drawing(browser: Any, page_server: PageServer) -> Iterator[ChatPage]:
    """One page for all drawing tests, on the server's own origin."""
    context = browser.new_context(locale="en-US")
    yield ChatPage(context.new_page(), page_server.url)
    context.close()


def draw(drawing: ChatPage, source: str, step: int = 0) -> str:
    """Draw a text, in one go or growing by `step` characters; the HTML of the result."""
    steps = list(range(step, len(source), step)) if step else []
    return drawing.page.evaluate(DRAW, [source, steps])


@pytest.mark.parametrize(("source", "outline"), OUTLINES)
def test_markdown_becomes_elements(drawing: ChatPage, source: str, outline: str) -> None:
    draw(drawing, source)
    assert drawing.page.evaluate(OUTLINE) == outline


def test_tables_have_alignment_and_escaped_bars(drawing: ChatPage) -> None:
    draw(drawing, LONG_ANSWER)
    cells = drawing.page.locator(".table td")
    assert cells.all_inner_texts() == ["x|y", "1", "c | d", "2"]
    assert [cell.get_attribute("class") for cell in cells.all()] == [None, "right", None, "right"]
    assert cells.first.locator("code").inner_text() == "x|y"


def test_tasks_and_numbers_of_lists(drawing: ChatPage) -> None:
    draw(drawing, "- [ ] a\n- [x] b\n\ntext\n\n7. c")
    boxes = drawing.page.locator(".md li.task input")
    assert [box.is_checked() for box in boxes.all()] == [False, True]
    assert all(box.is_disabled() for box in boxes.all())
    assert drawing.page.locator(".md ol").get_attribute("start") == "7"


@pytest.mark.parametrize("step", [1, 7, 64])
def test_a_growing_text_ends_as_if_drawn_at_once(drawing: ChatPage, step: int) -> None:
    assert draw(drawing, LONG_ANSWER, step) == draw(drawing, LONG_ANSWER)


def test_growing_redraws_the_end_alone(drawing: ChatPage) -> None:
    """Of 300 blocks, of 200 items and of 500 lines of code, one more character touches the last one only."""
    texts = {
        "blocks": "A paragraph of **text**.\n\n" * 300 + "The last",
        "items": "- item `x`\n" * 200 + "- the last",
        "lines": "```python\n" + "x = f(1)  # c\n" * 500 + "y = ",
        "rows": "| a | b |\n|--|--|\n" + "| 1 | **2** |\n" * 300 + "| 3 |",
    }
    for name, text in texts.items():
        touched = drawing.page.evaluate(
            """async (text) => {
              const { MarkdownView } = await import("/mdview.js");
              const view = new MarkdownView();
              view.update(text, true);
              const seen = new MutationObserver(() => {});
              seen.observe(view.element, {childList: true, subtree: true, characterData: true, attributes: true});
              view.update(text + "!", true);
              return seen.takeRecords().reduce((sum, record) => sum + record.addedNodes.length, 0);
            }""",
            text,
        )
        assert 1 <= touched <= 6, f"{name}: {touched} nodes were made anew"


def test_hostile_nesting_ends_soon(drawing: ChatPage) -> None:
    """Each of these takes quadratic time or deep recursion in a careless parser; all come back as text."""
    for source in (
        "[" * 20000,
        "*a" * 20000,
        "> " * 5000 + "x",
        "`" * 20000,
        "- " * 5000,
        "$" * 20001,
        "[](" * 9000,
        "a* " * 9000,
    ):
        draw(drawing, source)
        assert drawing.page.locator(".md").count() == 1


def test_code_is_coloured_and_loses_nothing(drawing: ChatPage) -> None:
    samples = {
        "python": (
            '@d\ndef f(x: int):\n    """doc\n    """\n    return None  # c',
            {"m", "k", "f", "t", "s", "l", "c"},
        ),
        "ts": ("const r = /a\\/b/g.test(x) ? `t${1}\nu` : 0x1F; // c", {"k", "s", "f", "n", "c"}),
        "json": ('{"a": [1.5e3, true, "s"]}', {"v", "n", "l", "s"}),
        "bash": ('for f in *; do echo "$f" $HOME; done # c', {"k", "t", "s", "v", "c"}),
        "cpp": ("#include <x>\nint main() { /* a\nb */ return 'c'; }", {"m", "t", "f", "c", "k", "s"}),
        "rust": ("fn f<'a>(x: &'a str) -> u8 { println!(\"x\"); 1 }", {"k", "f", "m", "t", "s", "n"}),
        "go": ("func f() error { return nil }", {"k", "f", "t", "l"}),
        "java": ('@Override public int f() { return "s".length(); }', {"m", "k", "t", "f", "s"}),
        "html": ('<!-- c\n--><a href="x">t</a>', {"c", "k", "v", "s"}),
        "css": (".a { color: #fff; } /* c */", {"v", "n", "c"}),
        "sql": ("SELECT count(*) FROM t WHERE a = 'x' -- c", {"k", "f", "s", "c"}),
        "toml": ('[a.b]\nk = "v" # c', {"m", "v", "s", "c"}),
        "yaml": ("a: true # c\nb: 'x'", {"v", "l", "c", "s"}),
        "diff": ("--- a\n+++ b\n@@ 1 @@\n+x\n-y\n z", {"c", "m", "a", "d"}),
        "unknown": ("if <b> then", set()),
    }
    for language, (code, classes) in samples.items():
        draw(drawing, f"```{language}\n{code}\n```")
        block = drawing.page.locator(".md .code")
        assert block.locator("code").text_content() == code + "\n"
        found = {
            name.removeprefix("hl-")
            for name in block.evaluate("e => [...e.querySelectorAll('code [class^=hl-]')].map(s => s.className)")
        }
        assert found == classes, language


def test_copy_takes_the_code_alone(open_page: Callable[..., ChatPage], page_server: PageServer) -> None:
    chat = open_page(page_server, permissions=["clipboard-read", "clipboard-write"])
    chat.ask("Show.")
    chat.page.get_by_role("button", name="Copy code").click()
    chat.page.get_by_role("button", name="Copied").wait_for()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return x  # c"


def test_attacks_stay_text(
    open_page: Callable[..., ChatPage], page_server: PageServer, attack: str, tmp_path: Any
) -> None:
    """As an answer, a question, a title, a tool's name and its result, growing and whole, through the import."""
    call = {"id": "c", "type": "function", "function": {"name": attack, "arguments": json.dumps({"x": attack})}}
    messages = [
        {"role": "user", "content": attack},
        {"role": "assistant", "content": attack, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": attack},
        {"role": "assistant", "content": f"1. {attack}\n\n> {attack}"},
    ]
    file = tmp_path / "attack.json"
    file.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    chat = open_page(page_server)
    chat.page.locator("#file").set_input_files(file)
    chat.page.locator(".tool-card").wait_for()
    draw(chat, attack, 1)
    found = chat.page.evaluate("""() => {
      const inside = [...document.querySelectorAll("#turns *, #conversations *")];
      const bad = "script, img, iframe, object, embed, style, link, meta, base, form, video, audio, foreignObject";
      return {
        hacked: window.hacked ?? null,
        elements: inside.filter((e) => e.matches(bad)).map((e) => e.outerHTML),
        handlers: inside.flatMap((e) => e.getAttributeNames().filter((name) => /^on|^style$/.test(name))),
        addresses: inside.filter((e) => e.matches("a")).map((e) => [e.protocol, e.rel, e.target]),
      };
    }""")
    assert found["hacked"] is None
    assert found["elements"] == []
    assert found["handlers"] == []
    for protocol, rel, target in found["addresses"]:
        assert protocol in ("http:", "https:", "mailto:")
        assert "noopener" in rel
        assert target == "_blank"
