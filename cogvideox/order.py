"""The clip, timestep and noise of each position of the run: pure functions of (seed, position).

A position counts clips over the whole run and all ranks. Step s (from 0) trains positions s * C to s * C + C - 1, where
C = batch x processes x accumulation. There is no random state to save: a resumed run, a run on more ranks and a run with
validation draw the same clips, timesteps and noise.
"""

import functools
import hashlib
import math
from collections import Counter
from dataclasses import dataclass

import torch


def seeded_generator(*key):
    """A CPU generator seeded by `key`; the same on every machine and device."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def epoch_length(shapes, clips_per_step):
    """Positions in an epoch: the number of clips, with each shape's clips padded to full steps if there are several shapes."""
    counts = Counter(shapes).values()
    return len(shapes) if len(counts) == 1 else sum(-(-count // clips_per_step) * clips_per_step for count in counts)


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, shapes, clips_per_step):
    """The clips of one epoch in order. shapes: one hashable per clip.

    Clips of one shape: a permutation. Of several shapes: every optimizer step has clips of one shape, and the steps are shuffled. A
    shape's last step is padded with the first clips of its order in this epoch, so every clip appears at least once per epoch
    and the repeated clips differ between epochs.
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
    """The number of the clip at a position. clips: the numbers of the clips in `shapes` (None: all)."""
    epoch, place = divmod(position, epoch_length(shapes, clips_per_step))
    chosen = epoch_order(seed, epoch, shapes, clips_per_step)[place]
    return chosen if clips is None else clips[chosen]


def positions_of(rank, world_size, batch_size, accumulation, first_step, total_steps):
    """The batches of positions of one rank, in order: `accumulation` lists of `batch_size` per step.

    The ranks' batches of one micro-step are adjacent, so P ranks with batch B train the same clips as one with P x B.
    """
    for step in range(first_step, total_steps):
        for micro_step in range(accumulation):
            start = ((step * accumulation + micro_step) * world_size + rank) * batch_size
            yield list(range(start, start + batch_size))


def choose_held_out(count, share, seed):
    """The numbers of the held-out clips among `count`: round(share * count), at least one, drawn from the seed alone."""
    if not share:
        return []
    return sorted(torch.randperm(count, generator=seeded_generator(seed, "held out"))[: max(1, round(share * count))].tolist())


GOLDEN_RATIO = 0.6180339887498949  # the fractional parts of its multiples leave no large gaps


def sampled_timestep(kind, seed, position, num_train_timesteps, generator):
    """The timestep of a position, from 0 to num_train_timesteps - 1. generator: the position's.

    uniform: independent draws. spread: the fractional part of u + position * golden ratio, with one u per run (a Kronecker
    sequence): also uniform, but consecutive clips cover the schedule evenly, so the gradient has the same mean and less noise
    (Kingma et al., 2021, "Variational diffusion models", appendix I.1, stratify a batch like this). logit_normal: spread, mapped
    to the sigmoid of a standard normal, which favours the middle of the schedule (Esser et al., 2024, "Scaling rectified flow
    transformers", section 3.1).
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
    """The order of a run's clips. Every step trains the same number of clips; the last one is filled from the next epoch.

    clips: the numbers of the training clips. shapes: one hashable per clip; a step has clips of one shape.
    """

    seed: int
    clips: tuple
    shapes: tuple
    clips_per_step: int
    epoch_clips: int
    total_steps: int

    @classmethod
    def of(cls, args, data, processes):
        """The plan for the checked clips on this many processes."""
        clips_per_step = args.train_batch_size * processes * args.gradient_accumulation_steps
        sizes = [(clip["frames"], clip["height"], clip["width"]) for clip in (data.clips[i] for i in data.trained)]
        shapes = tuple(sizes if args.bucket else [0] * len(sizes))
        epoch_clips = epoch_length(shapes, clips_per_step)
        total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * epoch_clips / clips_per_step)
        return cls(args.seed, tuple(data.trained), shapes, clips_per_step, epoch_clips, total_steps)

    def clip_of(self, position):
        """The number of the clip at a position."""
        return clip_at(self.seed, position, self.shapes, self.clips_per_step, self.clips)
