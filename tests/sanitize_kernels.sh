#!/usr/bin/env bash
# compute-sanitizer over a selection of the kernel tests; each tool in a process of its own. Needs a GPU.
cd "$(dirname "$0")/.."
logs=$(mktemp -d)
select='(test_linear_experts_and_top_k and 4-8-8) or (test_linear_every_token_count and (9 or 33)) or unaligned or router_ties or merge_in_place or (test_delta_alone and 8-8)'
for tool in memcheck racecheck synccheck; do
  (timeout "${1:-100}" compute-sanitizer --tool "$tool" --error-exitcode 9 python3 -m pytest tests/test_kernels_gpu.py -q -p no:cacheprovider \
    -k "$select" >"$logs/$tool.log" 2>&1; echo "$tool: exit $?, $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$logs/$tool.log" | tail -1), $(tail -1 "$logs/$tool.log")") &
done
wait
