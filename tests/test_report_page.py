"""report.html in a real Chromium: it opens without an error or a request, hostile text does nothing, filters work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from drift_jax.report.page import render_page, write_page
from drift_jax.report.runs import load_run
from tests.report_runs import DROPPED, HELD_OUT, plain, write_run
from tests.test_report import HOSTILE

REPO = Path(__file__).resolve().parent.parent
# Without them Chromium looks for updates and the like.
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")
PAIRS = 24
Open = Callable[..., Any]


@pytest.fixture(scope="session")
def chromium() -> Path:
    """A Chromium, fetched once; tests are skipped with the reason where none can be had."""
    out = REPO / ".cache" / "chromium"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name("chromium.lock")):
        command = [sys.executable, str(REPO / "scripts" / "get_chromium.py"), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not os.environ.get("DRIFT_NEEDS_CHROMIUM"):
        pytest.skip(f"no Chromium: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    env = dict(os.environ)
    if (chromium.parent / "lib").is_dir():
        env["LD_LIBRARY_PATH"] = str(chromium.parent / "lib")
    with api.sync_playwright() as playwright:
        # A machine that is busy may take a while for the first start.
        browser = playwright.chromium.launch(executable_path=str(chromium), args=QUIET, env=env, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture()
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a file; in the end the page must have logged no error and asked for nothing but itself."""
    opened: list[tuple[Any, str, list[str], list[str]]] = []

    def open_(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        errors, requests = list[str](), list[str]()
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        opened.append((page, path.as_uri(), errors, requests))
        return page

    yield open_
    for page, address, errors, requests in opened:
        page.context.close()
        assert errors == [] and set(requests) == {address}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("page") / "run", PAIRS, theory=True)
    write_page([load_run(run)], run / "report.html")
    return run / "report.html"


def records(page: Any) -> list[str]:
    return page.locator("#list .id").all_inner_texts()


def test_it_opens_and_shows_records_and_figures(open_page: Open, report: Path) -> None:
    page = open_page(report)
    assert page.locator("#count").inner_text() == f"{PAIRS + DROPPED} of {PAIRS + DROPPED} records, 10 shown"
    assert records(page) == [f"r{i}" for i in range(HELD_OUT, HELD_OUT + 10)]
    page.click("#more")
    assert len(records(page)) == 20
    for figure in page.locator(".plots svg").all():
        box = figure.bounding_box()
        assert box["width"] > 200 and box["height"] > 100
    first = page.locator(".record").first.inner_text()
    assert all(plain(HELD_OUT, what) in first for what in ("prompt", "complaint", "rejected", "chosen 1", "chosen 2"))


def test_search_and_filters(open_page: Open, report: Path) -> None:
    page = open_page(report)
    page.fill("#search", "RECORD 13: four")
    assert records(page) == ["r13"]
    page.fill("#search", "nothing like that")
    assert records(page) == [] and "0 of" in page.locator("#count").inner_text()
    page.fill("#search", "")
    page.select_option("#reason", "reason:speaks for another")
    assert records(page) == [f"r{i}" for i in range(PAIRS, PAIRS + DROPPED)]
    assert "speaks for another" in page.locator(".record").first.inner_text()
    page.select_option("#reason", "none")
    assert page.locator("#count").inner_text().startswith(f"{PAIRS} of")
    page.select_option("#split", "test")
    assert records(page) == [f"r{i}" for i in range(HELD_OUT)]
    page.fill("#low", "0.2")
    above = records(page)
    page.fill("#low", "")
    page.fill("#high", "0.2")
    assert 0 < len(above) < HELD_OUT and set(above) | set(records(page)) == {f"r{i}" for i in range(HELD_OUT)}


def test_order_by_margin_puts_unscored_records_last(open_page: Open, report: Path) -> None:
    page = open_page(report)
    page.select_option("#order", "down")
    shown = [
        float(x)
        for x in page.evaluate(
            "[...document.querySelectorAll('#list .record')].map(r => r.innerText.match(/.*margin (-?[0-9.]+)/s)?.[1])"
        )
        if x
    ]
    assert len(shown) == HELD_OUT and shown == sorted(shown, reverse=True)
    assert set(records(page)[:HELD_OUT]) == {f"r{i}" for i in range(HELD_OUT)}


