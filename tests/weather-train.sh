#!/bin/sh
# A training of some seconds in place of an image's milktea-train, which speaks the wire: it loads,
# steps, saves, goes on from its newest checkpoint, and saves when it is asked to end. It says so
# where the disk takes nothing. tests/weather.py puts values in place of the words between @.
set -e
[ "$1" = --wire ] && { echo @WIRE@; exit 0; }
say() { printf '{"t":%s,%s}\n' "$(date +%s)" "$1" >>events.jsonl; }
die() { say "\"event\":\"failed\",\"reason\":\"$1\""; exit 1; }
facts=$(dirname "$(command -v nvidia-smi)")/../facts
step=0 stop=
trap 'stop=1' TERM

save() {
  folder=checkpoints/$step
  [ -e "$folder" ] && return
  mkdir -p checkpoints && rm -rf "$folder.new" && mkdir "$folder.new" || return 1
  head -c @STATE@ /dev/zero >"$folder.new/state.bin" || return 1
  printf '{"step":%s,"files":{"state.bin":{"sha256":"%s","bytes":@STATE@}}}' \
    "$step" "$(sha256sum <"$folder.new/state.bin" | cut -c1-64)" >"$folder.new/manifest.json" || return 1
  mv "$folder.new" "$folder" || return 1
  hash=$(sha256sum <"$folder/manifest.json" | cut -c1-64)
  say "\"event\":\"checkpoint\",\"step\":$step,\"path\":\"$folder\",\"manifest_sha256\":\"$hash\""
}

for part in 1 2 3; do # a download, a tenth as fast where HUB_SHARE is 0.1
  . "$facts"
  case $HUB_SHARE in 1) sleep 0.1 || : ;; *) sleep 1 || : ;; esac
  say "\"event\":\"loading\",\"what\":\"model\",\"done_bytes\":$part,\"total_bytes\":3"
done
for manifest in checkpoints/*/manifest.json; do
  [ -e "$manifest" ] || continue
  at=${manifest#checkpoints/} at=${at%/manifest.json}
  [ "$at" -gt "$step" ] && step=$at
done
say "\"event\":\"started\",\"step\":$step,\"total_steps\":@STEPS@"
while [ $step -lt @STEPS@ ]; do
  sleep @STEP_S@ || :
  [ -z "$stop" ] || { save; exit 143; }
  step=$((step + 1))
  say "\"event\":\"step\",\"step\":$step,\"loss\":1.0,\"learning_rate\":0.1,\"grad_norm\":1.0"
  [ $((step % 3)) != 0 ] || save || die "checkpoint $step: No space left on device"
done
mkdir -p result
cp @FOLDER@/result/adapter.zip @FOLDER@/result/loss.png result/ || die "result: No space left on device"
sed "s/@RUN@/$(basename "$PWD")/" @FOLDER@/result/manifest.json >result/manifest.new ||
  die "result: No space left on device"
mv result/manifest.new result/manifest.json
say '"event":"finished","steps":@STEPS@,"final_loss":1.0,"seconds":1,"adapter_sha256":"@ADAPTER@"'
