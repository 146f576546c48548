#!/usr/bin/env bash
# What `make setup` runs: everything of requirements.lock into the virtual environment VENV.
#   .ci/setup.sh VENV [TORCH]      TORCH: another version than the lock's, for `make test-versions`
# Exit code 4: torch in this version could not be installed.
set -euo pipefail
venv=$1
log=$venv/setup.log
torch=$(grep '^torch==' requirements.lock)
torch=torch==${2:-${torch#torch==}}
cpu_index=https://download.pytorch.org/whl/cpu

pip() { # quiet: what it says is shown when it fails
  "$venv/bin/pip" -q "$@" >>"$log" 2>&1
}
failed() { # failed WHAT [CODE]
  tail -n 15 "$log" >&2
  echo "setup failed at: $1 (all of it: $log)" >&2
  exit "${2:-1}"
}

cpu_torch() { # fails where pip's own settings name another index, and that had a CUDA build
  pip install --no-deps --retries 1 --timeout 15 --index-url "$cpu_index" "$torch" &&
    "$venv/bin/pip" freeze | grep '^torch==.*+cpu' >>"$log"
}
pypi_torch() { # beside the lock's versions; of setuptools some releases of torch want an older one
  pip install "$torch" \
    -c <(grep -v '^torch==\|^setuptools==\|--hash' requirements.lock | sed 's/ *\\$//') ||
    failed "$torch" 4
}

echo "setting up $venv (a minute or two, once)"
: >"$log"
# PyPI's torch for Linux brings CUDA, 3 GB that a computer without an NVIDIA GPU has no use for.
if [[ $(uname -s) == Linux ]] && ! command -v nvidia-smi >/dev/null; then
  echo "  torch: PyTorch's CPU build, 0.2 GB"
  if ! cpu_torch; then
    echo "  torch: not at $cpu_index; PyPI's build instead (3 GB, installed 6)"
    pypi_torch
  fi
else
  echo "  torch: PyPI's build (with CUDA on Linux, 3 GB, installed 6)"
  pypi_torch
fi
echo "  $(grep -c '^[a-zA-Z].*==' requirements.lock) packages, each checked by hash"
pip install --no-deps --require-hashes -r <(grep -v '^torch==' requirements.lock) ||
  failed requirements.lock
pip install --no-deps --no-build-isolation -e . || failed "milktea itself"
