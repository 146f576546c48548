"""The page in a real browser: it streams, stops, outlives a reload, takes no answer for HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import ENTER, Browser
from served import Running

from trainer.practice.model import HERE as PRACTICE
from trainer.serve.engine import Engine
from trainer.serve.models import open_models

pytestmark = pytest.mark.slow

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    "<a href=\"javascript:document.title='owned'\">x</a> [x](javascript:1) `<b>` \u202e\n"
    "```html\n</code></pre><script>document.title='owned'</script>\n```\n<style>*{display:none}"
)
# stands in for the server's stream; `arguments` are texts, told one after another
SAY = """
const texts = arguments[0];
window.fetch = async () => new Response(new ReadableStream({ async start(stream) {
  const write = text => stream.enqueue(new TextEncoder().encode('data: ' + text + '\\n\\n'));
  const say = choice => write(JSON.stringify({ choices: [{ finish_reason: null, ...choice }] }));
  for (const text of texts) say({ delta: { content: text } });
  say({ delta: {}, finish_reason: 'stop' });
  write('[DONE]');
  stream.close();
} }), { status: 200 });
"""


@pytest.fixture(scope="module")
def endless(
    results: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server whose models never stop by themselves."""
    models = open_models(results, PRACTICE, torch.device("cpu"))
    models.voices = {n: replace(v, stops=frozenset()) for n, v in models.voices.items()}
    running = Running(Engine(models, 8), tmp_path_factory.mktemp("endless"))
    yield running
    running.end()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.end()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A new tab each; what the page's policy refused fails the test."""
    chromium.tab()
    chromium.look(1280, 860)
    yield chromium
    assert not [line for line in chromium.log() if "Security Policy" in line]


def opened(browser: Browser, server: Running) -> Browser:
    browser.go(f"{server.url}/#{server.token}")
    browser.wait(lambda: len(browser.texts("#a option")) == 3)
    return browser


def ask(browser: Browser, text: str) -> None:
    browser.type("#text", text + ENTER)


def ended(browser: Browser, count: int = 1) -> None:
    script = "return S.turns.flatMap(t => t.answers).filter(a => a.why && !running.has(a)).length"
    browser.wait(lambda: browser.js(script) >= count)


def state(browser: Browser, what: str) -> Any:
    return browser.js(f"return {what}")


def test_an_answer_streams_and_is_counted_and_the_token_leaves_the_address(
    browser: Browser, server: Running
) -> None:
    opened(browser, server)
    assert state(browser, "location.href") == f"{server.url}/"
    ask(browser, "Where does Anton live?")
    ended(browser)
    said = server.chat("Where does Anton live?", max_tokens=512)
    assert browser.texts(".says") == [
        "Where does Anton live?",
        said["choices"][0]["message"]["content"],
    ]
    assert f"{said['usage']['completion_tokens']} tokens" in browser.text(".told")
    assert browser.text("#text") == "" and browser.js("return document.activeElement.id") == "text"


def test_stop_stops_the_model_and_keeps_what_was_said(browser: Browser, endless: Running) -> None:
    opened(browser, endless)
    ask(browser, "Say much.")
    browser.wait(lambda: len(browser.text(".answer .says")) > 20)
    assert state(browser, "$('send').title") == "Stop"
    browser.click("#send")
    ended(browser)
    assert browser.text(".told").endswith("stopped") and len(browser.text(".answer .says")) > 20
    browser.wait(lambda: endless.engine.load == (0, 0))
    assert endless.engine.counts.ended["cancelled"] >= 1


def test_a_reload_in_mid_answer_keeps_the_conversation_and_stops_the_model(
    browser: Browser, endless: Running
) -> None:
    opened(browser, endless)
    ask(browser, "Say much.")
    browser.wait(lambda: len(browser.text(".answer .says")) > 60)
    browser.reload()
    browser.wait(lambda: "interrupted" in browser.text(".told"))
    assert len(browser.text(".answer .says")) > 20
    browser.wait(lambda: endless.engine.load == (0, 0))
    browser.click('[aria-label="Answer again"]')
    browser.wait(lambda: len(browser.text(".answer .says")) > 20 and state(browser, "running.size"))
    browser.js("halt()")
    ended(browser)


def test_two_tabs_are_two_conversations_at_once(browser: Browser, endless: Running) -> None:
    first = browser.handle
    opened(browser, endless)
    ask(browser, "The first.")
    second = browser.tab()
    opened(browser, endless)
    assert browser.texts(".says") == []
    ask(browser, "The second.")
    browser.wait(lambda: len(browser.text(".answer .says")) > 5)
    browser.to(first)
    browser.wait(lambda: len(browser.text(".answer .says")) > 5)
    assert browser.texts(".asked .says") == ["The first."]
    browser.js("halt()")
    browser.to(second)
    assert browser.texts(".asked .says") == ["The second."]
    browser.js("halt()")
    browser.wait(lambda: endless.engine.load == (0, 0))


