"""One pass over a film: its frames' times and changes, small samples of them, and a small preview. Needs scenedetect.

A film is read in pieces that begin at key frames, by the processes of cogvideox/reader.py (`python -m tools.footage` is one), so that
a long film uses all cores and a stopped run loses at most the pieces in work. What is kept of a film is independent of how it is
cut, so that other thresholds or windows cost no second pass.
"""

import errno
import hashlib
import io
import os
import shutil
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from cogvideox.console import progress
from cogvideox.container import BadClip, Place, decoded, frame_times, list_packets, open_video
from cogvideox.decode import picture_turn, turned
from cogvideox.files import key_of, write_bytes
from cogvideox.reader import Readers, serve

VERSION = 1  # raise it when the same film gives other numbers
SMALL = 256  # pixels of the longer side of what cuts are found on: scenedetect's own choice
FINE_HEIGHT = 480  # pixels at most of what blur and bars are measured on: the trained height
FINE_PER_SECOND = 2
THUMBNAIL = (8, 12)  # rows, columns
BLACK = 28  # grey level of 255; video's black is 16
PIECE_SECONDS = 20.0
BYTES_PER_SECOND = 30_000  # of film, for what is kept and for strips: 14,000 in Big Buck Bunny
TIMES_TO_LIST = 10  # the timeout of a piece, for reading all packets of a film


@dataclass(frozen=True)
class Piece:
    """A part of a film that one process reads: the frames from the presentation time `start` to before `end`, both in the stream's
    unit (None: from the first, to the last). first: the film's first time. fps: samples per second. folder: where its files go."""

    start: int | None
    end: int | None
    first: int
    fps: float
    folder: str
    number: int


# -----------------------------------------------------------------------------
# In the process that reads


def index_film(path):
    """What splits a film: {"stamps", "unit" (seconds as text), "keys": times of key frames at which it can be entered}.

    Raises BadClip. The times are those that cogvideox/decode.py reads; without a packet's time they come from decoding.
    """
    packets = list_packets(path)
    if not packets.stamps:
        return {"stamps": frame_times(path, packets.kind).stamps, "unit": str(packets.unit), "keys": []}
    # Of another container, an edit list or an open group the key frames are no entries.
    return {"stamps": packets.stamps, "unit": str(packets.unit), "keys": [] if packets.doubt else list(packets.keys)}


def examine(path, piece):
    """Read a piece; write PIECE.mkv, its preview, and then PIECE.npz, what `join` reads. Raises BadClip."""
    import av
    import cv2
    from scenedetect.detectors import ContentDetector

    cv2.setNumThreads(1)  # the other cores have pieces of their own
    detector, found = ContentDetector(), {name: [] for name in ARRAYS}
    name = Path(piece.folder, f"{piece.number:05d}")
    partial = f"{name}.{os.getpid()}.partial"  # a process of a killed run may still be at this piece
    last_slot, last_fine, before, next_score = None, None, None, np.nan
    with open_video(path) as (container, stream), av.open(partial, "w", format="matroska") as preview:
        unit, out = stream.time_base, None
        stream.codec_context.thread_count = 0 if piece.start is None else 1
        for frame in decoded(container, stream, Place(key=piece.start, stamp=piece.start)):
            if frame.pts is None:
                raise BadClip("its frames have no timestamps")
            seconds = float((frame.pts - piece.first) * unit)
            if frame.is_corrupt:
                raise BadClip(f"damaged: the frame at {seconds:.3f} s cannot be decoded completely")
            if piece.start is not None and frame.pts < piece.start:
                continue
            small = small_picture(frame, stream.sample_aspect_ratio)
            score = detector._calculate_frame_score(None, small)
            if piece.end is not None and frame.pts >= piece.end:
                next_score = score
                break
            found["stamps"].append(frame.pts)
            found["scores"].append(score if before is not None else np.nan)
            found["levels"].append(small.mean())
            slot, fine = int(seconds * piece.fps + 1e-6), int(seconds * FINE_PER_SECOND + 1e-6)
            if slot != last_slot:
                grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
                moved = before is not None and before.shape == grey.shape
                found["sample_stamps"].append(frame.pts)
                found["motion"].append(cv2.absdiff(grey, before).mean() if moved else np.nan)
                found["bright"].append(np.searchsorted(np.bincount(grey.ravel()).cumsum(), 0.95 * grey.size))
                found["thumbnails"].append(cv2.resize(small, THUMBNAIL[::-1], interpolation=cv2.INTER_AREA)[..., ::-1])
                out = out or preview_stream(preview, small, piece.fps)
                encode(preview, out, small, seconds)
                before = grey
            if fine != last_fine:
                picture = turned(frame.reformat(*fine_size(frame), "gray").to_ndarray(), picture_turn(frame))
                found["fine_stamps"].append(frame.pts)
                found["blur"].append(blur(picture))
                found["bars"].append(black_bars(picture))
            last_slot, last_fine = slot, fine
        if out is not None:
            preview.mux(out.encode(None))
    if not found["stamps"]:
        raise BadClip("no frame can be decoded")
    os.replace(partial, f"{name}.mkv")
    save_arrays(Path(f"{name}.npz"), {n: np.asarray(found[n], dtype) for n, dtype in ARRAYS.items()} | {"next_score": next_score})
    return {}