def test_words_that_differ_are_marked(open_page: Open, report: Path) -> None:
    page = open_page(report)
    assert page.locator("ins, del").count() == 0
    page.select_option("#diff", "previous")
    second = page.locator(".record").first.locator(".reply.chosen").nth(1)
    assert [word.strip() for word in second.locator("del").all_inner_texts()] == ["1", "five"]
    assert [word.strip() for word in second.locator("ins").all_inner_texts()] == ["2", "four"]
    kept = "".join(second.locator(".text > :not(del)").all_text_contents())
    assert kept == plain(HELD_OUT, "chosen 2")
    assert page.locator(".record").first.locator(".reply.chosen").nth(0).locator("ins, del").count() == 0
    page.select_option("#diff", "rejected")
    assert (
        page.locator(".record").first.locator(".reply.chosen").nth(0).locator("del").first.inner_text() == "rejected "
    )


def test_the_state_survives_a_reload(open_page: Open, report: Path) -> None:
    page = open_page(report)
    page.fill("#search", "record 13")
    page.click("#theme")
    page.reload()
    assert records(page) == ["r13"] and page.locator("#search").input_value() == "record 13"
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_light_and_dark_colour_page_and_figures(open_page: Open, report: Path) -> None:
    look = """[getComputedStyle(document.body).backgroundColor,
               getComputedStyle(document.querySelector('.plots svg path[style*="--c0"]')).stroke]"""
    light, dark = (open_page(report, scheme=scheme).evaluate(look) for scheme in ("light", "dark"))
    assert light[0] != dark[0] and light[1] != dark[1]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out_at_the_side(open_page: Open, report: Path, width: int) -> None:
    assert open_page(report, width=width).evaluate("document.documentElement.scrollWidth") == width


def test_hostile_text_is_shown_and_does_nothing(open_page: Open, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", PAIRS, say=lambda i, what: f"{what} {i} {HOSTILE[i % len(HOSTILE)]}")
    write_page([load_run(run)], run / "report.html")
    page = open_page(run / "report.html")
    for mode in ("", "rejected", "previous"):
        page.select_option("#diff", mode)
        while page.locator("#more").is_visible():
            page.click("#more")
        shown = page.locator(".reply.rejected .text").all_text_contents()
        assert shown[:6] == [f"rejected {i} {HOSTILE[i % len(HOSTILE)]}" for i in range(HELD_OUT, HELD_OUT + 6)]
        assert page.evaluate("window.hacked") is None
        assert page.locator("#list img, #list svg, #list script").count() == 0


def test_the_check_on_scripts_can_fail(browser: Any, tmp_path: Path, report: Path) -> None:
    page = browser.new_page()
    (tmp_path / "bare.html").write_text(f"<p>{HOSTILE[0]}")
    page.goto((tmp_path / "bare.html").as_uri())
    assert page.evaluate("window.hacked") == 1
    # Even where text did become markup, the page's policy lets no other script run, and no request out.
    text = render_page([load_run(report.parent)]).replace(
        "<main>", f"<main>{HOSTILE[0]}<img src='http://127.0.0.1:9/x'>"
    )
    (tmp_path / "page.html").write_text(text)
    blocked = list[str]()
    page.on("console", lambda message: blocked.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("window.hacked") is None and len(records(page)) == 10
    assert len([line for line in blocked if "Content Security Policy" in line]) == 2
    page.context.close()


def test_a_page_of_a_live_run_loads_itself_again(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False, iterations=1)
    write_page([load_run(run)], run / "report.html", refresh_s=1.0)
    page = browser.new_page()
    page.goto((run / "report.html").as_uri())
    assert page.locator(".live").inner_text() == "Not finished: run"
    write_run(run, iterations=1)
    write_page([load_run(run)], run / "report.html")
    page.locator(".live").wait_for(state="detached", timeout=60_000)
    page.context.close()
