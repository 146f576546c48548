"""The fuzzer: what it takes for a failure, and that a few inputs to every parser are none."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest

WORD = b'{"a": [1, "x"]}'


def target(parse: object) -> fuzz.Target:
    return fuzz.Target({"word": WORD}, parse, (ValueError,))  # type: ignore[arg-type]


def test_equal_seeds_give_equal_inputs_and_others_do_not() -> None:
    made = [fuzz.input_of(target(print), f"7 {n}") for n in range(60)]
    assert made == [fuzz.input_of(target(print), f"7 {n}") for n in range(60)]
    assert len({data for _, data in made}) > 40


def test_an_expected_error_is_none_and_any_other_is_a_failure() -> None:
    def parse(name: str, data: bytes, folder: Path) -> None:
        raise ValueError if data == WORD else KeyError

    assert fuzz.fault(target(parse), "word", WORD) is None
    assert isinstance(fuzz.fault(target(parse), "word", b"x"), KeyError)


def test_a_parse_that_does_not_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)

    def parse(name: str, data: bytes, folder: Path) -> None:
        while data:
            pass

    assert isinstance(fuzz.fault(target(parse), "word", WORD), fuzz.TooSlow)
    monkeypatch.setattr(fuzz, "HANGS_S", 0.05)
    slept = target(lambda *told: time.sleep(60))
    assert isinstance(fuzz.fault(slept, "word", WORD), fuzz.TooSlow)


def test_a_parse_that_takes_too_much_memory_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    held = fuzz.most_held()
    monkeypatch.setattr(fuzz, "MEMORY", 32 << 20)
    large = target(lambda *told: bytearray(held + (64 << 20)))
    assert isinstance(fuzz.fault(large, "word", WORD), fuzz.TooLarge)
    assert fuzz.fault(target(lambda *told: bytearray(1 << 20)), "word", WORD) is None


def test_a_failing_input_is_made_as_small_as_it_can_be() -> None:
    def parse(name: str, data: bytes, folder: Path) -> None:
        if b"\x00" in data:
            raise KeyError

    error = fuzz.fault(target(parse), "word", b"ab\x00c" * 50)
    assert error is not None
    least = fuzz.smallest(target(parse), "word", b"ab\x00c" * 50, fuzz.kind_of(error))
    assert least == b"\x00"


@pytest.mark.slow
def test_no_spoiled_input_ends_in_a_traceback() -> None:
    command = [sys.executable, fuzz.__file__, "10000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.stdout.splitlines()[-1] == "10000 inputs, 0 failures", done.stdout[-4000:]
