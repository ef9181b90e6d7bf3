"""A load test of the vLLM plugin: 64 clients, mixed adapters, cancellations, loads and unloads; every token is compared.

    python tests/serving/load.py [--seconds 120] [--out recipes/results/serving_load_cpu.json]

Run it with the development environment's Python; the server runs in vLLM's (`.ci/vllm` makes that). Exits with 1 if a token is
wrong, a request stuck, or the server ill.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import served_files  # noqa: E402
import vllm_server  # noqa: E402
from recipes.checkout import processor, versions  # noqa: E402

ADAPTERS = 12  # besides the named ones
SLOTS = 4


def run(clients: int, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    files = served_files.make(folder, "llama", seeds=ADAPTERS)
    shutil.copytree(files.folder / "paper", files.folder / "bad")
    config = files.folder / "bad" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bias": "all"}))
    arguments = served_files.arguments(files, "llama")
    arguments[arguments.index("--max-loras") + 1] = str(SLOTS)
    arguments += ["--max-cpu-loras", "10", "--max-num-seqs", "64"]
    with vllm_server.serving(files.folder / served_files.BASE, files.folder / "log", *arguments) as server:
        before = server.memory()
        client = [
            str(vllm_server.PYTHON),
            str(vllm_server.CLIENT.with_name("load_client.py")),
            server.url,
            str(files.folder),
        ]
        done = subprocess.run(
            [*client, str(clients), str(seconds), str(seed)],
            capture_output=True,
            text=True,
            env=vllm_server.environment(),
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        result = json.loads(done.stdout)
        for _ in range(60):  # requests that were left are ended
            left = server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
            if left == 0:
                break
            time.sleep(0.5)
        version = json.loads(server.post("/version", None)[1])["version"]
        return {
            "command": f"python tests/serving/load.py --seconds {seconds:g} --clients {clients} --seed {seed}",
            **versions("peft", "transformers"),
            "processor": processor(),
            "vllm": version,
            "clients": clients,
            "adapters": len(files.answers) - 1,
            "slots": SLOTS,
            **result,
            "left_over_requests": left,
            "alive_at_the_end": server.alive(),
            "memory_mib": [before >> 20, server.memory() >> 20],
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments.clients, arguments.seconds, arguments.seed, Path(folder) / "files")
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)
    errors = {
        name: count
        for name, count in result["counts"].items()
        if "error" in name or name in ("stuck", "a bad folder was loaded")
    }
    if result["wrong"] or errors or result["left_over_requests"] or not result["alive_at_the_end"]:
        raise SystemExit(f"failed: {errors or result['wrong'][:3] or 'the server is ill'}")


if __name__ == "__main__":
    main()
