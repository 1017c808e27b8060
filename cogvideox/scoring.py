"""Is it learning? The loss of training clips and held-out clips on fixed noise and timesteps, and a verdict.

The training loss is mostly noise: every step draws other clips, noise and timesteps. Here all three are fixed, so two scores of
a run differ only by the training in between.
"""

import functools
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import default_collate

from cogvideox import base_model, report
from cogvideox.console import progress, say, timed, warn
from cogvideox.files import key_of, read_json_lines
from cogvideox.launch import free
from cogvideox.lora import lora_modules
from cogvideox.motion import verdict_of
from cogvideox.stopping import exit_if_requested_anywhere, stop_noticed, stop_requested_anywhere
from cogvideox.validation import undisturbed
from dataset import TrainingClips

BANDS = 4  # the schedule is split into 4 equal bands, each scored at its middle timestep
SMALL = 0.01  # a smaller relative change of the loss, against the base model's, counts as no change
LEAST_CAPTIONS = 4  # fewer captions give no meaningful gap
CLEAR_GAP = 0.02  # a relative caption gap above this counts even if its standard error is larger
CLEAR_SCALING = 0.02  # the base model's loss must be lower by this much for another scaling of the image to be named


def spread(clips, most):
    """At most `most` of the clips, evenly spaced."""
    count = min(most, len(clips))
    return [clips[i * len(clips) // count] for i in range(count)]


class WithCaptionOf:
    """Encodings in which every clip has the caption of a given clip."""

    def __init__(self, encodings, clip):
        self.encodings, self.clip, self.moments = encodings, clip, encodings.moments

    def prompt(self, clip):
        return self.encodings.prompt(self.clip)

    def image(self, clip, flipped=False):
        return self.encodings.image(clip, flipped)


def score(accelerator, transformer, losses, encodings, sets, captions, seed, facts, num_train_timesteps, with_gap):
    """The mean loss of each set of clips in each band of timesteps, {"train": [...], "held_out": [...] or None}, and "gap".

    losses: batch -> loss of each clip. sets: {"train": clips, "held_out": clips}. captions: clip -> its caption. gap: with
    `with_gap`, `caption_gap` of the held-out clips (of the training clips if there are none) in the noisier bands, where the
    model depends on the caption; None if there are too few captions. Every rank scores its share; a collective. Returns None if
    a signal requested a stop, for which every forward pass is looked at.
    """
    jobs = [(name, clip, clip, band) for name, clips in sets.items() for clip in clips for band in range(BANDS)]
    distinct = list({captions[clip]: clip for clip in sets["held_out"] or sets["train"]}.values())  # one clip per caption
    crossed = distinct if with_gap and len(distinct) >= LEAST_CAPTIONS else []
    jobs += [("crossed", clip, other, band) for clip in crossed for other in crossed for band in range(BANDS // 2, BANDS)]
    results = torch.zeros(len(jobs), device=accelerator.device)
    with undisturbed(transformer):
        mine = range(accelerator.process_index, len(jobs), accelerator.num_processes)
        for number in progress(mine, "scoring", unit="clip", leave=False, delay=3, disable=not accelerator.is_main_process):
            if stop_noticed():
                break
            _, clip, other, band = jobs[number]
            source = TrainingClips(WithCaptionOf(encodings, other), None, f"{seed}/fixed/{band}", facts, num_train_timesteps)
            item = source.item(clip, position=clip) | {"timestep": torch.tensor(middle_of(band, num_train_timesteps))}
            batch = {name: value.to(accelerator.device) for name, value in default_collate([item]).items()}
            results[number] = losses(batch)[0]
    if stop_requested_anywhere(accelerator.device):
        return None
    results = accelerator.reduce(results, "sum").double().cpu()  # each is zero on all ranks but one
    scores, first = {}, 0
    for name, clips in sets.items():
        scores[name] = results[first : first + len(clips) * BANDS].view(-1, BANDS).mean(0).tolist() if clips else None
        first += len(clips) * BANDS
    scores["gap"] = caption_gap(results[first:].view(len(crossed), len(crossed), -1).mean(2)) if crossed else None
    return scores


def caption_gap(losses):
    """(relative increase of the loss when captions are swapped, its standard error), relative to the loss with own captions.

    losses: [clip, caption], own captions on the diagonal. Some clips are harder and some captions fit all clips better; both
    effects are removed (the interactions of a two-way layout), so the rest measures whether a caption belongs to its clip.
    """
    count, own = len(losses), losses.diagonal().mean()
    interactions = losses - losses.mean(0, keepdim=True) - losses.mean(1, keepdim=True) + losses.mean()
    gaps = -interactions.diagonal() * count / (count - 1)
    return [(gaps.mean() / own).item(), (gaps.std() / count**0.5 / own).item()]


def middle_of(band, num_train_timesteps):
    """The middle timestep of a band."""
    return int((band + 0.5) / BANDS * num_train_timesteps)


def base_score(transformer, score_of):
    """The base model's score: with the LoRA disabled, or with the current weights of full fine-tuning. score_of: transformer -> `score`.

    Full fine-tuning needs it before a step or a checkpoint changes a weight. A collective.
    """
    with base_model.without_lora(transformer):
        return score_of(transformer)


def image_scalings(facts):
    """The factors of the image's latent that trainers and samplers of image-to-video models have used; the pipeline's own first.

    The authors' own sampler takes 1 for 1.5, diffusers 1 / 0.7, and other trainers 0.7: a LoRA trained with one of them sees an
    image of another size in a pipeline that takes another. None for a text-to-video model.
    """
    if not facts.image_channels:
        return []
    others = {1.0, facts.scaling_factor, 1 / facts.scaling_factor} - {facts.image_scaling_factor}
    return [facts.image_scaling_factor, *sorted(others)]


def scaling_sentence(losses):
    """What the base model's losses say about the scaling of the image. losses: factor -> loss, the pipeline's own factor first.

    Returns (sentence, whether another factor is clearly better).
    """
    (own, loss), *others = losses.items()
    told = ", ".join(f"{percent(other / loss - 1)} with {factor:.3g}" for factor, other in others)
    best = min(losses, key=losses.get)
    if losses[best] > (1 - CLEAR_SCALING) * loss:
        return (
            f"image scaling: the pipeline multiplies the image's latent by {own:.3g}, and so does training (the base's loss: {told})",
            False,
        )
    return (
        f"image scaling: the base model's loss is lower with the image's latent multiplied by {best:.3g} than by {own:.3g}, which this "
        f"folder's pipeline takes ({told}): are scaling_factor and invert_scale_latents in vae/config.json those of this model?"
    ), True


def say_scalings(score):
    """Print what a base model's score says about the scaling of the image, a warning if another factor is clearly better."""
    if losses := {float(factor): loss for factor, loss in score.get("image_scalings", {}).items()}:
        sentence, is_doubtful = scaling_sentence(losses)
        (warn if is_doubtful else say)(sentence)


@torch.no_grad()
def update_share(transformer):
    """The relative size of the update, ‖ΔW‖ / ‖W‖ with ΔW = (alpha / rank) B A: Frobenius norms over all layers.

    |B A|^2 = sum of (B^T B) * (A A^T), which are rank x rank. None without a LoRA, or if W is packed (nf4).
    """
    added = whole = 0.0
    for _, layer in lora_modules(transformer):
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            return None
        a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
        added += layer.scaling["default"] ** 2 * ((b.T @ b) * (a @ a.T)).sum().item()
        whole += weight.float().square().sum().item()
    return (max(added, 0.0) / whole) ** 0.5 if whole else None


def line_of(step, scores, base, clips, share, earlier, num_train_timesteps):
    """The line of metrics.jsonl for one evaluation. scores, base: of the trained and the base model. clips: the scored clips.

    earlier: the previous lines, for the best step so far (never step 0).
    """

    def mean(values):
        return None if values is None else sum(values) / len(values)

    line = {"step": step, "eval_train_loss": mean(scores["train"]), "eval_held_out_loss": mean(scores["held_out"])}
    line |= {"eval_train_base_loss": mean(base["train"]), "eval_held_out_base_loss": mean(base["held_out"])}
    line |= {"eval_caption_gap": scores["gap"], "eval_caption_base_gap": base["gap"]}
    columns = {"train": scores["train"], "held_out": scores["held_out"], "train_base": base["train"], "held_out_base": base["held_out"]}
    line["eval_bands"] = [
        {"timestep": middle_of(band, num_train_timesteps)}
        | {name: None if values is None else values[band] for name, values in columns.items()}
        for band in range(BANDS)
    ]
    line |= {"eval_clips": clips, "update_share": share}
    best = best_of([*earlier, line])
    return line | {"best_step": best["step"] if best else None}


def evaluations(lines, clips=None):
    """The evaluations among the lines of metrics.jsonl. clips: only evaluations of these clips, which are comparable."""
    return [line for line in lines if "eval_train_loss" in line and clips in (None, line.get("eval_clips"))]


def best_of(lines):
    """The evaluation with the lowest held-out loss, excluding step 0, or None."""
    held_out = [line for line in evaluations(lines) if line["step"] > 0 and line["eval_held_out_loss"] is not None]
    return min(held_out, key=lambda line: line["eval_held_out_loss"], default=None)


def base_of(lines):
    """The base model's score from earlier evaluations, in the form of `score`, or None. For a resumed run."""
    if not lines:
        return None
    bands, gap = lines[0]["eval_bands"], lines[0].get("eval_caption_base_gap")
    held_out = None if bands[0]["held_out_base"] is None else [band["held_out_base"] for band in bands]
    return {"train": [b["train_base"] for b in bands], "held_out": held_out, "gap": gap}


def sentence_of(line):
    """One evaluation as a sentence."""
    parts = []
    for label, name in (("training clips", "train"), ("held-out clips", "held_out")):
        loss, base = line[f"eval_{name}_loss"], line[f"eval_{name}_base_loss"]
        if loss is not None:
            parts.append(f"{label} {loss:.5f} (base {base:.5f}, {percent(loss / base - 1)})")
    if line["update_share"] is not None:
        parts.append(f"the update is {100 * line['update_share']:.2g} % of the weights")
    return f"step {line['step']}: loss on fixed noise: {'; '.join(parts)}"


def percent(share):
    """A relative change in percent, with its sign."""
    return f"{100 * share:+.1f} %"


# -----------------------------------------------------------------------------
# In the loop


class Scorer:
    """Scores fixed clips on fixed noise at every checkpoint, with every validation, and every --eval_steps.

    The base model's score comes from metrics.jsonl (of a resumed run) or the cache, and is otherwise computed with the first score.
    clip_losses: (model, batch) -> the loss of each clip. run_identity: hashes of the encoded clips and of the base model.
    base_identity: `base_model.identity_of`. Every rank calls every method and scores its share.
    """

    def __init__(self, args, trained, clip_losses, encodings, data, facts, num_train_timesteps, run_identity=(), base_identity=""):
        self.args, self.trained, self.clip_losses, self.encodings = args, trained, clip_losses, encodings
        self.facts = facts
        self.noise, self.num_train_timesteps = (args.seed, facts, num_train_timesteps), num_train_timesteps
        self.output_dir, self.captions = Path(args.output_dir), [record.caption for record in data.records]
        self.sets = {"train": spread(data.own, args.eval_clips), "held_out": spread(data.held_out, args.eval_clips)}
        # Only scores of the same model, clips, captions and noise compare.
        settings = [*run_identity, args.seed, args.base_precision, args.mixed_precision]
        for clip in (clip for clips in self.sets.values() for clip in clips):
            own_image = (data.images[clip]["sha256"],) if data.images[clip] else ()  # run_identity has those of trained clips alone
            settings.append((data.clips[clip]["sha256"], self.captions[clip], *data.clips[clip].get("window", ()), *own_image))
        self.clips = {name: len(clips) for name, clips in self.sets.items()}
        self.clips["sha256"] = key_of(settings)[:12]
        # A clip's number seeds its noise.
        entries = [[(clip, encodings.clip_keys[clip], encodings.prompt_keys[clip]) for clip in clips] for clips in self.sets.values()]
        images = [[encodings.image_keys[clip] for clip in clips] for clips in self.sets.values()] if encodings.image_keys else ()
        self.base_key = key_of("base score", base_identity, BANDS, args.seed, facts.scaling_factor, num_train_timesteps, entries, *images)
        self.lines, self.meter, self.checkpointer, self.validator = [], None, None, None
        self.base = base_of(self.earlier_lines()) if args.resume_from_checkpoint else None
        if args.eval_clips and not self.base:
            self.base = self.stored_base()

    def stored_base(self):
        """The base model's score in the cache, the same on all ranks, or None."""
        stored = base_model.read_score(self.args.encoding_cache_dir, self.base_key) if self.trained.is_main else None
        stored = broadcast_object_list([stored])[0]
        say_scalings(stored or {})
        return stored

    def score_base(self, full_model):
        """Score the base model and keep the score in the cache. Returns None if a signal requested a stop."""
        with timed("score the base model"):
            score = base_score(full_model, self.score)
        if score and (factors := image_scalings(self.facts)):
            with timed("compare scalings of the image"):
                score = self.with_scalings(full_model, score, factors)
        if score and self.trained.is_main:
            base_model.write_score(self.args.encoding_cache_dir, self.base_key, score)
        return score

    def with_scalings(self, full_model, score, factors):
        """The base model's score with "image_scalings", factor -> its mean loss. The score is that with the first of `factors`. None as
        `score`."""
        scores = [score]
        for factor in factors[1:]:
            scores.append(base_score(full_model, functools.partial(self.score, with_gap=False, image_factor=factor / factors[0])))
            if not scores[-1]:
                return None
        values = [[*scored["train"], *(scored["held_out"] or [])] for scored in scores]
        losses = {f"{factor:.6g}": sum(own) / len(own) for factor, own in zip(factors, values, strict=True)}
        score = score | {"image_scalings": losses}
        say_scalings(score)
        return score

    def earlier_lines(self):
        """The scores of the same clips in metrics.jsonl, the same on all ranks."""
        lines = evaluations(read_json_lines(self.output_dir / "metrics.jsonl"), self.clips) if self.trained.is_main else None
        return broadcast_object_list([lines])[0]

    def follow(self, checkpointer, validator):
        """Score whenever these two are due."""
        self.checkpointer, self.validator = checkpointer, validator

    def score_what_training_changes(self):
        """Score the base model now if a step or a checkpoint changes its weights, so call it before either."""
        if self.args.eval_clips and not self.base and not lora_modules(self.trained.transformer):
            with self.trained.full_model() as full_model:
                self.base = self.score_base(full_model)
                del full_model  # a copy is freed at the end of the block
            exit_if_requested_anywhere(self.trained.device)

    def begin(self, meter):
        """Start scoring, after the checkpoint is loaded and metrics.jsonl is truncated to its step."""
        self.meter, self.lines = meter, self.earlier_lines()

    def score(self, transformer, with_gap=True, image_factor=1.0):
        """The function `score` on this run's clips. image_factor: of the image's latents."""

        def losses(batch):
            return self.clip_losses(transformer, batch | {"image": batch["image"] * image_factor})

        return score(
            self.trained.accelerator, transformer, losses, self.encodings, self.sets, self.captions, *self.noise, with_gap
        )  # fmt: skip

    def verdict(self, ran_all):
        """The function `verdict` on this run's scores and videos."""
        validations = [line for line in read_json_lines(self.output_dir / "metrics.jsonl") if "motion" in line]
        return verdict([*self.lines, *validations], self.trained.schedule.base_lrs[0], ran_all)

    def is_due(self, step, last=False):
        """Whether the clips are scored after this step."""
        if not self.args.eval_clips:
            return False
        by_steps = self.args.eval_steps and step % self.args.eval_steps == 0
        return bool(by_steps) or self.checkpointer.is_due(step, last) or self.validator.is_due(step, last)

    def offer(self, step, last=False):
        """Score and log if due, and export the weights with the lowest held-out loss so far to best/."""
        if not self.is_due(step, last):
            return
        untrained = step == 0 and not self.args.init_lora  # a new LoRA has no effect
        if untrained and not self.base:
            return  # the base model is scored with the first score, so that the first step does not wait for it
        now, share = (self.base, 0.0) if untrained else self.score_step(step, last)
        if not now:
            return  # a signal requested a stop
        if step > 0 and not self.args.init_lora and not any(line["step"] == 0 for line in self.lines):
            self.log(0, self.base, 0.0)
        line = self.log(step, now, share)
        if line["best_step"] == step:
            self.checkpointer.save_best(step)
        self.trained.barrier()
        if self.trained.is_main:
            report.refresh(self.output_dir)

    def score_step(self, step, last):
        """(the score of the current weights, `update_share`). Scores the base model first if need be. (None, None) after a signal."""
        with timed(f"score step {step}"), self.trained.averaged(), self.trained.full_model() as full_model:
            self.base = self.base or self.score_base(full_model)
            now = self.base and self.score(full_model, with_gap=last)
            share = now and update_share(full_model)
            del full_model  # a copy is freed at the end of the block
        free(self.trained.device)
        return now, share

    def make_missing(self, step):
        """Score the last step if a signal or a kill prevented it."""
        if self.args.eval_clips and not any(line["step"] == step for line in self.lines):
            self.offer(step, last=True)

    def log(self, step, scores, share):
        """Log one score. Returns its line of metrics.jsonl."""
        line = line_of(step, scores, self.base, self.clips, share, self.lines, self.num_train_timesteps)
        self.lines.append(line)
        self.meter.log(line)
        say(sentence_of(line))
        return line


# -----------------------------------------------------------------------------
# The verdict

NOTHING, WORSE, LEARNING, MEMORISING = "nothing happening", "getting worse", "learning", "memorising"
LOOK_ONLY, UNKNOWN = "learning the look, not the captions", "not measured"
STILL = "learning, but the videos stand still"


def verdict(lines, learning_rate, ran_all=True):
    """The verdict on a run: (a word, sentences). lines: of metrics.jsonl.

    A run that learns by `verdict_of_losses` may have videos that stand still, by the rule of `motion.verdict_of`.
    """
    word, sentences = verdict_of_losses(lines, learning_rate, ran_all)
    still, more = verdict_of(lines)
    return STILL if still and word == LEARNING else word, sentences + more


def verdict_of_losses(lines, learning_rate, ran_all=True):
    """The verdict by the losses: (a word, sentences). lines: of metrics.jsonl.

    The rules, with changes relative to the base model's loss on the same clips; less than `SMALL` = 1 % is no change:
    - getting worse: the loss on training clips ended above the base model's.
    - nothing happening: neither loss changed.
    - memorising: the loss on training clips fell, and the held-out loss either fell by less than a tenth of that, or rose from its
      minimum by more than 1 % and more than a quarter of its gain, while the loss on training clips kept falling.
    - learning: otherwise. If swapping captions does not raise the loss: the look was learned, not the captions.
    ran_all: whether the run reached its last step.
    """
    scored = evaluations(lines)
    if len(scored) < 2:
        return UNKNOWN, ["There are no scores after the first step (--eval_clips, --checkpointing_steps, --eval_steps)."]
    last, held_out = scored[-1], scored[-1]["eval_held_out_loss"] is not None
    base = last["eval_train_base_loss"]
    train_change = last["eval_train_loss"] / base - 1
    sentences = [f"After step {last['step']} the loss on training clips is {percent(train_change)} against the base model's."]
    change = train_change
    if held_out:
        held_out_base = last["eval_held_out_base_loss"]
        change = last["eval_held_out_loss"] / held_out_base - 1
        sentences.append(f"On held-out clips it is {percent(change)}.")
    if train_change > SMALL:
        sentences.append(f"Training makes the model worse: try a lower --learning_rate (it was {learning_rate:g}).")
        return WORSE, sentences
    if abs(train_change) <= SMALL and abs(change) <= SMALL:
        return NOTHING, [*sentences, why_nothing(last, learning_rate)]
    if not held_out:
        sentences.append("Without held-out clips, memorising looks like learning: --eval_share 0.1 holds some out.")
        return with_captions(last, sentences)
    best = best_of(scored)
    gained, lost = held_out_base - best["eval_held_out_loss"], last["eval_held_out_loss"] - best["eval_held_out_loss"]
    turned = lost > max(SMALL * held_out_base, gained / 4) and last["eval_train_loss"] < best["eval_train_loss"]
    if change > 0.1 * train_change or turned:
        since = f"from step {best['step']} on" if turned else "from the start"
        sentences.append(f"The model memorises the training clips {since}: the held-out clips do not gain from it.")
        sentences.append(f"The held-out loss was lowest at step {best['step']}: use best/.")
        sentences.append("More clips, a lower rank or fewer steps help.")
        return MEMORISING, sentences
    if best["step"] != last["step"]:
        sentences.append(f"The held-out loss was lowest at step {best['step']}: best/ has those weights.")
    elif ran_all:
        sentences.append("It was still decreasing at the end: more steps may help.")
    return with_captions(last, sentences)


def with_captions(last, sentences):
    """The verdict on a run that learns: with or without the captions."""
    if last.get("eval_caption_gap") is None:
        return LEARNING, sentences
    (gap, error), (base_gap, _) = last["eval_caption_gap"], last["eval_caption_base_gap"]
    numbers = f"{percent(gap)} ± {100 * error:.1f} (base model: {percent(base_gap)})"
    if gap > error or gap > CLEAR_GAP:
        sentences.append(f"The model uses the captions: with another clip's caption the loss is {numbers}.")
        return LEARNING, sentences
    sentences.append(
        f"Swapping captions does not raise the loss: with another clip's caption it is {numbers}. "
        "Check that each caption describes its clip."
    )
    return LOOK_ONLY, sentences


def why_nothing(last, learning_rate):
    """The likely cause of a loss that does not change."""
    share = last["update_share"]
    if learning_rate == 0 or share == 0:
        return f"The LoRA has not changed: the learning rate is {learning_rate:g}; raise --learning_rate."
    if share is not None and share < 1e-3:
        return (
            f"The LoRA changes the weights by only {100 * share:.1g} %: raise --learning_rate (it was {learning_rate:g}) or "
            "--lora_alpha, or train for more steps."
        )
    return "The weights changed but the loss did not: the clips may show nothing new to the model, or differ too much; inspect the videos."
