"""The report of a data run: its figures are those of the run, and no text of a document gets into its markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwench import cli
from qwench.data.pipeline.findings import read_findings
from qwench.data.pipeline.report import _marked, write_report

EVIL = '<script>window.hacked = 1</script><img src="http://example.com/x.png" onerror="alert(1)">'
PROSE = (
    "The river rose in the night and carried the bridge away before anyone in the village had woken. In the morning "
    "the children stood on the bank and counted the planks that came down with the brown water, and their parents "
    "talked about the winter, and about who would pay for a new bridge. Nobody had an answer that the others liked."
)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of two languages with duplicates, drops, a broken line and markup in all of them."""
    folder = tmp_path_factory.mktemp("report")
    records = [
        {"id": f"{EVIL}{n}", "text": f"{EVIL} Number {n}. {PROSE} {n * 'again '}", "kind": "docs"} for n in range(9)
    ]
    records += [{"id": f"short{n}", "text": f"{EVIL[:20]}{n}", "kind": EVIL} for n in range(5)]
    chinese = "河水在夜里涨了起来，把村口的桥冲走了。早上孩子们站在岸边，数着水里漂来的木板，大人们却在谈论冬天。"
    records += [{"id": f"zh{n}", "text": f"第{n}章 {chinese}", "kind": "docs"} for n in range(2)]
    lines = [json.dumps(record) for record in records]
    lines[4:4] = ["{broken", lines[0].replace("}0", "}copy")]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert cli.main(["data", f"out={folder / 'run'}", f'sources.web.paths=["{folder / "a.jsonl"}"]', "workers=1"]) == 0
    return folder / "run"


def test_no_text_of_a_document_becomes_markup(run: Path) -> None:
    html = (run / "report.html").read_text()
    page = Tags()
    page.feed(html)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert EVIL in page.text, "and yet it is shown"
    assert html.count("&lt;script&gt;window.hacked") > 5


def test_the_figures_are_those_of_the_run(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    found = read_findings(run, summary)
    prepare, dedup = (next(s for s in found.stages if s.name == name) for name in ("prepare", "dedup"))
    assert prepare.kept.total() == summary["prepare"]["kept"]
    assert prepare.dropped.total() == summary["prepare"]["dropped"] == 5
    assert dedup.kept.total() == summary["documents"]["documents"] < prepare.kept.total()
    assert dedup.kept_bytes == summary["documents"]["bytes"]
    by_reason = {f"{stage}: {reason}": entry.count for (stage, reason), entry in found.dropped.items()}
    assert by_reason.items() >= summary["prepare"]["reasons"].items()
    assert {lang for lang, _ in prepare.kept} == {"en", "zh"}
    short = next(entry for (_, reason), entry in found.dropped.items() if reason in ("too_short", "too_few_words"))
    assert all(len(entry.samples) == min(3, entry.count) == len({s.id for s in entry.samples}) for entry in [short])
    assert found.pairs
    assert prepare.peak_mb > 20
    assert found.scores["lang_score"]["kept"].max() <= 1
    text = (run / "report.html").read_text()
    for wanted in ("Funnel", "near_duplicate", "no valid JSON", "<del>", "<ins>", "polyline", "MB/s a core"):
        assert wanted in text, wanted


def test_it_can_be_made_again_by_its_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_bytes()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == before
    with pytest.raises(ValueError, match="no finished run"):
        write_report(tmp_path)


def test_differences_are_marked_on_their_side() -> None:
    left, right = _marked("the red <b>cat</b> 猫在睡", "the blue <b>cat</b> 狗在睡")
    assert left == "the <del>red</del> &lt;b&gt;cat&lt;/b&gt; <del>猫</del>在睡"
    assert right == "the <ins>blue</ins> &lt;b&gt;cat&lt;/b&gt; <ins>狗</ins>在睡"
