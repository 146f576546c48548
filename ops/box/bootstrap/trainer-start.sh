# For an image that does not hold our trainer: it came with the data; what it imports is installed once, beside the runs.
set -e
for p in /opt/venv/bin/python /venv/main/bin/python /opt/conda/bin/python python3; do
  if command -v "$p" >/dev/null 2>&1 && "$p" -c 'import torch' 2>/dev/null; then py=$p; break; fi
done
[ -n "${py:-}" ] || { echo "no Python with torch in this image: choose another image.ref" >&2; exit 3; }
"$py" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "the image's Python is older than 3.11: choose another image.ref" >&2; exit 3; }
if [ ! -e ../venv.ready ]; then
  printf '{"t": %s, "event": "loading", "what": "installing what the trainer imports"}\n' "$(date +%s)" >>events.jsonl
  "$py" -m venv --system-site-packages ../venv
  # Of an image's Python that is a venv itself, a new venv sees what lies below it, and no torch.
  "$py" -c 'import site, sys
for path in site.getsitepackages() if sys.prefix != sys.base_prefix else []:
    print(f"import site; site.addsitedir({path!r})")' >image.pth
  mv image.pth ../venv/lib/python3*/site-packages/
  ../venv/bin/python -m pip install -q --disable-pip-version-check \
    --no-deps --require-hashes -r trainer-requirements.txt
  touch ../venv.ready
fi
if [ -e packages/requirements.txt ] && [ ! -e ../packages.ready ]; then
  printf '{"t": %s, "event": "loading", "what": "installing packages of the job"}\n' "$(date +%s)" >>events.jsonl
  ../venv/bin/python -m pip install -q --disable-pip-version-check \
    --no-deps --only-binary=:all: -r packages/requirements.txt
  touch ../packages.ready
fi
if [ "${1:-}" = serve ] && [ ! -e ../serve.ready ]; then
  ../venv/bin/python -m pip install -q --disable-pip-version-check \
    --no-deps --require-hashes -r serve-requirements.txt
  touch ../serve.ready
fi
[ $# -gt 0 ] || set -- job.json
PYTHONPATH=. exec ../venv/bin/python -m trainer.launch "$@"
