#!/usr/bin/env bash
# What `make setup` runs: everything of requirements.lock into the virtual environment VENV.
#   .ci/setup.sh VENV
set -euo pipefail
venv=$1
log=$venv/setup.log
torch=$(grep '^torch==' requirements.lock)
cpu_index=https://download.pytorch.org/whl/cpu

pip() { # quiet: what it says is shown when it fails
  "$venv/bin/pip" -q "$@" >>"$log" 2>&1
}
failed() {
  tail -n 15 "$log" >&2
  echo "setup failed at: $1 (all of it: $log)" >&2
  exit 1
}

echo "setting up $venv (a minute or two, once)"
: >"$log"
# PyPI's torch for Linux brings CUDA, 3 GB that a computer without an NVIDIA GPU has no use for.
if [[ $(uname -s) == Linux ]] && ! command -v nvidia-smi >/dev/null; then
  echo "  torch: PyTorch's CPU build, 0.2 GB"
  if ! pip install --no-deps --retries 1 --timeout 15 --index-url "$cpu_index" "$torch"; then
    echo "  torch: $cpu_index does not answer; PyPI's build instead (up to 3 GB)"
    pip install "$torch" -c <(grep -v '^torch==\|--hash' requirements.lock | sed 's/ *\\$//') ||
      failed "$torch"
  fi
else
  echo "  torch: PyPI's build (with CUDA on Linux, 3 GB)"
  pip install "$torch" -c <(grep -v '^torch==\|--hash' requirements.lock | sed 's/ *\\$//') ||
    failed "$torch"
fi
echo "  $(grep -c '^[a-zA-Z].*==' requirements.lock) packages, each checked by hash"
pip install --no-deps --require-hashes -r <(grep -v '^torch==' requirements.lock) ||
  failed requirements.lock
pip install --no-deps --no-build-isolation -e . || failed "milktea itself"
