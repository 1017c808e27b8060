"""What a run says and how it ends early: messages, progress bars, exit codes. Nothing heavy is imported here.

Messages are Python logging's, of the logger "cogvideox", on stderr and above any progress bar. The main process writes them;
with --verbose every process does, with the time and its rank, the details too.

Exit codes of the script itself (both launchers turn any of them into 1): 0 done, 1 anything unforeseen, 2 flags or
environment, 3 dataset, 4 output folder or checkpoint, 5 numbers that are not finite, 128 + n stopped by signal n.
"""

import contextlib
import logging
import os
import sys
import time

from tqdm.auto import tqdm

BAD_FLAGS, BAD_DATA, BAD_OUTPUT, BAD_NUMBERS = 2, 3, 4, 5
SECONDS_A_LINE = 30  # of a progress bar where stderr is no terminal

log = logging.getLogger("cogvideox")


def rank():
    """The rank of this process, as its launcher set it."""
    return int(os.environ.get("RANK", "0"))


class Console(logging.Handler):
    """Writes messages above any progress bar: warnings say so, everything else stands as it is."""

    def emit(self, record):
        verbose = log.level <= logging.DEBUG
        if rank() != 0 and not verbose and not getattr(record, "on_every_rank", False):
            return
        level = f"{record.levelname.lower()}: " if record.levelno in (logging.WARNING, logging.DEBUG) else ""
        stamp = time.strftime("%H:%M:%S ", time.localtime(record.created)) + f"[rank {rank()}] " if verbose else ""
        text = record.getMessage()
        start = len(text) - len(text.lstrip("\n"))  # an empty line before a title stays before it
        tqdm.write(text[:start] + stamp + level + text[start:], file=sys.stderr)
        sys.stderr.flush()


def configure(verbose=False):
    """Show messages from the level info on; with `verbose` from debug on, and those of the libraries."""
    if not any(isinstance(handler, Console) for handler in log.handlers):
        log.addHandler(Console())
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")


configure()


def say(text, on_every_rank=False):
    """Tell the user something, once a run or once a process."""
    log.info("%s", text, extra={"on_every_rank": on_every_rank})


def warn(text):
    """Tell the user of something that does not end the run but may not be what was meant."""
    log.warning("%s", text)


@contextlib.contextmanager
def timed(name):
    """With --verbose, say how long a part of the run took."""
    started = time.perf_counter()
    yield
    log.debug("%s: %.1f s", name, time.perf_counter() - started)


def fail(code, problems):
    """End the run with exit code `code` and one sentence a problem. Every process calls it; the main one prints."""
    problems = [problems] if isinstance(problems, str) else problems
    log.error("%s", "".join(f"\nERROR[{code}]: {problem}" for problem in problems))
    if rank() != 0:
        time.sleep(3)  # the launcher ends all processes when the first one stops: let the main one print before that
    raise SystemExit(code)


class LogFile:
    """stderr for a bar where it is no terminal: every state is a line of its own, and nothing is erased."""

    def write(self, text):
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(items=None, desc=None, **options):
    """A tqdm bar with an ETA; a line every 30 seconds where stderr is no terminal. options: tqdm's."""
    if not sys.stderr.isatty():
        options = {"file": LogFile(), "mininterval": SECONDS_A_LINE, "maxinterval": SECONDS_A_LINE, "miniters": 1} | options
    return tqdm(items, desc=desc, **options)