def test_an_answer_of_html_is_text(browser: Browser, server: Running) -> None:
    opened(browser, server)
    browser.js(SAY, [HOSTILE[n : n + 7] for n in range(0, len(HOSTILE), 7)])
    ask(browser, "<b>bold?</b>")
    ended(browser)
    assert state(browser, "S.turns[0].answers[0].text") == HOSTILE
    tags = "return [...document.querySelectorAll('#talk .says *')].map(x => x.tagName)"
    assert set(browser.js(tags)) <= {"CODE", "PRE"}
    assert browser.js("return document.querySelectorAll('script').length") == 1
    assert browser.text(".asked .says") == "<b>bold?</b>"
    assert "<img src=x onerror=" in browser.text(".answer .says")
    assert state(browser, "document.title") == "milktea"
    browser.reload()
    browser.wait(lambda: "<img src=x" in browser.text(".answer .says"))
    assert state(browser, "document.title") == "milktea"


KEY = """
const [type, more] = arguments, area = document.getElementById('text');
const made = type.startsWith('composition') ? new CompositionEvent(type, { bubbles: true })
  : new KeyboardEvent(type, { bubbles: true, cancelable: true, key: 'Enter', ...more });
area.dispatchEvent(made);
return S.turns.length;
"""


def test_enter_never_sends_while_an_input_method_composes(
    browser: Browser, server: Running
) -> None:
    opened(browser, server)
    browser.js(SAY, ["好"])
    browser.js("$('text').value = '你好'; $('text').dispatchEvent(new Event('input'))")

    def key(kind: str, **more: Any) -> int:
        return int(browser.js(KEY, kind, more))

    # Chrome and Firefox: the Enter that confirms comes within the composition
    assert key("compositionstart") == 0
    assert key("keydown", keyCode=229, isComposing=True) == 0
    assert key("keydown", keyCode=13) == 0
    # Safari: the composition ends first, the Enter follows in the same task
    end = "area.dispatchEvent(new CompositionEvent('compositionend', { bubbles: true }));"
    safari = KEY.replace("area.dispatchEvent(made);", f"{end} area.dispatchEvent(made);")
    assert browser.js(safari, "keydown", {"keyCode": 229}) == 0
    assert key("keydown", shiftKey=True) == 0
    # Chrome on macOS: an Enter that should send may bear 229 too
    assert key("keydown", keyCode=229) == 1
    ended(browser)


def test_a_real_composition_sends_nothing_until_enter_comes_alone(
    browser: Browser, server: Running
) -> None:
    opened(browser, server)
    browser.js("$('text').focus()")
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    browser.chrome("Input.imeSetComposition", text="nihao", selectionStart=5, selectionEnd=5)
    browser.chrome("Input.dispatchKeyEvent", type="rawKeyDown", **enter)
    assert state(browser, "S.turns.length") == 0
    browser.chrome("Input.insertText", text="你好")
    browser.chrome("Input.dispatchKeyEvent", type="keyUp", **enter)
    assert state(browser, "[S.turns.length, $('text').value]") == [0, "你好"]
    browser.type("#text", ENTER)
    ended(browser)
    assert browser.text(".asked .says") == "你好"


def test_two_models_are_compared_blind_and_a_vote_becomes_a_pair(
    browser: Browser, server: Running
) -> None:
    opened(browser, server)
    browser.click("#two")
    browser.click("#blind")
    ask(browser, "Who sells tea in the town?")
    ended(browser, 2)
    assert browser.texts(".who b") == ["Answer 1", "Answer 2"]
    assert browser.texts(".votes .pill") == ["Answer 1 is better", "Alike", "Answer 2 is better"]
    assert "tokens" not in "".join(browser.texts(".told"))
    models = state(browser, "S.turns[0].answers.map(a => [a.model, a.text])")
    texts = {model: text for model, text in models}
    assert set(texts) == {"zh-1", "base"} and texts["zh-1"] != texts["base"]
    browser.click(".votes .pill:last-child")
    browser.wait(lambda: sorted(browser.texts(".who b")) == ["base", "zh-1"])
    worse, better = (text for _, text in models)
    row = json.loads((server.feedback / "feedback.pairs.jsonl").read_text().splitlines()[-1])
    assert row["chosen"][0]["content"] == better and row["rejected"][0]["content"] == worse
    assert f"{models[1][0]} 1" in browser.text("#tally")


