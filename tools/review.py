"""review.html: every window of a data folder as a strip and a playable preview, with what speaks against it; and the list it writes."""

import io

import numpy as np
from PIL import Image

from cogvideox import hub
from cogvideox.files import write_bytes

STRIP_FRAMES = 6
STRIP_WIDTH = 180  # pixels of one frame


def pictures_at(path, times):
    """The pictures of a preview at times in seconds, uint8 [n, h, w, 3]: for each the last frame that has come by then."""
    import av

    pictures = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for time in times:
            container.seek(max(0, int((time + 1e-3) / stream.time_base)), stream=stream)
            picture = None
            for frame in container.decode(stream):
                if picture is not None and frame.time > time + 1e-3:
                    break
                picture = frame
            pictures.append(picture.to_ndarray(format="rgb24"))
    return np.stack(pictures)


def write_strip(path, preview, window):
    """Write a JPEG with frames of a window side by side, if it is not there."""
    if path.exists():
        return
    times = np.linspace(window.start, max(window.start, window.end - 0.15), STRIP_FRAMES)
    pictures = [Image.fromarray(picture) for picture in pictures_at(preview, times)]
    height = max(1, round(pictures[0].height * STRIP_WIDTH / pictures[0].width))
    strip = Image.new("RGB", (STRIP_FRAMES * STRIP_WIDTH, height))
    for place, picture in enumerate(pictures):
        strip.paste(picture.resize((STRIP_WIDTH, height)), (place * STRIP_WIDTH, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=75)
    write_bytes(path, buffer.getvalue())


def write_page(path, title, summary, windows, short, reasons, command):
    """Write the page. windows: dicts of what the template names. reasons: {reason: (meaning, number of windows)}."""
    content = {"title": title, "summary": summary, "windows": windows, "short": short, "reasons": reasons, "command": command}
    page = hub.page("review", **content, store=str(path.resolve()))
    write_bytes(path, page.encode(errors="replace"))
