"""The page for the security officer: what was verified, proved and installed, from
INSTALL-RECORD.json.

Standard library only: it runs inside the image, on the server, and the server's own key signs what
it writes. The record lies in the page whole (in a <script type="application/json">), so the page
alone can be checked and re-read by programs.
"""

from __future__ import annotations

import hashlib
import html
import json
from typing import Any

STYLE = """body{font:15px/1.5 system-ui,sans-serif;
max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;width:100%;margin:.5em 0 1.5em}
td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;
vertical-align:top;word-break:break-word}
th{background:#f3f0ea}.ok{color:#0a6b2d}.warn{color:#8a5a00}.fail{color:#a00}
code{font-size:.9em;word-break:break-all}"""
VERIFY = """ssh-keygen -Y verify -f allowed -I server -n milktea-evidence \
    -s EVIDENCE.html.sig < EVIDENCE.html
    (allowed holds one line: server, a space, and the content of PREFIX/keys/server.pub)"""


def page(record_text: str) -> str:
    """The page of one record. Raises ValueError (json's) or KeyError for a text that is no record
    of an installation.
    """
    record = json.loads(record_text)
    if record.get("milktea_install") != 1:
        raise ValueError("this is not an INSTALL-RECORD.json that this milktea understands")
    bundle, image, selftest = record["bundle"], record["image"], record["selftest"]
    facts = {
        "When, by whom, where": f"{record['when']}, {record['who']}, {record['server']}",
        "Bundle": (
            f"{bundle['name']} {bundle['id']} ({bundle['kind']}), release {bundle['release']}"
        ),
        "SHA256SUMS of the bundle is": bundle["sha256sums"],
        "Signature of the bundle": bundle["signature"],
        "Volumes verified before loading": bundle["volumes_verified"],
        "Preflight overruled by --force": "yes" if record["forced"] else "no",
        "Image": f"{image['ref']} = {image['id']}",
        "Layers, compared with the signed plan": len(image["layers"]),
        "Image before, kept for rollback": image["previous"] or "none",
        "Bill of materials (sbom/image.cdx.json) is": record["sbom"] or "not carried",
    }
    body = [
        f"<h1>Evidence of an installation: {_e(bundle['name'])} {_e(bundle['id'])}</h1>",
        _rows(facts),
    ]
    body += ["<h2>Self-test, without a network, on a read-only image</h2>", _selftest(selftest)]
    body += ["<h2>The server before the installation</h2>", _checks(record["preflight"]["checks"])]
    body += [
        "<h2>Layers</h2><ol>",
        *(f"<li><code>{_e(x)}</code></li>" for x in image["layers"]),
        "</ol>",
    ]
    body += [f"<h2>To verify this page</h2><pre>{_e(VERIFY)}</pre>"]
    body += [
        f"<p>Record: sha256 <code>{hashlib.sha256(record_text.encode()).hexdigest()}</code></p>"
    ]
    data = record_text.replace("</", "<\\/")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Evidence'
        f" {_e(bundle['id'])}</title><style>{STYLE}</style>"
        + "\n".join(body)
        + f'\n<script type="application/json" id="record">{data}</script></html>\n'
    )


def _selftest(selftest: Any) -> str:
    """The checks of trainer.checkup; an image with another self-test shows what it printed."""
    if not isinstance(selftest, dict) or "checks" not in selftest:
        text = selftest if isinstance(selftest, str) else json.dumps(selftest, indent=1)
        return f"<pre>{_e(text)}</pre>"
    rows = "".join(
        _row(c["check"], *(("ok", "passed") if c["ok"] else ("fail", "FAILED")), c["found"])
        for c in selftest["checks"]
    )
    return f"<table><tr><th>check</th><th>result</th><th>found</th></tr>{rows}</table>"


def _checks(checks: list[dict[str, str]]) -> str:
    rows = "".join(
        _row(c["check"], c["verdict"], c["verdict"], c["measured"], c["needed"]) for c in checks
    )
    head = "<tr><th>check</th><th>verdict</th><th>measured</th><th>needed</th></tr>"
    return f"<table>{head}{rows}</table>"


def _row(name: str, colour: str, verdict: str, *cells: str) -> str:
    more = "".join(f"<td>{_e(x)}</td>" for x in cells)
    return f'<tr><td>{_e(name)}</td><td class="{_e(colour)}">{_e(verdict)}</td>{more}</tr>'


def _rows(facts: dict[str, Any]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><th>{_e(k)}</th><td>{_e(v)}</td></tr>" for k, v in facts.items())
        + "</table>"
    )


def _e(value: Any) -> str:
    return html.escape(str(value))
