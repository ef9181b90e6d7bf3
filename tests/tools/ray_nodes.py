"""Two Ray nodes on this machine, with vLLM's environment on each, and a vLLM on the CPU that takes Ray's workers.

vLLM's platform for CPUs names no device of Ray's and is refused ("current platform cpu does not support ray"). Nothing else is in
the way: `RayOnCPU` names one, so that Ray hands out as many workers as each node says it has GPUs. vLLM finds it in every process
as a platform plugin (`vllm.platform_plugins`), through the package that `write_plugin` writes.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import vllm_server

HEAD, OTHER = "127.0.0.2", "127.0.0.3"  # vLLM wants each node to have an address of its own
START_SECONDS = 60
PLATFORM = """
def name():
    return "ray_on_cpu_platform.RayOnCPU"
"""
RAY_ON_CPU = """
from vllm.platforms.cpu import CpuPlatform


class RayOnCPU(CpuPlatform):
    ray_device_key = "GPU"
"""


def is_installed() -> bool:
    """Whether vLLM's environment has Ray."""
    command = [
        str(vllm_server.PYTHON),
        "-c",
        "from importlib.util import find_spec; print(find_spec('ray') is not None)",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=vllm_server.environment())
    return done.stdout.strip() == "True"


def write_plugin(folder: Path) -> None:
    """A folder for PYTHONPATH that holds `RayOnCPU` and tells vLLM of it."""
    about = folder / "ray_on_cpu-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-on-cpu\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_on_cpu = ray_on_cpu:name\n")
    (folder / "ray_on_cpu.py").write_text(PLATFORM)
    (folder / "ray_on_cpu_platform.py").write_text(RAY_ON_CPU)


@contextmanager
def serving(model: Path, folder: Path, *arguments: str) -> Iterator[vllm_server.Server]:
    """A server of `model` on a Ray cluster of two nodes, with room for one worker each, until the block ends.

    Args:
        folder: gets the nodes' logs and the server's, and the plugin.

    Raises:
        RuntimeError: a node or the server does not come up. Holds the end of its log.
    """
    write_plugin(folder / "site")
    address = f"{HEAD}:{vllm_server.free_port()}"
    variables = {
        "PYTHONPATH": str(folder / "site"), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    arguments += ("--distributed-executor-backend", "ray")
    with tempfile.TemporaryDirectory(prefix="ray") as sockets, ExitStack() as stack:  # their paths must be short
        head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false", f"--temp-dir={sockets}"]
        nodes = [stack.enter_context(_node(HEAD, head, folder / "head.log", variables))]
        nodes += [stack.enter_context(_node(OTHER, [f"--address={address}"], folder / "other.log", variables))]
        variables |= {"VLLM_HOST_IP": HEAD, "RAY_ADDRESS": address}
        shared: set[Path] = set()
        try:
            with vllm_server.serving(model, folder / "log", *arguments, **variables) as server:
                shared = {path for node in nodes for path in _shared_memory(node)}
                yield server
        finally:  # Ray kills workers, and older vLLM names this by a number that the next server has again
            for path in shared:
                path.unlink(missing_ok=True)


def _shared_memory(node: int) -> set[Path]:
    """What vLLM's workers on CPUs exchange tensors through."""
    found = set()
    for pid in vllm_server.descendants(node):
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:  # it has ended
            continue
        found |= {Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if "-cpushm_" in line}
    return found


@contextmanager
def _node(ip: str, arguments: list[str], log: Path, variables: dict[str, str]) -> Iterator[int]:
    """Gives its process' id."""
    command = [
        str(vllm_server.PYTHON), "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={ip}", "--num-gpus=1",
        "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000", *arguments,
    ]  # fmt: skip
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env=vllm_server.environment(**variables, VLLM_HOST_IP=ip),
        )  # fmt: skip
    try:
        vllm_server.wait_for(lambda: b"Ray runtime started" in log.read_bytes(), process, log, START_SECONDS)
        yield process.pid
    finally:
        started = vllm_server.descendants(process.pid)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        for pid in started:  # what the node left behind
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
