"""The predicted share of a run's time that goes into validation videos, scores and checkpoints."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLCogVideoX
from torch.utils.flop_counter import FlopCounterMode

from cogvideox.console import say, warn
from cogvideox.files import read_json
from cogvideox.folder import latent_shape, patches_of
from cogvideox.scoring import BANDS, LEAST_CAPTIONS, image_scalings

LARGE_SHARE = 0.2  # a larger share of the time is a warning


@dataclass
class Part:
    """Videos, scores or checkpoints of a run: how often, the seconds of each time, and what makes them cheaper."""

    name: str
    times: int
    seconds_each: float
    remedy: str

    @property
    def seconds(self):
        return self.times * self.seconds_each


def forward_flops(config, shape):
    """FLOPs of one forward pass on one clip with latents of `shape` [F', C, H', W']: 24 n d^2 + 4 n^2 d for each block.

    Linear layers: attention has 4 d^2 weights and the feed-forward layers 8 d^2, for n tokens of d channels. Attention: n^2 d
    products for its scores and as many for its output. A multiplication and an addition are two FLOPs.
    """
    tokens, channels = config.max_text_seq_length + patches_of(config, shape), config.num_attention_heads * config.attention_head_dim
    return config.num_layers * (24 * tokens * channels**2 + 4 * tokens**2 * channels)


def decoding_flops(vae_config, shape):
    """FLOPs of decoding latents of `shape` [F', C, H', W'], from those of a small clip: convolutions cost the same for every latent."""
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(vae_config)
        sample = torch.empty(1, shape[1], 2, 4, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(sample)
    return counter.get_total_flops() / (2 * 4 * 4) * shape[0] * shape[2] * shape[3]


def video_seconds(config, vae_config, facts, settings, forward_seconds, trained_shape):
    """Seconds of one validation video. forward_seconds: of one clip with latents of `trained_shape`, measured."""
    shape = latent_shape(facts, settings["num_frames"], settings["height"], settings["width"])
    passes = settings["num_inference_steps"] * (2 if settings["guidance_scale"] > 1 else 1)
    flops = passes * forward_flops(config, shape) + decoding_flops(vae_config, shape)
    return forward_seconds * flops / forward_flops(config, trained_shape)


def predict(args, plan, first_step, measured, seconds_of_video, base_videos, processes, watchers):
    """The Parts of a run from `first_step` on. measured: `rehearsal.Measured`. base_videos: of step 0, to be made.

    watchers: (checkpointer, scorer, validator).
    """
    checkpointer, scorer, validator = watchers
    steps = [(step, step == plan.total_steps) for step in range(first_step + 1, plan.total_steps + 1)]
    looks = [step for step, last in steps if validator.is_due(step, last)]
    jobs = [len(validator.jobs_of(step)) for step in looks] + [base_videos]
    rounds = sum(-(-count // processes) for count in jobs)
    parts = [Part("videos", rounds, seconds_of_video, halve_videos(args, looks, plan.total_steps))]

    scores = sum(scorer.is_due(step, last) for step, last in steps)
    clips = sum(len(clips) for clips in scorer.sets.values())
    forward = measured.forward_seconds / args.train_batch_size / processes
    captions = len({scorer.captions[clip] for clip in scorer.sets["held_out"] or scorer.sets["train"]})
    crossed = captions**2 * (BANDS - BANDS // 2) if captions >= LEAST_CAPTIONS else 0
    base = 0 if scorer.base else clips * BANDS * max(1, len(image_scalings(scorer.facts))) + crossed
    passes = scores * clips * BANDS + crossed + base
    parts.append(Part("scores", scores, passes * forward / scores if scores else 0.0, halve_scores(args, scorer, steps)))

    saves = sum(checkpointer.is_due(step, last) for step, last in steps)
    remedy = f"--checkpointing_steps {2 * args.checkpointing_steps} halves the time of checkpoints"
    remedy = remedy if saves > 1 else "the last checkpoint is always written"
    parts.append(Part("checkpoints", saves, measured.save_seconds, remedy))
    return [part for part in parts if part.times]


def halve_videos(args, looks, total_steps):
    """The flag that halves the time of videos: their interval, if most are made at one, and otherwise their denoising steps."""
    if sum(step < total_steps for step in looks) > 2:
        interval = "validation_steps" if args.validation_steps else "validation_epochs"
        return f"--{interval} {2 * getattr(args, interval)} halves the time of videos"
    sampler = "" if args.validation_scheduler == "dpm" else " (with --validation_scheduler dpm)"
    return f"--num_inference_steps {max(1, args.num_inference_steps // 2)}{sampler} halves the time of videos"


def halve_scores(args, scorer, steps):
    """The flag that halves the time of scores: their interval, if most are made at it, and otherwise the scored clips."""
    due = [step for step, last in steps if scorer.is_due(step, last)]
    if args.eval_steps and sum(step % (2 * args.eval_steps) != 0 for step in due) >= len(due) / 2:
        return f"--eval_steps {2 * args.eval_steps} halves the time of scores"
    clips = max(len(clips) for clips in scorer.sets.values()) // 2
    return f"--eval_clips {clips} halves the time of scores" if clips else "--eval_clips 0 omits the scores"


def say_price(parts, training_seconds):
    """Print the share of the run's time that each part takes, and the flag that halves the largest; a warning above LARGE_SHARE."""
    total = training_seconds + sum(part.seconds for part in parts)
    if not parts or total <= 0:
        return
    largest = max(parts, key=lambda part: part.seconds)
    listed = ", ".join(f"{part.name} {100 * part.seconds / total:.1f} % ({part.times} x {part.seconds_each:.3g} s)" for part in parts)
    share = 1 - training_seconds / total
    (warn if share > LARGE_SHARE else say)(f"predicted: {100 * share:.0f} % of this run's time goes into {listed}; {largest.remedy}")


def say_price_of(args, plan, measured, transformer, folder, facts, trained_shape, processes, watchers, first_step):
    """`say_price` of a run from `first_step` on. A collective.

    trained_shape: latents [F', C, H', W'] of the rehearsed clip. folder: of the model. watchers: as in `predict`.
    """
    settings, forward_seconds = watchers[2].settings, measured.forward_seconds / args.train_batch_size
    config, vae_config = transformer.config, read_json(folder / "vae/config.json")
    seconds = video_seconds(config, vae_config, facts, settings, forward_seconds, trained_shape) if watchers[2].jobs else 0.0
    # After a resume, step 0's videos are made only if a new LoRA can be switched off for them.
    base_videos = len(watchers[2].restore_base(copy=False)) if first_step == 0 or watchers[2].base_is_pending else 0
    parts = predict(args, plan, first_step, measured, seconds, base_videos, processes, watchers)
    say_price(parts, (plan.total_steps - first_step) * measured.seconds_per_step)
