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
from typing import IO, Any, NamedTuple

from paths import ROOT, TOOLS

# What a test may want to see imported or not. Everything else of the wait is in PyTorch's own modules.
NOT_IMPORTED = ("transformers", "peft", "huggingface_hub", "trl", "datasets", "pandas", "matplotlib", "peft_loraswitch")
LIBRARIES = ("transformers.models.llama.modeling_llama", "transformers.generation", "accelerate", "peft")
OURS = ("peft_loraswitch", "recipes")
MODULE = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


class Server(NamedTuple):
    """A process that others are forked from: what it reads requests from, and writes the forks' statuses to."""

    requests: IO[str]
    answers: IO[str]


_servers: dict[tuple[str, ...], Server] = {}  # by what else it has imported


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
    libraries: tuple[str, ...] = (),
) -> str:
    """Standard output of `code`, run as `__main__` with these `sys.argv[1:]`, import paths and environment.

    Args:
        libraries: `LIBRARIES`, where it does not matter when Transformers and PEFT are imported.

    Raises:
        AssertionError: it ended with another status than 0; the message holds what it printed.
    """
    done = _run(code, arguments, environment, paths, cwd, timeout, libraries)
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
    server = _server(libraries)
    _send(server, request)
    answer = server.answers.readline()
    assert answer, "the process that others are forked from has ended"
    return int(answer)


def _send(server: Server, request: dict[str, Any]) -> None:
    server.requests.write(json.dumps(request) + "\n")
    server.requests.flush()


def _server(libraries: tuple[str, ...]) -> Server:
    """The one that has imported these, started if need be: as a fork of the one with the fewest less, which waits for nothing."""
    if libraries in _servers:
        return _servers[libraries]
    if not libraries:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS)},
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        _servers[()] = Server(process.stdin, process.stdout)
        atexit.register(_stop, _servers[()], process)
        return _servers[()]
    fewer = _server(() if libraries == LIBRARIES else LIBRARIES)
    folder = tempfile.TemporaryDirectory()  # also for what the libraries keep: they ask where when they are imported
    pipes = [f"{folder.name}/{name}" for name in ("requests", "answers")]
    for pipe in pipes:
        os.mkfifo(pipe)
    _send(fewer, {"serve": libraries, "pipes": pipes, "home": folder.name})
    _servers[libraries] = Server(open(pipes[0], "w"), open(pipes[1]))  # in the order in which the fork opens them
    atexit.register(_stop, _servers[libraries], folder)
    return _servers[libraries]


def _stop(server: Server, kept: subprocess.Popen | tempfile.TemporaryDirectory) -> None:
    with contextlib.suppress(OSError):
        server.requests.close()
    server.answers.read()  # ends when the process does
    server.answers.close()
    if isinstance(kept, subprocess.Popen):
        kept.wait(10)
    else:
        kept.cleanup()


# ------------------------------------------------------------------------------------ the process that is forked from


def _serve() -> None:
    import torch
    import torch._inductor.compile_fx
    import torch.distributed.tensor
    import torch.distributed.tensor.parallel

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    base = [path for path in sys.path if Path(path) not in (TOOLS, Path(__file__).parent)]
    requests: IO[str] = sys.stdin
    _check_imports(NOT_IMPORTED)
    while line := requests.readline():
        request = json.loads(line)
        child = os.fork()
        if child == 0 and "serve" in request:  # from here on this process is the server with more libraries
            answers.close()
            os.environ["HF_HOME"] = request["home"]
            requests, answers = open(request["pipes"][0]), open(request["pipes"][1], "w")
            for name in request["serve"]:
                importlib.import_module(name)
            _check_imports(OURS)
        elif child == 0:
            _become(request, base)
        elif "serve" not in request:
            print(_status(child, request["timeout"]), file=answers, flush=True)


def _check_imports(names: tuple[str, ...]) -> None:
    early = [name for name in names if name in sys.modules]
    assert not early, f"imported before any test asked for it: {early}"


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
