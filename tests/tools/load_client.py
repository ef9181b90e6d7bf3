"""Clients that ask, leave, load and unload at random: `python load_client.py URL FOLDER CLIENTS SECONDS SEED`.

Run in vLLM's environment. FOLDER is a `ServedFiles` folder. Prints a JSON object of counts; see `main`.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from openai import APIStatusError, APITimeoutError, AsyncOpenAI

PATIENCE = 120.0  # seconds: a request that takes longer is stuck
EXTRA = {"ignore_eos": True, "return_token_ids": True}


class Load:
    def __init__(self, url: str, folder: Path, seed: int) -> None:
        content = json.loads((folder / "answers.json").read_text())
        self.prompts, self.answers = content["prompts"], content["answers"]
        self.url, self.folder, self.random = url, folder, random.Random(seed)
        self.client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        self.names = {name: name for name in self.answers}  # served name -> adapter
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[Any] = []
        self.slowest = 0.0

    async def ask(self) -> None:
        name = self.random.choice(list(self.names))
        adapter = self.names[name]
        index = self.random.randrange(len(self.answers[adapter]))
        wanted = self.answers[adapter][index]["tokens"]
        length = self.random.randint(1, len(wanted))
        leave_after = self.random.randint(0, length) if self.random.random() < 0.25 else length + 1
        began, tokens = time.monotonic(), []
        try:
            stream = await self.client.completions.create(
                model=name, prompt=self.prompts[index], max_tokens=length, temperature=0, stream=True, extra_body=EXTRA
            )
            async with stream:
                async for part in stream:
                    for choice in part.choices:
                        tokens += choice.token_ids or []
                    if len(tokens) >= leave_after:
                        break
            left = len(tokens) >= leave_after
            self.counts["cancelled" if left else "complete"] += 1
            if tokens != wanted[: len(tokens) if left else length]:
                self.wrong.append([name, index, tokens, wanted[:length]])
        except APIStatusError as error:
            gone = error.status_code == 404 and name not in self.names
            self.counts["asked for an unloaded adapter" if gone else f"error {error.status_code}"] += 1
        except APITimeoutError:
            self.counts["stuck"] += 1
        self.slowest = max(self.slowest, time.monotonic() - began)

    async def post(self, path: str, body: dict[str, str]) -> None:
        try:
            await self.client.post(f"{self.url}{path}", body=body, cast_to=str)
            self.counts[path.rpartition("/")[2]] += 1
        except APIStatusError as error:
            self.counts[f"{path}: error {error.status_code}"] += 1

    async def load_and_unload(self, end: float) -> None:
        """Adapters come under new names, are asked for, and leave while they are in use."""
        number = 0
        while time.monotonic() < end:
            adapter = self.random.choice([name for name in self.answers if name != "base"])
            name = f"{adapter}_again_{number}"
            number += 1
            await self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.folder / adapter)})
            self.names[name] = adapter
            await asyncio.sleep(self.random.uniform(0.5, 3))
            del self.names[name]
            await self.post("/v1/unload_lora_adapter", {"lora_name": name})
            # a folder that is refused in between
            await self.refused(f"bad_{number}")

    async def refused(self, name: str) -> None:
        try:
            body = {"lora_name": name, "lora_path": str(self.folder / "bad")}
            await self.client.post(f"{self.url}/v1/load_lora_adapter", body=body, cast_to=str)
            self.counts["a bad folder was loaded"] += 1
        except APIStatusError:
            self.counts["bad folders refused"] += 1

    async def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self.ask()

        await asyncio.gather(self.load_and_unload(end), *(client() for _ in range(clients)))


def main() -> None:
    url, folder, clients, seconds, seed = sys.argv[1:]
    load = Load(url, Path(folder), int(seed))
    asyncio.run(load.run(int(clients), float(seconds)))
    print(json.dumps({"counts": load.counts, "wrong": load.wrong, "slowest_s": round(load.slowest, 2)}))


if __name__ == "__main__":
    main()