# What is kept of a film. Per frame: its time, scenedetect's score of the change from the one before, and the mean level. Per sample:
# its time, the mean change in grey levels from the one before, the 95th percentile of its grey levels, and its thumbnail. Per fine
# sample: its time, its blur, and its black bars at the left, top, right and bottom as shares of the picture.
ARRAYS = {"stamps": np.int64, "scores": np.float32, "levels": np.float32, "sample_stamps": np.int64, "motion": np.float32}
ARRAYS |= {"bright": np.float32, "thumbnails": np.uint8, "fine_stamps": np.int64, "blur": np.float32, "bars": np.float32}


def small_picture(frame, aspect):
    """A frame as it is shown, its longer side SMALL pixels and both even: uint8 BGR [h, w, 3]."""
    width, height = frame.width * float(aspect or 1), frame.height
    scale = SMALL / max(width, height)
    size = (max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2))
    return np.ascontiguousarray(turned(frame.reformat(*size, "bgr24", interpolation="AREA").to_ndarray(), picture_turn(frame)))


def fine_size(frame):
    """(width, height) for blur and bars, never larger than the frame: enlarging blurs."""
    height = min(FINE_HEIGHT, frame.height)
    return max(16, round(frame.width * height / frame.height / 2) * 2), height


def preview_stream(preview, small, fps):
    """An H.264 stream with a key frame each second, so that a browser seeks at once."""
    out = preview.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"preset": "veryfast", "crf": "28", "bf": "0"})
    out.height, out.width, out.pix_fmt, out.gop_size = *small.shape[:2], "yuv420p", max(1, round(fps))
    out.codec_context.time_base, out.codec_context.thread_count = Fraction(1, 1000), 1
    return out


def encode(preview, out, small, seconds):
    """Append a picture at its time."""
    import av

    frame = av.VideoFrame.from_ndarray(small[: out.height, : out.width], "bgr24")
    frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
    preview.mux(out.encode(frame))


def blur(picture):
    """Crete's perceptual blur of a grey picture, 0 (sharp) to 1: how little a further blur takes from the differences of neighbours.

    Crete et al. 2007, "The blur effect: perception and estimation with a new no-reference perceptual blur metric".
    """
    import cv2

    values = []
    for lines, softer in ((picture, cv2.blur(picture, (1, 11))), (picture.T, cv2.blur(picture, (11, 1)).T)):
        sharp, left = cv2.absdiff(lines[1:], lines[:-1]), cv2.absdiff(softer[1:], softer[:-1])
        differences = cv2.sumElems(sharp)[0]
        flat = differences < 0.1 * sharp.size  # an even colour is not blurred
        values.append(0.0 if flat else 1 - cv2.sumElems(cv2.subtract(sharp, left))[0] / differences)
    return max(values)


def black_bars(picture):
    """Shares of the picture that are black at its left, top, right and bottom; all 1 for a picture that is dark everywhere.

    A row or column is black if 19 of 20 of its pixels are: subtitles in a bar do not hide it.
    """
    bars = []
    for lines in (picture.T, picture):
        dark = (lines > BLACK).mean(axis=1) <= 0.05
        if dark.all():
            return [1.0] * 4
        bars.append((int(np.argmin(dark)) / len(dark), int(np.argmin(dark[::-1])) / len(dark)))
    (left, right), (top, bottom) = bars
    return [left, top, right, bottom]


