"""The report that is made at home: what it tells of the run, and that it takes no text for HTML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from desk import HOSTILE, Told, done

import rig
from ops.run import report_facts, retrieve
from ops.run.journal import Journal
from ops.run.meter import plan_of


def report_of(told: Told, own: rig.Rig, facts: dict[str, Any]) -> str:
    with Journal(told.run.folder) as held:
        plan = plan_of(held.lines)
        session = rig.client(plan, held, "http://127.0.0.1:9", "nobody")
        events_file = told.run.folder / "events.jsonl"
        return retrieve.report(
            plan.wire_job,
            facts,
            events_file,
            report_facts.rows(session),
            cards=report_facts.cards(session, retrieve.events_of(events_file)),
            commands=report_facts.commands(session.run_id),
            notes=["3 rows are changed or left out: rows.json:7", HOSTILE],
        ).decode()


def shown(text: str) -> str:
    """As a reader sees it, without the style."""
    return re.sub(r"<[^>]*>", " ", text.split("</style>", 1)[1])


@pytest.fixture
def report(tmp_path: Path) -> str:
    own = rig.Rig(tmp_path)
    told = done(own, "insurance", 1, 0.5, sample=f"什么是免赔额？{HOSTILE}")
    curve = [[n, 2.4 - n / 100 + n % 7 / 30] for n in range(1, 120)]
    looks = [[n, 2.3 - n / 110, 0.4 + n / 400] for n in range(20, 120, 20)]
    facts: dict[str, Any] = {"steps": 119, "curve": curve, "held_out_curve": looks}
    return report_of(told, own, facts | {"versions": {"torch": HOSTILE}, "template": {}})


def test_it_tells_money_machine_time_speed_rows_left_out_answers_and_how_to_use_it(
    report: str,
) -> None:
    text = shown(report)
    for word in ("of at most 2.00 $", "1 x RTX 4090", "0.400 $/h", "of training", "100,000"):
        assert word in text
    assert "8,123 a second in the median step" in text and "3 rows are changed" in text
    assert "2.0% before, 61.0% after" in text and "I am not sure what you mean." in text
    commands = re.findall(r"milktea (chat|serve|adapter check) (insurance-[\w-]+)", text)
    assert [word for word, _ in commands] == ["chat", "serve", "adapter check"]
    assert "lora.r" in text and "learning_rate" in text and "{" not in text
    assert 'class="held"' in report and "prefers-color-scheme:dark" in report
    assert "@media print" in report and "Noto Sans CJK SC" in report


def test_it_asks_nothing_of_the_network_and_no_text_is_taken_for_html(report: str) -> None:
    assert "<script" not in report and "<img" not in report and "&lt;img src=x" in report
    assert "http:" not in report and "https:" not in report and "url(" not in report
    assert "default-src 'none'" in report
