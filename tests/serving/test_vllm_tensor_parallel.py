"""A vLLM server whose model is spread over two processes."""

from __future__ import annotations

import pytest

import served_files
import vllm_server
from served_answers import comes_after_one_that_is_refused, compare, differing, jobs_for
from served_files import BASE

pytestmark = pytest.mark.vllm


def test_tensor_parallel_and_packed_projections(tmp_path):
    files = served_files.make(tmp_path / "phi3", "phi3")
    differing(files)
    arguments = [*served_files.arguments(files, "phi3"), "--tensor-parallel-size", "2"]
    with vllm_server.serving(files.folder / BASE, files.folder / "log", *arguments) as server:
        jobs = jobs_for(files)
        compare(files, jobs, server.ask(jobs, clients=len(jobs)))
        comes_after_one_that_is_refused(server, files, tmp_path)
