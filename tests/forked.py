"""Trainers that are forked from one warm process instead of started: three seconds instead of sixteen, the same bits.

A session's first run starts a server (this file as a program) that imports torch, diffusers and the trainer, and runs no
operation of torch, so that it has one thread and can be forked (Linux). For each process of a run it forks a child, which gets the
variables a launcher would set, a session of its own, its output in a file, and then runs train_cogvideox_lora.py, or another program of
the repository. Signals, exit codes and the files it leaves are those of a real process (tests/test_forked.py).

Two things are not here. Launchers end all processes when one has failed, and pass signals on. And Python orders sets of words
differently in each process that is started, but alike in the children of one: the real starts would show what depends on that.
"""

import contextlib
import gc
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tools.processes import family, strike

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "train_cogvideox_lora.py"


class Forked:
    """One process of a run, with the methods of subprocess.Popen that the tests use. log: the file with all that it prints."""

    def __init__(self, pid, log, exit_code_path):
        self.pid, self.log, self.exit_code_path = pid, log, exit_code_path

    @property
    def returncode(self):
        """The exit code, negative for a signal as subprocess has it; None while it runs."""
        return int(self.exit_code_path.read_text()) if self.exit_code_path.exists() else None

    def poll(self):
        return self.returncode

    def output(self):
        return self.log.read_text(errors="replace")

    def wait(self, timeout):
        """Wait for its end and return the exit code. Raises subprocess.TimeoutExpired with the end of what it printed."""
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(SCRIPT, timeout, self.output()[-3000:])
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout):
        """Wait for its end. Returns (what it printed, None), as Popen does with both outputs in one."""
        self.wait(timeout)
        return self.output(), None

    def send_signal(self, number):
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended a moment ago
                os.kill(self.pid, number)


class ForkServer:
    """Owns the warm process. `start` forks a run, `run` waits for its end too, `end_all` kills what is left of all runs."""

    def __init__(self, folder, environment, model):
        self.folder, self.environment, self.number, self.started = Path(folder), environment, 0, []
        self.model = model  # its tokenizer is read once

    def __enter__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(self.model)],
            cwd=ROOT,
            env=self.environment | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # or an older torch starts a thread when it is imported
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest, which closes this one's input
        )
        return self

    def __exit__(self, *exception):
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()

    def start(self, line, processes=1, before="", module=None, **variables):
        """Fork a run. Returns its processes, by rank.

        line: its flags. processes: how many, with gloo between them. before: Python that each child runs first, to put a fault into the
        modules; `rank` is known there. module: the program that is run as `python -m` would, in place of the trainer. variables:
        environment on top of that of the tests.
        """
        self.number += 1
        ranks = []
        port = free_port()
        for rank in range(processes):
            environment = dict(self.environment)
            if processes > 1:
                environment |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in (environment | variables).items()}
            log = self.folder / f"run-{self.number}-{rank}.log"
            log.touch()
            ranks.append({"rank": rank, "environment": environment, "log": str(log), "exit_code_path": str(log.with_suffix(".code"))})
        request = {"line": [str(word) for word in line], "before": before, "module": module, "ranks": ranks}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, f"the warm process has ended with {self.server.wait()}"
        made = [Forked(pid, Path(rank["log"]), Path(rank["exit_code_path"])) for pid, rank in zip(json.loads(answer), ranks, strict=True)]
        self.started += made
        return made

    def run(self, line, processes=1, before="", timeout=150, **variables):
        """Fork a run and wait for its end. Returns (exit codes by rank, what all printed)."""
        ranks = self.start(line, processes, before, **variables)
        codes = [rank.wait(timeout) for rank in ranks]
        output = "".join(rank.output() for rank in ranks)
        assert any(codes) or all(f"process {rank} of {processes}" in output for rank in range(processes)), output[-3000:]
        return codes, output

    def end_all(self):
        """Kill all processes that still run, with those that they have started."""
        for process in self.started:
            if process.poll() is None:
                strike(family(process.pid), signal.SIGKILL)
                process.wait(60)
        self.started.clear()


PORTS = itertools.count(os.getpid() * 37)  # each process of tests begins elsewhere


def free_port():
    """A TCP port that nobody uses, and that no program gets before the one it is for, which may still import for seconds.

    It is below those that Linux gives to whoever asks for any port (from 32768 on), as gloo does a dozen times a run, and in a
    thousand of its own for each of pytest's workers.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20000 + 1000 * (worker % 12) + next(PORTS) % 1000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


# -----------------------------------------------------------------------------
# The warm process


def serve():
    """Read requests from the standard input and fork. Returns in each child, with (request, rank's part); ends when the input does."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    waiting, running = b"", {}  # bytes of a line that is not whole; pidfd -> (pid, exit_code_path)
    while True:
        ready = select.select([requests, *running], [], [])[0]
        for pidfd in set(ready) & running.keys():
            pid, exit_code_path = running.pop(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(pidfd)
            partial = Path(exit_code_path + ".partial")
            partial.write_text(str(code))
            partial.replace(exit_code_path)
        if requests not in ready:
            continue
        read = os.read(requests.fileno(), 1 << 16)
        if not read:
            for pid, _ in running.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        *lines, waiting = (waiting + read).split(b"\n")
        for line in map(json.loads, lines):
            pids = []
            for part in line["ranks"]:
                deadline = time.monotonic() + 20  # a library may have a thread that ends a moment after the import
                while len(threads := os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert len(threads) == 1, f"{len(threads)} threads: a fork has only one of them, and waits for the locks of the others"
                pid = os.fork()
                if pid == 0:
                    answers.close()
                    for pidfd in running:
                        os.close(pidfd)
                    return line, part
                pids.append(pid)
                running[os.pidfd_open(pid)] = pid, part["exit_code_path"]
            print(json.dumps(pids), file=answers, flush=True)


def become_program(request, part):
    """In a child: take the place of a process that a launcher has started, and run the trainer, or another program, to its end."""
    import runpy

    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(part["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, place)
    os.close(nothing)
    os.close(log)
    os.environ.clear()
    os.environ.update(part["environment"])
    exec(request["before"], {"rank": part["rank"]})
    sys.argv = [request["module"] or SCRIPT, *request["line"]]
    if request["module"]:
        runpy.run_module(request["module"], run_name="__main__")
    else:
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")


def warm_up(model):
    """Import all that a run imports, and read the tokenizer. diffusers and transformers load their parts when first asked for."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel  # noqa: F401
    from transformers import T5EncoderModel, T5Tokenizer  # noqa: F401

    import train_cogvideox_lora  # noqa: F401
    from tests import shortcuts

    shortcuts.take()
    shortcuts.load_tokenizer_once(model)
    gc.collect()
    gc.freeze()  # a child that walked all objects would copy the memory they lie in


if __name__ == "__main__":
    warm_up(Path(sys.argv[1]))
    become_program(*serve())
