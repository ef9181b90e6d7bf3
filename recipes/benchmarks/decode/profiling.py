"""Where a forward's time goes."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def profile_forwards(run: Callable[[], None], forwards: int, device: str) -> dict[str, Any]:
    """Milliseconds a forward: the GPU's busy time, its kernels, and the host's functions.

    Args:
        run: so many forwards, and waits for the device.
    """
    import torch
    from torch.profiler import ProfilerActivity

    start = time.perf_counter()
    run()
    wall = time.perf_counter() - start
    host = cProfile.Profile()
    host.runcall(run)
    activities = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as traced:
        run()
    kernels = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in traced.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    busy, until = 0.0, 0.0
    by_name: dict[str, list[float]] = {}
    for begin, end, name in sorted(kernels):
        busy += max(0.0, end - max(begin, until))  # dependent launches overlap
        until = max(until, end)
        by_name.setdefault(name, []).append(end - begin)
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]
    stats = pstats.Stats(host).stats  # type: ignore[attr-defined]
    slowest = sorted(stats.items(), key=lambda item: -item[1][2])[:20]
    return {
        "forwards": forwards, "wall_ms": round(wall / forwards * 1e3, 4),
        "gpu_busy_ms": round(busy / forwards / 1e3, 4), "gpu_kernels": round(len(kernels) / forwards, 1),
        "kernels_ms": {name[:90]: [round(sum(t) / forwards / 1e3, 4), round(len(t) / forwards, 1)] for name, t in top},
        # with cProfile, which doubles the time of short functions: shares count, not sums
        "host_ms": {
            f"{Path(file).name}:{line} {name}"[:90]: [round(own / forwards * 1e3, 4), round(calls / forwards, 1)]
            for (file, line, name), (_, calls, own, _, _) in slowest
        },
    }  # fmt: skip
