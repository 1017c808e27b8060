"""`encoded/`: a few clips beside their VAE reconstructions, to see what the model is trained on."""

import functools
import time
from pathlib import Path

import numpy as np

from cogvideox import report
from cogvideox.console import timed, warn
from cogvideox.decode import clip_framing
from cogvideox.launch import free
from cogvideox.model import decode_latents
from cogvideox.reader import Readers
from cogvideox.stopping import interruptible
from cogvideox.video import contact_sheet, write_video

CLIPS_SHOWN, SECONDS_TO_SHOW = 3, 10  # show no further clip after 10 seconds: a CPU decodes one in 15 seconds


class Preview:
    """Shows the first training clips after the first checkpoint, unless an earlier start did: the first step does not wait for it.

    encodings: encodings.Encodings. load_vae: () -> the VAE. Every rank calls `offer`, and rank 0 works.
    """

    def __init__(self, args, trained, data, encodings, load_vae):
        self.args, self.trained, self.data, self.encodings, self.load_vae = args, trained, data, encodings, load_vae
        self.clips, self.done = data.trained[:CLIPS_SHOWN], False

    def offer(self, due):
        """Show the clips if due and not yet done."""
        if not due or self.done:
            return
        self.done = True
        if self.trained.is_main and not (Path(self.args.output_dir) / "encoded/contact_sheet.png").exists():
            with timed("show the encoded clips"):
                try:
                    self.show()
                except InterruptedError as error:
                    warn(f"the preview of the encoded clips was not saved: {error}")
                except Exception as error:  # a preview must not end the run
                    warn(f"the preview of the encoded clips was not saved ({type(error).__name__}: {error})")
            report.refresh(self.args.output_dir)
        free(self.trained.device)
        self.trained.barrier()

    def show(self):
        """Decode the clips again, and their latents, until SECONDS_TO_SHOW have passed."""
        records = [self.data.records[clip] for clip in self.clips]
        framed = [(record.path, clip_framing(record, self.data.framing, self.args.seed)) for record in records]
        vae, started = self.load_vae(), time.monotonic()
        show = functools.partial(show_encoded, self.args.output_dir, self.args.fps, [])
        with Readers(1, self.args.clip_timeout_seconds) as readers, interruptible(vae.decoder):
            for clip, record, (_, frames, reason) in zip(self.clips, records, readers.read_all(framed), strict=True):
                if reason:
                    warn(f"{record.listed}: no preview: {reason}")
                    continue
                show(vae, record.listed, frames, self.encodings.moments(clip))
                if time.monotonic() - started > SECONDS_TO_SHOW:
                    return


def show_encoded(output_dir, fps, rows, vae, name, frames, moments):
    """Save a clip beside its VAE reconstruction: `encoded/00.mp4` (left: the frames, right: the reconstruction) and a contact sheet."""
    mean = moments.float().chunk(2)[0].transpose(0, 1) * vae.config.scaling_factor
    decoded = decode_latents(vae, mean)
    folder = Path(output_dir) / "encoded"
    write_video(folder / f"{len(rows) // 2:02d}.mp4", np.concatenate([frames, decoded], axis=2), fps)
    rows += [(f"{name}: as trained on", frames), ("decoded from its latents", decoded)]
    contact_sheet(folder / "contact_sheet.png", rows, "clips and their VAE reconstructions")
