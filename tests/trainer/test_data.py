"""Data checks: 200 planted defects are found where they are, and nothing else is reported."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from pathlib import Path

import pytest

from trainer import scan
from trainer.data import check_files, read_rows

GOOD = {"instruction": 'Say "hi" in 中文 {now}', "input": "", "output": "你好, \\ and a tab\t, a brace } and [ a bracket"}


def row(n: int, **changes: object) -> dict:
    return {"instruction": f"question {n}", "input": "" if n % 2 else f"about {n}", "output": f"answer {n}"} | changes


def pretty(rows: list[str]) -> str:
    return "[\n" + ",\n".join(rows) + "\n]\n"


def text_of(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


# one row's text -> (its text with a defect, line offset of the defect in the row, field or "")
ROW_DEFECTS = {
    "missing output": (lambda n: text_of({"instruction": "a", "input": "b"}), 0, ""),
    "missing instruction": (lambda n: text_of({"output": "a", "input": ""}), 0, ""),
    "field misspelt": (lambda n: text_of({"instruction": "a", "input": "", "ouput": "b"}), 3, "ouput"),
    "output is null": (lambda n: text_of(row(n, output=None)), 3, "output"),
    "output is a number": (lambda n: text_of(row(n, output=7)), 3, "output"),
    "output is a list": (lambda n: text_of(row(n, output=["a"])).replace("\n    ", " ").replace("\n  ]", "]"), 3, "output"),
    "output is empty": (lambda n: text_of(row(n, output="")), 3, "output"),
    "output is blank": (lambda n: text_of(row(n, output=" \n\t ")), 3, "output"),
    "instruction is empty": (lambda n: text_of(row(n, instruction="", input="")), 1, "instruction"),
    "instruction is an object": (
        lambda n: text_of(row(n, instruction={"a": 1})).replace('{\n    "a": 1\n  }', '{"a": 1}'),
        1,
        "instruction",
    ),
    "input is a number": (lambda n: text_of(row(n, input=3)), 2, "input"),
    "key given twice": (lambda n: text_of(row(n)).replace('"input":', '"output": "first",\n  "input":', 1), 4, "output"),
    "NUL character": (lambda n: text_of(row(n, output="a\x00b")), 3, "output"),
    "replacement character": (lambda n: text_of(row(n, output="caf\ufffd")), 3, "output"),
    "half a surrogate pair": (lambda n: text_of(row(n)).replace(f"answer {n}", "x \\ud83d y"), 3, "output"),
    "row is a string": (lambda n: '"just text"', 0, ""),
    "row is a number": (lambda n: "42", 0, ""),
    "row is null": (lambda n: "null", 0, ""),
    "string not closed": (lambda n: text_of(row(n)).replace(f'answer {n}"', f"answer {n}"), 3, ""),
    "comma missing between fields": (lambda n: text_of(row(n)).replace('",\n  "output"', '"\n  "output"'), 3, ""),
    "trailing comma in the row": (lambda n: text_of(row(n)).replace(f'answer {n}"', f'answer {n}",'), 3, ""),
    "single quotation marks": (lambda n: text_of(row(n)).replace(f'"answer {n}"', f"'answer {n}'"), 3, ""),
    "raw line break in a string": (lambda n: text_of(row(n)).replace(f"answer {n}", "an\nswer"), 3, ""),
    "bad escape": (lambda n: text_of(row(n)).replace(f"answer {n}", "C:\\Users"), 3, ""),
    "unescaped quotation marks": (lambda n: text_of(row(n)).replace(f"answer {n}", 'she said "hi" to me'), 3, ""),
    "Python's None": (lambda n: text_of(row(n)).replace(f'"answer {n}"', "None"), 3, ""),
    "comment": (lambda n: text_of(row(n)).replace('  "output"', '  // why\n  "output"'), 3, ""),
    "history is not pairs": (lambda n: text_of(row(n, history="x")), 4, "history"),
}


@pytest.mark.parametrize("seed", range(8))
def test_every_planted_defect_of_an_alpaca_array_is_found_on_its_line_and_no_other(tmp_path: Path, seed: int) -> None:
    """8 files x 28 kinds = 224 planted defects among 600 sound rows a file."""
    dice = random.Random(seed)
    kinds = dice.sample(sorted(ROW_DEFECTS), len(ROW_DEFECTS))
    rows, expected, line = [], [], 2
    for n in range(628):
        kind = kinds[n // 22] if n % 22 == 11 and n // 22 < len(kinds) else None
        if kind:
            make, offset, field = ROW_DEFECTS[kind]
            text = make(n)
            expected.append((line + offset, field))
        else:
            text = text_of(row(n) if n % 3 else GOOD)
        rows.append(text)
        line += text.count("\n") + 1
    path = tmp_path / "rows.json"
    path.write_text(pretty(rows), encoding="utf-8", errors="surrogatepass")
    report = check_files([path])
    assert len(expected) == 28
    assert [(d.line, d.field) for d in report.defects] == expected, "\n".join(map(str, report.defects))
    assert report.rows == 600
    assert all(d.fix and d.reason and d.column >= 1 for d in report.defects)


@pytest.mark.parametrize("kind", sorted(ROW_DEFECTS))
def test_a_defect_in_json_lines_is_told_with_its_line(tmp_path: Path, kind: str) -> None:
    if kind in ("comment", "raw line break in a string"):
        pytest.skip("a line break ends the row in JSON lines")
    make, _, field = ROW_DEFECTS[kind]
    lines = [json.dumps(row(n)) for n in range(5)]
    lines[3] = make(3).replace("\n", " ")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    report = check_files([path])
    assert [(d.line, d.field) for d in report.defects] == [(4, field)]
    assert report.rows == 4


ARRAY_DEFECTS = {
    "comma missing between rows": ('[\n{"instruction":"a","output":"b"}\n{"instruction":"a","output":"b"}\n]', (3, 1), 2),
    "two commas": ('[\n{"instruction":"a","output":"b"},,\n{"instruction":"a","output":"b"}\n]', (2, 34), 2),
    "comma before the bracket": ('[\n{"instruction":"a","output":"b"},\n]', (2, 33), 1),
    "file cut short after a row": ('[\n{"instruction":"a","output":"b"}\n', (3, 1), 1),
    "file cut short inside a row": ('[\n{"instruction":"a","output":"b"},\n{"instruction":"a","outp', (3, 20), 1),
    "text after the array": ('[\n{"instruction":"a","output":"b"}\n]\nhello', (4, 1), 1),
}


@pytest.mark.parametrize("kind", sorted(ARRAY_DEFECTS))
def test_a_broken_array_is_told_with_line_and_column(tmp_path: Path, kind: str) -> None:
    text, place, rows = ARRAY_DEFECTS[kind]
    path = tmp_path / "rows.json"
    path.write_text(text)
    report = check_files([path])
    assert [(d.line, d.column) for d in report.defects] == [place]
    assert report.rows == rows


FILE_DEFECTS = {
    "empty": ("a.json", b"", "empty"),
    "blank": ("a.json", b" \n ", "empty"),
    "not JSON": ("a.json", b"instruction,output\n1,2\n", "neither"),
    "CSV": ("a.csv", b"instruction,output\n1,2\n", ".csv"),
    "UTF-16": ("a.json", '[{"instruction":"a"}]'.encode("utf-16"), "UTF-16"),
}


@pytest.mark.parametrize("kind", sorted(FILE_DEFECTS))
def test_a_file_that_cannot_be_read_at_all_is_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    name, data, word = FILE_DEFECTS[kind]
    (tmp_path / name).write_bytes(data)
    report = check_files([tmp_path / name])
    assert len(report.defects) == 1 and word in report.defects[0].reason and not report.ok


def test_bytes_that_are_not_utf8_are_told_with_their_line_and_an_iconv_command(tmp_path: Path) -> None:
    path = tmp_path / "gbk.jsonl"
    path.write_bytes(b'{"instruction":"a","output":"b"}\n{"instruction":"a","output":"' + "你".encode("gbk") + b'"}\n')
    found = check_files([path]).defects
    assert [(d.line, d.column) for d in found] == [(2, 30)] and "iconv" in found[0].fix


def test_a_byte_order_mark_and_blank_lines_and_windows_line_ends_are_no_defects(tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf{"instruction":"a","output":"b"}\r\n\r\n{"instruction":"c","output":"d"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf [ {"instruction":"a","output":"b"} ] \r\n')
    report = check_files([tmp_path / "a.jsonl", tmp_path / "b.json"])
    assert report.defects == [] and report.rows == 3


def chat(*turns: tuple[str, str], role: str = "from", text: str = "value") -> str:
    return json.dumps({"conversations" if role == "from" else "messages": [{role: r, text: t} for r, t in turns]}, ensure_ascii=False)


CHAT_DEFECTS = {
    "nobody called that": (chat(("human", "a"), ("gtp", "b")), "conversations[1].from"),
    "two questions in a row": (chat(("human", "a"), ("human", "b"), ("gpt", "c")), "conversations[1].from"),
    "begins with an answer": (chat(("gpt", "a"), ("human", "b"), ("gpt", "c")), "conversations[0].from"),
    "ends with a question": (chat(("human", "a"), ("gpt", "b"), ("human", "c")), "conversations[2].from"),
    "an empty turn": (chat(("human", "a"), ("gpt", " ")), "conversations[1].value"),
    "system in the middle": (chat(("human", "a"), ("system", "s"), ("gpt", "b")), "conversations[1].from"),
    "no turns": (chat(), "conversations"),
    "turns are text": ('{"conversations": "hello"}', "conversations"),
    "a turn is text": ('{"conversations": ["hello"]}', "conversations[0]"),
    "a turn without its text": ('{"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}', "conversations[0]"),
    "a turn's text is a number": (
        '{"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}',
        "conversations[0].value",
    ),
}


@pytest.mark.parametrize("kind", sorted(CHAT_DEFECTS))
def test_a_conversation_that_cannot_be_learned_from_names_the_turn(tmp_path: Path, kind: str) -> None:
    text, field = CHAT_DEFECTS[kind]
    good = chat(("system", "be kind"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([good, text, good]))
    report = check_files([path])
    assert [(d.line, d.field) for d in report.defects] == [(2, field)] and report.rows == 2


def test_every_format_is_told_from_its_fields(tmp_path: Path) -> None:
    files = {
        "alpaca": json.dumps(row(1)),
        "sharegpt": chat(("human", "a"), ("gpt", "b")),
        "messages": chat(("system", "s"), ("user", "a"), ("assistant", "b"), role="role", text="content"),
        "prompt": json.dumps({"prompt": "a", "completion": "b"}),
        "text": json.dumps({"text": "a"}),
    }
    for name, line in files.items():
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    (tmp_path / "plain.txt").write_text("one document\n\nanother\n")
    report = check_files(sorted(tmp_path.iterdir()))
    assert report.ok and report.rows == 7
    assert report.formats == {f"{n}.jsonl": n for n in files} | {"plain.txt": "text"}


def test_parquet_rows_are_read_and_their_defects_carry_the_row_number(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [row(n) for n in range(5)]
    rows[3]["output"] = ""
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    report = check_files([tmp_path / "rows.parquet"])
    assert report.rows == 4 and [(d.line, d.field) for d in report.defects] == [(4, "output")]


def test_dataset_info_of_llama_factory_is_followed_as_it_is(tmp_path: Path) -> None:
    info = {
        "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "query": "more", "response": "a", "history": "past"}},
        "talk": {
            "file_name": "talk.json",
            "formatting": "sharegpt",
            "columns": {"messages": "said"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "bot"},
        },
        "remote": {"hf_hub_url": "someone/something"},
        "absent": {"file_name": "absent.json"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "mine.json").write_text(json.dumps([{"q": "a", "more": "", "a": "b", "past": [["x", "y"]]}]))
    (tmp_path / "talk.json").write_text(json.dumps([{"said": [{"who": "me", "what": "a"}, {"who": "bot", "what": "b"}]}]))
    rows, defects = read_rows([tmp_path / "dataset_info.json"])
    assert defects == []
    assert [[(t.role, t.text) for t in r.turns] for r in rows] == [
        [("user", "x"), ("assistant", "y"), ("user", "a"), ("assistant", "b")],
        [("user", "a"), ("assistant", "b")],
    ]
    again, _ = read_rows([(tmp_path / "talk.json", "talk.json"), (tmp_path / "dataset_info.json", "dataset_info.json")])
    assert [r.where for r in again] == ["talk.json:1"]


def test_rows_know_their_line_in_a_pretty_printed_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(pretty([text_of(row(n)) for n in range(50)]))
    rows, _ = read_rows([(path, "rows.json")])
    assert [r.where for r in rows] == [f"rows.json:{2 + 5 * n}" for n in range(50)]


@pytest.mark.parametrize("style", ["pretty", "minified", "lines"])
def test_a_large_file_checked_in_parts_gives_the_same_report_as_in_one_piece(tmp_path: Path, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import data

    dice, rows = random.Random(style), []
    for n in range(3000):
        value = row(n, output="x" * dice.randrange(1, 200) + '}, {"instruction": ' + "\n") if n % 7 == 0 else row(n)
        text = text_of(value) if style == "pretty" else json.dumps(value)
        rows.append('{"instruction": "a", "output": 3}' if n % 100 == 50 else text[:-1] if n % 500 == 333 else text)
    path = tmp_path / "rows.json"
    path.write_text(pretty(rows) if style == "pretty" else "[" + ",".join(rows) + "]" if style == "minified" else "\n".join(rows) + "\n")
    whole = check_files([path], processes=1)
    monkeypatch.setattr(data, "LARGE", 1000)
    parts = check_files([path], processes=3)
    assert len(whole.defects) == 36
    assert (parts.rows, parts.defects) == (whole.rows, whole.defects)


def test_a_row_that_only_looks_like_a_beginning_inside_another_does_not_mislead_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import data

    inner = [{"instruction": "deep", "output": "x"}] * 40
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": f"q{n}", "output": "a", "meta": inner} for n in range(200)]))
    monkeypatch.setattr(data, "LARGE", 1000)
    report = check_files([path], processes=3)
    assert report.rows == 200 and report.defects == []


def test_reading_in_small_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    path.write_text(pretty([text_of(row(n, output="中文🙂" * (n % 40 + 1))) for n in range(200)]), encoding="utf-8")
    whole = read_rows([path])
    monkeypatch.setattr(scan, "BLOCK", 97)
    assert read_rows([path]) == whole and len(whole[0]) == 200


def cpu_seconds() -> float:
    """Of this process and those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@pytest.mark.slow
def test_a_gigabyte_is_checked_in_twenty_seconds(tmp_path: Path) -> None:
    """Of all cores: on a machine that does other things too, their seconds are not ours."""
    rows = [row(n, output="一句话 and some words, 42. " * (5 + n % 30)) for n in range(2000)]
    blob = ",\n".join(text_of(r) for r in rows)
    times = 1_000_000_000 // len(blob.encode()) + 1
    path = tmp_path / "big.json"
    path.write_text("[\n" + ",\n".join([blob] * times) + "\n]\n", encoding="utf-8")
    assert path.stat().st_size >= 1_000_000_000
    began, spent = time.perf_counter(), cpu_seconds()
    report = check_files([path])
    wall, seconds = time.perf_counter() - began, (cpu_seconds() - spent) / (os.cpu_count() or 1)
    print(f"{wall:.1f} s, {seconds:.1f} s of every core")
    assert report.rows == 2000 * times and report.defects == []
    assert seconds < 20, f"{seconds:.1f} s"
