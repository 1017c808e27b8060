"""Windows: parts of a file by time, in seconds after its first frame. How lists name them, and where they are placed.

No imports of the project: lists, the data layer and the tools share it.
"""

import math
import re

TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)")
HOW = "write FILE | START-END in seconds (film.mp4 | 12.5-18.625) or minutes (1:02.5-1:08)"
# Windows are written in milliseconds, so half of one belongs to each end; a microsecond more, or what lies exactly there would depend on
# how its sum was rounded.
TOLERANCE_SECONDS = 0.000501


def seconds_of(value):
    """The seconds of a time: a number, or a text (12.5, 1:02.5, 0:01:02.5). Raises ValueError, a sentence without a subject."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value < math.inf:
            raise ValueError(f"{value:g} is no time in seconds")
        return float(value)
    found = TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found:
        raise ValueError(f"{str(value)[:40]!r} is no time in seconds (12.5) or minutes (1:02.5)")
    hours, minutes, seconds = found.groups()
    if (hours and int(minutes) >= 60) or (minutes and float(seconds) >= 60):
        raise ValueError(f"{value.strip()!r} has 60 or more after a colon")
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)


def window_of(start, end):
    """The window of two times as (start, end) in seconds. Raises ValueError, a sentence without a subject."""
    window = seconds_of(start), seconds_of(end)
    if window[1] <= window[0]:
        raise ValueError(f"ends at {end}, not after its start at {start}")
    return window


def split_line(line):
    """(file, window) of a line `FILE | START-END`; (line, None) of a line without a "|". Raises ValueError, a sentence."""
    name, bar, times = line.rpartition("|")
    if not bar:
        return line, None
    ends = re.split("[-\u2013]", times)  # an en dash too, which text programs put in
    try:
        if len(ends) != 2 or not name.strip():
            raise ValueError(f"{times.strip()[:40]!r} is no window")
        return name.strip(), window_of(*(end.strip() for end in ends))
    except ValueError as error:
        raise ValueError(f"{error}; {HOW}") from None


def listed_window(name, window):
    """The line that names a window of the file `name`."""
    return f"{name} | {window[0]:.3f}-{window[1]:.3f}"


def seconds_trained(num_frames, fps, source_fps):
    """The seconds of a file that `num_frames` at `fps` take, so that they are all there wherever such a window begins.

    Where few frames of the source lie between two that are trained, its last one may come too late: one more is taken in.
    """
    length = num_frames / fps
    frames = math.floor(length * source_fps + 1e-6)
    return length + (1 / source_fps if (frames - 0.5) / source_fps < (num_frames - 1) / fps - 1e-6 else 0.0)


def place_windows(kind, start, end, length):
    """Windows of `length` seconds in the stretch from `start` to `end`, as [(start, end)] in whole milliseconds.

    one: the middle. slide: one after the other from the start, as many as fit whole. spread: as many as cover the stretch, evenly
    spaced, overlapping a little. A stretch that is no longer than `length` is one window.
    """
    rest = end - start - length
    if rest <= 0.001:
        return [(round(start, 3), round(end, 3))]
    if kind == "one":
        starts = [start + rest / 2]
    elif kind == "slide":
        starts = [start + number * length for number in range(math.floor((rest + 0.001) / length) + 1)]
    else:
        gaps = math.ceil((rest - 0.001) / length)
        starts = [start + number * rest / gaps for number in range(gaps + 1)]
    whole = math.ceil(1000 * length - 1e-6) / 1000  # not a millisecond less than what is trained, or its last frame is missing
    return [(round(place, 3), round(round(place, 3) + whole, 3)) for place in starts]
