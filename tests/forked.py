"""Scripts as processes of their own without the seconds that each needs to import torch and Hydra.

Run as a program this is a server: it imports everything once and forks for each line of its standard input. The child has
its own arguments, environment, folder and output, and is otherwise what `python train.py ...` is: it can be killed,
signalled and waited for by its id. The ranks that it starts are forks too, to which everything is handed as to a new
process. What depends on how Python itself is started has to start Python: with `fresh` those ranks do."""

import atexit
import gc
import importlib
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing import popen_spawn_posix, resource_tracker, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "etude.data.loader etude.data.mixture etude.data.rows etude.data.text etude.display etude.infer.engine etude.infer.guide "
    "etude.infer.session etude.interop.convert etude.lora etude.loop etude.model.gqa etude.model.mla etude.model.moe etude.saving etude.strategy.dpo "
    "etude.strategy.grpo etude.summary etude.training rich.live torch.utils.tensorboard"
).split()


def warm() -> None:
    """What every script does before anything of its own: import, compose, read the constructors' sources."""
    from hydra import compose, initialize_config_dir

    import etude.run
    from etude.config import CONF, check

    for name in MODULES:
        importlib.import_module(name)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in ([], ["strategy=grpo", "model=moe"]):
            check(compose("train", overrides=overrides), "train")
    etude.run.packages()
    gc.collect()
    gc.freeze()  # else the first collection in a child would write to, and so copy, all that it shares with this process


def serve() -> dict[str, Any] | None:
    """Fork at each request; -> the request in the child, None at the end in the server."""
    warm()
    results: dict[int, str] = {}

    def reap(*_: Any) -> None:
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            path = Path(results.pop(pid))
            path.with_suffix(".new").write_text(f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}")
            os.replace(path.with_suffix(".new"), path)

    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        if (pid := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            return request
        results[pid] = request["result"]
        signal.signal(signal.SIGCHLD, reap)
        print(pid, flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    return None


def become(request: dict[str, Any]) -> None:
    """What a fresh interpreter would be."""
    for number, path in enumerate((request["stdin"], request["stdout"], request["stderr"])):
        fd = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if not request["fresh"]:
        fork_ranks()
    script = Path(request["argv"][0]).resolve()
    sys.argv = [request["argv"][0], *request["argv"][1:]]
    sys.path[:0] = [str(script.parent), *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(str(script), run_name="__main__")


def fork(path: str, args: Sequence[str], passfds: Sequence[int]) -> int:
    """In place of multiprocessing's start of a new Python: a fork that reads what it is to do from the same pipe, with no
    other file open and no signal handled."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        kept = sorted({2, *passfds})
        for a, b in zip(kept, [*kept[1:], 1 << 16]):
            os.closerange(a + 1, b)
        sys.argv = ["-c", *args[args.index("--multiprocessing-fork") :]]
        exec(args[args.index("-c") + 1], {"__name__": "__main__"})
    except SystemExit as error:
        end(error.code)
    except BaseException:
        traceback.print_exc()
    end(1)
    raise AssertionError


def fork_ranks() -> None:
    """From here on the ranks of a run are forks of this process."""
    from etude import parallel

    start = popen_spawn_posix.Popen._launch  # type: ignore[attr-defined]

    def launch(self: Any, process: Any) -> None:
        spawn = util.spawnv_passfds  # type: ignore[attr-defined]
        resource_tracker.ensure_running()  # started by the same function
        if process._target is parallel._child:
            util.spawnv_passfds = fork  # type: ignore[attr-defined]
        try:
            start(self, process)
        finally:
            util.spawnv_passfds = spawn  # type: ignore[attr-defined]

    popen_spawn_posix.Popen._launch = launch  # type: ignore[attr-defined]


class Forked:
    """A started script, to be used as a subprocess.Popen of text; `cpu` are the seconds it and its children took."""

    _server: subprocess.Popen[str] | None = None
    _numbers = itertools.count()
    _folder = Path()

    def __init__(
        self,
        argv: list[str],
        cwd: Path,
        env: dict[str, str],
        stdin: str | None = None,
        joined: bool = False,
        fresh: bool = False,
    ):
        server = self._serve()
        number = next(self._numbers)
        self._out, self._err, given, self._result = (
            self._folder / f"{number}.{n}" for n in ("out", "err", "in", "result")
        )
        given.write_text(stdin or "")
        request = {
            "argv": argv, "cwd": str(cwd), "env": env, "stdin": str(given), "stdout": str(self._out),
            "stderr": str(self._out if joined else self._err), "result": str(self._result), "fresh": fresh,
        }  # fmt: skip
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(request), file=server.stdin, flush=True)
        self.args, self.pid = argv, int(server.stdout.readline())
        self.returncode: int | None = None
        self.cpu = 0.0

    @classmethod
    def _serve(cls) -> "subprocess.Popen[str]":
        if cls._server is None:
            cls._folder = Path(tempfile.mkdtemp(prefix="forked"))
            env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
            pipe = subprocess.PIPE
            cls._server = subprocess.Popen([sys.executable, __file__], env=env, stdin=pipe, stdout=pipe, text=True)
            atexit.register(cls._stop)
        return cls._server

    @classmethod
    def _stop(cls) -> None:
        assert cls._server is not None and cls._server.stdin is not None and cls._server.stdout is not None
        cls._server.stdin.close()
        cls._server.wait()
        cls._server.stdout.close()

    def poll(self) -> int | None:
        if self.returncode is None and self._result.exists():
            code, cpu = self._result.read_text().split()
            self.returncode, self.cpu = int(code), float(cpu)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text() if self._err.exists() else ""

    def readline(self, timeout: float = 120) -> str:
        """The first line of its output, once that is whole; empty if it ends without one."""
        end = time.monotonic() + timeout
        while b"\n" not in (found := self.written()) and self.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        return found.decode().partition("\n")[0]

    def written(self) -> bytes:
        """Its output so far, to the byte."""
        return self._out.read_bytes() if self._out.exists() else b""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run(
    argv: list[str], cwd: Path, env: dict[str, str], stdin: str | None = None, timeout: float = 240, fresh: bool = False
) -> "subprocess.CompletedProcess[str]":
    """A script from start to end."""
    process = Forked(argv, cwd, env, stdin, fresh=fresh)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(argv, process.returncode or 0, out, err)


def end(code: object) -> None:
    """What Python does at its end, but for taking every module apart: that would copy all memory shared with the server."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    try:
        if (request := serve()) is not None:
            become(request)
    except SystemExit as error:
        end(error.code)
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)
