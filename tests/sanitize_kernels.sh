#!/usr/bin/env bash
# compute-sanitizer over all kernel tests, in small processes whose results are kept, so that it can be stopped and run again.
#
#   tests/sanitize_kernels.sh [racecheck] [memcheck] [synccheck]     # all three if none is named; needs a GPU
#   LIMIT=500 JOBS=4 tests/sanitize_kernels.sh racecheck             # stop beginning anything after 500 s, four at a time
#
# CHUNK: tests of one process (60). EACH: seconds one may take (240). STATE: where results are kept (outputs/sanitize); what
# is clean there, for the same tests and the same library, is not run again. ONLY: what pytest's -k takes.
# A process takes up to 13 GB of the GPU's memory under racecheck: JOBS=8 for 140 GB, or some fail for want of it.
# Exit status: 0 all is clean, 1 something is not, 3 not everything was reached.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
export PEFT_LORASWITCH_SANITIZING=1
export LIMIT=${LIMIT:-3600} EACH=${EACH:-240} STATE=${STATE:-outputs/sanitize} PYTHON=${PYTHON:-python3} BEGAN=$(date +%s)
CHUNK=${CHUNK:-60} JOBS=${JOBS:-1}
read -ra tools <<<"${*:-racecheck memcheck synccheck}"
for tool in "${tools[@]}"; do
  [[ " racecheck memcheck synccheck " == *" $tool "* ]] || { echo "unknown tool $tool: racecheck, memcheck or synccheck" >&2; exit 2; }
done
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit" >&2; exit 2; }
mkdir -p "$STATE"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
LIBRARY=$(cat peft_loraswitch/libloraswitch.so setup.py 2>/dev/null | sha1sum | cut -c1-12)
export LIBRARY

# Left out: what only repeats the same kernels thousands of times, or counts on the speed of launches.
$PYTHON -m pytest tests/test_kernels_gpu.py tests/test_expand_gpu.py --collect-only -q -p no:cacheprovider \
  -k "(${ONLY:-test}) and not soak and not 20000 and not fill_the_gpu" 2>&1 | grep '^tests/.*::' >"$scratch/all"
[ -s "$scratch/all" ] || { echo "pytest found no kernel test (ONLY=${ONLY:-})" >&2; exit 2; }
# Alone in their processes: full-size layers, which take long, and captured graphs, which need torch's own allocator.
grep -vE 'full_size|graph' "$scratch/all" | split -l "$CHUNK" -a 3 - "$scratch/chunk."
grep -E 'full_size' "$scratch/all" | split -l 1 -a 3 - "$scratch/slow."
grep -E 'graph' "$scratch/all" | split -l 1 -a 3 - "$scratch/torchs_allocator."

run_chunk() { # tool, file with test ids
  local key log seconds status=0 summary outcome environment=()
  key=$(cat "$2" <(echo "$1 $LIBRARY") | sha1sum | cut -c1-16)
  grep -q "^$key clean" "$STATE/$1" 2>/dev/null && return
  (($(date +%s) - BEGAN < LIMIT)) || { echo "$1: not begun: $(head -1 "$2"), and $(($(wc -l <"$2") - 1)) more"; return; }
  log="$STATE/$1.$key.log" seconds=$(date +%s)
  # an allocation of its own for every tensor, so that a step over its end is one into nothing
  [[ $1 == memcheck && $2 != *torchs_allocator* ]] && environment=(PYTORCH_NO_CUDA_MEMORY_CACHING=1)
  mapfile -t ids <"$2"
  # kns: part of the mangled names. Ours alone are watched; the float64 oracle runs at its own speed.
  timeout "$EACH" env "${environment[@]}" compute-sanitizer --tool "$1" --kernel-name kns=_ZN2ls --error-exitcode 9 \
    "$PYTHON" -m pytest -q -p no:cacheprovider --durations=3 "${ids[@]}" >"$log" 2>&1 || status=$?
  seconds=$(($(date +%s) - seconds))
  summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1 | sed 's/=* *//')
  outcome="FAILED ($status)"
  ((status == 0)) && grep -qE '(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)' <<<"$summary" &&
    grep -qE '[0-9]+ passed' "$log" && ! grep -qE '[0-9]+ (skipped|failed)' "$log" && outcome=clean
  ((status == 124)) && outcome="TIME OUT"
  ((status != 0)) && [[ $summary == *": 0 "* ]] && grep -q OutOfMemoryError "$log" && outcome="OUT OF MEMORY, fewer JOBS:"
  echo "$key $outcome ${seconds}s ${#ids[@]} tests, from ${ids[0]##*::}; $summary" | tee -a "$STATE/$1" | sed "s/^$key/$1:/"
  [[ $outcome == clean ]] && rm "$log" || echo "  see $log: $(grep -E '(passed|failed|skipped|Error)' "$log" | tail -1)"
}
export -f run_chunk

unclean=0 unreached=0
for tool in "${tools[@]}"; do
  printf '%s\n' "$scratch"/chunk.* "$scratch"/torchs_allocator.* "$scratch"/slow.* |
    xargs -P "$JOBS" -I{} bash -c 'run_chunk "$@"' _ "$tool" {}
  tests=0 clean=0
  for file in "$scratch"/*.*; do
    key=$(cat "$file" <(echo "$tool $LIBRARY") | sha1sum | cut -c1-16)
    count=$(wc -l <"$file") tests=$((tests + count))
    if grep -q "^$key clean" "$STATE/$tool" 2>/dev/null; then clean=$((clean + count))
    elif grep -q "^$key" "$STATE/$tool" 2>/dev/null; then unclean=1
    else unreached=1; fi
  done
  echo "$tool: $clean of $tests tests clean, library $LIBRARY, $(($(date +%s) - BEGAN)) s"
done
((unclean)) && exit 1
((unreached)) && exit 3
exit 0
