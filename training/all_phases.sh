#!/bin/sh
# Trains all of `nano` on one GPU machine without a network, in about 13 minutes: the recipe of the shipped weights.
#   training/all_phases.sh PHOTOS_DIR OUT
# Needs python3 with torch, numpy, pillow and safetensors, and about 16 cores to draw clips. Phases that do not need each
# other run at the same time. Each ends by the clock: VAE1, STAGE1 and STAGE2 are their minutes, none over 9; vae2 is
# fitted, and vae1 too with VAE1_FLAGS=--linear. OUT/models gets the averaged weights, OUT/NAME.log and OUT/NAME/log.jsonl
# are logs; exits with 1 if one fails.
set -u
photos=$1 out=$2
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/.typing${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"

run() { # PHASE WORKERS MINUTES [OPTIONS]
  phase=$1 workers=$2 minutes=$3
  shift 3
  python3 -m swifti2v.training.cli nano "$phase" -o "$out" --photos-dir "$photos" --device "${DEVICE:-cuda}" --workers "$workers" \
    --minutes "$minutes" --finish --set steps=30000 --set curve=false --set save_every=1000000 --set log_every=20 \
    --set skips=30 "$@" >"$out/$phase.log" 2>&1 || {
    echo "$phase: failed" >&2
    tail -n 5 "$out/$phase.log" >&2
    return 1
  }
  rm -f "$out/$phase/checkpoint.safetensors" # nothing resumes a run by the clock, and it is eight times the weights
  echo "$phase: $(grep ' min$' "$out/$phase.log" | tail -n 1)"
}

(run vae1 6 "${VAE1:-2.3}" ${VAE1_FLAGS:-} && run stage1 8 "${STAGE1:-2.4}") &
run vae2 4 1 --linear
code=$?
wait $! && [ $code = 0 ] || exit 1
run stage2 14 "${STAGE2:-8}"
