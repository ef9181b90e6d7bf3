#!/usr/bin/env bash
# compute-sanitizer over all kernel tests, in small processes whose results are kept, so that it can be stopped and run again.
#
#   tests/kernels/sanitize_kernels.sh [racecheck] [memcheck] [synccheck]     # all three if none is named; needs a GPU
#   LIMIT=500 JOBS=4 tests/kernels/sanitize_kernels.sh racecheck             # stop beginning anything after 500 s, four at a time
#
# CHUNK: tests of one process (40). EACH: seconds one may take (400). STATE: where results are kept (outputs/sanitize); a test
# that was clean there, with the same library, is not run again. ONLY: what pytest's -k takes. EVERY=5: of each test function's cases the
# first, the sixth and so on (an odd number: even ones leave out one dtype).
# No tensor of a process is freed under these tools, whatever the reason, so that a larger CHUNK takes more memory; what failed for
# want of it is told apart from a finding.
# Exit status: 0 all is clean, 1 something is not, 3 not everything was reached.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "$0")/../.."
export PEFT_LORASWITCH_SANITIZING=1
export LIMIT=${LIMIT:-3600} EACH=${EACH:-400} STATE=${STATE:-outputs/sanitize} PYTHON=${PYTHON:-python3} BEGAN=$(date +%s)
CHUNK=${CHUNK:-40} JOBS=${JOBS:-1}
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

files=(kernels many_tokens split_k expand linear_4bit linear_int4 router_context merge)
files=("${files[@]/#/tests/kernels/test_}") files=("${files[@]/%/_gpu.py}")
# Left out: what only repeats the same kernels thousands of times, or counts on the speed of launches.
$PYTHON -m pytest "${files[@]}" --collect-only -q -p no:cacheprovider \
  -k "(${ONLY:-test}) and not soak and not 20000 and not fill_the_gpu" 2>&1 | grep '^tests/.*::' |
  awk -F'[' -v every="${EVERY:-1}" 'seen[$1]++ % every == 0' >"$scratch/all"
[ -s "$scratch/all" ] || { echo "pytest found no kernel test (ONLY=${ONLY:-})" >&2; exit 2; }

run_chunk() { # file with test ids, its name begins with the tool's
  local tool log seconds status=0 summary outcome environment=()
  tool=$(basename "$1") tool=${tool%%.*}
  (($(date +%s) - BEGAN < LIMIT)) || { echo "$tool: not begun: $(head -1 "$1"), and $(($(wc -l <"$1") - 1)) more"; return; }
  log="$STATE/$tool.$(sha1sum <"$1" | cut -c1-12).log" seconds=$(date +%s)
  # an allocation of its own for every tensor, so that a step over its end is one into nothing
  [[ $tool == memcheck && $1 != *.graph.* ]] && environment=(PYTORCH_NO_CUDA_MEMORY_CACHING=1)
  mapfile -t ids <"$1"
  # kns: part of the mangled names. Ours alone are watched; the float64 oracle runs at its own speed.
  timeout "$EACH" env "${environment[@]}" compute-sanitizer --tool "$tool" --kernel-name kns=_ZN2ls --error-exitcode 9 \
    "$PYTHON" -m pytest -q -p no:cacheprovider --durations=3 "${ids[@]}" >"$log" 2>&1 || status=$?
  seconds=$(($(date +%s) - seconds))
  summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1 | sed 's/=* *//')
  outcome="FAILED ($status)"
  ((status == 0)) && grep -qE '(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)' <<<"$summary" &&
    grep -qE '[0-9]+ passed' "$log" && ! grep -qE '[0-9]+ (skipped|failed)' "$log" && outcome=clean
  ((status == 124)) && outcome="TIME OUT"
  # memcheck reports a refused allocation, too; any other report is a finding
  ((status != 0)) && grep -qE 'OutOfMemoryError|cudaErrorMemoryAllocation' "$log" &&
    ! grep -E '^========= [A-Z]' "$log" |
      grep -qvE 'COMPUTE-SANITIZER|cudaErrorMemoryAllocation|Target application returned|: [0-9]+ (errors|hazards)' &&
    [[ $tool == memcheck || $summary == *": 0 "* ]] && outcome="OUT OF MEMORY, fewer JOBS:"
  echo "$outcome ${seconds}s ${#ids[@]} tests, from ${ids[0]##*::}; $summary" | tee -a "$STATE/$tool.$LIBRARY" | sed "s/^/$tool: /"
  if [[ $outcome == clean ]]; then rm "$log"; cat "$1" >>"$STATE/$tool.$LIBRARY.clean"
  else touch "$STATE/$tool.unclean"; echo "  see $log: $(grep -E '(passed|failed|skipped|Error)' "$log" | tail -1)"; fi
}
export -f run_chunk

tests=$(wc -l <"$scratch/all")
for tool in "${tools[@]}"; do
  rm -f "$STATE/$tool.unclean"
  touch "$STATE/$tool.$LIBRARY.clean"
  grep -vxFf "$STATE/$tool.$LIBRARY.clean" "$scratch/all" >"$scratch/left"
  # Alone in their processes: layers of full size, which take long, and captured graphs, which need torch's own allocator.
  grep -E 'full_size|panels' "$scratch/left" | split -l 1 -a 3 - "$scratch/$tool.full_size."
  grep -E 'graph|replay' "$scratch/left" | split -l 1 -a 3 - "$scratch/$tool.graph."
  grep -vE 'full_size|panels|graph|replay' "$scratch/left" | split -l "$CHUNK" -a 3 - "$scratch/$tool.tests."
done
# One queue for all tools, so that none waits for the last process of another; first what takes longest.
printf '%s\n' "$scratch"/*.full_size.* "$scratch"/*.graph.* "$scratch"/*.tests.* |
  xargs -P "$JOBS" -I{} bash -c 'run_chunk "$@"' _ {}

unclean=0 unreached=0
for tool in "${tools[@]}"; do
  clean=$(grep -cxFf "$STATE/$tool.$LIBRARY.clean" "$scratch/all")
  if [ -e "$STATE/$tool.unclean" ]; then unclean=1; elif ((clean < tests)); then unreached=1; fi
  echo "$tool: $clean of $tests tests clean, library $LIBRARY, $(($(date +%s) - BEGAN)) s"
done
((unclean)) && exit 1
((unreached)) && exit 3
exit 0
