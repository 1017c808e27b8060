"""A process with all that it has started: to end them together, and to wait for them. Not a program."""

import contextlib
import signal

import psutil


def family(pid):
    """A process and all that it has started. torchrun gives each trainer a session of its own: no group holds them all."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def strike(processes, number):
    """Send a signal to each of these processes that is still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def wait_for_end(processes, seconds):
    """Wait until all of these have ended; kills those that have not. Returns whether they ended by themselves."""
    alive = psutil.wait_procs(processes, timeout=seconds)[1]
    strike(alive, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=10)
    return not alive
