"""A Python process of its own for a test, without the seconds that an import of PyTorch takes.

`run_python` does what `subprocess.run([sys.executable, "-c", code])` does. The process is a fork of one that has imported PyTorch
and its compiler, and nothing of Transformers, PEFT or the Hub: those, and this package, are imported anew, in the order and under
the environment variables of the test. The process that is forked from starts with the first call and ends with the tests.

`run_module` does what `subprocess.run([sys.executable, "-m", module, ...])` does, for tests to which it does not matter when
Transformers and PEFT are imported: its process is a fork of one that has imported those, too, but nothing of this repository.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from paths import ROOT, TOOLS

# What a test may want to see imported or not. Everything else of the wait is in PyTorch's own modules.
NOT_IMPORTED = ("transformers", "peft", "huggingface_hub", "trl", "datasets", "pandas", "matplotlib", "peft_loraswitch")
LIBRARIES = ("transformers.models.llama.modeling_llama", "transformers.generation", "accelerate", "peft")
OURS = ("peft_loraswitch", "recipes")
MODULE = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
_servers: dict[tuple[str, ...], subprocess.Popen] = {}  # by what else it has imported


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_python(
    code: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    paths: tuple[Path, ...] = (ROOT, TOOLS),
    cwd: Path | str = ROOT,
    timeout: int = 300,
) -> str:
    """Standard output of `code`, run as `__main__` with these `sys.argv[1:]`, import paths and environment.

    Raises:
        AssertionError: it ended with another status than 0; the message holds what it printed.
    """
    done = _run(code, arguments, environment, paths, cwd, timeout, libraries=())
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def run_module(
    module: str,
    *arguments: object,
    environment: dict[str, str] | None = None,
    paths: tuple[Path, ...] = (ROOT,),
    cwd: Path | str = ROOT,
    timeout: int = 300,
    libraries: tuple[str, ...] = (),
) -> Finished:
    """What `python -m module arguments` ends with, whatever its status. The environment's own import paths are not looked at.

    Args:
        libraries: modules that are imported already, besides `LIBRARIES`.
    """
    return _run(
        MODULE, (module, *map(str, arguments)), environment, paths, cwd, timeout, libraries=(*LIBRARIES, *libraries)
    )


def _run(
    code: str,
    arguments: tuple[str, ...],
    environment: dict[str, str] | None,
    paths: tuple[Path, ...],
    cwd: Path | str,
    timeout: int,
    libraries: tuple[str, ...],
) -> Finished:
    variables = {**(dict(os.environ) if environment is None else environment), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{name}" for name in ("stdout", "stderr")]
        request = {
            "code": textwrap.dedent(code), "arguments": arguments, "environment": variables, "files": files,
            "paths": [str(path) for path in paths], "cwd": str(cwd), "timeout": timeout,
        }  # fmt: skip
        status = _ask(request, libraries)
        return Finished(status, *(Path(file).read_text(errors="replace") for file in files))


def _ask(request: dict[str, Any], libraries: tuple[str, ...]) -> int:
    if libraries not in _servers:
        cache = tempfile.TemporaryDirectory()  # for what the libraries keep: they ask where when they are imported
        _servers[libraries] = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *libraries],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS), "HF_HOME": cache.name},
        )  # fmt: skip
        atexit.register(_stop, _servers[libraries], cache)
    server = _servers[libraries]
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that others are forked from has ended"
    return int(answer)


def _stop(server: subprocess.Popen, cache: tempfile.TemporaryDirectory) -> None:
    assert server.stdin is not None
    with contextlib.suppress(OSError):
        server.stdin.close()
    server.wait(10)
    cache.cleanup()


# ------------------------------------------------------------------------------------ the process that is forked from


def _serve() -> None:
    import torch
    import torch._inductor.compile_fx
    import torch.distributed.tensor
    import torch.distributed.tensor.parallel

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    early = [name for name in (OURS if sys.argv[1:] else NOT_IMPORTED) if name in sys.modules]
    assert not early, f"imported before any test asked for it: {early}"
    base = [path for path in sys.path if Path(path) not in (TOOLS, Path(__file__).parent)]
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request, base)
        print(_status(child, request["timeout"]), file=answers, flush=True)


def _become(request: dict[str, Any], base: list[str]) -> None:
    """This process, a fork, is from here on the one that was asked for."""
    status = 1
    try:
        sys.stdin = open(os.devnull)
        for descriptor, file in zip((1, 2), request["files"], strict=True):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        sys.path[:] = ["", *request["paths"], *base]
        sys.argv[:] = ["-c", *request["arguments"]]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(request["code"], "<code>", "exec"), main.__dict__)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(child: int, timeout: float) -> int:
    """Its exit status; it is killed if it takes longer."""
    end = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    _serve()
