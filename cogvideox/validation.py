"""Validation videos from the live model, without side effects on training."""

import contextlib
import copy
import functools
import hashlib
import json
import re
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from PIL import Image

from cogvideox import base_model, metrics, motion, report
from cogvideox.console import say, timed, warn
from cogvideox.files import key_of, read_json, write_bytes
from cogvideox.launch import free
from cogvideox.model import bare_pipeline, decode_latents, drop_padding, whole_frames
from cogvideox.stopping import interruptible, raise_if_noticed
from cogvideox.video import contact_sheet, film_strip, png_bytes, read_video, write_video

WITHOUT = "without_trigger"  # the folder, beside a step's other videos, of the one whose prompt lacks the id token


@contextlib.contextmanager
def undisturbed(transformer):
    """Evaluation mode without compilation; restores the mode and all random states afterwards, also after an error."""
    was_training = transformer.training
    transformer.eval()
    try:
        device = next(transformer.parameters()).device
        generators = [device] if device.type == "cuda" else []  # of all GPUs by default, with a warning
        with torch.random.fork_rng(generators), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        transformer.train(was_training)


def video_jobs(prompts, videos_per_prompt, seed, images=()):
    """The jobs of one validation, one per video. A job's seed and file name do not depend on the rank. images: uint8 [H, W, 3] for each
    prompt, of an image-to-video model."""
    jobs = []
    for number, prompt in enumerate(prompts):
        slug = re.sub(r"[^A-Za-z0-9]+", "-", prompt)[:40].strip("-")
        # The hashes distinguish prompts with the same beginning, prompts without letters, and videos of the same prompt and another image.
        mark = "-".join(hashlib.sha256(content).hexdigest()[:6] for content in (prompt.encode(), *images[number : number + 1]))
        for video in range(videos_per_prompt):
            jobs.append({"prompt": number, "seed": seed + video, "name": f"{number:02d}-{slug}-{mark}-seed{seed + video}.mp4"})
    return jobs


def job_without_trigger(jobs, number, text, prompt, token, images=()):
    """One more job: the text of prompt number `number` without the id token, as prompt number `prompt`, with the seed and the image of
    its partner."""
    partner = next(job for job in jobs if job["prompt"] == number)
    name = video_jobs([text], 1, partner["seed"], images[number : number + 1])[0]["name"]
    return {"prompt": prompt, "seed": partner["seed"], "name": f"{WITHOUT}/{name}", "without": token, "partner": partner["name"]}


def title_of(job, texts):
    """A job's prompt for people."""
    return f"without the trigger: {texts[job['prompt']]}" if "without" in job else texts[job["prompt"]]


