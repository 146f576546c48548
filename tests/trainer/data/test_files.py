"""Data checks: 200 planted defects are found where they are, and nothing else is reported."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import get_args

import pytest

from trainer.data import files, scan
from trainer.data.files import examine_files, read_rows
from trainer.data.formats import KEYS
from trainer.data.sources import Reading
from trainer.data.stage_rows import READERS
from trainer.wire.job import DataFormat
from trainer.wire.stages import ANSWERS, RowKind

ROOT = Path(__file__).parents[3]

GOOD = {
    "instruction": 'Say "hi" in 中文 {now}',
    "input": "",
    "output": "你好, \\ and a tab\t, a brace } and [ a bracket",
}


def row(n: int, **changes: object) -> dict:
    return {
        "instruction": f"question {n}",
        "input": "" if n % 2 else f"about {n}",
        "output": f"answer {n}",
    } | changes


def pretty(rows: list[str]) -> str:
    return "[\n" + ",\n".join(rows) + "\n]\n"


def text_of(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


# one row's text -> (its text with a defect, line offset of the defect in the row, field or "")
ROW_DEFECTS = {
    "missing output": (lambda n: text_of({"instruction": "a", "input": "b"}), 0, ""),
    "missing instruction": (lambda n: text_of({"output": "a", "input": ""}), 0, ""),
    "field misspelt": (
        lambda n: text_of({"instruction": "a", "input": "", "ouput": "b"}),
        3,
        "ouput",
    ),
    "output is null": (lambda n: text_of(row(n, output=None)), 3, "output"),
    "output is a number": (lambda n: text_of(row(n, output=7)), 3, "output"),
    "output is a list": (
        lambda n: text_of(row(n, output=["a"])).replace("\n    ", " ").replace("\n  ]", "]"),
        3,
        "output",
    ),
    "output is empty": (lambda n: text_of(row(n, output="")), 3, "output"),
    "output is blank": (lambda n: text_of(row(n, output=" \n\t ")), 3, "output"),
    "instruction is empty": (lambda n: text_of(row(n, instruction="", input="")), 1, "instruction"),
    "instruction is an object": (
        lambda n: text_of(row(n, instruction={"a": 1})).replace('{\n    "a": 1\n  }', '{"a": 1}'),
        1,
        "instruction",
    ),
    "input is a number": (lambda n: text_of(row(n, input=3)), 2, "input"),
    "key given twice": (
        lambda n: text_of(row(n)).replace('"input":', '"output": "first",\n  "input":', 1),
        4,
        "output",
    ),
    "NUL character": (lambda n: text_of(row(n, output="a\x00b")), 3, "output"),
    "replacement character": (lambda n: text_of(row(n, output="caf\ufffd")), 3, "output"),
    "half a surrogate pair": (
        lambda n: text_of(row(n)).replace(f"answer {n}", "x \\ud83d y"),
        3,
        "output",
    ),
    "row is a string": (lambda n: '"just text"', 0, ""),
    "row is a number": (lambda n: "42", 0, ""),
    "row is null": (lambda n: "null", 0, ""),
    "history is not pairs": (lambda n: text_of(row(n, history="x")), 4, "history"),
}

# the same of text that is not JSON
SYNTAX_DEFECTS = {
    "string not closed": (lambda n: text_of(row(n)).replace(f'answer {n}"', f"answer {n}"), 3, ""),
    "comma missing between fields": (
        lambda n: text_of(row(n)).replace('",\n  "output"', '"\n  "output"'),
        3,
        "",
    ),
    "trailing comma in the row": (
        lambda n: text_of(row(n)).replace(f'answer {n}"', f'answer {n}",'),
        3,
        "",
    ),
    "single quotation marks": (
        lambda n: text_of(row(n)).replace(f'"answer {n}"', f"'answer {n}'"),
        3,
        "",
    ),
    "raw line break in a string": (
        lambda n: text_of(row(n)).replace(f"answer {n}", "an\nswer"),
        3,
        "",
    ),
    "bad escape": (lambda n: text_of(row(n)).replace(f"answer {n}", "C:\\Users"), 3, ""),
    "unescaped quotation marks": (
        lambda n: text_of(row(n)).replace(f"answer {n}", 'she said "hi" to me'),
        3,
        "",
    ),
    "Python's None": (lambda n: text_of(row(n)).replace(f'"answer {n}"', "None"), 3, ""),
    "comment": (lambda n: text_of(row(n)).replace('  "output"', '  // why\n  "output"'), 3, ""),
}


@pytest.mark.parametrize("seed", range(8))
def test_every_planted_defect_of_an_alpaca_array_is_found_on_its_line_and_no_other(
    tmp_path: Path, seed: int
) -> None:
    """8 files x 19 kinds = 152 planted defects among 600 sound rows a file."""
    dice = random.Random(seed)
    kinds = dice.sample(sorted(ROW_DEFECTS), len(ROW_DEFECTS))
    rows, expected, line = [], [], 2
    for n in range(619):
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
    report = examine_files([path])
    assert len(expected) == 19
    assert [(d.line, d.field) for d in report.defects] == expected, "\n".join(
        map(str, report.defects)
    )
    assert report.rows == 600
    assert all(d.fix and d.reason and d.column >= 1 for d in report.defects)


@pytest.mark.parametrize("kind", sorted(SYNTAX_DEFECTS))
def test_the_first_syntax_error_of_an_array_is_told_and_ends_it(tmp_path: Path, kind: str) -> None:
    make, offset, _ = SYNTAX_DEFECTS[kind]
    rows = [text_of(row(n)) for n in range(9)]
    rows[2] = rows[7] = text_of(row(2, output=7))
    rows[5] = make(5)
    path = tmp_path / "rows.json"
    path.write_text(pretty(rows), encoding="utf-8")
    report = examine_files([path])
    found = [(d.line, d.field) for d in report.defects]
    assert found == [(2 + 2 * 5 + 3, "output"), (2 + 5 * 5 + offset, "")]
    assert report.rows == 4 and report.defects[1].reason and report.defects[1].fix


@pytest.mark.parametrize("kind", sorted(ROW_DEFECTS | SYNTAX_DEFECTS))
def test_a_defect_in_json_lines_is_told_with_its_line(tmp_path: Path, kind: str) -> None:
    if kind in ("comment", "raw line break in a string"):
        pytest.skip("a line break ends the row in JSON lines")
    make, _, field = (ROW_DEFECTS | SYNTAX_DEFECTS)[kind]
    lines = [json.dumps(row(n)) for n in range(5)]
    lines[3] = make(3).replace("\n", " ")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    report = examine_files([path])
    assert [(d.line, d.field) for d in report.defects] == [(4, field)]
    assert report.rows == 4


ARRAY_DEFECTS = {
    "comma missing between rows": (
        '[\n{"instruction":"a","output":"b"}\n{"instruction":"a","output":"b"}\n]',
        (3, 1),
        1,
    ),
    "two commas": (
        '[\n{"instruction":"a","output":"b"},,\n{"instruction":"a","output":"b"}\n]',
        (2, 34),
        1,
    ),
    "comma before the bracket": ('[\n{"instruction":"a","output":"b"},\n]', (2, 33), 1),
    "file cut short after a row": ('[\n{"instruction":"a","output":"b"}\n', (3, 1), 1),
    "file cut short inside a row": (
        '[\n{"instruction":"a","output":"b"},\n{"instruction":"a","outp',
        (3, 20),
        1,
    ),
    "text after the array": ('[\n{"instruction":"a","output":"b"}\n]\nhello', (4, 1), 1),
}


@pytest.mark.parametrize("kind", sorted(ARRAY_DEFECTS))
def test_a_broken_array_is_told_with_line_and_column(tmp_path: Path, kind: str) -> None:
    text, place, rows = ARRAY_DEFECTS[kind]
    path = tmp_path / "rows.json"
    path.write_text(text)
    report = examine_files([path])
    assert [(d.line, d.column) for d in report.defects] == [place]
    assert report.rows == rows


FILE_DEFECTS = {
    "empty": ("a.json", b"", "empty"),
    "blank": ("a.json", b" \n ", "empty"),
    "not JSON": ("a.json", b"instruction,output\n1,2\n", "neither"),
    "Excel of 2003": ("a.xls", b"\xd0\xcf\x11\xe0", ".xls"),
    "UTF-16": ("a.json", '[{"instruction":"a"}]'.encode("utf-16"), "UTF-16"),
    "UTF-16 without its mark": ("a.json", '[{"instruction":"你"}]'.encode("utf-16-le"), "UTF-16LE"),
    "UTF-16 the other way": ("a.jsonl", '{"instruction":"你"}'.encode("utf-16-be"), "UTF-16BE"),
    "UTF-32": ("a.json", '[{"instruction":"a"}]'.encode("utf-32"), "UTF-32"),
    "gzip that is cut short": ("a.json.gz", gzip.compress(b"[]")[:12], "unpacked"),
}


@pytest.mark.parametrize("kind", sorted(FILE_DEFECTS))
def test_a_file_that_cannot_be_read_at_all_is_refused_with_what_to_do(
    tmp_path: Path, kind: str
) -> None:
    name, data, word = FILE_DEFECTS[kind]
    (tmp_path / name).write_bytes(data)
    report = examine_files([tmp_path / name])
    assert len(report.defects) == 1 and word in report.defects[0].reason and not report.ok


def test_bytes_that_are_not_utf8_are_told_with_their_line_and_an_iconv_command(
    tmp_path: Path,
) -> None:
    path = tmp_path / "gbk.jsonl"
    path.write_bytes(
        b'{"instruction":"a","output":"b"}\n{"instruction":"a","output":"'
        + "你".encode("gbk")
        + b'"}\n'
    )
    found = examine_files([path]).defects
    assert [(d.line, d.column) for d in found] == [(2, 30)] and "iconv" in found[0].fix


def test_a_byte_order_mark_and_blank_lines_and_windows_line_ends_are_no_defects(
    tmp_path: Path,
) -> None:
    lines = (
        b'\xef\xbb\xbf{"instruction":"a","output":"b"}\r\n\r\n{"instruction":"c","output":"d"}\r\n'
    )
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf [ {"instruction":"a","output":"b"} ] \r\n')
    report = examine_files([tmp_path / "a.jsonl", tmp_path / "b.json"])
    assert report.defects == [] and report.rows == 3


def chat(*turns: tuple[str, str], role: str = "from", text: str = "value") -> str:
    return json.dumps(
        {"conversations" if role == "from" else "messages": [{role: r, text: t} for r, t in turns]},
        ensure_ascii=False,
    )


CHAT_DEFECTS = {
    "nobody called that": (chat(("human", "a"), ("gtp", "b")), "conversations[1].from"),
    "two questions in a row": (
        chat(("human", "a"), ("human", "b"), ("gpt", "c")),
        "conversations[1].from",
    ),
    "begins with an answer": (
        chat(("gpt", "a"), ("human", "b"), ("gpt", "c")),
        "conversations[0].from",
    ),
    "ends with a question": (
        chat(("human", "a"), ("gpt", "b"), ("human", "c")),
        "conversations[2].from",
    ),
    "an empty turn": (chat(("human", "a"), ("gpt", " ")), "conversations[1].value"),
    "system in the middle": (
        chat(("human", "a"), ("system", "s"), ("gpt", "b")),
        "conversations[1].from",
    ),
    "no turns": (chat(), "conversations"),
    "turns are text": ('{"conversations": "hello"}', "conversations"),
    "a turn is text": ('{"conversations": ["hello"]}', "conversations[0]"),
    "a turn without its text": (
        '{"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}',
        "conversations[0]",
    ),
    "a turn's text is a number": (
        '{"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}',
        "conversations[0].value",
    ),
}


@pytest.mark.parametrize("kind", sorted(CHAT_DEFECTS))
def test_a_conversation_that_cannot_be_learned_from_names_the_turn(
    tmp_path: Path, kind: str
) -> None:
    text, field = CHAT_DEFECTS[kind]
    good = chat(("system", "be kind"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([good, text, good]))
    report = examine_files([path])
    assert [(d.line, d.field) for d in report.defects] == [(2, field)] and report.rows == 2


def test_every_format_is_told_from_its_fields(tmp_path: Path) -> None:
    files = {
        "alpaca": json.dumps(row(1)),
        "sharegpt": chat(("human", "a"), ("gpt", "b")),
        "messages": chat(
            ("system", "s"), ("user", "a"), ("assistant", "b"), role="role", text="content"
        ),
        "prompt": json.dumps({"prompt": "a", "completion": "b"}),
        "text": json.dumps({"text": "a"}),
    }
    for name, line in files.items():
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    (tmp_path / "plain.txt").write_text("one document\n\nanother\n")
    report = examine_files(sorted(tmp_path.iterdir()))
    assert report.ok and report.rows == 7
    assert report.formats == {f"{n}.jsonl": n for n in files} | {"plain.txt": "text"}


def test_parquet_rows_are_read_and_their_defects_carry_the_row_number(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [row(n) for n in range(5)]
    rows[3]["output"] = ""
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    report = examine_files([tmp_path / "rows.parquet"])
    assert report.rows == 4 and [(d.line, d.field) for d in report.defects] == [(4, "output")]


def test_dataset_info_of_llama_factory_is_followed_as_it_is(tmp_path: Path) -> None:
    info = {
        "mine": {
            "file_name": "mine.json",
            "columns": {"prompt": "q", "query": "more", "response": "a", "history": "past"},
        },
        "talk": {
            "file_name": "talk.json",
            "formatting": "sharegpt",
            "columns": {"messages": "said"},
            "tags": {
                "role_tag": "who",
                "content_tag": "what",
                "user_tag": "me",
                "assistant_tag": "bot",
            },
        },
        "remote": {"hf_hub_url": "someone/something"},
        "absent": {"file_name": "absent.json"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "mine.json").write_text(
        json.dumps([{"q": "a", "more": "", "a": "b", "past": [["x", "y"]]}])
    )
    (tmp_path / "talk.json").write_text(
        json.dumps([{"said": [{"who": "me", "what": "a"}, {"who": "bot", "what": "b"}]}])
    )
    rows, defects = read_rows([tmp_path / "dataset_info.json"])
    assert defects == []
    assert [[(t.role, t.text) for t in r.turns] for r in rows] == [
        [("user", "x"), ("assistant", "y"), ("user", "a"), ("assistant", "b")],
        [("user", "a"), ("assistant", "b")],
    ]
    again, _ = read_rows(
        [
            (tmp_path / "talk.json", "talk.json"),
            (tmp_path / "dataset_info.json", "dataset_info.json"),
        ]
    )
    assert [r.where for r in again] == ["talk.json:1"]


ODD_INFO = {
    "a list": "[1]",
    "too deep": "[" * 100_000,
    "cut short": '{"mine": {',
    "not UTF-8": '{"mine": "\udcff"}',
    "a number for the file": '{"mine": {"file_name": 3}}',
    "a list for columns": '{"mine": {"file_name": "mine.json", "columns": ["a"]}}',
    "a list for a tag": '{"mine": {"file_name": "mine.json", "tags": {"user_tag": ["a"]}}}',
    "a text for a count": '{"mine": {"file_name": "mine.json", "num_samples": "ten"}}',
    "a count that no machine has": (
        '{"mine": {"file_name": "mine.json", "num_samples": 9223372036854775808}}'
    ),
    "a negative count": '{"mine": {"file_name": "mine.json", "num_samples": -1}}',
    "texts for entries": '{"mine": "file_name", "citation": ""}',
}


@pytest.mark.parametrize("kind", sorted(ODD_INFO))
def test_a_dataset_info_that_cannot_be_followed_is_a_defect(tmp_path: Path, kind: str) -> None:
    info = tmp_path / "dataset_info.json"
    info.write_text(ODD_INFO[kind], encoding="utf-8", errors="surrogateescape")
    (tmp_path / "mine.json").write_text(json.dumps([row(1)]))
    rows, defects = read_rows([info])
    assert rows == [] and defects and all(d.file == "dataset_info.json" for d in defects)


def test_a_dataset_info_with_a_byte_order_mark_and_nulls_is_followed(tmp_path: Path) -> None:
    entry = {"file_name": "mine.json", "columns": None, "tags": None, "num_samples": 1}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}), encoding="utf-8-sig")
    (tmp_path / "mine.json").write_text(json.dumps([row(1), row(2)]))
    rows, defects = read_rows([tmp_path / "dataset_info.json"])
    assert len(rows) == 1 and defects == []
    assert examine_files([tmp_path / "dataset_info.json"]).rows == 1


def test_rows_know_their_line_in_a_pretty_printed_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(pretty([text_of(row(n)) for n in range(50)]))
    rows, _ = read_rows([(path, "rows.json")])
    assert [r.where for r in rows] == [f"rows.json:{2 + 5 * n}" for n in range(50)]


def test_reading_in_small_blocks_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        pretty([text_of(row(n, output="中文🙂" * (n % 40 + 1))) for n in range(200)]),
        encoding="utf-8",
    )
    whole = read_rows([path])
    monkeypatch.setattr(scan, "CHUNK", 97)
    assert read_rows([path]) == whole and len(whole[0]) == 200


SOUND = b'{"instruction":"a","output":"b"}'
DEEP = b'{"instruction":"a","output":"b","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DIGITS = b"9" * 10_000  # more than int() takes
# file name, text, (line, column, a word of the reason) of each defect, sound rows
HOSTILE = {
    "deep nesting in a line": (
        "a.jsonl",
        SOUND + b"\n" + DEEP + b"\n" + SOUND,
        [(2, 1, "deep")],
        2,
    ),
    "deep nesting in an array": (
        "a.json",
        b"[" + SOUND + b",\n" + DEEP + b"]",
        [(2, 1, "deep")],
        1,
    ),
    "an array that only opens": ("a.json", b"[" * 3_000_000, [(1, 2, "deep")], 0),
    "a row as deep as the decoder goes": (
        "a.jsonl",
        b'{"instruction":"a","output":"b","x":' + b"[" * 900 + b"]" * 900 + b"}",
        [(1, 1, "deep")],
        0,
    ),
    "NaN for a text": ("a.jsonl", b'{"instruction":"a","output":NaN}', [(1, 29, "number")], 0),
    "Infinity beside the texts": (
        "a.jsonl",
        b'{"instruction":"a","output":"b","score":-Infinity}',
        [],
        1,
    ),
    "a huge integer for a text": (
        "a.json",
        b'[{"instruction":"a","output":-' + DIGITS + b"}," + SOUND + b"]",
        [(1, 30, "number")],
        1,
    ),
    "a huge integer beside the texts": (
        "a.jsonl",
        b'{"instruction":"a","output":"b","id":' + DIGITS + b"}\n" + DIGITS,
        [(2, 1, "number")],
        1,
    ),
    "an array cut inside \\u": ("a.json", b"[" + SOUND + b',\n{"x":"\\u12', [(2, 8, "ends")], 1),
    "an array cut inside a pair of \\u": (
        "a.json",
        b"[" + SOUND + b',\n{"x":"\\ud83d\\u',
        [(2, 14, "ends")],
        1,
    ),
    "an array cut after a backslash": (
        "a.json",
        b"[" + SOUND + b',\n{"x":"y\\',
        [(2, 6, "ends")],
        1,
    ),
    "an array cut inside a word": ("a.json", b"[" + SOUND + b',\n{"x":fal', [(2, 6, "ends")], 1),
    "an array cut inside a character": (
        "a.json",
        b"[" + SOUND + b',\n{"x":"\xe4\xbd',
        [(2, 6, "ends")],
        1,
    ),
    "a line cut after its comma": (
        "a.jsonl",
        b'{"instruction":"x",\n' + SOUND,
        [(1, 20, "ends")],
        1,
    ),
    "a line cut inside \\u": ("a.jsonl", b'{"x":"\\u12\n' + SOUND, [(1, 8, "ends")], 1),
    "an opening bracket alone": ("a.json", b"[", [(1, 2, "ends")], 0),
    "two closing brackets": ("a.json", b"[" + SOUND + b"]]", [(1, 35, "after the array")], 1),
    "a comma before the first row": ("a.json", b"[,", [(1, 2, "comma")], 0),
    "a row over several lines": ("a.json", b'{\n  "instruction": "a"\n}\n', [(1, 1, "several")], 0),
    "a byte in a row that is not UTF-8": (
        "a.json",
        b"[\n" + SOUND + b',\n{"instruction":"\xe4\xbd\xa0\xff","output":"b"},\n' + SOUND + b"]",
        [(3, 18, "byte 0xff (at offset 55 of the file)")],
        2,
    ),
    "a byte in a line that is not UTF-8": (
        "a.jsonl",
        SOUND + b'\r\n{"instruction":"\xe4\xbd\xa0\xff","output":"b"}\n' + SOUND,
        [(2, 18, "byte 0xff (at offset 53 of the file)")],
        2,
    ),
    "a byte between rows that is not UTF-8": (
        "a.json",
        b"[" + SOUND + b",\xff" + SOUND + b"]",
        [(1, 35, "byte 0xff (at offset 34 of the file)")],
        1,
    ),
    "a byte after the array that is not UTF-8": (
        "a.json",
        b"[" + SOUND + b"]\n\xe4\xbd",
        [(2, 1, "byte 0xe4 (at offset 35 of the file)")],
        1,
    ),
    "GBK whose second bytes look like backslashes": (
        "a.json",
        '[{"instruction":"許功","output":"b"}]'.encode("gbk"),
        [(1, 18, "not UTF-8")],
        0,
    ),
    "a surrogate written as UTF-8": (
        "a.jsonl",
        b'{"instruction":"\xed\xa0\xbd","output":"b"}',
        [(1, 17, "byte 0xed")],
        0,
    ),
    "half a surrogate pair where the reason shows it": (
        "a.jsonl",
        b'{"\\ud83d\\u001b[31m":"\\u0000","instruction":"a","output":"b"}\n"\\ud83d"\n',
        [(1, 21, "NUL"), (2, 1, "\\ud83d")],
        0,
    ),
    "a byte order mark before each line": (
        "a.jsonl",
        b"\xef\xbb\xbf" + SOUND + b"\n\xef\xbb\xbf" + SOUND,
        [],
        2,
    ),
}


@pytest.mark.parametrize("chunk", [5, 1 << 20])
@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_text_is_told_with_its_place_and_can_be_printed(
    tmp_path: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "CHUNK", chunk)
    name, text, expected, rows = HOSTILE[kind]
    (tmp_path / name).write_bytes(text)
    report = examine_files([tmp_path / name])
    assert [(d.line, d.column) for d in report.defects] == [
        (at, column) for at, column, _ in expected
    ]
    assert all(word in d.reason for d, (*_, word) in zip(report.defects, expected, strict=True))
    assert report.rows == rows
    assert all(line.isprintable() for line in str(report).encode().decode().split("\n"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_row_longer_than_the_limit_is_a_defect(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "CHUNK", 40)
    monkeypatch.setattr(scan, "MAX_ROW_SIZE", 1000)
    long = SOUND.replace(b'"a"', b'"' + b"a" * 3000 + b'"')
    fits = SOUND.replace(b'"a"', b'"' + b"a" * 900 + b'"')
    mark = (b"[", b",\n", b"]") if name == "a.json" else (b"", b"\n", b"")
    (tmp_path / name).write_bytes(mark[0] + mark[1].join([SOUND, fits, long, SOUND]) + mark[2])
    report = examine_files([tmp_path / name])
    assert [(d.line, d.column) for d in report.defects] == [(3, 1)]
    assert "longer than" in report.defects[0].reason
    assert report.rows == (2 if name == "a.json" else 3)


@pytest.mark.parametrize("kind", sorted(READERS))
def test_a_row_of_endless_brackets_is_a_defect_for_every_stage(
    tmp_path: Path, kind: RowKind
) -> None:
    for depth in (200, 400, 800):
        deep = '{"a":' * depth + "1" + "}" * depth
        row = f'{{"prompt": "q", "instruction": "q", "chosen": {deep}, "output": {deep}}}'
        (tmp_path / "a.json").write_text(f"[{row}]")
        found, defects = READERS[kind].read([(tmp_path / "a.json", "a.json")], Reading(), [])
        assert (len(found), len(defects)) != (0, 0)


def test_a_row_with_thousands_of_mistakes_tells_the_first_of_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": 7}] * 3000
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    defects = examine_files([tmp_path / "a.jsonl"]).defects
    assert 0 < len(defects) <= files.MAX_ROW_DEFECTS
    assert defects[0].field == "messages[0].content"


def test_reading_a_file_ends_after_ten_thousand_defects(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": 1}\n' * 20_000)
    report = examine_files([tmp_path / "a.jsonl"])
    assert len(report.defects) == 10_001
    assert report.defects[-1].line == 5001 and "10,000 defects" in report.defects[-1].reason


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_row_of_five_megabytes_is_read(tmp_path: Path, name: str) -> None:
    long = row(1, output="中🙂\n" * 600_000)
    text = json.dumps([row(0), long, row(2)], ensure_ascii=False)
    if name == "a.jsonl":
        text = "\n".join(json.dumps(r, ensure_ascii=False) for r in (row(0), long, row(2)))
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows, defects = read_rows([tmp_path / name])
    assert defects == [] and [r.turns[1].text for r in rows] == [
        "answer 0",
        long["output"],
        "answer 2",
    ]


def test_a_line_of_text_that_begins_like_json_is_found_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n{:\x00\n")
    _, [defect] = read_rows([tmp_path / "a.txt"])
    assert (defect.line, defect.column) == (2, 1)


def test_many_defects_of_one_long_row_are_found_in_a_moment(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": None, "n": n} for n in range(20_000)]
    for name, text in (("a.jsonl", '{"messages": %s}\n'), ("a.json", '[\n{"messages": %s}\n]')):
        (tmp_path / name).write_text(text % json.dumps(turns))
        began = time.process_time()
        _, defects = read_rows([tmp_path / name])
        assert len({d.column for d in defects}) == len(defects) >= 20
        assert time.process_time() - began < 2


def test_a_text_file_does_not_keep_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert [r.text for r in read_rows([tmp_path / "a.txt"])[0]] == ["one", "two"]


def many(tmp_path: Path, name: str, size: int) -> Path:
    """A file of `size` bytes or more of ASCII but for an emoji in each thousandth row."""
    rows = [row(n, output="words " * (n % 90 + 1) + "🙂" * (n == 500)) for n in range(1000)]
    path, last = tmp_path / name, json.dumps(row(0))
    array = name.endswith(".json")
    block = "".join(json.dumps(r, ensure_ascii=False) + (", " if array else "\n") for r in rows)
    with open(path, "w", encoding="utf-8") as file:
        file.write("[" if array else "")
        while file.tell() < size:
            file.write(block)
        file.write(last + ("]" if array else "\n"))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_large_file_on_one_line_is_held_in_pieces(tmp_path: Path, name: str) -> None:
    path = many(tmp_path, name, 12_000_000)
    tracemalloc.start()
    try:
        report = examine_files([path])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.ok and report.rows > 30_000
    assert peak < 12_000_000, f"{peak:,} bytes"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_gigabyte_with_an_emoji_is_checked_in_a_gigabyte(tmp_path: Path, name: str) -> None:
    path = many(tmp_path, name, 1_000_000_000)
    limited = (
        "import resource, runpy, sys;"
        "resource.setrlimit(resource.RLIMIT_AS, (1_000_000_000, 1_000_000_000));"
        "sys.argv[0] = 'data'; runpy.run_module('trainer.data', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", limited, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" 0 defects\n")


def test_a_format_is_named_wherever_a_user_may_name_it() -> None:
    names = set(KEYS)
    assert {"auto", *names} == set(get_args(DataFormat)), "data.format and --format"
    assert set(ANSWERS) <= names
    for page in ("jobs/reference.toml", "docs/data.md"):
        text = (ROOT / page).read_text("utf-8")
        assert [name for name in names if name not in text] == [], page
