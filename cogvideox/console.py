"""Messages, progress bars and exit codes. No heavy imports.

Messages go through Python's logger "cogvideox" to stderr, above any progress bar. Rank 0 prints them; with --verbose every rank
does, with debug messages, time and rank.

Exit codes of the script itself (both launchers turn every failure into 1): 0 done, 1 unexpected error, 2 flags or environment,
3 dataset, 4 output folder or checkpoint, 5 non-finite gradients, 128 + n stopped by signal n.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import time

from tqdm.auto import tqdm

BAD_FLAGS, BAD_DATA, BAD_OUTPUT, BAD_NUMBERS = 2, 3, 4, 5
SECONDS_PER_LINE = 30  # of a progress bar without a terminal

# Lines of libraries that are about a part of theirs and ask for nothing: logger -> how the line begins. --verbose shows them.
NOT_FOR_THE_USER = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # a faster kernel for a CPU; it has another one
    "DeepSpeed": "Setting accelerator to CPU",
}

log = logging.getLogger("cogvideox")


def rank():
    """The rank of this process, as set by the launcher."""
    return int(os.environ.get("RANK", "0"))


class Unbreakable(io.FileIO):
    """A standard stream that drops what nobody can read any more: a closed terminal (EIO), a reader that ended (EPIPE), a full disk."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlive_readers():
    """Have no print of this program raise, nor its last flush change the exit code, because its terminal, `head` or `tee` has gone.

    Other programs' streams (a notebook's, a test's) stay as they are.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is None:  # closed by the shell: 2>&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # lives as long as the program
        elif old is getattr(sys, f"__{name}__"):
            settings = {"encoding": old.encoding, "errors": old.errors}
            settings |= {"line_buffering": old.line_buffering, "write_through": old.write_through}
            buffered = io.BufferedWriter(Unbreakable(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffered, **settings))


class Console(logging.Handler):
    """Writes messages above any progress bar, warnings and debug messages with their level in front."""

    def emit(self, record):
        verbose = log.level <= logging.DEBUG
        if rank() != 0 and not verbose and not getattr(record, "on_every_rank", False):
            return
        level = f"{record.levelname.lower()}: " if record.levelno in (logging.WARNING, logging.DEBUG) else ""
        stamp = time.strftime("%H:%M:%S ", time.localtime(record.created)) + f"[rank {rank()}] " if verbose else ""
        text = record.getMessage()
        start = len(text) - len(text.lstrip("\n"))  # keep blank lines before the prefix
        with contextlib.suppress(OSError, ValueError):  # a terminal that was closed, or `tee` that was killed: the run continues
            tqdm.write(text[:start] + stamp + level + text[start:], file=sys.stderr)
            sys.stderr.flush()


def configure(verbose=False):
    """Show messages of level info and above; with `verbose` of level debug and above, and the libraries' messages."""
    if not any(isinstance(handler, Console) for handler in log.handlers):
        log.addHandler(Console())
    for stream in (sys.stdout, sys.stderr):  # a file's name holds any byte, and a terminal may know Latin letters only
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")


@contextlib.contextmanager
def without_line(beginning):
    """Leave a line that a library prints to stdout in the block out, and nothing else."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        lines = printed.getvalue().splitlines(keepends=True)
        sys.stdout.write("".join(line for line in lines if not line.startswith(beginning) or log.level <= logging.DEBUG))


configure()
outlive_readers()
for name, beginning in NOT_FOR_THE_USER.items():
    logging.getLogger(name).addFilter(
        lambda record, beginning=beginning: not str(record.msg).startswith(beginning) or log.level <= logging.DEBUG
    )


def in_utf8(text):
    """The text with escapes for what UTF-8 cannot write, such as a byte of a file's name: trackers read the log as UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def say(text, on_every_rank=False):
    """Print a message, on rank 0 or on every rank."""
    log.info("%s", in_utf8(text), extra={"on_every_rank": on_every_rank})


def warn(text):
    """Print a warning: the run continues."""
    log.warning("%s", in_utf8(text))


@contextlib.contextmanager
def timed(name):
    """With --verbose, print how long the block took."""
    started = time.perf_counter()
    yield
    log.debug("%s: %.1f s", name, time.perf_counter() - started)


def fail(code, problems):
    """End the run with exit code `code` and one sentence per problem. Every rank calls it; rank 0 prints."""
    problems = [problems] if isinstance(problems, str) else problems
    log.error("%s", in_utf8("".join(f"\nERROR[{code}]: {problem}" for problem in problems)))
    if rank() != 0:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which would be told as a stop that saves
        time.sleep(3)  # the launcher kills all ranks when the first one exits: let rank 0 print before
    raise SystemExit(code)


class LogFile:
    """stderr for a progress bar without a terminal: a line every 30 seconds, however often the bar is drawn, and its last state."""

    def __init__(self):
        self.line, self.count, self.due = "", "", -float("inf")

    def write(self, text):
        self.line = text.strip("\r\n ") or self.line
        count, now = self.line.partition("[")[0], time.monotonic()  # "training:  10%|#         | 30/300 "
        ends = text.endswith("\n")
        if count != self.count and (ends or now >= self.due):
            self.count, self.due = count, now + SECONDS_PER_LINE
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(self.line + "\n")

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


class Bar(tqdm):
    """A tqdm bar, on rank 0; without a terminal, a line every 30 seconds and its last state. For libraries that take a class of bars."""

    def __init__(self, *arguments, **options):
        options["disable"] = bool(options.get("disable")) or rank() != 0
        if not sys.stderr.isatty():
            options |= {"file": LogFile(), "mininterval": 1, "maxinterval": SECONDS_PER_LINE, "miniters": 1}
            options |= {"position": 0, "leave": True}  # no bar in another's lines; the last state of each
        super().__init__(*arguments, **options)


def progress(items=None, desc=None, **options):
    """A bar with an ETA over items, or over `total` of something. options: tqdm's."""
    return Bar(items, desc=desc, **options)
