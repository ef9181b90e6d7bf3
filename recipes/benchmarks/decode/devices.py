"""The benchmark over several GPUs: a process of it for each, with some of the models, and their results in one."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from recipes.benchmarks.decode import report
from recipes.benchmarks.decode.plan import Job
from recipes.checkout import module_command, module_environment


def spread(models: list[str], devices: list[str], jobs: list[Job]) -> dict[str, list[str]]:
    """Models for each device, so that the busiest has as little to do as can be."""
    cost = {model: sum(job.seconds() for job in jobs if job.model == model) for model in models}
    result: dict[str, list[str]] = {device: [] for device in devices}
    for model in sorted(models, key=lambda m: -cost[m]):
        result[min(devices, key=lambda d: sum(cost[m] for m in result[d]))].append(model)
    return {device: chosen for device, chosen in result.items() if chosen}


def run_devices(args: argparse.Namespace, argv: list[str], jobs: list[Job], folder: Path) -> dict[str, Any]:
    """One process of this script for each device, with its share of the processors; their results in one."""
    shares = spread(args.models, args.devices, jobs)
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // len(shares))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    runs: list[tuple[subprocess.Popen[bytes], Path]] = []
    for n, (device, models) in enumerate(shares.items()):
        output = folder / f"device{n}.json"
        name = visible[int(device)] if device.isdigit() and len(visible) > int(device) and visible[0] else device
        mine = cores[n * each : (n + 1) * each] or cores
        # the last of a repeated option wins
        command = module_command("recipes.benchmarks.decode", *argv, "--models", *models, "--devices")
        command += ["--output", str(output), "--slots", str(min(args.slots, max(2, each - 1)))]
        command += ["--cores", *map(str, mine)]
        environment = module_environment(CUDA_VISIBLE_DEVICES=name)
        print(f"device {device}: {', '.join(models)}", flush=True)
        runs.append((subprocess.Popen(command, env=environment), output))
    try:
        for process, _ in runs:
            process.wait()
    except (KeyboardInterrupt, SystemExit):
        print("stopped early", flush=True)
    finally:
        for process, _ in runs:
            process.terminate()
        for process, _ in runs:
            process.wait(30)
    parts = [json.loads(output.read_text()) for _, output in runs if output.exists()]
    failed = [models for (_, output), models in zip(runs, shares.values(), strict=True) if not output.exists()]
    return report.merge(parts, [f"{model}: its process wrote nothing" for models in failed for model in models])