def save_arrays(path, arrays):
    """Write an .npz file atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def answer(request):
    """The reply to one request of `Readers`: an index for a Piece without a folder, else {} once the piece is written."""
    piece = Piece(**request["framing"])
    return None, examine(request["path"], piece) if piece.folder else index_film(request["path"])


# -----------------------------------------------------------------------------
# In the program


def film_key(path, fps):
    """The name of what is kept of a film: the same for a link to it or a copy that keeps its time, another for another rate."""
    status = os.stat(path)
    with open(path, "rb") as file:
        start = hashlib.sha256(file.read(1 << 16)).hexdigest()
    return key_of(VERSION, start, status.st_size, status.st_mtime_ns, fps)[:16]


def pieces_of(index, fps, folder):
    """The pieces of a film and their seconds; each is at least PIECE_SECONDS long, but for the last, and begins at a key frame."""
    stamps, unit = index["stamps"], Fraction(index["unit"])
    starts = [stamps[0]]
    for key in index["keys"]:
        if key - starts[-1] >= PIECE_SECONDS / unit and stamps[-1] - key >= PIECE_SECONDS / 2 / unit:
            starts.append(key)
    parts = [float((end - start) * unit) for start, end in pairwise([*starts, stamps[-1]])]
    pieces = [Piece(start, end, stamps[0], fps, str(folder), n) for n, (start, end) in enumerate(pairwise([*starts, None]))]
    pieces = pieces if len(pieces) > 1 else [replace(pieces[0], start=None)]  # a whole film needs no seeking
    return dict(zip(pieces, parts, strict=True))


def join(index, pieces, target):
    """Make TARGET.npz and TARGET.mp4 of a film's pieces, and remove the pieces. Returns False if they do not hold its listed frames."""
    parts = [dict(np.load(Path(piece.folder, f"{piece.number:05d}.npz"))) for piece in pieces]
    for part, following in zip(parts, parts[1:], strict=False):
        following["scores"][0] = part["next_score"]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ARRAYS}
    arrays["stamps"].sort()  # AVI's are out of order
    if pieces[0].end is not None and arrays["stamps"].tolist() != index["stamps"]:
        return False
    arrays["scores"][0] = 0.0
    arrays["unit"] = index["unit"]
    join_previews([Path(piece.folder, f"{piece.number:05d}.mkv") for piece in pieces], target.with_suffix(".mp4"))
    save_arrays(target.with_suffix(".npz"), arrays)
    shutil.rmtree(target, ignore_errors=True)
    return True


def join_previews(parts, path):
    """Write one mp4 of the packets of several previews."""
    import av

    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as whole:
        out = None
        for part in parts:
            with av.open(str(part)) as container:
                stream = container.streams.video[0]
                out = out or whole.add_stream_from_template(stream)
                for packet in container.demux(stream):
                    if packet.size:
                        packet.stream = out
                        whole.mux(packet)
    os.replace(partial, path)


def examine_films(paths, fps, folder, timeout_seconds, workers):
    """Read each film once, or take what `folder` keeps of it. Returns {path: why it cannot be used}.

    FOLDER/KEY.npz then has what was found of a film, FOLDER/KEY.mp4 its preview (`film_key`). timeout_seconds: of PIECE_SECONDS of
    film; a file that hangs or crashes the decoder costs itself only. Raises OSError if the disk has no room.
    """
    targets = {path: folder / film_key(path, fps) for path in paths}
    of_target = {target: path for path, target in targets.items()}  # a copy is read once
    todo, reasons = [path for target, path in of_target.items() if not target.with_suffix(".npz").exists()], {}
    if not todo:
        return {}
    with Readers(workers, timeout_seconds, [sys.executable, "-m", "tools.footage"]) as readers:

        def read(path, piece, times_timeout):
            if path in reasons or (piece.folder and Path(piece.folder, f"{piece.number:05d}.npz").exists()):
                return None
            try:
                return readers.read(path, piece, want_frames=False, times_timeout=times_timeout)[0]
            except BadClip as error:
                reasons.setdefault(path, str(error))

        def submit(path, pieces):
            Path(next(iter(pieces)).folder).mkdir(parents=True, exist_ok=True)
            return [readers.threads.submit(read, path, piece, max(1.0, part / PIECE_SECONDS)) for piece, part in pieces.items()]

        listing = [readers.threads.submit(read, path, Piece(None, None, 0, fps, "", 0), TIMES_TO_LIST) for path in todo]
        indexes = {path: future.result() for path, future in zip(todo, progress(listing, "listing frames", unit="file"), strict=True)}
        plans = {path: pieces_of(index, fps, targets[path]) for path, index in indexes.items() if index}
        seconds = sum(sum(plan.values()) for plan in plans.values())
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < (needed := seconds * BYTES_PER_SECOND):
            raise OSError(errno.ENOSPC, f"{needed / 2**20:.0f} MiB are needed for previews, {free / 2**20:.0f} are free")
        work = {path: submit(path, pieces) for path, pieces in plans.items()}
        with progress(total=round(seconds), desc="reading footage", unit="s") as bar:
            for path, futures in work.items():
                for future, part in zip(futures, plans[path].values(), strict=True):
                    future.result()
                    bar.update(round(part))
                if path not in reasons and not join(indexes[path], list(plans[path]), targets[path]):
                    # Its packets do not list its frames.
                    whole = pieces_of(indexes[path] | {"keys": []}, fps, targets[path] / "whole")
                    submit(path, whole)[0].result()
                    if path not in reasons:
                        join(indexes[path], list(whole), targets[path])
    return {path: reasons[of_target[target]] for path, target in targets.items() if of_target[target] in reasons}


if __name__ == "__main__":
    serve(answer)
