"""What a process has to settle with whoever launched it before anything heavy is imported."""

import contextlib
import ctypes
import os
import signal


def end_with_launcher():
    """Let the launcher's death end this process too, and a signal end it at once, until the run listens for signals.

    A launcher that is killed would leave its processes behind, each in a session of its own, with the GPU and the folder
    still taken. A run that was started from a shell has to survive the shell and is left alone.
    """
    # Python would raise KeyboardInterrupt, and not before a wait in C (for the other processes, half an hour) is over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        with contextlib.suppress(OSError, AttributeError, TypeError):  # Linux only
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
