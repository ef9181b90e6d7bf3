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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paths import ROOT

PYTHON = Path(os.environ.get("LORASWITCH_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
TOOLS = Path(__file__).parent
CLIENT = TOOLS / "openai_client.py"
START_SECONDS = 180


def environment(**variables: str) -> dict[str, str]:
    """Of processes in vLLM's environment, which has to be there: no network, no leftovers of this one."""
    assert PYTHON.exists(), f"{PYTHON} is not there: .ci/vllm makes it (or set LORASWITCH_VLLM_PYTHON)"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ours = {
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }  # fmt: skip
    return {**kept, **ours, **variables}


def printed_by(tool: str, *arguments: str, **variables: str) -> list[str]:
    """The words that a file in tests/tools prints, run by vLLM's Python with these variables."""
    done = subprocess.run(
        [str(PYTHON), str(TOOLS / tool), *arguments], capture_output=True, text=True, timeout=600,
        env=environment(PYTHONPATH=str(ROOT), **variables),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


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
    client: subprocess.Popen[str]

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
        assert self.client.stdin is not None and self.client.stdout is not None
        self.client.stdin.write(json.dumps({"clients": clients, "jobs": jobs}) + "\n")
        self.client.stdin.flush()
        answers = self.client.stdout.readline()
        assert answers, f"the client ended:\n{self.log.read_text(errors='replace')[-3000:]}"
        return list(json.loads(answers))

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


def command(module: str, model: Path, port: int, *arguments: str) -> list[str]:
    settings = {
        "model": str(model), "served-model-name": "base", "dtype": "float32", "host": "127.0.0.1", "port": str(port),
        "max-model-len": "128", "block-size": "32", "seed": "0",
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return [str(PYTHON), "-m", module, *flags, *arguments]


@contextmanager
def serving(
    model: Path, log: Path, *arguments: str, module: str = "vllm.entrypoints.openai.api_server", **variables: str
) -> Iterator[Server]:
    """A server of `model` with these arguments and environment variables, until the block ends.

    Args:
        log: gets what the server and its client write.
        module: of vLLM's environment, that is run: vLLM's server, or what starts it in its own way.

    Raises:
        RuntimeError: it does not come up. Holds the end of its log.
    """
    port = free_port()
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command(module, model, port, *arguments),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(**variables),
            start_new_session=True,
        )
        client = subprocess.Popen(
            [str(PYTHON), str(CLIENT), f"http://127.0.0.1:{port}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            env=environment(),
        )
    server = Server(process, port, log, client)
    try:
        wait_for(lambda: _is_up(server), process, log, START_SECONDS)
        yield server
    finally:
        client.kill()
        client.communicate()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_up(server: Server) -> bool:
    try:
        return server.post("/health", None, timeout=5)[0] == 200
    except OSError:
        return False


def wait_for(is_up: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Until what `process` starts is up.

    Raises:
        RuntimeError: it has ended, or is not up in time. Holds the end of its log.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if is_up():
            return
        time.sleep(0.3)
    what = "ended" if process.poll() is not None else "is not up in time"
    raise RuntimeError(f"{' '.join(process.args[:4])} {what}:\n{log.read_text(errors='replace')[-6000:]}")
