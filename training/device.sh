#!/bin/sh
# Trains phases of `nano` on a bare GPU machine without a network: needs python with torch, numpy, pillow, safetensors.
#   training/device.sh PHOTOS.safetensors MODELS OUT PHASE [swifti2v-train options]
# PHOTOS is what `swifti2v-train pack` wrote, MODELS a folder of the finished models that the phase reads (and, with
# `--start MODELS`, begins with). One call trains one phase in at most 8.5 minutes; OUT/PHASE.safetensors and
# OUT/PHASE.json (and text.*) are its averaged weights, OUT/PHASE.log its log.
set -eu
photos=$1 models=$2 out=$3 phase=$4
shift 4
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
mkdir -p "$work/models" "$out"
if [ -d "$models" ]; then cp -r "$models/." "$work/models/"; fi
PYTHONPATH="$root/.typing" PYTHONUNBUFFERED=1 python3 -m swifti2v.training.cli nano "$phase" -o "$work" \
  --packed "$photos" --device cuda --minutes 8.5 --finish --set curve=false "$@" 2>"$out/$phase.log" || {
  status=$?
  tail -n 20 "$out/$phase.log" >&2
  exit $status
}
cp "$work/$phase/log.jsonl" "$out/$phase.jsonl"
for name in "$phase" text; do
  if [ "$name" = text ] && [ "$phase" != stage1 ]; then continue; fi
  cp "$work/models/$name"/*.safetensors "$out/$name.safetensors"
  if [ -f "$work/models/$name/config.json" ]; then cp "$work/models/$name/config.json" "$out/$name.json"; fi
done
tail -n 3 "$out/$phase.log"
