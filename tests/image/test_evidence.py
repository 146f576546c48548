"""The page for the security officer: everything that the record says is on it, and nothing on it
can be changed unseen.
"""

from __future__ import annotations

import copy
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ops.image.server import audit_report as evidence

RECORD: dict[str, Any] = {
    "milktea_install": 1,
    "when": "2026-11-21T12:00:00Z",
    "who": "root",
    "forced": False,
    "server": "gpu-<7>",
    "bundle": {
        "name": "train-cu130",
        "id": "0123456789ab",
        "kind": "full",
        "sha256sums": "a" * 64,
        "signature": "good, by ssh-keygen, with the key given by --key",
        "volumes_verified": 21,
        "release": 20261121120000,
    },
    "image": {
        "ref": "milktea/train-cu130:0123456789ab",
        "id": "sha256:" + "b" * 64,
        "previous": "",
        "layers": ["sha256:" + "c" * 64, "sha256:" + "d" * 64],
    },
    "sbom": "e" * 64,
    "preflight": {
        "checks": [
            {
                "check": "engine",
                "verdict": "ok",
                "measured": "Docker 24.0.7",
                "needed": "20.10 or newer",
                "remedy": "nothing to do",
            }
        ]
    },
    "selftest": {
        "milktea_selftest": 1,
        "ok": True,
        "checks": [
            {
                "check": "connections",
                "ok": True,
                "found": "0 attempts (by audit hook)",
                "seconds": 0.1,
            }
        ],
    },
}


def leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in leaves(v)]
    return [x for v in value for x in leaves(v)] if isinstance(value, list) else [str(value)]


def test_the_page_says_what_the_record_says_and_carries_it_whole() -> None:
    text = json.dumps(RECORD)
    page = evidence.page(text)
    shown = html.unescape(re.sub(r"<script.*?</script>", "", page, flags=re.S))
    unseen = {"1", "True", "False", "0.1", "nothing to do", ""}
    assert [x for x in leaves(RECORD) if x.strip() not in unseen and x.strip() not in shown] == []
    inside = re.search(r'<script type="application/json" id="record">(.*?)</script>', page, re.S)
    assert inside and json.loads(inside[1]) == RECORD
    assert "gpu-<7>" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_a_failed_check_is_shown_as_failed() -> None:
    record = copy.deepcopy(RECORD)
    record["selftest"]["checks"][0] |= {"ok": False, "found": "2 attempts"}
    assert 'class="fail">FAILED</td><td>2 attempts' in evidence.page(json.dumps(record))


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not an INSTALL-RECORD\.json"):
        evidence.page('{"milktea_install": 2}')


def test_a_server_whose_folders_are_named_in_gbk_has_a_record(tiny: Any, tmp_path: Path) -> None:
    tiny.pack(tmp_path / "b")
    facts = b"when 2026\nwho root\nserver s\nengine 24\nsums 0\nsignature good\nvolumes 1\nref r\n"
    facts += b"id i\ncheck disk|ok|9 MB free in /\xca\xfd\xbe\xdd|1 MB|nothing to do\nselftest\n{}"
    subprocess.run(
        [sys.executable, tmp_path / "b/tools/installer.py", "record", tmp_path],
        input=facts,
        env={"MILKTEA_SMALL": str(tmp_path / "b"), "PYTHONUTF8": "1"},
        check=True,
    )
    [found] = json.loads((tmp_path / "INSTALL-RECORD.json").read_text())["preflight"]["checks"]
    assert (found["verdict"], found["measured"][:14]) == ("ok", "9 MB free in /")
