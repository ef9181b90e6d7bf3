"""A vLLM server with fewer slots than adapters, and a small KV cache."""

from __future__ import annotations

import pytest

import served_files
import vllm_server
from served_answers import compare, differing, jobs_for, long_jobs
from served_files import BASE

pytestmark = pytest.mark.vllm


def test_two_slots_twenty_adapters(tmp_path):
    """Least recently used adapters leave; memory stays level. Prompts in chunks of 64 tokens; requests that have begun wait for
    others, because the KV cache has ten blocks."""
    files = served_files.make(tmp_path / "qwen3", "qwen3", seeds=20)
    differing(files)
    names = [name for name in files.answers if name.startswith("seed_")]
    arguments = served_files.arguments(files, "qwen3")
    arguments[arguments.index("--max-loras") + 1] = "2"
    arguments += ["--max-cpu-loras", "5", "--max-num-seqs", "32", "--max-num-batched-tokens", "64"]
    arguments += ["--num-gpu-blocks-override", "10"]
    with vllm_server.serving(files.folder / BASE, files.folder / "log", *arguments) as server:
        jobs = jobs_for(files)
        compare(files, jobs, server.ask(jobs, clients=32))
        jobs = long_jobs(files) * 2
        compare(files, jobs, server.ask(jobs, clients=len(jobs)))
        assert server.metric("vllm:num_preemptions_total") > 0
        levels = []
        for turn in range(5):  # 500 requests
            jobs = [
                {
                    "model": names[(7 * index + turn) % 20],
                    "prompt": files.prompts[index % 2],
                    "max_tokens": 2,
                    "answer": index % 2,
                }
                for index in range(100)
            ]
            compare(files, jobs, server.ask(jobs, clients=8))
            levels.append(server.memory() / 2**20)
        assert levels[-1] - levels[1] < 16, f"MiB after each hundred requests: {levels}"
