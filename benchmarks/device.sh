#!/bin/sh
# Measures everything on a bare GPU machine without a network, in parts that each end within PART_SECONDS:
#   benchmarks/device.sh OUT [PART ...]
# needs python3 with torch, numpy, pillow, safetensors and click; pytest and diffusers are used where they are there.
# OUT/PART.json are the records, OUT/PART.log what was printed, OUT/summary.txt all tables; that is printed last.
# A part that fails or takes too long is said so, and the others go on; the exit status is then 1.
# To try it anywhere: PROFILE=tiny DEVICE=cpu RUNS=2 LENGTHS=33,49 benchmarks/device.sh build/device
set -u
self=$0
PYTHON=${PYTHON:-python3}
PROFILE=${PROFILE:-wan-2k}
DEVICE=${DEVICE:-cuda}
DTYPE=${DTYPE:-bf16}
RUNS=${RUNS:-7}
LENGTHS=${LENGTHS:-81,241}
PART_SECONDS=${PART_SECONDS:-570}
root=$(cd "$(dirname "$self")/.." && pwd)
export PYTHON PROFILE DEVICE DTYPE RUNS LENGTHS PART_SECONDS PYTHONUNBUFFERED=1
export PYTHONPATH="$root/.typing${PYTHONPATH:+:$PYTHONPATH}"

has() { "$PYTHON" -c "import importlib.util as i, sys; sys.exit(i.find_spec('$1') is None)"; }

bench() { # CASE [options]
  case=$1
  shift
  "$PYTHON" -m swifti2v.benchmarks.cli "$case" --profile "$PROFILE" --device "$DEVICE" --json "$out/$part.json" "$@"
}

run_part() {
  # compiling takes minutes of a CPU, and what a GPU gains from it is what is asked
  compile=$([ "$DEVICE" = cpu ] || echo --compile)
  case $part in
    smoke)
      nvidia-smi 2>/dev/null
      "$PYTHON" -m swifti2v.benchmarks.cli clip --profile tiny --device "$DEVICE" --dtype fp32 --dtype bf16 --runs 2 \
        --warmup 0 --json "$out/$part.json"
      ;;
    kernels)
      if [ "$DEVICE" != cpu ] && has pytest; then
        (cd "$root" && "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider)
      else
        "$PYTHON" -m swifti2v.benchmarks.cli_check --device "$DEVICE"
      fi
      ;;
    attention) bench attention --dtype "$DTYPE" --runs "$RUNS" ;;
    ladder) bench ladder --dtype "$DTYPE" $compile --runs "$RUNS" --warmup 1 ;;
    stage1) bench dit-stage1 --dtype "$DTYPE" --runs "$RUNS" --warmup 1 ;;
    stage2)
      peers=$(has diffusers && echo "--peers --peer-dtype bf16")
      bench dit-stage2 --dtype "$DTYPE" $compile $peers --runs "$RUNS" --warmup 1
      ;;
    encode) bench vae-encode --dtype "$DTYPE" --runs "$RUNS" --warmup 1 ;;
    decode) bench vae-decode --dtype "$DTYPE" --runs "$RUNS" --warmup 1 ;;
    clip) bench clip --dtype "$DTYPE" --runs 3 --warmup 0 ;;
    first) bench first-frames --dtype "$DTYPE" --runs 3 --warmup 0 ;;
    length) bench length --dtype "$DTYPE" --lengths "$LENGTHS" --runs 1 --warmup 0 ;;
    *)
      echo "device.sh: got part '$part', want one of those that the script lists" >&2
      return 2
      ;;
  esac
}

if [ "${2:-}" = --run ]; then # the script calls itself so, under its time limit
  out=$1 part=$3
  run_part
  exit $?
fi
out=$1
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
status=0
: >"$out/summary.txt"
for part in ${*:-smoke kernels stage2 decode clip ladder encode stage1 attention first length}; do
  started=$(date +%s)
  timeout -k 10 "$PART_SECONDS" sh "$self" "$out" --run "$part" >"$out/$part.log" 2>&1
  code=$?
  took=$(($(date +%s) - started))
  {
    if [ $code = 0 ]; then
      echo "== $part: ok in $took s"
      grep -v ' done$' "$out/$part.log" | tail -n 40
    else
      echo "== $part: FAILED with $code in $took s"
      tail -n 15 "$out/$part.log"
      status=1
    fi
  } >>"$out/summary.txt"
done
cat "$out/summary.txt"
exit $status
