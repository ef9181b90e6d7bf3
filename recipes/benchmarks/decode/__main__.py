"""What a routed adapter costs at decode time, on this GPU: the table at the top of the README.

    python -m recipes.benchmarks.decode                       # all of it, into recipes/results/decode_<gpu>.json and .png
    python -m recipes.benchmarks.decode --devices 0 1 2 3     # the models spread over four GPUs, into one file
    python -m recipes.benchmarks.decode --models llama-2-7b --methods backbone fused --modes static --profile
    python -m recipes.benchmarks.decode --only many-experts high-rank --limit 190   # parts, into a file of their own
    python -m recipes.benchmarks.decode --device cpu          # a rehearsal with tiny models: everything but the numbers
    python -m recipes.benchmarks.decode.report                # the table into the README

Models have random weights, made on the GPU; nothing is downloaded. Each job (a model, a method, a rank) is a process of its
own. Compiling takes the time, so as many processes as there are processors compile at once; the backbone's weights are
in the GPU's memory once, in a process that shares them. One measurement runs at a time, while all other processes stand
still: samples of a method and of the unadapted backbone take turns, each on a processor that nobody else slows down
(quiet_processor.py), and the ratio is that of their medians (of at least seven). Results are written as they come; `--limit`
ends the run, and what it did not reach is listed in the file's header.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recipes.benchmarks.decode import report
from recipes.benchmarks.decode.devices import run_devices
from recipes.benchmarks.decode.plan import FIRST, METHODS, MODES, NUM_EXPERTS, SETS, SHAPES, TOP_K, plan
from recipes.benchmarks.decode.scheduler import Scheduler
from recipes.checkout import ROOT, git


def has_gpu() -> bool:
    """Asks the driver, because importing torch takes seconds."""
    try:
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0)) == 0
    except OSError:
        return False


def header(args: argparse.Namespace) -> dict[str, Any]:
    """What the parent knows; the first worker adds GPU and versions."""
    driver: list[str] = []
    if args.device == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return {
        "date": datetime.date.today().isoformat(), "gpu": "", "driver": driver[0] if driver else "",
        "commit": os.environ.get("BENCH_COMMIT", git("rev-parse", "HEAD")), "dtype": "bfloat16", "num_experts": NUM_EXPERTS,
        "top_k": TOP_K, "devices": 1, "limit": args.limit,
    }  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, help=f"left out: all, with --only {FIRST}")
    parser.add_argument(
        "--only", nargs="+", choices=SETS, help="parts to measure, each with its backbone; left out: the usual table"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--layers", type=int, help="depth of the models other than llama-2-7b; left out: their own")
    parser.add_argument("--output", type=Path, help="JSON file; the picture goes beside it")
    parser.add_argument("--limit", type=float, default=465.0, help="seconds after which the run ends (default: 465)")
    parser.add_argument(
        "--devices", nargs="*", default=[], help="GPUs to spread the models over, as in CUDA_VISIBLE_DEVICES"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal with tiny models")
    parser.add_argument(
        "--slots", type=int, default=max(2, len(os.sched_getaffinity(0)) - 1), help="processes that compile at once"
    )
    parser.add_argument("--cores", type=int, nargs="+", help="processors to run on; left out: all")
    parser.add_argument("--memory", type=float, help="GiB of device memory to use; left out: all but --reserve")
    parser.add_argument("--reserve", type=float, default=4.0, help="GiB of device memory to leave free")
    parser.add_argument("--no-linears", action="store_true", help="leave out what memory and the linears alone can do")
    parser.add_argument("--no-sharing", action="store_true", help="every process makes its own copy of the weights")
    parser.add_argument("--profile", action="store_true", help="also where the time of backbone and fused (r = 8) goes")
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs; left out: a temporary one")
    args = parser.parse_args(argv)
    args.models = args.models or ([FIRST] if args.only else list(SHAPES))
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.cores:
        os.sched_setaffinity(0, args.cores)
    os.environ.update(TORCHINDUCTOR_COMPILE_THREADS="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = args.logs or Path(tempfile.mkdtemp(prefix="bench_decode_"))
    folder.mkdir(parents=True, exist_ok=True)
    if args.device == "cuda" and not has_gpu():
        raise SystemExit("This benchmark needs a CUDA GPU. Without one: --device cpu, a rehearsal with tiny models.")
    jobs = plan(args.models, args.methods, args.modes, args.device, args.layers, not args.no_linears, args.only)
    print(
        f"{len(jobs)} jobs, about {sum(job.seconds() for job in jobs):.0f} processor seconds until all are ready",
        flush=True,
    )
    default_output, started = args.output is None, time.monotonic()
    args.output = args.output or folder / "decode.json"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated: what was measured so far is written"))
    if len(args.devices) > 1:
        result = run_devices(args, argv, jobs, folder)
    else:
        if args.devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = args.devices[0]
        result = {"header": header(args), "linears": {}, "copy_tb_per_s": None, "rows": []}
        try:
            Scheduler(jobs, args, result, folder).run()
        except (KeyboardInterrupt, SystemExit):
            print("stopped early", flush=True)
    result["header"]["seconds"] = round(time.monotonic() - started, 1)
    if not result["rows"]:
        raise SystemExit(f"Nothing was measured: {result['header'].get('missing', [])[:3]}; logs in {folder}")
    gpu = result["header"]["gpu"].replace("NVIDIA ", "").replace(" ", "_").lower()
    part = "_" + "_".join(args.only) if args.only else ""
    output = ROOT / "recipes" / "results" / f"decode_{gpu}{part}.json" if default_output else args.output
    report.write(result, output)
    for row in result["rows"]:
        print(report.line(row))
    for bar in report.bars(result):
        print(
            f"{bar['model']:13s} {bar['what']:55s} {bar['value']:7.3f}  bar {bar['bar']:.2f}  {'met' if bar['met'] else 'MISSED'}"
        )
    for text in result["header"]["missing"]:
        print(f"missing: {text}")
    print(report.draw(result, output.with_suffix(".png")))
    print(f"{output}: {result['header']['seconds']:.0f} s, {len(result['rows'])} rows, logs in {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
