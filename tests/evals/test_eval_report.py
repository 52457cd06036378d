"""The page of an evaluation: what is in the file, and how it behaves in Chromium with attacks in the answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from run_writer import answer_sample, choice_sample, write_run

from qwench import cli
from qwench.evals.report import MAX_TEXT, write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ATTACK = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"><!-- 'x' \\u003c"
)
MANY = 2500
SHOTS = "".join(f"Question: example {n}\nAnswer: A\n\n" for n in range(20))


def letters(count: int, is_right: Callable[[int], bool], **changes: Any) -> list[dict[str, Any]]:
    return [
        choice_sample(n, f"item number {n}", [-1.0, -2.0] if is_right(n) else [-2.0, -1.0], 0,
                      prompt=f"{SHOTS}item number {n}\nAnswer:", **changes)
        for n in range(count)
    ]  # fmt: skip


def sums(wrong: set[int], *, words: str = "So it is", attack: bool = False) -> list[dict[str, Any]]:
    samples = [answer_sample(n, f"What is {n} + 1?", f"{words} {n + 1 + (n in wrong)}", str(n + 1)) for n in range(12)]
    if attack:
        samples[7] |= {"response": [ATTACK], "doc": {"question": ATTACK}, "prompt": ATTACK}
        samples[8]["response"] = ["beginning " + "long " * 3000 + "ending"]
        samples[9]["response"] = ["x" * (MAX_TEXT + 500) + "end"]
    return samples


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    needles = [
        {"id": n, "doc": {"depth": 50 * (n % 3), "length": 1024 << (n // 3)}, "prompt": "hay", "response": ["7"],
         "target": "7", "metrics": {"acc": float(n != 4)}}
        for n in range(6)
    ]  # fmt: skip
    tasks = {"letters": letters(MANY, lambda n: n % 2 == 0), "sums": sums({3}, attack=True), "needle_en": needles}
    new = write_run(root / "new", tasks, model="new <b>model</b>", setting={"stop": ["\n\n"]})
    old_tasks = {
        "letters": letters(MANY, lambda n: (n % 2 == 0 and n != 4) or n == 5),
        "sums": sums({3, 2}, words="Therefore it is")[1:],
    }
    return new, write_run(root / "old", old_tasks, model="old", setting={"num_fewshot": 5})


@pytest.fixture(scope="module")
def pages(runs: tuple[Path, Path]) -> tuple[Path, Path]:
    """Of one run, and of two."""
    return write_report(runs[0]), write_report(*runs, out=runs[0].parent / "both.html")


# ------------------------------------------------------------------------------------------------------------- the file
def test_the_file_is_whole_and_holds_no_markup_of_a_model(pages: tuple[Path, Path]) -> None:
    for path in pages:
        html = path.read_text(encoding="utf-8")
        assert (
            len(re.findall(r"<script", html))
            == len(re.findall(r"</script>", html))
            == 2 + html.count('type="text/plain"')
        )
        assert "document.title='taken'" not in html
        assert "<b>model</b>" not in html
        assert "&lt;b&gt;model" in html
        assert not re.search(r"(src|href)=[\"']?https?:", html)
        assert "script-src 'sha256-" in html
        assert html.count("<svg") >= 1, "the needle's heat map"
    assert pages[1].stat().st_size < 400_000, "2,500 samples of both runs, 20 shots each"


def test_the_same_runs_give_the_same_page(runs: tuple[Path, Path], pages: tuple[Path, Path], tmp_path: Path) -> None:
    assert write_report(*runs, out=tmp_path / "again.html").read_bytes() == pages[1].read_bytes()


def test_the_command(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, old = runs
    assert cli.main(["report", str(new), "--baseline", str(old), "--out", str(tmp_path / "deep" / "page.html")]) == 0
    assert f"report: {tmp_path / 'deep' / 'page.html'}" in capsys.readouterr().out
    assert (tmp_path / "deep" / "page.html").is_file()
    assert cli.main(["report", str(new), "--baseline", str(tmp_path)]) == 2
    assert "has no results.json" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--baseline", str(old)]) == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_loss_by_position_is_drawn(tmp_path: Path) -> None:
    samples = [
        {"id": 0, "doc": {}, "prompt": "", "choices": [], "target": "", "metrics": {"nll_0_64": 2.0, "nll_64_128": 1.5}}
    ]
    html = write_report(write_run(tmp_path / "run", {"positions": samples})).read_text(encoding="utf-8")
    assert "Length and position" in html
    assert "<svg" in html


# ---------------------------------------------------------------------------------------------------------- in Chromium
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("needs Chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a file; anything that the console says, and any request but for the file, fails the test."""
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 1300, "height": 900}, offline=True)
    context.set_default_timeout(20_000)

    def open_one(path: Path, address: str = "") -> Page:
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(path.as_uri()) else problems.append(request.url)
        )
        page.goto(path.as_uri() + address)
        page.locator("body[data-ready=yes]").wait_for()
        return page

    yield open_one
    context.close()
    assert problems == []


