#!/bin/sh
# Trains all of `nano` from nothing on one GPU machine without a network, in 12 minutes and two fits.
#   training/all_phases.sh PHOTOS_DIR OUT
# Needs python3 with torch, numpy, pillow and safetensors, and about 16 cores to draw clips. Both VAEs are fitted, at the
# same time; the DiTs end by the clock: STAGE1 and STAGE2 are their minutes, neither over 9. OUT/models gets the averaged
# weights, OUT/NAME.log and OUT/NAME/log.jsonl are logs; exits with 1 if one fails.
set -u
photos=$1 out=$2
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/.typing${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"

run() { # PHASE WORKERS [OPTIONS]
  phase=$1 workers=$2
  shift 2
  "${PYTHON:-python3}" -m swifti2v.training.cli nano "$phase" -o "$out" --photos-dir "$photos" --device "${DEVICE:-cuda}" --workers "$workers" \
    --set steps=30000 --set curve=false --set save_every=1000000 --set log_every=20 \
    --set skips=30 "$@" >"$out/$phase.log" 2>&1 || {
    echo "$phase: failed" >&2
    tail -n 5 "$out/$phase.log" >&2
    return 1
  }
  rm -f "$out/$phase/checkpoint.safetensors" # nothing resumes a run by the clock, and it is eight times the weights
  echo "$phase: done $(grep ' min$' "$out/$phase.log" | tail -n 1)"
}

run vae1 7 --linear &
run vae2 7 --linear
code=$?
wait $! && [ $code = 0 ] || exit 1
run stage1 14 --minutes "${STAGE1:-4}" --finish && run stage2 14 --minutes "${STAGE2:-8}" --finish
