#!/bin/sh
# Measures everything on a bare GPU machine without a network, in parts that each end within PART_SECONDS:
#   benchmarks/device.sh OUT [PART ...]
# needs python3 with torch, numpy, pillow, safetensors and click; triton, pytest and diffusers are used if they are there.
# OUT/records.json has the record of each part by its name, OUT/log.txt all that was printed, OUT/kernels.json what was
# measured of kernels, OUT/summary.txt all tables; that is printed last. OUT/running/ has the part that is under way.
# A part that fails or takes too long is said so, and the others go on; the exit status is then 1. What such a part
# had measured is in its record, marked as not complete.
# To try it anywhere: PROFILE=tiny DEVICE=cpu RUNS=2 LENGTHS=33,49 benchmarks/device.sh build/device
set -u
self=$0
PYTHON=${PYTHON:-python3}
PROFILE=${PROFILE:-wan-2k}
SMALL=${SMALL:-nano} # where launches are most of the time
DEVICE=${DEVICE:-cuda}
DTYPE=${DTYPE:-bf16}
RUNS=${RUNS:-7}
LENGTHS=${LENGTHS:-81,241}
PART_SECONDS=${PART_SECONDS:-570}
root=$(cd "$(dirname "$self")/.." && pwd)
export PYTHON PROFILE SMALL DEVICE DTYPE RUNS LENGTHS PART_SECONDS PYTHONUNBUFFERED=1
export PYTHONPATH="$root/.typing${PYTHONPATH:+:$PYTHONPATH}"

has() { "$PYTHON" -c "import importlib.util as i, sys; sys.exit(i.find_spec('$1') is None)" 2>/dev/null; }

bench() { # CASE [options]; later options win
  case=$1
  shift
  "$PYTHON" -m swifti2v.benchmarks.cli "$case" --profile "$PROFILE" --device "$DEVICE" --dtype "$DTYPE" \
    --json "$out/running/$part.json" "$@"
}

gpu_tests() { # each file in a process of its own, which a crash ends; that of a compiler last, as it takes longest
  ends=$(($(date +%s) + PART_SECONDS - 20)) failed=0
  cd "$root" || return 1
  for file in $(grep -l 'pytest\.mark\.gpu' tests/test_*.py | grep -v inductor) tests/test_inductor_cuda.py; do
    left=$((ends - $(date +%s)))
    if [ $left -le 0 ]; then
      echo "$file FAILED: no time is left for it"
      failed=1
      continue
    fi
    # in the foreground, so that it ends with the part; interrupted, pytest still says what has failed
    timeout --foreground -s INT -k 10 $left "$PYTHON" -m pytest -v -m gpu --maxfail 20 -p no:cacheprovider "$file"
    code=$?
    if [ $code != 0 ] && [ $code != 5 ]; then # 5: none of its tests can run here
      echo "$file FAILED: pytest ended with $code"
      failed=1
    fi
  done
  return $failed
}

run_part() {
  # compiling takes minutes of a CPU, and what a GPU gains from it is what is asked; a CPU has no CUDA graphs.
  # With graphs two calls are warm-up: the third call of a step is the one that is captured.
  compile=--compile graphs=--cuda-graphs
  [ "$DEVICE" != cpu ] || compile='' graphs=''
  # shellcheck disable=SC2086  # an option that is not there is no word
  case $part in
    smoke)
      nvidia-smi 2>/dev/null
      "$PYTHON" -m swifti2v.benchmarks.cli clip --profile tiny --device "$DEVICE" --dtype fp32 --dtype bf16 --runs 2 \
        --warmup 0 --json "$out/running/$part.json"
      ;;
    kernels)
      if [ "$DEVICE" != cpu ] && has pytest; then
        gpu_tests
      else
        "$PYTHON" -m swifti2v.benchmarks.cli_check --device "$DEVICE"
      fi
      ;;
    attention) bench attention --runs "$RUNS" ;;
    ladder) bench ladder $compile --runs "$RUNS" --warmup 2 ;;
    stage1) bench dit-stage1 --kernels auto --runs "$RUNS" --warmup 1 ;;
    stage2) bench dit-stage2 --kernels auto $graphs --runs "$RUNS" --warmup 2 ;;
    peers)
      if ! has diffusers; then
        echo "peers: got no diffusers, want it; this part is left out"
        return 0
      fi
      bench dit-stage2 $compile --peers --peer-dtype "$DTYPE" --runs "$RUNS" --warmup 1
      ;;
    encode) bench vae-encode --runs "$RUNS" --warmup 1 ;;
    decode) bench vae-decode --runs "$RUNS" --warmup 1 ;;
    small) bench clip --profile "$SMALL" --kernels auto $graphs --runs "$RUNS" --warmup 2 ;;
    memory) bench clip --runs 1 --warmup 0 ;; # of one variant alone, as others would count their weights
    clip) bench clip --kernels auto --runs 2 --warmup 0 ;;
    graphs) bench clip $graphs --runs 2 --warmup 0 ;;
    reuse) bench clip --reuse-context --kernels auto --runs 2 --warmup 0 ;;
    first) bench first-frames --kernels auto --runs 2 --warmup 0 ;;
    length) bench length --lengths "$LENGTHS" --runs 1 --warmup 0 ;;
    growth) bench full-sequence --denoising --stage2-steps 1 --lengths "$LENGTHS" --runs 3 --warmup 0 ;;
    *)
      echo "device.sh: got part '$part', want one of those that the script lists" >&2
      return 2
      ;;
  esac
}

collect() { # the files of a part that has ended go to those of all parts
  {
    echo "== $part"
    cat "$out/running/$part.log"
  } >>"$out/log.txt"
  "$PYTHON" - "$out/records.json" "$out/running/$part.json" "$part" <<'END'
import json, pathlib, sys
records, record = map(pathlib.Path, sys.argv[1:3])
if record.exists():
    known = json.loads(records.read_text()) if records.exists() else {}
    records.write_text(json.dumps({**known, sys.argv[3]: json.loads(record.read_text())}, indent=1) + "\n")
END
  rm -rf "$out/running"
}

out=$1
shift
if [ "${1:-}" = --run ]; then # the script calls itself so, under its time limit
  part=$2
  run_part
  exit $?
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
export SWIFTI2V_CACHE="$out" # of which only kernels.json is used here
status=0
: >"$out/summary.txt"
for part in ${*:-smoke kernels small stage2 clip decode ladder memory graphs peers encode stage1 attention first length growth reuse}; do
  mkdir -p "$out/running"
  started=$(date +%s)
  timeout -k 10 "$PART_SECONDS" sh "$self" "$out" --run "$part" >"$out/running/$part.log" 2>&1
  code=$?
  took=$(($(date +%s) - started))
  {
    if [ $code = 0 ]; then
      echo "== $part: ok in $took s"
      grep -v ': done$' "$out/running/$part.log" | tail -n 40
    else
      echo "== $part: FAILED with $code in $took s"
      grep -E '^tests/.*(FAILED|ERROR|Fatal Python error)' "$out/running/$part.log" | tail -n 30
      tail -n 15 "$out/running/$part.log"
      status=1
    fi
  } >>"$out/summary.txt"
  collect
done
if [ -f "$out/kernels.json" ]; then
  echo "== kernels that were chosen" >>"$out/summary.txt"
  "$PYTHON" -m swifti2v.benchmarks.cli_kernels "$out/kernels.json" >>"$out/summary.txt" 2>&1 || status=1
fi
cat "$out/summary.txt"
exit $status