def count_is(page: Page, text: str) -> None:
    page.locator("#count", has_text=re.compile(f"^{text}$")).wait_for()


def test_thousands_of_samples_are_drawn_as_they_come_into_view(
    show: Callable[..., Page], pages: tuple[Path, Path]
) -> None:
    page = show(pages[0])
    count_is(page, "2,500 samples")
    assert page.locator(".row").count() < 80
    page.locator("#list").focus()
    page.keyboard.press("End")
    page.locator(".row[aria-selected=true]", has_text="item number 2499").wait_for()
    assert page.locator(".row").count() < 80
    assert "item number 2499" in page.locator("#detail").inner_text()
    page.keyboard.press("ArrowUp")
    page.locator("#detail .head", has_text="sample 2498").wait_for()
    assert "#task=letters&id=2498" in page.url
    assert page.locator("#filter option").count() == 5, "nothing about a baseline"


def test_filters_search_and_order(show: Callable[..., Page], pages: tuple[Path, Path]) -> None:
    page = show(pages[1])
    page.select_option("#filter", "wrong")
    count_is(page, "1,250 of 2,500 samples")
    page.select_option("#filter", "lost")
    count_is(page, "1 of 2,500 samples")
    assert "sample 5" in page.locator("#detail .head").inner_text()
    page.select_option("#filter", "changed")
    count_is(page, "2 of 2,500 samples")
    page.select_option("#filter", "all")
    page.fill("#search", "ITEM NUMBER 1234")
    count_is(page, "1 of 2,500 samples")
    page.locator("#detail .head", has_text="sample 1234").wait_for()
    assert "← target" in page.locator("#detail .choices tr.taken").first.inner_text()
    page.fill("#search", "example 7")
    count_is(page, "0 of 2,500 samples")  # the beginning that all prompts share is not searched
    page.fill("#search", "")
    page.select_option("#task", "")
    count_is(page, "2,519 samples")
    page.select_option("#sort", "change")
    page.locator("#filter").select_option("answer")
    page.locator("#count", has_text=" of 2,519 samples").wait_for()
    page.select_option("#task", "sums")
    page.select_option("#filter", "here")
    count_is(page, "2 of 13 samples")
    assert "only in this run" in page.locator("#detail .head").inner_text()


def test_two_runs_stand_beside_each_other_with_their_differences(
    show: Callable[..., Page], pages: tuple[Path, Path]
) -> None:
    page = show(pages[1], "#task=sums&id=2")
    detail = page.locator("#detail")
    assert detail.locator("ins").all_inner_texts()[:2] == ["So", "3"]
    assert detail.locator("del").all_inner_texts()[:2] == ["Therefore", "4"]
    assert detail.locator(".sides.two").count() == 3
    settings = page.locator("#settings")
    assert settings.locator(".other").all_inner_texts()[:2] == ["0.9167 ± 0.0833", "0.8182 ± 0.1220"]
    assert "num_fewshot" in settings.inner_text()
    warnings = page.locator(".warnings").inner_text()
    assert "num_fewshot is 0 here and 5 in the baseline" in warnings
    scores = page.locator("table").first.inner_text()
    assert "0-shot · no chat template · greedy" in scores
    page.locator("a", has_text="letters").first.click()
    count_is(page, "2,500 samples")


def test_what_a_model_wrote_is_text(show: Callable[..., Page], pages: tuple[Path, Path]) -> None:
    page = show(pages[1], "#task=sums&id=7")
    assert page.locator("#detail .text").first.inner_text() == ATTACK
    assert "taken" not in page.title()
    assert page.locator("#detail script, #detail img, #list script, #list img").count() == 0
    assert page.locator(".row[aria-selected=true] .title").inner_text().startswith("</script>")


def test_long_texts_are_cut_and_shown_when_asked_for(show: Callable[..., Page], pages: tuple[Path, Path]) -> None:
    page = show(pages[0], "#task=sums&id=8")
    text = page.locator("#detail .text").first
    assert len(text.inner_text()) < 5000
    text.locator("button", has_text="show all 15,016 characters").click()
    assert len(text.inner_text()) == 15_016
    page.goto(pages[0].as_uri() + "#task=sums&id=9")
    page.locator("#detail .head", has_text="sample 9").wait_for()
    page.locator("#detail .text").first.locator("button").click()
    assert "503 characters are left out of this page" in page.locator("#detail .text").first.inner_text()
    page.goto(pages[0].as_uri() + "#task=letters&id=0")
    page.locator("#detail .head", has_text="sample 0").wait_for()
    page.locator("#detail summary", has_text="the beginning").click()
    assert "example 19" in page.locator("#detail details .text").first.inner_text()


def test_sample_files_that_are_missing_or_broken_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"t": sums(set()), "u": sums(set())})
    (run / "samples" / "u.jsonl").unlink()
    with (run / "samples" / "t.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": 1})[:-1])
    html = write_report(run).read_text(encoding="utf-8")
    assert "line 13 of t.jsonl is no sample and was left out" in html
    assert "u: no samples at" in html


def test_a_directory_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "there is no directory" in capsys.readouterr().err
