"""The page of runs in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from desk import HOSTILE, Served, done, going

import rig
from ops.run import wishes

pytestmark = pytest.mark.slow


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    chromium = Browser(tmp_path / "chromium")
    yield chromium
    refused = [line for line in chromium.log() if "Security Policy" in line]
    chromium.end()
    assert not refused


def test_the_page_shows_runs_live_ends_one_after_asking_and_takes_no_text_for_html(
    tmp_path: Path, browser: Browser
) -> None:
    own = rig.Rig(tmp_path)
    done(own, "odd", 1, 0.2, sample=HOSTILE)
    done(own, "tea", 33, 1.5)
    now = going(own)
    server = Served(own.runs, lambda run, wish: wishes.send(run.folder, wish))
    try:
        browser.go(server.page)
        browser.wait(lambda: len(browser.texts(".run")) == 3)
        browser.wait(lambda: now.run.id in browser.text("h1"))
        assert browser.js("return location.href") == f"{server.url}/", (
            "the token leaves the address"
        )
        browser.wait(lambda: "241 / 400" in browser.text(".cards"))
        assert browser.js("return document.querySelectorAll('.mean, .held').length") == 2
        now.event("step", step=242, loss=1.11, learning_rate=1e-4, grad_norm=1.0, eta_s=470.0)
        browser.wait(lambda: "242 / 400" in browser.text(".cards"))

        browser.click('[data-wish="fetch"]')
        assert now.run.id in browser.text("#sure-text") and "$" in browser.text("#sure-text")
        browser.click("#no")
        assert server.ended == []
        browser.click('[data-wish="fetch"]')
        browser.click("#yes")
        browser.wait(lambda: server.ended == [(now.run.id, "fetch")])
        browser.wait(lambda: "fetch" in browser.text("#toast"))

        browser.click(".run:nth-child(2)")
        browser.wait(lambda: "<img src=x" in browser.text(".asked"))
        assert browser.js("return document.title") == "milktea"
        browser.click("#costs")
        browser.wait(lambda: len(browser.texts("#main tr")) >= 5)
        browser.click("#lang")
        assert (
            "花费" in browser.text("#main h1")
            and browser.js("return document.documentElement.lang") == "zh"
        )
        browser.reload()
        browser.wait(lambda: len(browser.texts(".run")) == 3)
        assert "完成" in browser.text(".run:nth-child(2)")
        browser.js("sessionStorage.clear()")
        browser.reload()
        browser.wait(lambda: browser.js("return document.getElementById('key').open"))
    finally:
        server.close()
        now.end()
