#!/usr/bin/env bash
# `make test` as on a bare machine (.ci/bare.sh), which types `make rent-and-train` too; what skips
# there for want of a program is listed, and runs once more with the programs of this machine.
set -euo pipefail

skipped=$(mktemp)
trap 'rm -f "$skipped"' EXIT
MILKTEA_SKIPPED=$skipped .ci/bare.sh make test
[[ ! -s $skipped ]] || .venv/bin/python -m pytest -n 2 "@$skipped"
