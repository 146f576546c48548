#!/usr/bin/env bash
# Both CUDA images prove themselves on the CPU: fetched, built by their Dockerfiles, then their own
# self-test (real LoRA steps in fp32 and bf16, Triton's machine code, bitsandbytes' library).
#   .ci/prove-images.sh     within BUDGET_S seconds for both (1,320)
# What this machine cannot have, or not in time, is said and passed over: an engine, wheels, room,
# minutes. An image that does not build, or that was built and fails its test, is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

end=$((SECONDS + ${BUDGET_S:-1320}))
room_kb=14000000 # wheels, layers and the build's own copy of one image
base=()
if docker image inspect base:bookworm >/dev/null 2>&1; then base=(--base base:bookworm); fi

# within COMMAND...: at low priority, in the time that is left; 124 where that was not enough
within() {
  local left=$((end - SECONDS))
  ((left > 0)) || return 124
  timeout "$left" nice -n 10 "$@"
}

for image in train-cu130 train-cu126; do
  began=$SECONDS code=0
  if (($(df --output=avail -k . | tail -n 1) < room_kb)); then
    echo "ci: $image was not proven here: less than $((room_kb / 1000000)) GB free"
    continue
  fi
  within .venv/bin/milktea image fetch "$image" || code=$?
  if ((code)); then
    echo "ci: $image was not proven here: its packages cannot be had, or not in time (exit $code)"
    continue
  fi
  within .venv/bin/milktea image build "$image" --no-fetch "${base[@]}" || code=$?
  built=$((SECONDS - began))
  if ((code == 0)); then
    within .venv/bin/python -m pytest -m docker tests/image -n 0 \
      -k "proves_itself and $image" || code=$?
    docker rmi "$(docker images -q "milktea/$image" | head -n 1)" >/dev/null || true
  fi
  if ((code == 124)); then
    echo "ci: $image was not proven here: the time was over"
  elif ((code)); then
    echo "ci: $image does not build, or does not prove itself (exit $code)"
    exit 1
  else
    echo "ci: $image proved itself: built in $built s, $((SECONDS - began)) s in all"
  fi
done
