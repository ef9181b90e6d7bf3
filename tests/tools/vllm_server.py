"""A vLLM server in a process of its own, in vLLM's environment, and clients of it there: `openai` is not in this one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paths import ROOT

PYTHON = Path(os.environ.get("LORASWITCH_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
CLIENT = Path(__file__).with_name("openai_client.py")
START_SECONDS = 180


def environment(**variables: str) -> dict[str, str]:
    """Of processes in vLLM's environment: no network, no leftovers of this one."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ours = {
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }  # fmt: skip
    return {**kept, **ours, **variables}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A server that answers on the loopback interface."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def alive(self) -> bool:
        return self.process.poll() is None and self.post("/health", None)[0] == 200

    def post(self, path: str, body: Any, timeout: float = 60) -> tuple[int, str]:
        """Status and text of the answer; a GET if there is no body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def load(self, name: str, folder: Path) -> tuple[int, str]:
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def ask(self, jobs: list[dict[str, Any]], clients: int = 16) -> list[dict[str, Any]]:
        """What openai's client gets for each job, `clients` at a time: see openai_client.py."""
        command = [str(PYTHON), str(CLIENT), self.url, str(clients)]
        done = subprocess.run(
            command, input=json.dumps(jobs), capture_output=True, text=True, timeout=300, env=environment()
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return list(json.loads(done.stdout))

    def metric(self, name: str) -> float:
        """The sum of all rows of a metric."""
        rows = [line.rsplit(" ", 1) for line in self.post("/metrics", None)[1].splitlines() if line.startswith(name)]
        return sum(float(value) for _, value in rows)

    def memory(self) -> int:
        """Bytes that the server's processes hold, without what they share with files."""
        total = 0
        for pid in descendants(self.process.pid):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
        return total


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += descendants(int(child))
    return found


def command(model: Path, port: int, *arguments: str) -> list[str]:
    settings = {
        "model": str(model), "served-model-name": "base", "dtype": "float32", "host": "127.0.0.1", "port": str(port),
        "max-model-len": "128", "block-size": "32", "seed": "0",
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *flags, *arguments]


@contextmanager
def serving(model: Path, log: Path, *arguments: str, **variables: str) -> Iterator[Server]:
    """A server of `model` with these arguments and environment variables, until the block ends.

    Raises:
        RuntimeError: it does not come up. Holds the end of its log.
    """
    port = free_port()
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command(model, port, *arguments),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(**variables),
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        _wait_until_up(server)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_up(server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        try:
            if server.post("/health", None, timeout=5)[0] == 200:
                return
        except OSError:
            time.sleep(0.3)
    what = "ended" if server.process.poll() is not None else "is not up in time"
    raise RuntimeError(f"the server {what}:\n{server.log.read_text(errors='replace')[-6000:]}")