def sample_latents(transformer, scheduler, prompt, negative_prompt, seed, device, vae=None, **settings):
    """Latents [F', C, H', W'] of one video from the stock pipeline. prompt, negative_prompt: embeddings [T, D].

    An image-to-video model needs an `image` of the video's size among the settings, and the VAE to encode it.
    """
    pipeline = bare_pipeline(transformer, scheduler=copy.deepcopy(scheduler), vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    with whole_frames(vae):
        result = pipeline(
            prompt_embeds=prompt[None].to(device),
            negative_prompt_embeds=negative_prompt[None].to(device),
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=stop_sampling_if_requested,
            **settings,
        )
    return drop_padding(result.frames[0], settings["num_frames"], pipeline.vae_scale_factor_temporal)


def sampler_of(scheduler, name):
    """The scheduler that makes the videos: the model's own for "stored", or a DDIM or DPM one with the same noise schedule.

    These begin at the last timestep, as in the authors' own demo (inference/cli_demo.py of CogVideo), whatever the model's config says.
    """
    if name == "stored":
        return type(scheduler).from_config(scheduler.config)
    kinds = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
    return kinds[name].from_config(scheduler.config, timestep_spacing="trailing")


def stop_sampling_if_requested(pipeline, step, timestep, tensors):
    """Abort a video when a signal requests a stop; the loop then saves."""
    raise_if_noticed()
    return tensors


def validate(folder, jobs, rank, world_size, transformer, scheduler, embeddings, load_vae, device, fps, settings, images=()):
    """Generate this rank's share of the videos and write them as mp4. Returns failures as sentences.

    embeddings: (prompt embeddings, negative embedding), encoded before training. The VAE is loaded only for decoding, after all
    latents are sampled; the transformer stays on its device. images: of an image-to-video model, uint8 [H, W, 3] for each prompt; the VAE
    (0.4 GB) then encodes them, and stays until the videos are decoded.
    """
    folder, failures, latents = Path(folder), [], []
    prompts, negative = embeddings
    load_vae = functools.cache(load_vae)

    def condition(prompt):
        return {"vae": load_vae(), "image": Image.fromarray(images[prompt])} if images else {}

    with undisturbed(transformer):
        for job in jobs[rank::world_size]:
            try:
                raise_if_noticed()
                prompt, given = prompts[job["prompt"]], settings | condition(job["prompt"])
                latents.append((job, sample_latents(transformer, scheduler, prompt, negative, job["seed"], device, **given)))
            except Exception as error:
                failures.append(failure(job, error))
        if not latents:
            return failures
        try:
            vae = load_vae()
        except Exception as error:
            return failures + [failure(job, error) for job, _ in latents]
        with interruptible(vae.decoder):
            for job, sample in latents:
                try:
                    write_video(folder / job["name"], decode_latents(vae, sample), fps)
                except Exception as error:
                    failures.append(failure(job, error))
    return failures


def failure(job, error):
    """A sentence for a video that a signal stopped, or that failed, then with the failing line of code."""
    if isinstance(error, InterruptedError):
        return f"validation video {job['name']} was not made: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    return f"validation video {job['name']} failed, training continues: {reason}"


def write_sheet(folder, first_folder, jobs, prompts, step, settings, images=()):
    """Write `contact_sheet.png` (each video below that of step 0 with the same seed) and `videos.json` of one validation.

    images: as in `validate`. A small copy of each is kept for the report.
    """
    folder, first_folder = Path(folder), Path(first_folder)
    rows, small = [], [film_strip(image[None]) for image in images]
    for job in jobs:
        rows.append((title_of(job, prompts), None))
        rows += [("image", small[job["prompt"]][None])] if images else []
        before, now = first_folder / job["name"], folder / job["name"]
        if before != now and before.exists():
            rows.append((f"step 0 (base model), seed {job['seed']}", read_video(before)))
        if now.exists():
            rows.append((f"step {step}, seed {job['seed']}", read_video(now)))
    contact_sheet(folder / "contact_sheet.png", rows, f"validation at step {step}")
    record = [job | {"prompt": prompts[job["prompt"]]} | ({"image": f"image-{job['prompt']:02d}.png"} if images else {}) for job in jobs]
    for number in {job["prompt"] for job in jobs} if images else ():
        write_bytes(folder / f"image-{number:02d}.png", png_bytes(Image.fromarray(small[number])))
    write_bytes(folder / "videos.json", json.dumps({"settings": settings, "videos": record}, indent=1).encode())
    say(f"step {step}: validation videos and contact_sheet.png in {folder}")


def is_due(step, clips_per_step, num_clips, args):
    """Whether to validate after this step: every N steps, or at the first step that completes every N-th epoch."""
    if args.validation_steps:
        return step % args.validation_steps == 0
    if not args.validation_epochs:
        return False
    clips = num_clips * args.validation_epochs
    return step * clips_per_step // clips > (step - 1) * clips_per_step // clips


# -----------------------------------------------------------------------------
# In the loop


class Validator:
    """Generates the validation videos of step 0, when they are due, and after the last step.

    Step 0's come from the cache, or are made with the first others, so that the first step does not wait for them; where that is
    too late, because training changes the weights of step 0, they are made before the first step. encodings: encodings.Encodings.
    load_vae: () -> the VAE. clip_shape: default (frames, height, width) of the videos. plan: order.Plan. base_identity:
    `base_model.identity_of`. data_motion: () -> the motion of the training clips, which is asked for once, on the main process. images:
    of an image-to-video model, uint8 [H, W, 3] in the videos' size for each of args.prompts; else none. Every rank calls every method
    and generates its share.
    """

    def __init__(
        self, args, trained, scheduler, encodings, load_vae, clip_shape, plan, base_identity="", data_motion=lambda: None, images=()
    ):  # fmt: skip
        self.args, self.trained, self.encodings, self.load_vae, self.plan = args, trained, encodings, load_vae, plan
        self.folder, self.texts = Path(args.output_dir) / "validation", list(args.prompts)
        self.jobs = video_jobs(args.prompts, args.num_validation_videos, args.seed, images)
        self.images, self.pair = list(images), ()  # pair: the names of a video with the id token and of the same without it
        if args.plain_prompt:
            number, text = args.plain_prompt
            of_same_image = [i for i in range(len(self.texts)) if not self.images or np.array_equal(self.images[i], self.images[number])]
            plain = next((i for i in of_same_image if self.texts[i] == text), len(self.texts))
            if plain == len(self.texts):
                self.jobs.append(job_without_trigger(self.jobs, number, text, plain, args.id_token, self.images))
                self.texts.append(text)
                self.images += self.images[number : number + 1]
            self.pair = tuple(next(job["name"] for job in self.jobs if job["prompt"] == n) for n in (number, plain))
        self.data_motion, self.meter = functools.cache(data_motion), None
        self.scheduler = sampler_of(scheduler, args.validation_scheduler) if self.jobs else scheduler
        frames, height, width = clip_shape
        self.settings = {
            "height": args.validation_height or height,
            "width": args.validation_width or width,
            "num_frames": args.validation_frames or frames,
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
            "use_dynamic_cfg": args.use_dynamic_cfg,
        }
        self.base_identity = base_identity, base_model.initial_lora(args), args.validation_scheduler
        self.base_is_pending = bool(self.jobs) and base_model.stays_available(args, trained.transformer)

    def begin(self, meter):
        """Log to this meter from now on."""
        self.meter = meter

    def folder_of(self, step):
        """The folder of a step's videos."""
        return self.folder / f"step-{step:06d}"

    def is_due(self, step, last=False):
        """Whether videos are due after this step (0: before the first one)."""
        if not self.jobs:
            return False
        return step == 0 or last or is_due(step, self.plan.clips_per_step, self.plan.epoch_clips, self.args)

    def jobs_of(self, step):
        """The jobs of a step: all of them at first and at last; in between those of --validation_prompts_at_once prompts, in turns, and
        the one without the id token where its partner is among them."""
        count, at_once = len(self.args.prompts), self.args.validation_prompts_at_once
        if step in (0, self.plan.total_steps) or not at_once or at_once >= count:
            return self.jobs
        if self.args.validation_steps:
            turn = step // self.args.validation_steps
        else:
            turn = step * self.plan.clips_per_step // (self.plan.epoch_clips * max(1, self.args.validation_epochs))
        chosen = {(turn * at_once + number) % count for number in range(at_once)}
        names = {job["name"] for job in self.jobs if job["prompt"] in chosen}
        return [job for job in self.jobs if job["name"] in names or job.get("partner") in names]

    def offer(self, step, last=False):
        """Generate the videos if due."""
        if not self.is_due(step, last):
            return
        if step == 0 or self.base_is_pending:
            self.offer_base(step)
        if step > 0:
            self.make(step)

    def offer_base(self, step):
        """Take step 0's videos from the cache, or generate those that are missing unless they can be made after the first step."""
        missing = self.restore_base()
        if missing and step == 0 and self.base_is_pending:
            return
        self.base_is_pending = False
        if missing:
            self.generate(0, missing, of_base=step > 0, now=step)
        elif not (self.folder_of(0) / "contact_sheet.png").exists():
            self.show(0, step)

    def make_missing(self, step):
        """Generate the last step's videos if a signal or a kill prevented it."""
        missing = [job for job in self.jobs_of(step) if not (self.folder_of(step) / job["name"]).exists()]
        if broadcast_object_list([missing])[0]:
            self.offer(step, last=True)

    def make(self, step):
        """Generate a step's videos with the current weights, and show them."""
        self.generate(step, self.jobs_of(step), now=step)

    def restore_base(self, copy=True):
        """Copy step 0's videos from the cache. Returns the jobs whose videos are in neither place, the same on all ranks.

        A video in the output folder counts if its key is on record there: an earlier start may have had other settings.
        """
        missing = None
        if self.trained.is_main:
            cache, folder, frames = self.args.encoding_cache_dir, self.folder_of(0), self.settings["num_frames"]
            try:
                known = {video["name"]: video["key"] for video in read_json(folder / "videos.json")["videos"]}
            except (OSError, ValueError, KeyError, TypeError):
                known = {}
            missing = []
            for job in self.jobs:
                key, path = self.base_key(job), folder / job["name"]
                if path.exists() and known.get(job["name"]) == key:
                    continue
                if not (base_model.take_video(cache, key, path, frames) if copy else base_model.has_video(cache, key)):
                    missing.append(job)
        return broadcast_object_list([missing])[0]

    def base_key(self, job):
        """The cache key of one video of step 0."""
        captions = [self.encodings.caption_keys[text] for text in (self.texts[job["prompt"]], self.args.negative_prompt)]
        image = [hashlib.sha256(image).hexdigest() for image in self.images[job["prompt"] :][:1]]
        return key_of("base video", *self.base_identity, self.encodings.vae, captions, job["seed"], self.settings, self.args.fps, *image)

    def generate(self, step, jobs, now, of_base=False):
        """Generate videos with the current weights or, with `of_base`, without the LoRA; keep step 0's in the cache, and show them.

        now: the steps trained so far, if step 0's videos are made later.
        """
        trained, folder = self.trained, self.folder_of(step)
        rank, world_size = trained.accelerator.process_index, trained.accelerator.num_processes
        texts = [*self.texts, self.args.negative_prompt]
        *prompts, negative = [self.encodings.caption(text).to(trained.dtype) for text in texts]
        with contextlib.ExitStack() as stack:
            stack.enter_context(timed(f"make the videos of step {step}"))
            stack.enter_context(trained.averaged())
            full_model = stack.enter_context(trained.full_model())
            if of_base:
                stack.enter_context(base_model.without_lora(full_model))
            failures = validate(
                folder, jobs, rank, world_size, full_model, self.scheduler, (prompts, negative), self.load_vae, trained.device,
                self.args.fps, self.settings, self.images,
            )  # fmt: skip
            del full_model  # a copy is freed at the end of the block
        for sentence in failures:
            print(f"warning: {sentence}", file=sys.stderr, flush=True)
        free(trained.device)
        trained.barrier()  # one rank may have more videos than another
        if step == 0 and trained.is_main:
            for job in jobs:
                if (folder / job["name"]).exists():
                    base_model.keep_video(self.args.encoding_cache_dir, self.base_key(job), folder / job["name"])
        self.show(step, now)

    def show(self, step, now):
        """Add a step's videos to a contact sheet, metrics, trackers and report. now: as in `generate`."""
        trained, folder, jobs = self.trained, self.folder_of(step), self.jobs_of(step)
        if not trained.is_main:
            return
        if folder.exists():
            try:
                keyed = [job | {"key": self.base_key(job)} for job in jobs] if step == 0 else jobs
                write_sheet(folder, self.folder_of(0), keyed, self.texts, step, self.settings, self.images)
            except Exception as error:  # Pillow and the video reader raise many kinds of errors; none must end the run
                warn(f"the contact sheet of step {step} was not written ({type(error).__name__}: {error})")
            try:
                self.measure(step, jobs)
            except Exception as error:  # as above
                warn(f"the motion of the videos of step {step} was not measured ({type(error).__name__}: {error})")
            titles = {job["prompt"]: title_of(job, self.texts) for job in jobs}
            metrics.track_videos(trained.accelerator.trackers, folder, jobs, titles, step, now, self.args.fps)
        report.refresh(self.args.output_dir)

    def measure(self, step, jobs):
        """Log how much a step's videos move, and how far they are from those of step 0."""
        folder, first, videos = self.folder_of(step), self.folder_of(0), []
        for job in jobs:
            if not (folder / job["name"]).exists():
                continue
            frames = read_video(folder / job["name"])
            base = frames if step == 0 else read_video(first / job["name"]) if (first / job["name"]).exists() else None
            videos.append({"name": job["name"]} | motion.compare(frames, base, self.args.fps))
        if videos:
            of_data = self.data_motion() if step else None  # the first step does not wait for it
            line = motion.line_of(step, videos, self.pair, of_data)
            self.meter.log(line)
            for sentence in motion.sentences_of(line) if step else ():
                say(f"step {step}: {sentence}")

    def videos_of(self, step):
        """[(prompt, path inside the output folder)] of a step's videos of the prompts as they were given."""
        given = [job for job in self.jobs if "without" not in job]
        paths = [(self.texts[job["prompt"]], self.folder_of(step) / job["name"]) for job in given]
        return [(prompt, path.relative_to(self.folder.parent).as_posix()) for prompt, path in paths if path.exists()]