def test_answers_are_rated_edited_asked_again_and_saved_as_rows(
    browser: Browser, server: Running
) -> None:
    opened(browser, server)
    ask(browser, "Where does Anton live?")
    ended(browser)
    first = state(browser, "S.turns[0].answers[0].text")
    browser.click(".answer .up")
    browser.wait(lambda: state(browser, "S.turns[0].answers[0].liked") is True)
    browser.click('.answer [aria-label="Edit"]')
    browser.js("document.querySelector('.answer textarea').value = 'In 奥尔德穆尔.'")
    browser.click(".answer .pill.go")
    browser.wait(lambda: browser.text(".answer .says") == "In 奥尔德穆尔.")
    rows = [json.loads(x) for x in (server.feedback / "feedback.jsonl").read_text().splitlines()]
    assert [r["messages"][-1]["content"] for r in rows][-2:] == [first, "In 奥尔德穆尔."]
    browser.js("window.saved = []; URL.createObjectURL = x => { x.text().then(t => saved.push(t)); "
               "return '#' }")  # fmt: skip
    browser.click("#export")
    text = browser.wait(lambda: state(browser, "saved[0]"))
    assert [m["content"] for m in json.loads(text)["messages"]] == [
        "Where does Anton live?",
        "In 奥尔德穆尔.",
    ]
    browser.click('[aria-label="Answer again"]')
    browser.wait(lambda: browser.text(".answer .says") == first)
    assert browser.wait(lambda: "2/2" in browser.text(".answer .foot"))
    browser.click('[aria-label="Earlier answer"]')
    assert browser.text(".answer .says") == "In 奥尔德穆尔."
    browser.click('.asked [aria-label="Edit"]')
    browser.js("document.querySelector('.asked textarea').value = 'Where does Bo live?'")
    browser.click(".asked .pill.go")
    ended(browser)
    assert browser.texts(".asked .says") == ["Where does Bo live?"]


def test_settings_reach_the_model_and_a_refusal_is_told(browser: Browser, server: Running) -> None:
    opened(browser, server)
    browser.click("#settings")
    fields = {"system": "Be brief.", "temperature": 1.5, "seed": 7, "most": 5}
    for name, value in fields.items():
        script = "$(arguments[0]).value = arguments[1]; $(arguments[0]).oninput()"
        browser.js(script, name, value)
    browser.click("#options .go")
    assert browser.text("#how") == "Temperature 1.5 · at most 5 tokens"
    ask(browser, "Where does Anton live?")
    ended(browser)
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Where does Anton live?"}]  # fmt: skip
    said = server.chat(messages=messages, temperature=1.5, seed=7, max_tokens=5)
    assert state(browser, "S.turns[0].answers[0].text") == said["choices"][0]["message"]["content"]
    browser.js("S.most = '100000'")
    ask(browser, "And Bo?")
    browser.wait(lambda: "context" in browser.text(".fault"))


def test_without_a_token_the_page_asks_for_it_and_a_wrong_one_opens_nothing(
    browser: Browser, server: Running
) -> None:
    browser.go(f"{server.url}/")
    browser.wait(lambda: state(browser, "$('key').open"))
    browser.type("#token", "wrong" + ENTER)
    browser.wait(lambda: state(browser, "$('key').open") and browser.text("#toast"))
    assert browser.texts("#a option") == []
    browser.js("$('token').value = arguments[0]", f"{server.url}/#{server.token}")
    browser.click("#key .go")
    browser.wait(lambda: browser.texts("#a option"))


def test_it_speaks_chinese_where_the_browser_does_and_fits_a_phone(
    browser: Browser, server: Running
) -> None:
    browser.look(360, 640, phone=True)
    opened(browser, server)
    browser.click("#lang")
    assert state(browser, "$('text').placeholder") == "说点什么"
    assert state(browser, "document.documentElement.lang") == "zh"
    browser.click("#two")
    assert state(browser, "document.documentElement.scrollWidth") <= 360
    browser.click("#lang")


def test_on_a_rented_machine_the_page_shows_dollars_and_the_end(
    browser: Browser, server: Running
) -> None:
    opened(browser, server)
    assert not state(browser, "$('meter').offsetParent !== null"), "nobody rented this machine"
    told = {"usd": 0.1234, "usd_per_hour": 0.36, "max_usd": 0.5, "ends_in_s": 1770.0}
    server.meter.write_text(json.dumps(told))
    try:
        browser.look(360, 640, phone=True)
        opened(browser, server)
        browser.js("location.reload()")
        browser.wait(lambda: state(browser, "$('meter').textContent"))
        assert browser.text("#meter") == "$0.123 of $0.50 · machine ends in 30 min"
        browser.click("#lang")
        assert browser.text("#meter") == "$0.123 / $0.50 · 机器还剩 30 分钟"
        tops = "[...document.querySelectorAll('header .tool')].filter(x => x.offsetParent)"
        lines = set(state(browser, f"{tops}.map(x => x.offsetTop)"))
        assert len(lines) == 1, "the tools stand in one line on a phone"
        browser.click("#lang")
        assert state(browser, "document.documentElement.scrollWidth") <= 360
        server.meter.write_text(json.dumps(told | {"usd": 0.2, "ends_in_s": 60.0}))
        browser.js("meter()")
        browser.wait(lambda: "$0.200 of $0.50" in browser.text("#meter"))
    finally:
        server.meter.unlink()
