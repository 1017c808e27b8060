"""From what is kept of a film (tools/footage.py) to windows: where its cuts are, where windows fit, and what speaks against each."""

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from cogvideox.decode import longest_legal_length
from cogvideox.windows import place_windows

SHORTEST_SHOT = 2  # frames: of two cuts close together none may be lost, or a window holds the end of another shot
SAME_SIDES = 0.02  # bars are alike on both sides, dark edges of a picture are not
SMALLEST_BAR = 0.01
FADED = 0.25  # of a window's median level
WHITE, NOT_WHITE = 235.0, 190.0
OVERLAY_SHOTS = (8, 60)  # fewer shots that differ prove nothing, and more cost time
OVERLAY_EDGE, OVERLAY_STEADY, OVERLAY_PIXELS = 6.0, 0.85, 24  # grey levels a pixel, share of the shots, and how many such pixels

# Reason -> what it means, for --help and the page.
REASONS = {
    "static": "hardly moves",
    "blurred": "blurred or out of focus",
    "dark": "too dark",
    "bars": "black bars that the trained picture would have",
    "overlay": "a logo or text that stays across shots",
    "fade": "fades or flashes",
    "duplicate": "like another window",
}


@dataclass
class Window:
    """A window of a film, in seconds after its first frame, and what speaks against it: {reason: a sentence with its number}."""

    film: str
    start: float
    end: float
    frames: int
    reasons: dict[str, str] = field(default_factory=dict)


def seconds_of(film, name):
    """Times of a film's `stamps`, `sample_stamps` or `fine_stamps`, in seconds after its first frame."""
    return (film[name] - film["stamps"][0]) * float(Fraction(str(film["unit"])))


def cuts_of(film, detector, threshold=None):
    """The numbers of the frames that begin a new shot, as scenedetect's detectors find them. threshold: theirs, or None.

    The detectors work on changes from frame to frame, which are kept, and on frame numbers, so a variable frame rate is no other case.
    """
    from scenedetect import FrameTimecode, StatsManager
    from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

    if detector == "none":
        return []
    kind, name = {
        "adaptive": (AdaptiveDetector, "adaptive_threshold"),
        "content": (ContentDetector, "threshold"),
        "threshold": (ThresholdDetector, "threshold"),
    }[detector]
    found = kind(min_scene_len=SHORTEST_SHOT, **({} if threshold is None else {name: threshold}))
    times = [FrameTimecode(number, 25.0) for number in range(len(film["scores"]))]
    if detector == "threshold":
        found.stats_manager = StatsManager()
        for time, level in zip(times, film["levels"], strict=True):
            found.stats_manager.set_metrics(time, {ThresholdDetector.THRESHOLD_VALUE_KEY: float(level)})
    else:
        scores = iter(film["scores"].tolist())
        found._calculate_frame_score = lambda timecode, frame: next(scores)  # scenedetect reads no stored scores itself
    cuts = {cut.frame_num for time in times for cut in found.process_frame(time, None)}
    return sorted(cuts - {0})


def shots_of(film, cuts, margin_seconds):
    """The stretches between cuts in seconds, [(start, end)], `margin_seconds` left out on both sides of a cut."""
    times = seconds_of(film, "stamps")
    end = times[-1] + (float(np.median(np.diff(times))) if len(times) > 1 else 0.0)
    edges = [times[cut] for cut in cuts]
    starts, ends = [0.0, *(edge + margin_seconds for edge in edges)], [*(edge - margin_seconds for edge in edges), end]
    return [(float(a), float(b)) for a, b in zip(starts, ends, strict=True)]


def windows_of(name, shots, kind, fps, most_frames, least_frames, latents_per_patch=1):
    """(windows, shots that are too short) of a film. A shot that is shorter than `most_frames` gives the longest legal length."""
    windows, short = [], []
    for start, end in shots:
        frames = longest_legal_length(min(most_frames, int((end - start) * fps + 1e-3)), latents_per_patch=latents_per_patch)
        if frames < least_frames:
            short.append((start, end))
            continue
        windows += [Window(name, *window, frames) for window in place_windows(kind, start, end, frames / fps)]
    return windows, short


# -----------------------------------------------------------------------------
# What speaks against a window


def part(film, name, of, window, skip_seconds=0.0):
    """The values of `name` at the times `of` in a window."""
    times = seconds_of(film, of)
    return film[name][(times >= window.start + skip_seconds - 5e-4) & (times < window.end - 5e-4)]


def judge(film, window, rules):
    """Fill in what speaks against a window by itself. rules: {fps, min_motion, max_blur, min_bright, aspect, trained_aspect}."""
    # A sample's motion is from the one before it, which for the first may lie before the cut.
    motion = part(film, "motion", "sample_stamps", window, skip_seconds=1 / rules["fps"])
    if len(motion) and (moved := float(np.nanmean(motion))) < rules["min_motion"]:
        window.reasons["static"] = f"changes by {moved:.2f} grey levels a sample, {rules['min_motion']:g} asked for"
    bright = part(film, "bright", "sample_stamps", window)
    is_dark = len(bright) > 0 and float(np.median(bright)) < rules["min_bright"]
    if is_dark:
        level = float(np.median(bright))
        window.reasons["dark"] = f"its bright parts have level {level:.0f} of 255, {rules['min_bright']:g} asked for"
    blur = part(film, "blur", "fine_stamps", window)
    if len(blur) and not is_dark and (blurred := float(np.median(blur))) > rules["max_blur"]:
        window.reasons["blurred"] = f"blur {blurred:.2f} of 1, at most {rules['max_blur']:g}"
    if not is_dark and (bars := bars_of(part(film, "bars", "fine_stamps", window), rules["aspect"], rules["trained_aspect"])):
        window.reasons["bars"] = bars
    levels = part(film, "levels", "stamps", window)
    low, median, high = (float(np.percentile(levels, q)) for q in (0, 50, 100)) if len(levels) else (0.0, 0.0, 0.0)
    if not is_dark and (low < FADED * median or (high > WHITE and median < NOT_WHITE)):
        window.reasons["fade"] = f"its mean level goes from {low:.0f} to {high:.0f}"


