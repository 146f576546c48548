"""Rows in another language: what stays as it is, what is refused of an answer, what is paid."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import bad_calls
import pytest
from fake_endpoint import USD_IN, USD_OUT, Fake, chinese
from typer.testing import CliRunner, Result

from ops.cli.app import app
from ops.errors import ConfigError, PreflightError
from ops.prepare import translate
from ops.prepare.calls import Calls
from ops.prepare.endpoint import endpoint_of, refusal
from ops.prepare.languages import Language, fault
from ops.prepare.masks import mask, unmask
from ops.prepare.work import journal_of

ZH = Language("zh")
CODE = "def f(x):\n    return x + 1"


def said(*words: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["data", "translate", *map(str, words)], env=env)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    told = [
        {"instruction": f"Say what number {n} is for in `f({n})`.", "output": f"A thing {n} of it."}
        for n in range(30)
    ]
    told += [{"instruction": "Find words that rhyme with tea.", "output": "sea, bee"}]
    told += [{"instruction": "说说茶", "output": "茶很好喝"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(told), "utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Run `ls -l` and see https://a.org/b?c=1, or mail x@y.org.", 3),
        (f"Here it is:\n{CODE}\nThat was it.", 1),
        ("```\nint x = 1;\n```\nand ```open", 2),
        ("Dear {name}, {{title}} costs $5.20 or 10% of 1,000 at 12:30 for %s", 7),
        ("<b>bold</b> and \\(x^2\\) and $a_1 = b$", 4),
        ("call get_name() with my_value, not the prose (of it); so it goes.", 2),
        ("A list of fruit:\napples;\npears;\nplums (ripe).", 0),
        ("From here to there, print it while you can. COVID-19 and H2O stay words.", 0),
        ("a bracket ⟦1⟧ of its own", 3),
    ],
)
def test_what_must_not_change_is_taken_out_and_comes_back_as_it_was(text: str, kept: int) -> None:
    masked = mask(text)
    assert len(masked.kept) == kept, masked
    assert unmask(masked.text, masked.kept) == text
    assert unmask(chinese(masked.text), masked.kept).count(CODE) == text.count(CODE)
    for spoiled in (masked.text.replace("⟦1⟧", ""), masked.text + "⟦1⟧", masked.text + " ⟦99⟧"):
        if kept or "⟦99⟧" in spoiled:
            with pytest.raises(ValueError, match=r"⟦|mark"):
                unmask(spoiled, masked.kept)


@pytest.mark.parametrize(
    ("source", "made", "why"),
    [
        ("What is the capital of France?", "法国的首都是哪里？", ""),
        ("What is the capital of France?", "法国的首都是巴黎。", "answers a question"),
        ("Describe how to make crepes.", "做可丽饼很容易。" * 12, "repeats itself"),
        ("Describe how to make crepes.", "首先你需要面粉、鸡蛋和牛奶" * 4, "times as long"),
        ("Describe how to make crepes.", "抱歉，我无法回答。", "answers instead"),
        ("Describe how to make crepes.", "Décrivez comment faire des crêpes", "letters are Han"),
        ("Describe how to make crepes.", "Describe how to make crepes.", "as it was"),
        ("Paris", "巴黎", ""),
        ("OK", "OK", ""),
    ],
)
def test_what_is_no_translation_is_refused_with_the_reason(
    source: str, made: str, why: str
) -> None:
    found = fault(source, made, ZH)
    assert (why in found) if why else not found


@pytest.mark.parametrize("seed", [5, 9])
def test_on_bad_days_no_row_is_misaligned_and_no_more_is_charged_than_allowed(seed: int) -> None:
    sums: Counter[str] = Counter()
    bad_calls.play(seed, sums)
    assert sums["done"] == 1 and sums["rows"] > 5
    assert not any(sums[name] for name in ("misaligned", "changed", "over", "twice")), sums


@pytest.mark.slow
def test_the_same_holds_for_a_hundred_days_and_twenty_kills() -> None:
    sums: Counter[str] = Counter()
    for seed in range(1, 101):
        bad_calls.play(seed, sums)
    bad_calls.kill(20, sums, rows=200)
    assert sums["rows"] > 1000 and sums["kills"] == 20
    assert not any(sums[name] for name in ("misaligned", "changed", "over", "twice")), sums


def test_a_journal_that_ends_anywhere_goes_on_and_pays_for_no_answer_twice(tmp_path: Path) -> None:
    with Fake(seed=1) as fake:
        day = bad_calls.Day(7, tmp_path, rows=12)
        endpoint = bad_calls.at(fake)
        day.run(endpoint, 100.0)
        whole, first = journal_of(day.out).read_bytes(), day.out.read_bytes()
        charged = fake.usd
        for cut in random.Random(3).sample(range(len(whole)), 4):
            day.out.unlink()
            Path(f"{day.out}.report.json").unlink()
            journal_of(day.out).write_bytes(whole[:cut])
            fake.kept, fake.twice = set(), []
            fake.keep(bad_calls.answered(journal_of(day.out)))
            day.run(endpoint, 100.0)
            assert not fake.twice
            assert day.out.read_bytes() == first
        spent = json.loads(Path(f"{day.out}.report.json").read_text("utf-8"))["spent"]
        assert spent["usd"] >= charged - 1e-6, "what was sent and never answered counts in full"


def test_the_command_prices_translates_lists_what_it_left_out_and_overwrites_nothing(
    rows: Path, tmp_path: Path
) -> None:
    paid = ["--price-in", "2", "--price-out", "6"]
    with Fake() as fake:
        asked = (rows, "--to", "zh", "--endpoint", fake.url, "--model", "m", *paid)
        priced = json.loads(said(*asked, "--plan", "--json").stdout)
        assert fake.requests == 0 and list(tmp_path.iterdir()) == [rows]
        assert said(*asked).exit_code == 2, "no cap"
        done = said(*asked, "--max-usd", "1", "--json")
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["removed"] == {"is about its own language": 1} and told["rows"] == 32
        assert fake.requests == priced["calls"] and priced["kept"] == 1
        assert 0 < fake.usd <= priced["worst_usd"]
        made = [
            json.loads(line)
            for line in (tmp_path / "rows.zh.jsonl").read_text("utf-8").splitlines()
        ]
        assert made[3]["output"] == chinese("A thing 3 of it.") and len(made) == 31
        assert "`f(3)`" in made[3]["instruction"] and made[-1]["output"] == "茶很好喝"
        assert said(*asked, "--max-usd", "1").exit_code == 2, "it exists"
        assert said(*asked, "--max-usd", "1", "--force").exit_code == 0
        assert fake.requests == priced["calls"], "the journal is the cache"


def test_a_cap_ends_the_work_before_the_call_that_could_break_it_and_more_goes_on(
    rows: Path, tmp_path: Path
) -> None:
    paid = ["--price-in", "2", "--price-out", "6", "--rows-per-call", "2"]
    with Fake() as fake:
        asked = (rows, "--to", "zh", "--endpoint", fake.url, "--model", "m", *paid)
        worst = json.loads(said(*asked, "--plan", "--json").stdout)["worst_usd"]
        short = said(*asked, "--max-usd", str(worst / 8))
        assert short.exit_code == 3 and "same command again" in short.output
        assert 0 < fake.usd <= worst / 8 and not (tmp_path / "rows.zh.jsonl").exists()
        first = fake.requests
        part = said(*asked, "--max-usd", str(worst / 8), "--partial", tmp_path / "part.jsonl")
        assert part.exit_code == 0 and "not come to" in part.output
        rest = fake.requests
        assert said(*asked, "--max-usd", str(worst * 2)).exit_code == 0
        assert fake.requests == rest + 15 - first


def test_calls_that_were_never_sent_are_not_counted_as_done(rows: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with Fake() as fake:
        endpoint, how = endpoint_of(fake.url, "m", 2.0, 6.0, None), translate.how("zh", 2)
        cap = translate.price([rows], endpoint, how).worst_usd / 8
        with pytest.raises(PreflightError, match="rows are done"):
            translate.translate(
                *([rows], tmp_path / "out.jsonl", endpoint, how),
                max_usd=cap,
                tell=lambda done, total, spent: told.append((done, total)),
            )
        assert told[-1] == (fake.requests, 15) and 0 < fake.requests < 15


def test_the_key_goes_to_the_endpoint_alone_and_into_no_file(rows: Path, tmp_path: Path) -> None:
    with Fake(key="sk-secret") as fake:
        asked = (rows, "--to", "zh", "--endpoint", fake.url, "--model", "m")
        refused = said(*asked, "--max-usd", "1")
        assert refused.exit_code == 3 and "no such key" in refused.output
        assert said(*asked, "--key-env", "MY_KEY").exit_code == 2, "it is not set"
        done = said(*asked, "--key-env", "MY_KEY", env={"MY_KEY": "sk-secret"})
        assert done.exit_code == 0 and "sk-secret" not in done.output
    for file in tmp_path.iterdir():
        assert b"sk-secret" not in file.read_bytes()


def test_a_host_elsewhere_needs_prices_and_a_key_does_not_travel_in_the_clear() -> None:
    with pytest.raises(ConfigError, match="costs is not said"):
        endpoint_of("https://api.example.com/v1", "m", None, 1.0, None)
    with pytest.raises(ConfigError, match="unencrypted"):
        endpoint_of("http://api.example.com/v1", "m", 1.0, 1.0, "K", environ={"K": "sk"})
    found = endpoint_of("https://api.example.com", "m", 1.0, 1.0, "K", environ={"K": "sk"})
    assert found.url == "https://api.example.com/v1/chat/completions" and "sk" not in repr(found)


def test_an_endpoint_that_bills_more_than_was_asked_for_ends_the_work(rows: Path) -> None:
    def long(content: str) -> list[str]:
        return [text + "话" for text in json.loads(content[content.rfind("\n[") :])]

    with Fake(reply=long) as fake:
        real = fake._charge

        def charge(call: str, usage: dict[str, int]) -> None:
            usage["completion_tokens"] *= 40
            real(call, usage)

        fake._charge = charge  # type: ignore[method-assign]
        asked = (rows, "--to", "zh", "--endpoint", fake.url, "--model", "m", "--at-once", "1")
        done = said(*asked, "--price-in", "2", "--price-out", "6", "--max-usd", "9")
    assert done.exit_code == 3 and "no cap holds" in " ".join(done.output.split())
    assert fake.requests == 1 and "another --endpoint" in " ".join(done.output.split())
    with Fake() as fake:
        fake._charge = charge  # type: ignore[method-assign]
        asked = (rows, "--to", "zh", "--endpoint", fake.url, "--model", "m")
        assert said(*asked).exit_code == 0, "a template may be long where nothing is charged"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b'{"error": {"message": "the prompt has 3000 tokens"}}', "the prompt has 3000 tokens"),
        (b'{"error": "busy"}', '{"error": "busy"}'),
        (b"[1]", "[1]"),
        (b'{"error": {"message": ["no text"]}}', '{"error": {"message": ["no text"]}}'),
    ],
)
def test_a_refusal_is_told_in_the_words_of_the_endpoint(said: bytes, told: str) -> None:
    assert str(refusal(400, said, None)) == f"status 400: {told}"


def test_a_model_that_cannot_do_it_is_given_up_early_and_one_without_json_has_its_own_prompt(
    rows: Path, tmp_path: Path
) -> None:
    with Fake(reply=lambda content: ["yes"]) as fake:
        asked = (rows, "--to", "zh", "--endpoint", fake.url, "--model", "m")
        done = said(*asked)
        told = " ".join(done.output.split())
        assert done.exit_code == 3 and "not up to it" in told
        assert "another --model, or --prompt" in told and "goes on" not in told
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"instruction": "Say it.", "output": "It is said now."}), "utf-8")
    with Fake(reply=lambda content: "It is English.") as fake:
        asked = (few, "--to", "zh", "--endpoint", fake.url, "--model", "m")
        none = said(*asked, "--prompt", "{text}")
        assert none.exit_code == 3 and "no row could be" in none.output
        assert fake.requests == 2, "asked in the same words it would say the same"
        assert not (tmp_path / "few.zh.jsonl").exists()
    with Fake() as fake:
        asked = (rows, "--to", "zh", "--endpoint", fake.url, "--model", "m")
        done = said(*asked, "--prompt", "Into {language}:\n{text}", tmp_path / "plain.jsonl")
        assert done.exit_code == 0, done.output
        assert fake.bodies[0]["messages"][0]["content"].startswith("Into Simplified Chinese:\n")
    [first, *_] = (tmp_path / "plain.jsonl").read_text("utf-8").splitlines()
    assert json.loads(first)["output"] == chinese("A thing 0 of it.")


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    endpoint = endpoint_of("127.0.0.1:1", "m", USD_IN, USD_OUT, None)
    held = Calls(tmp_path / "x.calls.jsonl", endpoint, 1.0)
    try:
        with pytest.raises(PreflightError, match="another process"):
            Calls(tmp_path / "x.calls.jsonl", endpoint, 1.0)
    finally:
        held.close()
