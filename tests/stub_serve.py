"""Stands in for an image's `milktea-train serve`: its files, its port on loopback and its token."""

from __future__ import annotations

import argparse
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
for option in ("token-file", "meter", "address", "feedback"):
    parser.add_argument(f"--{option}", type=Path, required=True)
for option in ("base", "width", "context", "port"):
    parser.add_argument(f"--{option}")
told, rest = parser.parse_known_args()
token = told.token_file.read_text().strip()
_, result = rest
name, _, adapter = result.partition("=")


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {token}"
        seen = {"model": name, "bytes": os.path.getsize(adapter), "base": told.base}
        if told.meter.exists():
            seen["meter"] = json.loads(told.meter.read_text())
        body = json.dumps(seen).encode() if allowed else b"no"
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if allowed and self.path == "/vote":
            with (told.feedback / "feedback.jsonl").open("a") as file:
                file.write('{"messages": []}\n[1, 2]\nnot a row\n{"half')
        if allowed and self.path == "/end":
            os._exit(7)

    def log_message(self, *_: object) -> None: ...


server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
line = {"api": f"http://127.0.0.1:{server.server_port}/v1", "token": token}
part = told.address.with_suffix(".part")
part.write_text(json.dumps(line))
part.replace(told.address)
server.serve_forever()
