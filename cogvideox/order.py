"""Which clip a position of the run holds, and what noise it gets: pure functions of (seed, position).

A position counts clips over the whole run and all processes. Step s (from 0) trains positions s * C to s * C + C - 1,
where C = batch x processes x accumulation. Nothing is kept between steps, so there is no random state to save: a
resumed run, a run on more processes and a run that validates in between draw the same clips, timesteps and noise.
"""

import functools
import hashlib
import math
from collections import Counter
from dataclasses import dataclass

import torch


def seeded_generator(*key):
    """A CPU generator seeded by everything in `key`; equal on every machine and device."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def epoch_length(shapes, clips_per_step):
    """Positions in an epoch: the number of clips or, for clips of several shapes, that of steps of one shape each, filled."""
    counts = Counter(shapes).values()
    return len(shapes) if len(counts) == 1 else sum(-(-count // clips_per_step) * clips_per_step for count in counts)


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, shapes, clips_per_step):
    """The clips of one epoch in order. shapes: one hashable a clip.

    Clips of one shape: a permutation. Of several: every optimizer step holds one shape, whatever batch, processes and
    accumulation make it up; the steps are shuffled. A shape's last step is filled with clips that the epoch's own order
    puts first, so every clip comes at least once an epoch and others repeat from epoch to epoch.
    """
    generator = seeded_generator(seed, "order", epoch)
    shuffled = torch.randperm(len(shapes), generator=generator).tolist()
    if len(set(shapes)) == 1:
        return shuffled
    steps = []
    for shape in sorted(set(shapes)):
        own = [clip for clip in shuffled if shapes[clip] == shape]
        own = [own[i % len(own)] for i in range(-(-len(own) // clips_per_step) * clips_per_step)]
        steps += [own[i : i + clips_per_step] for i in range(0, len(own), clips_per_step)]
    return [clip for step in torch.randperm(len(steps), generator=generator).tolist() for clip in steps[step]]


def clip_at(seed, position, shapes, clips_per_step, clips=None):
    """The number of the clip that is trained at a position. clips: the numbers of those that `shapes` speaks of (None: all)."""
    epoch, place = divmod(position, epoch_length(shapes, clips_per_step))
    chosen = epoch_order(seed, epoch, shapes, clips_per_step)[place]
    return chosen if clips is None else clips[chosen]


def positions_of(rank, world_size, batch_size, accumulation, first_step, total_steps):
    """The batches of positions that one process trains, in order: `accumulation` lists of `batch_size` a step.

    The processes' batches of one micro-step lie side by side, so P processes with batch B see what one sees with P x B.
    """
    for step in range(first_step, total_steps):
        for micro_step in range(accumulation):
            start = ((step * accumulation + micro_step) * world_size + rank) * batch_size
            yield list(range(start, start + batch_size))


def choose_held_out(count, share, seed):
    """The clips of `count` that are held out: round(share * count) of them, at least one, a function of the seed alone."""
    if not share:
        return []
    return sorted(torch.randperm(count, generator=seeded_generator(seed, "held out"))[: max(1, round(share * count))].tolist())


GOLDEN_RATIO = 0.6180339887498949  # its multiples, without their whole part, never leave a large gap between them


def sampled_timestep(kind, seed, position, num_train_timesteps, generator):
    """The timestep of a position, of 0 to num_train_timesteps - 1. generator: the position's own.

    uniform: drawn alone. spread: the fractional parts of u + position * golden ratio, with u drawn once a run: uniform as
    well, but any few neighbours (the clips of a step, the steps of a minute) cover the schedule evenly, so that the gradient's
    mean is the same and its noise smaller (a Kronecker sequence; Kingma et al., 2021, "Variational diffusion models",
    appendix I.1, spread those of a batch so). logit_normal: those, with the middle of the schedule more often: sigmoid of a
    standard normal (Esser et al., 2024, "Scaling rectified flow transformers", section 3.1).
    """
    drawn = torch.randint(0, num_train_timesteps, (), generator=generator)
    if kind == "uniform":
        return drawn
    share = (torch.rand((), dtype=torch.float64, generator=seeded_generator(seed, "timesteps")).item() + position * GOLDEN_RATIO) % 1
    if kind == "logit_normal":
        share = torch.special.ndtri(torch.tensor(share, dtype=torch.float64)).sigmoid().item()
    return torch.tensor(min(int(share * num_train_timesteps), num_train_timesteps - 1))


@dataclass(frozen=True)
class Plan:
    """Which clips a run trains, in which steps. Every step trains the same number of clips; the last step of a run is filled
    from the next epoch's order.

    clips: the numbers of the trained clips. shapes: one hashable a clip; a step holds one shape.
    """

    seed: int
    clips: tuple
    shapes: tuple
    clips_per_step: int
    epoch_clips: int
    total_steps: int

    @classmethod
    def of(cls, args, data, processes):
        """The plan of `args` for the checked clips on this many processes."""
        clips_per_step = args.train_batch_size * processes * args.gradient_accumulation_steps
        sizes = [(clip["frames"], clip["height"], clip["width"]) for clip in (data.clips[i] for i in data.trained)]
        shapes = tuple(sizes if args.bucket else [0] * len(sizes))
        epoch_clips = epoch_length(shapes, clips_per_step)
        total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * epoch_clips / clips_per_step)
        return cls(args.seed, tuple(data.trained), shapes, clips_per_step, epoch_clips, total_steps)

    def clip_of(self, position):
        """The number of the clip that is trained at a position."""
        return clip_at(self.seed, position, self.shapes, self.clips_per_step, self.clips)
