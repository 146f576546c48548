"""The server of the page of runs: who may ask, what is told, and which ends are taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from desk import HOSTILE, TOKEN, Served, Told, done, going

import rig
from ops.run import wishes
from ops.web import facts
from ops.web.app import PAGE
from trainer.wire.browser import content_policy
from trainer.wire.events import Step


@pytest.fixture
def own(tmp_path: Path) -> rig.Rig:
    return rig.Rig(tmp_path)


@pytest.fixture
def now(own: rig.Rig) -> Iterator[Told]:
    """A run that trains, owned by this process."""
    told = going(own)
    yield told
    told.end()


@pytest.fixture
def served(own: rig.Rig) -> Iterator[Served]:
    server = Served(own.runs, lambda run, wish: wishes.send(run.folder, wish))
    yield server
    server.close()


def ask(served: Served, path: str, body: Any = None, **headers: str) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"} | headers
    method = "GET" if body is None else "POST"
    return requests.request(method, served.url + path, json=body, headers=headers, timeout=60)


def test_only_this_page_with_the_token_may_ask_and_only_by_the_name_of_loopback(
    served: Served,
) -> None:
    assert ask(served, "/runs").json() == []
    for headers, status in (
        ({"Authorization": ""}, 401),
        ({"Authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Host": f"evil.example:{served.port}"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://127.0.0.1:{served.port + 1}"}, 403),
    ):
        for path in ("/runs", "/costs", "/runs/x", "/nothing"):
            assert ask(served, path, **headers).status_code == status, headers
        assert ask(served, "/runs/x/end", {"wish": "destroy"}, **headers).status_code == status
    assert ask(served, "/runs", Origin=served.url).status_code == 200
    page = requests.get(served.url, timeout=60)
    assert page.content == PAGE.read_bytes() and len(page.content) < 60_000
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert TOKEN not in page.text and "Server" not in page.headers
    assert "http://" not in page.text.replace("http://www.w3.org/", ""), "it asks no other host"
    assert policy == content_policy(page.text)


def test_a_run_is_told_with_its_money_phase_curve_and_who_looks_after_it(
    own: rig.Rig, now: Told, served: Served
) -> None:
    over = done(own, "tea", 2, 0.5)
    newest, older = ask(served, "/runs").json()
    assert (newest["id"], older["id"]) == (now.run.id, over.run.id)
    assert newest["owner"] == "detached" and newest["stage"] == "training"
    assert newest["step"] == 241 and newest["total_steps"] == 400
    assert 400 <= newest["left_s"] <= 520 and 0 < newest["spent_usd"] < newest["max_usd"] == 1.0
    assert older["done"] and older["owner"] == "" and older["left_s"] is None
    told = ask(served, f"/runs/{now.run.id}").json()
    assert len(told["curve"]) == 241 and told["curve"][-1] == [241, 1.12]
    assert [h[0] for h in told["held_out"]] == [40, 80, 120, 160, 200, 240]
    assert [c["wish"] for c in told["choices"]] == [c.wish for c in now.run.choices()]
    assert all("$" in c["text"] for c in told["choices"])
    told = ask(served, f"/runs/{over.run.id}").json()
    assert told["score"] == [0.02, 0.61, 64] and told["choices"] == []
    assert told["samples"][0]["prompt"] == "什么是免赔额？"
    months = ask(served, "/costs").json()["months"]
    assert sum(m["runs"] for m in months) >= 2


def test_an_end_is_taken_only_where_it_is_offered_and_goes_to_the_owner(
    own: rig.Rig, now: Told, served: Served
) -> None:
    over = done(own, "tea", 2, 0.5)
    for run_id, wish, status in (
        (over.run.id, "destroy", 409),
        (now.run.id, "leave", 409),
        (now.run.id, "format", 409),
        (now.run.id[:-2], "destroy", 409),
        ("..%2F..", "destroy", 409),
    ):
        assert ask(served, f"/runs/{run_id}/end", {"wish": wish}).status_code == status
    assert ask(served, f"/runs/{now.run.id}/end", [1]).status_code == 400
    assert served.ended == []
    assert ask(served, f"/runs/{now.run.id}/end", {"wish": "fetch"}).json() == {"holds": "fetch"}
    second = ask(served, f"/runs/{now.run.id}/end", {"wish": "destroy"}).json()
    assert second == {"holds": "fetch"} and wishes.read(now.run.folder) == "fetch"


def test_what_a_box_and_its_rows_say_is_bounded_and_plain_and_a_bad_journal_hides_no_other(
    own: rig.Rig, served: Served
) -> None:
    told = done(own, "odd", 1, 0.1, sample=HOSTILE)
    text = told.run.folder / "events.jsonl"
    text.write_text(
        text.read_text() + "\n".join(["{", "[]", '{"t":1,"event":"step","step":9e99}', ""])
    )
    (told.run.folder / "log.txt").write_bytes(b"\xff\x1b[2J" * 99_999)
    bad = own.runs / "bad-20260101-000000-ab12"
    bad.mkdir()
    (bad / "journal.jsonl").write_text("{]\n{]\n")
    rows = ask(served, "/runs").json()
    assert [row["id"] for row in rows] == [told.run.id, bad.name] and "cannot" in rows[1]["error"]
    run = ask(served, f"/runs/{told.run.id}").json()
    assert run["samples"][0]["prompt"].endswith("\\x1b[2J\\u202e")
    assert len(run["log"]) < 5 * facts.TAIL_BYTES and "\x1b" not in json.dumps(
        run, ensure_ascii=False
    )


def test_a_long_curve_is_thinned_and_a_file_that_was_begun_again_is_read_anew(
    own: rig.Rig,
) -> None:
    told = Told(own, "long", 1.7e9)
    trace = facts.Trace(told.run)
    for n in range(1, 10_000):
        trace._hear(Step(t=n, step=n, loss=1 / n, learning_rate=1, grad_norm=1))
    assert facts.MOST_POINTS / 2 < len(trace.curve) <= 2 * facts.MOST_POINTS
    assert trace.curve[0][0] < 20 and trace.curve[-1][0] > 9_900
    told.train(3, 3)
    trace.read_new()
    assert len(trace.curve) == 3, "the first look at the file begins anew"
    told.train(1, 3)
    trace.read_new()
    assert len(trace.curve) == 4
    (told.run.folder / "events.jsonl").unlink()
    told.train(2, 2)
    trace.read_new()
    assert len(trace.curve) == 2
    told.end()
