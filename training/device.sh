#!/bin/sh
# Trains phases of `nano` on a bare GPU machine without a network: needs python with torch, numpy, pillow, safetensors.
#   training/device.sh PHOTOS.safetensors MODELS OUT PHASE [swifti2v-train options]
# With `--linear` a VAE is fitted in a minute instead, and there is no .jsonl.
# PHOTOS is what `swifti2v-train pack` wrote, MODELS a folder of the finished models that the phase reads (and, with
# `--start MODELS`, begins with). One call trains one phase in under 9 minutes, at whose end the learning rate is 0; OUT/PHASE
# (and OUT/text) hold its averaged weights as a model folder has them, OUT/PHASE.log and .jsonl its log. WORKERS processes
# draw clips. training/all_phases.sh runs them all.
set -eu
photos=$1 models=$2 out=$3 phase=$4
shift 4
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/models" "$out"
case " $* " in
*" --linear "*) ;;
*) set -- --minutes 8 --finish "$@" ;;
esac
if [ -d "$models" ]; then cp -r "$models/." "$work/models/"; fi
export PYTHONPATH="$root/.typing${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"${PYTHON:-python3}" -m swifti2v.training.cli nano "$phase" -o "$work" \
  --packed "$photos" --device "${DEVICE:-cuda}" --workers "${WORKERS:-12}" --set curve=false "$@" \
  2>"$out/$phase.log" || {
  status=$?
  tail -n 20 "$out/$phase.log" >&2
  exit $status
}
if [ -f "$work/$phase/log.jsonl" ]; then cp "$work/$phase/log.jsonl" "$out/$phase.jsonl"; fi
cp -r "$work/models/$phase" "$out/"
if [ "$phase" = stage1 ]; then cp -r "$work/models/text" "$out/"; fi
tail -n 3 "$out/$phase.log"