def bars_of(bars, aspect, trained_aspect):
    """A sentence on the black bars that the centre crop to the trained aspect ratio leaves, with the crop that removes them, or None.

    bars [n, 4]: shares at the left, top, right and bottom.
    """
    if not len(bars) or bars.min(axis=0).min() >= 1:
        return None
    left, top, right, bottom = bars.min(axis=0).tolist()
    across = min(left, right) if abs(left - right) <= SAME_SIDES else 0.0
    along = min(top, bottom) if abs(top - bottom) <= SAME_SIDES else 0.0
    cropped = max(0.0, 1 - trained_aspect / aspect) / 2, max(0.0, 1 - aspect / trained_aspect) / 2
    if max(across - cropped[0], along - cropped[1]) < SMALLEST_BAR:
        return None
    sides = [f"{100 * across:.1f} % at the left and right"] * (across >= SMALLEST_BAR)
    sides += [f"{100 * along:.1f} % at the top and bottom"] * (along >= SMALLEST_BAR)
    keep = [f"i{side}" if share < SMALLEST_BAR else f"i{side}*{0.99 - 2 * share:.2f}" for side, share in (("w", across), ("h", along))]
    return f"{' and '.join(sides)}; ffmpeg -vf crop={keep[0]}:{keep[1]} writes a file without them"


def gradients(picture):
    """The horizontal and vertical change of a picture's grey levels, float [2, h, w]."""
    grey = picture.astype(np.float32).mean(axis=2)
    across, along = np.zeros_like(grey), np.zeros_like(grey)
    across[:, 1:-1], along[1:-1] = (grey[:, 2:] - grey[:, :-2]) / 2, (grey[2:] - grey[:-2]) / 2
    return np.stack([across, along])


def overlay_of(pictures):
    """The edges that stay across a film's shots, as (mask [h, w], their mean gradients [2, h, w]), or None.

    pictures: one small picture a shot, uint8 [h, w, 3], shots that differ. Lines that run through the whole picture are bars' edges.
    """
    if len(pictures) < OVERLAY_SHOTS[0]:
        return None
    each = np.stack([gradients(picture) for picture in pictures])
    mean = each.mean(axis=0)
    strength = np.hypot(*mean)
    # One strong edge in one shot also has a mean: most shots must have this edge, at half the strength or more.
    steady = ((each * mean).sum(axis=1) > 0.5 * strength**2).mean(axis=0)
    mask = (strength > OVERLAY_EDGE) & (steady >= OVERLAY_STEADY)
    mask &= (mask.mean(axis=1, keepdims=True) < 0.8) & (mask.mean(axis=0, keepdims=True) < 0.8)
    return (mask, mean) if mask.sum() >= OVERLAY_PIXELS else None


def shows_overlay(picture, overlay):
    """A sentence on the overlay of a film, if this picture of one of its windows has it, or None."""
    mask, mean = overlay
    agreement = float((gradients(picture)[:, mask] * mean[:, mask]).sum() / (mean[:, mask] ** 2).sum())
    if agreement < 0.5:
        return None
    rows, columns = np.nonzero(mask)
    left, right = (100 * columns.min() / mask.shape[1], 100 * (columns.max() + 1) / mask.shape[1])
    top, bottom = (100 * rows.min() / mask.shape[0], 100 * (rows.max() + 1) / mask.shape[0])
    return f"edges that stay across shots, {left:.0f} to {right:.0f} % from the left and {top:.0f} to {bottom:.0f} % from the top"


def thumbnails_of(film, window):
    """Three small pictures of a window, float [3, 8, 12, 3], for comparing windows."""
    small = part(film, "thumbnails", "sample_stamps", window)
    return small[np.linspace(0, len(small) - 1, 3).round().astype(int)].astype(np.float32)


def find_duplicates(windows, thumbnails, min_distance, name_of):
    """Fill in which windows are like an earlier one. Windows that are left out anyway are like nothing.

    thumbnails: of each window. name_of: window -> its name in the sentence.
    """
    kept = [number for number, window in enumerate(windows) if not window.reasons and len(thumbnails[number])]
    flat = np.stack([thumbnails[number].ravel() for number in kept]) if kept else np.zeros((0, 1))
    originals = []
    for place, number in enumerate(kept):
        distance = np.abs(flat[originals] - flat[place]).mean(axis=1) if originals else np.array([np.inf])
        nearest = int(distance.argmin())
        if distance[nearest] < min_distance:
            like = windows[kept[originals[nearest]]]
            windows[number].reasons["duplicate"] = f"{distance[nearest]:.1f} grey levels from {name_of(like)}, {min_distance:g} asked for"
        else:
            originals.append(place)
