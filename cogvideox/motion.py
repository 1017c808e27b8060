"""How much a video moves: what the loss does not show."""

import numpy as np

GRID = 8  # blocks along the shorter side of a picture
SECONDS_APART = 0.5
LUMA = np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601


def motion(frames, fps):
    """The motion of a clip of uint8 frames [F, H, W, 3], in grey levels of 255 per second. None for fewer than three frames.

    From D(k), the mean square change of luma between frames that are k apart, with k frames in half a second: for steady motion
    D(k) = k^2 D(1), so sqrt((D(k) - D(1)) / (k^2 - 1)) is the change of a frame. Grain, flicker and shake, which change each frame anew,
    add the same to both and cancel. Luma is averaged over blocks, an eighth of the shorter side wide, and each frame is brought to the
    clip's mean contrast around a mean of 0, so that noise is small and fades are no motion.
    """
    apart = min(max(2, round(SECONDS_APART * fps)), len(frames) - 1)
    if apart < 2:
        return None
    blocks = np.stack([block_means(frame) for frame in frames])  # [F, blocks]
    blocks -= blocks.mean(1, keepdims=True)
    contrast = np.maximum(blocks.std(1, keepdims=True), 1.0)  # a black frame stays black
    blocks *= contrast.mean() / contrast
    persisting = mean_square_change(blocks, apart) - mean_square_change(blocks, 1)
    return float((max(0.0, persisting) / (apart**2 - 1)) ** 0.5 * fps)


def block_means(frame):
    """The mean luma of each block of a picture [H, W, 3]; what is left at the right and at the bottom is dropped."""
    luma = frame.astype(np.float32) @ LUMA
    side = max(1, min(luma.shape) // GRID)
    height, width = (length // side for length in luma.shape)
    return luma[: height * side, : width * side].reshape(height, side, width, side).mean((1, 3)).ravel()


def mean_square_change(blocks, apart):
    """D of `motion`. blocks: [F, blocks]."""
    return np.square(blocks[apart:] - blocks[:-apart]).mean()
