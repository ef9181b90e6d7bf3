"""tests/kernels/sanitize_kernels.sh without a GPU: pieces, results that are kept, exit statuses. The tools are stand-ins."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess

import pytest

from paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Collects 5 tests, with CASES cases each; one that runs prints what pytest would.
PYTHON = """#!/usr/bin/env bash
if [[ "$*" == *--collect-only* ]]; then
  echo "$*" >>"$HERE/collected"
  for name in a b c full_size graph; do
    for ((i = 1; i <= ${CASES:-1}; ++i)); do echo "tests/kernels/test_kernels_gpu.py::test_$name[$i]"; done
  done
else
  printf '%s\\n' "${@: -1} ${PYTORCH_NO_CUDA_MEMORY_CACHING:-cached}" >>"$HERE/ran"
  [[ -n ${FULL:-} && "$*" == *test_c* ]] && { echo "torch.OutOfMemoryError: CUDA out of memory"; echo "1 failed in 1 s"; exit 1; }
  echo "$(grep -o :: <<<"$*" | wc -l) passed in 1 s"
fi
"""
SANITIZER = """#!/usr/bin/env bash
tool=$2
[[ "$*" == *"--kernel-name kns=_ZN2ls"* ]] || exit 5
shift 6
"$@"
status=$? hazards=0
[[ $tool == memcheck && -n ${FULL:-} && "$*" == *test_c* ]] && hazards=2 status=9 &&
  echo '========= Program hit cudaErrorMemoryAllocation (error 2) due to "out of memory" on CUDA API call to cudaGetLastError.'
[[ $tool == "$BROKEN" && "$*" == *test_c* ]] && hazards=2 status=9 && echo "========= Invalid __global__ read of size 2 bytes"
if [[ $tool == racecheck ]]; then echo "========= RACECHECK SUMMARY: $hazards hazards displayed ($hazards errors, 0 warnings)"
else echo "========= ERROR SUMMARY: $hazards errors"; fi
exit $status
"""


@pytest.fixture
def script(tmp_path):
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*tools: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "HERE": str(tmp_path),
            "STATE": str(tmp_path / "state"), "CHUNK": "2", "BROKEN": "none", **settings,
        }  # fmt: skip
        command = ["bash", str(ROOT / "tests" / "kernels" / "sanitize_kernels.sh"), *tools]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    run.ran = lambda: (tmp_path / "ran").read_text().split("\n")[:-1] if (tmp_path / "ran").exists() else []  # type: ignore[attr-defined]
    return run


def test_everything_is_run_in_pieces_once(script, tmp_path):
    first = script("racecheck", "memcheck")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "racecheck: 5 of 5 tests clean" in first.stdout and "memcheck: 5 of 5 tests clean" in first.stdout
    assert len(script.ran()) == 8  # a and b, c, full_size, graph; twice
    assert [line.split("::")[1] for line in script.ran()[:4]] == [
        "test_full_size[1] 1", "test_full_size[1] cached", "test_graph[1] cached", "test_graph[1] cached"
    ], "what takes long comes first; graphs need torch's allocator, which hides from memcheck where a tensor ends"  # fmt: skip
    assert sorted(line.split()[-1] for line in script.ran()[4:]) == ["1", "1", "cached", "cached"]
    again = script("racecheck", "memcheck", CHUNK="1")  # other pieces, the same tests
    assert again.returncode == 0 and "racecheck: 5 of 5 tests clean" in again.stdout and len(script.ran()) == 8
    assert "not soak and not 20000" in (tmp_path / "collected").read_text()


def test_a_share_of_each_functions_cases(script):
    assert "racecheck: 10 of 10 tests clean" in script("racecheck", CASES="6", EVERY="3", CHUNK="9").stdout
    assert "racecheck: 30 of 30 tests clean" in script("racecheck", CASES="6", CHUNK="9").stdout
    assert "test_full_size[4]" in "".join(script.ran()[:4]), "the first and the fourth of each"


def test_a_hazard_is_reported_and_looked_for_again(script):
    broken = script("racecheck", BROKEN="racecheck")
    assert broken.returncode == 1 and "racecheck: 4 of 5 tests clean" in broken.stdout
    assert "FAILED (9)" in broken.stdout and "2 hazards displayed" in broken.stdout and "see " in broken.stdout
    mended = script("racecheck")
    assert mended.returncode == 0 and "racecheck: 5 of 5 tests clean" in mended.stdout
    assert len(script.ran()) == 4 + 1, "only what was not clean"


def test_a_gpu_without_memory_is_neither_clean_nor_a_finding(script):
    full = script("memcheck", FULL="1")
    assert full.returncode == 1 and "memcheck: 4 of 5 tests clean" in full.stdout
    assert "OUT OF MEMORY, fewer JOBS" in full.stdout and "FAILED" not in full.stdout
    assert "FAILED (9)" in script("memcheck", FULL="1", BROKEN="memcheck").stdout, "a finding is one all the same"
    assert script("memcheck").returncode == 0


def test_time_that_is_up_is_not_success(script):
    late = script("racecheck", LIMIT="0")
    assert late.returncode == 3 and "not begun" in late.stdout and not script.ran()
    assert script("racecheck", JOBS="3").returncode == 0


def test_wrong_names_and_empty_selections(script):
    unknown = script("racechek")
    assert unknown.returncode == 2 and "unknown tool racechek" in unknown.stderr
    assert subprocess.run(["bash", "-n", str(ROOT / "tests" / "kernels" / "sanitize_kernels.sh")]).returncode == 0


def test_what_captures_a_graph_says_so_in_its_name():
    """By the name the script knows that memcheck needs torch's allocator there: capturing is refused without it."""
    kernels = ROOT / "tests" / "kernels"
    files = [
        ast.parse(path.read_text())
        for path in (*kernels.glob("test_*_gpu.py"), ROOT / "tests" / "tools" / "kernel_groups.py")
    ]
    names: dict[str, set[str]] = {}
    for function in (node for file in files for node in file.body if isinstance(node, ast.FunctionDef)):
        used = names.setdefault(function.name, set())
        for node in ast.walk(function):
            if isinstance(node, (ast.Attribute, ast.Name)):
                used.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    capturing = {"CUDAGraph"}
    while more := {name for name, used in names.items() if used & capturing} - capturing:
        capturing |= more
    tests = {name for name in capturing if name.startswith("test_")}
    assert len(tests) >= 6, "this test finds none"
    assert not [name for name in tests if "graph" not in name and "replay" not in name]
