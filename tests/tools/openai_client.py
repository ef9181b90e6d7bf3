"""Run in vLLM's environment: `python openai_client.py URL`. Reads lines {"clients", "jobs"}, writes a line of answers for each.

One process for many lines, because importing openai takes longer than most answers. `clients` is how many jobs are asked at a
time. A job is {"model", "prompt" (token ids), "max_tokens"}, and perhaps "kind": "completion" (the default), "stream", "chat"
(with "messages") or "cancel" (a stream that is left after its first token), "n", "temperature", and "extra" (what is vLLM's own).
An answer is {"tokens", "logprobs", "text"}, a list each with one for each of `n`, or {"error", "status"}.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import APIStatusError, OpenAI

EXTRA = {"ignore_eos": True, "return_token_ids": True}


def ask(client: OpenAI, job: dict[str, Any]) -> dict[str, Any]:
    kind = job.get("kind", "completion")
    common = {
        "model": job["model"],
        "max_tokens": job["max_tokens"],
        "temperature": job.get("temperature", 0),
        "extra_body": {**EXTRA, **job.get("extra", {})},
    }
    try:
        if kind == "chat":
            answer = client.chat.completions.create(messages=job["messages"], logprobs=True, **common)
            choice = answer.choices[0]
            return {
                "tokens": [choice.token_ids],
                "logprobs": [[c.logprob for c in choice.logprobs.content]],
                "text": [choice.message.content],
            }
        if kind in ("stream", "cancel"):
            tokens: list[int] = []
            logprobs: list[float] = []
            text = ""
            with client.completions.create(prompt=job["prompt"], logprobs=0, stream=True, **common) as stream:
                for part in stream:
                    if part.choices:
                        tokens += part.choices[0].token_ids or []
                        logprobs += part.choices[0].logprobs.token_logprobs if part.choices[0].logprobs else []
                        text += part.choices[0].text
                    if kind == "cancel" and tokens:
                        break
            return {"tokens": [tokens], "logprobs": [logprobs], "text": [text]}
        answer = client.completions.create(prompt=job["prompt"], logprobs=0, n=job.get("n", 1), **common)
        choices = answer.choices
        return {
            "tokens": [choice.token_ids for choice in choices],
            "logprobs": [choice.logprobs.token_logprobs for choice in choices],
            "text": [choice.text for choice in choices],
        }
    except APIStatusError as error:
        return {"error": str(error), "status": error.status_code}


def ask_all(jobs: list[dict[str, Any]], clients: int) -> list[dict[str, Any]]:
    """Answers in the order of the jobs. Each has a connection of its own: the server closes one that has been idle for seconds,
    and a job that is asked at that moment gets no answer."""
    closes = {"Connection": "close"}
    with (
        OpenAI(
            base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0, timeout=120, default_headers=closes
        ) as client,
        ThreadPoolExecutor(clients) as pool,
    ):
        return list(pool.map(lambda job: ask(client, job), jobs))


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(ask_all(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
