#!/usr/bin/env bash
# `make lock`: resolves pyproject.toml anew into requirements.lock and the box's list, every file of
# every version by hash. torch's line has none: it comes from PyTorch's CPU index, PyPI or an image.
#   .ci/lock.sh UV TORCH [--keep]      --keep: leave the versions as they are
set -euo pipefail
uv=$1 torch=$2
keep=()
[[ ${3:-} == --keep ]] && keep=(-c requirements.lock)
box=ops/box/bootstrap/trainer-requirements.txt
serve=ops/box/bootstrap/serve-requirements.txt
resolve() {
  "$uv" pip compile --quiet --universal --generate-hashes --python-version 3.11 \
    --no-header --no-annotate --no-emit-index-url "$@"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
resolve pyproject.toml --extra dev "${keep[@]}" -o "$work/all"
sed 's/ *\\$//; /--hash/d' "$work/all" >"$work/versions" # what the box gets is what runs here
resolve .ci/box-requirements.in -c "$work/versions" -o "$work/box"
resolve .ci/serve-requirements.in -c "$work/versions" -o "$work/serve"
{
  echo "# Made by make lock. Installed with --no-deps --require-hashes, torch before it by its version."
  echo "torch==$torch"
  cat "$work/all"
} >requirements.lock
{
  echo "# Made by make lock. A box has torch already: the image brings it."
  cat "$work/box"
} >"$box"
{
  echo "# Made by make lock. What a box installs when it serves a result, beside the trainer's list."
  cat "$work/serve"
} >"$serve"
