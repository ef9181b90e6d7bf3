"""A vLLM server whose model is spread over two Ray nodes, each with a process of its own that finds the plugin."""

from __future__ import annotations

import pytest

import ray_nodes
import served_files
from served_answers import comes_after_one_that_is_refused, compare, differing, jobs_for
from served_files import BASE

pytestmark = pytest.mark.vllm


def test_tensor_parallel_over_two_nodes(tmp_path):
    """PEFT's answers, one worker on each node, because neither has room for two; adapters that come at run time."""
    if not ray_nodes.is_installed():
        pytest.skip("Ray is not in vLLM's environment: .venv-vllm/bin/python -m pip install ray")
    files = served_files.make(tmp_path / "llama", "llama")
    differing(files)
    arguments = [*served_files.arguments(files, "llama"), "--tensor-parallel-size", "2"]
    with ray_nodes.serving(files.folder / BASE, tmp_path, *arguments) as server:
        jobs = jobs_for(files)
        compare(files, jobs, server.ask(jobs, clients=len(jobs)))
        comes_after_one_that_is_refused(server, files, tmp_path)
