"""Decoding in worker processes: a file that hangs or crashes the decoder costs its timeout, not the run.

`Readers` starts workers (`python -m cogvideox.reader`), which read requests as JSON lines and reply with JSON and raw frames. A
worker imports numpy and a decoder, not torch, and exits with its parent (its stdin closes).
"""

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cogvideox.decode import BadClip, Framing, read_clip

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "cogvideox.reader"]


class Readers:
    """A pool of decoding processes, used as a context manager.

    workers: number of processes. timeout_seconds: timeout per file. command: the worker's command line (tests replace it).
    """

    def __init__(self, workers=2, timeout_seconds=60.0, command=COMMAND):
        self.timeout_seconds, self.command = timeout_seconds, command
        self.idle = queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(None)  # a worker starts with its first file
        self.workers = workers
        self.threads = ThreadPoolExecutor(workers)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.threads.shutdown(wait=True, cancel_futures=True)
        while not self.idle.empty():
            stop(self.idle.get())

    def read(self, path, framing, want_frames=True, reader="auto", times_timeout=1):
        """Decode one file. Returns (facts, frames); frames is None without `want_frames`. Raises BadClip with the reason.

        times_timeout: how many times the pool's timeout this file may take.
        """
        request = {"path": str(path), "framing": asdict(framing), "want_frames": want_frames, "reader": reader}
        worker = self.idle.get()
        try:
            worker = worker or self.start()
            reply, frames = self.exchange(worker, request, self.timeout_seconds * times_timeout)
        except TimeoutError:
            stop(worker)
            worker = None
            raise BadClip(f"not decoded within {self.timeout_seconds * times_timeout:g} seconds (--clip_timeout_seconds)") from None
        except (EOFError, BrokenPipeError, json.JSONDecodeError):
            reason = describe_end(worker)
            stop(worker)
            worker = None
            raise BadClip(f"the decoder crashed on it ({reason})") from None
        finally:
            self.idle.put(worker)
        if not reply["ok"]:
            raise BadClip(reply["reason"])
        return reply["facts"], frames

    def read_all(self, requests, want_frames=True):
        """Decode (path, framing) pairs, at most two files per worker ahead of the caller.

        Yields (facts, frames, reason) in order; reason says why a file cannot be used, and the others are then None.
        """

        def attempt(path, framing):
            try:
                return (*self.read(path, framing, want_frames), None)
            except BadClip as error:
                return None, None, str(error)

        requests, ahead = iter(requests), []
        for request in requests:
            ahead.append(self.threads.submit(attempt, *request))
            if len(ahead) > 2 * self.workers:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()

    def start(self):
        """Start one worker process."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        # A separate session: Ctrl-C goes to the trainer only, which finishes its work and then closes the pipes.
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )

    def exchange(self, worker, request, timeout_seconds):
        """Send one request and wait for its reply. Raises TimeoutError, or EOFError if the worker has exited."""
        deadline = time.monotonic() + timeout_seconds
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        length = int.from_bytes(read_exactly(worker.stdout, 8, deadline))
        reply = json.loads(bytes(read_exactly(worker.stdout, length, deadline)))
        if "shape" not in reply:
            return reply, None
        pixels = read_exactly(worker.stdout, int(np.prod(reply["shape"])), deadline)
        return reply, np.frombuffer(pixels, dtype=np.uint8).reshape(reply["shape"])


def read_exactly(pipe, size, deadline):
    """Read `size` bytes from an unbuffered pipe. Raises EOFError at its end, TimeoutError at the deadline."""
    received = bytearray(size)
    view, filled = memoryview(received), 0
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while filled < size:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            count = pipe.readinto(view[filled:])
            if not count:
                raise EOFError
            filled += count
    return received


def stop(worker):
    """Kill a worker and its child processes."""
    if worker is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()


def describe_end(worker):
    """How a worker that closed its pipe exited, for a message."""
    try:
        code = worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    return f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"


def read_request(request):
    """`read_clip` of a request."""
    framing = request["framing"]
    framing["sizes"] = tuple(map(tuple, framing["sizes"]))
    framing["lengths"], framing["background"] = tuple(framing["lengths"]), tuple(framing["background"])
    framing["window"] = framing["window"] and tuple(framing["window"])
    return read_clip(request["path"], Framing(**framing), request["reader"])


def serve(answer=read_request):
    """Answer requests until stdin closes. Replies go to a private copy of stdout, which no library's print can corrupt.

    answer: request -> (frames or None, facts); it raises BadClip for a file that cannot be used.
    """
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        frames = None
        try:
            frames, facts = answer(request)
            reply = {"ok": True, "facts": facts}
        except BadClip as error:
            reply = {"ok": False, "reason": str(error)}
        except Exception as error:  # a decoder may raise anything; report it for the file
            reply = {"ok": False, "reason": f"the decoder failed: {type(error).__name__}: {str(error)[:160]}"}
        send_frames = request["want_frames"] and frames is not None
        if send_frames:
            reply["shape"] = frames.shape
        header = json.dumps(reply).encode()
        replies.write(len(header).to_bytes(8) + header)
        if send_frames:
            replies.write(memoryview(np.ascontiguousarray(frames)).cast("B"))
        replies.flush()


def decode_workers():
    """The number of decoding processes on this machine: at most 4, because encoding is slower than decoding."""
    return min(4, cores())


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    serve()
