"""What a server is asked about `served_files`, and whether it answers as PEFT does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from served_files import PROMPTS, ServedFiles
from vllm_server import Server

TOLERANCE = 1e-4  # of a logprob in float32; 7e-6 was seen


def jobs_for(files: ServedFiles, **settings: Any) -> list[dict[str, Any]]:
    """A job for each prompt and adapter, neighbours of different adapters."""
    return [
        {"model": name, "prompt": prompt, "max_tokens": len(answers[index].tokens), "answer": index, **settings}
        for index, prompt in enumerate(files.prompts)
        for name, answers in files.answers.items()
        if index < len(answers)
    ]


def compare(files: ServedFiles, jobs: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    """Tokens equal to PEFT's, logprobs close."""
    assert len(jobs) == len(answers)
    for job, answer in zip(jobs, answers, strict=True):
        wanted = files.answers[job["model"]][job["answer"]]
        assert "error" not in answer, (job["model"], answer)
        for tokens, logprobs in zip(answer["tokens"], answer["logprobs"], strict=True):
            assert tokens == wanted.tokens[: job["max_tokens"]], job
            assert logprobs == pytest.approx(wanted.logprobs[: job["max_tokens"]], abs=TOLERANCE), job


def differing(files: ServedFiles) -> None:
    """No two adapters give the same answers, so that one cannot pass for another."""
    texts = {name: str([answer.tokens for answer in answers]) for name, answers in files.answers.items()}
    assert len(set(texts.values())) == len(texts)


def long_jobs(files: ServedFiles, **settings: Any) -> list[dict[str, Any]]:
    """Long prompts that share their beginnings, for adapters whose router sees context."""
    return [job for job in jobs_for(files, **settings) if job["answer"] >= len(PROMPTS)]


def comes_after_one_that_is_refused(server: Server, files: ServedFiles, work: Path) -> None:
    """On a server of several processes, a file cut in half is refused, and the whole one is served afterwards.

    vLLM reads no answer of the other processes once the first says no, so they are in its way at the next load, of whatever
    kind the adapter is (vLLM's pull request 57846): that one is answered with the old reason, and has to be asked for again.
    """
    right, wrong = files.folder / "deep", work / "cut"
    shutil.copytree(right, wrong)
    (weights,) = wrong.glob("*.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    status, text = server.load("again", wrong)
    assert status >= 400 and "truncated" in json.loads(text)["error"]["message"], text
    status, text = server.load("again", right)
    assert status == 200 or "truncated" in json.loads(text)["error"]["message"], text
    assert status == 200 or server.load("again", right)[0] == 200
    jobs = [job for job in jobs_for(files) if job["model"] == "deep"]
    compare(files, jobs, server.ask([{**job, "model": "again"} for job in jobs]))
    assert server.alive()
