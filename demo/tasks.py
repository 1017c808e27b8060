"""Three things to learn that the demo's base model does not know: `python -m demo.tasks demo/tasks` writes a data folder of each.

Each is a change of the demo's 38 clips: a style (an old film), a subject (a striped ball that rolls through the scene) and a
motion (the camera rolls clockwise). All randomness is seeded by the clip's number. `sheet.png` shows frames of each.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideox.video import contact_sheet, read_video
from demo.old_film import CHANGES, old_film, write_dataset

STRIPES = np.array([(235, 30, 150), (255, 255, 255), (20, 190, 235), (255, 255, 255), (255, 140, 0), (255, 255, 255)], np.float32)
SMOOTH = 3  # the ball is drawn so many times larger, then reduced: smooth edges


def ball_picture(radius, angle):
    """A beach ball of six stripes, turned clockwise by `angle` radians: RGBA uint8 [2r, 2r, 4], its light from the upper left."""
    x, y = np.meshgrid(*[(np.arange(2 * radius * SMOOTH) + 0.5) / (radius * SMOOTH) - 1] * 2)
    z = np.sqrt(np.clip(1 - x**2 - y**2, 0, None))
    # The pole, where the stripes meet, is off the middle, so the ball does not look like a flat wheel.
    turned_x, turned_y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    across, along = turned_x - 0.4 * z, turned_y
    stripe = ((np.arctan2(along, across) / (2 * np.pi) + 1) * len(STRIPES)).astype(int) % len(STRIPES)
    colour = np.where((np.hypot(across, along) < 0.18)[..., None], STRIPES[0], STRIPES[stripe])
    light = 0.45 + 0.55 * np.clip(-0.45 * x - 0.6 * y + 0.66 * z, 0, 1)
    inside = 255.0 * (x**2 + y**2 <= 1)
    picture = np.concatenate([colour * light[..., None], inside[..., None]], axis=-1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(picture).resize((2 * radius, 2 * radius), Image.BOX)


def rolling_ball(frames, seed):
    """uint8 frames [F, H, W, 3] with a striped ball, three quarters as high as the picture, that rolls along the ground from left to right.

    The seed changes its size and its way by a few percent: a way that the seed alone decides could not be learned.
    """
    random = np.random.default_rng(seed)
    count, height, width = frames.shape[:3]
    radius, start = round(height * random.uniform(0.37, 0.39)), width * random.uniform(0.3, 0.32)
    changed = []
    for number, time in enumerate(np.linspace(0, 1, count)):
        across = start + 0.38 * width * time
        frame = Image.fromarray(frames[number])
        ball = ball_picture(radius, (across - start) / radius)
        frame.paste(ball, (round(across - radius), round(0.97 * height - 2 * radius)), ball)
        changed.append(np.asarray(frame))
    return np.stack(changed)


def camera_roll(frames, seed):
    """uint8 frames [F, H, W, 3] as a camera sees them that turns steadily by a quarter, enlarged so that no corner is empty.

    The seed gives the angle at the start, which is at most 20 degrees off the horizontal.
    """
    start = np.random.default_rng(seed).uniform(-20, 20)
    count, height, width = frames.shape[:3]
    scale = min(height, width) / np.hypot(height, width)
    changed = []
    for frame, degrees in zip(frames, start + np.linspace(0, 90, count), strict=True):
        cosine, sine = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
        x, y = (width - 1) / 2, (height - 1) / 2
        # From a pixel of the result to one of the source.
        place = (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)
        changed.append(np.asarray(Image.fromarray(frame).transform((width, height), Image.AFFINE, place, Image.BICUBIC)))
    return np.stack(changed)


# name -> (change of frames by a seed, trigger word, what the attribution says of the clips)
TASKS = {
    "style": (old_film, "OLDFILM", CHANGES),
    "subject": (rolling_ball, "BEACHBALL", "The clips here are a further change of those: a striped ball rolls through the picture.\n"),
    "motion": (camera_roll, "CAMERAROLL", "The clips here are a further change of those: enlarged, with a camera that rolls.\n"),
}


def write_task(name, folder):
    """Write the data folder of a task, unless it is there. The captions have no trigger word: the trainer's --id_token adds it."""
    change, _, note = TASKS[name]
    if not folder.exists():
        write_dataset(folder, change, note)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/tasks"))
    parent = parser.parse_args().folder
    rows = []
    for name in TASKS:
        write_task(name, parent / name)
        videos = sorted((parent / name / "videos").glob("*.mp4"))
        rows += [(name if number == 0 else "", read_video(path)) for number, path in enumerate(videos[::8])]
    contact_sheet(parent / "sheet.png", rows)
    print(parent / "sheet.png")
