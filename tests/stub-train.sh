#!/bin/sh
# Stands in for an image's milktea-train: the wire's files, in the wire's order. tests/rig.py puts
# a folder and two hashes in place of the words between @.
set -e
[ "$1" = --wire ] && { echo @WIRE@; exit 0; }
if [ "$1" = evaluate ]; then
  echo "base: loading"
  while [ -e @FOLDER@/slow ]; do sleep 0.05; done
  [ -e @FOLDER@/unscored ] && { echo "no room"; exit 3; }
  cp @FOLDER@/scores.json "$6"; exit 0
fi
if [ "$1" = merge ]; then
  while [ -e @FOLDER@/slow ]; do sleep 0.05; done
  for to; do [ "$before" = --out ] && out=$to; before=$to; done
  [ -d @FOLDER@/merged ] || { echo "refused: the merge loses 3 % of what the adapter does"; exit 3; }
  cp -r @FOLDER@/merged "$out"; exit 0
fi
[ "$1" = serve ] && exec python3 @FOLDER@/serve.py "$@"
[ "$1" = chat ] && { echo "asked of $2"; read -r line; echo "you said $line, $HF_TOKEN"; exit 0; }
now=$(date +%s)
say() { printf '{"t":%s,%s}\n' "$now" "$1" >>events.jsonl; }
while [ -e @FOLDER@/hang ] && [ -z "$NCCL_P2P_DISABLE" ]; do sleep 0.05; done
say '"event":"started","step":0,"total_steps":2'
say '"event":"step","step":1,"loss":2.0,"learning_rate":0.1,"grad_norm":1.0'
[ -z "$HF_TOKEN" ] || say "\"event\":\"warning\",\"message\":\"a token of ${#HF_TOKEN} letters came\""
while [ -e @FOLDER@/pause ]; do sleep 0.05; done
if [ -e @FOLDER@/die-once ]; then
  mv @FOLDER@/die-once @FOLDER@/died
  say "\"event\":\"failed\",\"reason\":\"$(cat @FOLDER@/died)\""; exit 1
fi
[ -e @FOLDER@/die ] && { say "\"event\":\"failed\",\"reason\":\"$(cat @FOLDER@/die)\""; exit 1; }
[ -e @FOLDER@/fail ] && { say '"event":"failed","reason":"planted"'; exit 4; }
mkdir -p checkpoints/1.new
cp @FOLDER@/checkpoint/* checkpoints/1.new
mv checkpoints/1.new checkpoints/1
say '"event":"checkpoint","step":1,"path":"checkpoints/1","manifest_sha256":"@MANIFEST@"'
mkdir -p result
cp @FOLDER@/result/* result/
rm result/manifest.json
sed "s/@RUN@/$(basename "$PWD")/" @FOLDER@/result/manifest.json >result/manifest.new
mv result/manifest.new result/manifest.json
say '"event":"finished","steps":2,"final_loss":1.0,"seconds":1,"adapter_sha256":"@ADAPTER@"'
