"""The run's metrics: metrics.jsonl, a plot, and optional trackers."""

import contextlib
import io
import json
import time
from pathlib import Path

import torch
from accelerate.tracking import filter_trackers
from accelerate.utils import gather_object

from cogvideox import engine, flags, report
from cogvideox.console import BAD_NUMBERS, fail, progress, warn
from cogvideox.files import note_file, read_json_lines, write_bytes
from cogvideox.launch import peak_memory_gib
from cogvideox.stopping import write_status
from cogvideox.survey import printable
from cogvideox.video import gif_bytes, read_video


class MetricsFile:
    """metrics.jsonl: one JSON object per line. A resumed run first drops the lines after its checkpoint's step."""

    def __init__(self, path, first_step, enabled):
        self.file, self.path = None, Path(path)
        if not enabled:
            return
        path = self.path
        kept = [line for line in read_json_lines(path) if line["step"] <= first_step] if first_step else []
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = path.open("a", encoding="utf-8")

    def write(self, values):
        """Append and flush one line, so that a killed run loses none."""
        if not self.file:
            return
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk; later lines may fit again
            warn(f"step {values['step']} was not written to metrics.jsonl ({error.strerror})")


class Meter:
    """The progress bar and the log: every --logging_steps optimizer steps, at every checkpoint and after the last step.

    A line has the mean loss of all clips on all ranks since the previous line. Every rank calls `offer`.
    """

    def __init__(self, args, trained, plan, first_step):
        self.args, self.trained, self.plan = args, trained, plan
        self.file = MetricsFile(Path(args.output_dir) / "metrics.jsonl", first_step, enabled=trained.is_main)
        self.logged_step, self.losses, self.waited, self.progress = first_step, [], 0.0, None
        self.since_log, self.failed_trackers = time.perf_counter(), set()

    def bar(self, first, last):
        """The steps from `first` to `last`, with a progress bar."""
        self.since_log = time.perf_counter()
        settings = {"initial": first - 1, "unit": "step", "disable": not self.trained.is_main, "dynamic_ncols": True}
        self.progress = progress(range(first, last + 1), "training", total=last, **settings)
        return self.progress

    def is_due(self, step, last=False):
        """Whether this step is logged."""
        return last or step % self.args.logging_steps == 0 or step % self.args.checkpointing_steps == 0

    def offer(self, step, result, last=False):
        """Record a step's numbers, and log them if due. Reading the loss waits for the GPU, so only then."""
        self.losses += result.losses
        self.waited += result.seconds_waited
        if not self.is_due(step, last):
            return
        mean_loss = self.trained.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        now = time.perf_counter()
        line = {
            "step": step,
            "epoch": round(step * self.plan.clips_per_step / self.plan.epoch_clips, 4),
            "loss": mean_loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "seconds_per_step": (now - self.since_log) / (step - self.logged_step),
            "data_wait_percent": 100 * self.waited / (now - self.since_log),
            "peak_memory_gib": peak_memory_gib(self.trained.device),
        }
        self.log(line)
        shown = {"loss": f"{mean_loss:.4f}", "grad": f"{result.grad_norm:.3f}", "lr": f"{result.learning_rate:.1e}"}
        self.progress.set_postfix(shown | {"wait": f"{line['data_wait_percent']:.0f}%"}, refresh=False)
        self.since_log, self.waited, self.logged_step, self.losses = now, 0.0, step, []

    def log(self, line):
        """Write a line to metrics.jsonl and its numbers to the trackers; a line of a past step only to those that take it.

        A tracker that fails is a warning, once; the next line may reach it again.
        """
        self.file.write(line)
        numbers = {name: value for name, value in line.items() if name != "step" and isinstance(value, (int, float))}
        for tracker in self.trained.accelerator.trackers:
            if line["step"] < self.logged_step and tracker.name != "tensorboard":  # wandb drops it with a warning
                continue
            try:
                tracker.log(numbers, step=line["step"])
            except Exception as error:
                if tracker.name not in self.failed_trackers:
                    warn(f"step {line['step']} did not reach {tracker.name} ({first_line(error)}); metrics.jsonl has all numbers")
                self.failed_trackers.add(tracker.name)

    @contextlib.contextmanager
    def paused(self):
        """Exclude the block from the measured time of the training steps."""
        started = time.perf_counter()
        yield
        self.since_log += time.perf_counter() - started


class NonFiniteGuard:
    """Aborts after --max_skipped_steps consecutive non-finite gradients. Every rank calls `check`.

    With DeepSpeed the first one aborts: the optimizer steps before the norm is known, and the step cannot be undone.
    """

    def __init__(self, args, trained, clip_of, records, checkpointer):
        self.args, self.trained, self.clip_of, self.records, self.checkpointer = args, trained, clip_of, records, checkpointer
        deepspeed = engine.uses_deepspeed(trained.accelerator)
        self.most, self.fate = (1, "was taken with") if deepspeed else (args.max_skipped_steps, "was skipped for")
        self.consecutive = 0

    def check(self, step, result):
        """Warn of a step with a non-finite gradient, with its clips; abort after too many consecutive ones."""
        self.consecutive = 0 if result.finite else self.consecutive + 1
        if not self.consecutive:
            return
        for sentence in self.describe(result):
            warn(f"step {step} {self.fate} a non-finite gradient: {sentence}")
        if self.consecutive < self.most:
            return
        path = self.checkpointer.newest()
        if self.trained.is_main:
            write_status(self.args.output_dir, BAD_NUMBERS, "non-finite gradients", step, path)
            report.refresh(self.args.output_dir)
        newest = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
        count = "1 step" if self.consecutive == 1 else f"{self.consecutive} consecutive steps"
        fail(BAD_NUMBERS, f"{count} had a non-finite gradient (check --learning_rate and --mixed_precision); {newest}")

    def describe(self, result):
        """The clips and timesteps with a non-finite loss, as sentences from all ranks."""
        bad = []
        for loss, positions, timesteps in zip(result.losses, result.positions, result.timesteps, strict=True):
            if not torch.isfinite(loss):
                for position, timestep in zip(positions.tolist(), timesteps.tolist(), strict=True):
                    clip = printable(self.records[self.clip_of(position)].listed)
                    bad.append(f"{clip} at timestep {timestep} (loss {loss.item()})")
        return gather_object(bad) or ["every loss was finite, but the gradient norm was not"]


def plot_losses(metrics_path, picture_path):
    """Draw loss.png: training loss and its running mean, the scores on fixed noise, learning rate and gradient norm over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_json_lines(metrics_path)
    trained = [line for line in lines if "loss" in line]
    scored = [line for line in lines if "eval_train_loss" in line]
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 9), sharex=True, height_ratios=[3, 1, 1])
    steps = [line["step"] for line in trained]
    running, means = None, []
    for line in trained:
        running = line["loss"] if running is None else 0.9 * running + 0.1 * line["loss"]
        means.append(running)
    axes[0].plot(steps, [line["loss"] for line in trained], color="tab:blue", alpha=0.25, label="training loss, one step")
    axes[0].plot(steps, means, color="tab:blue", alpha=0.6, label="training loss, running mean")
    for name, clips, color in (("train", "training clips", "tab:red"), ("held_out", "held-out clips", "tab:orange")):
        line = [(one["step"], one[f"eval_{name}_loss"], one[f"eval_{name}_base_loss"]) for one in scored]
        line = [values for values in line if values[1] is not None]
        if line:
            at, losses, base = zip(*line, strict=True)
            axes[0].plot(at, losses, "o-", color=color, label=f"{clips}, fixed noise")
            axes[0].plot(at, base, "--", color=color, alpha=0.6, label=f"{clips}, base model")
    if scored and scored[-1]["best_step"]:
        axes[0].axvline(scored[-1]["best_step"], color="tab:orange", linestyle=":", label="lowest on held-out clips")
    axes[0].set_ylabel("velocity loss")
    axes[0].legend()
    axes[1].plot(steps, [line["learning_rate"] for line in trained], color="tab:green")
    axes[1].set_ylim(bottom=0)
    axes[1].set_ylabel("learning rate")
    axes[2].plot(steps, [line["grad_norm"] for line in trained], color="tab:purple")
    axes[2].set_ylabel("gradient norm")
    axes[2].set_xlabel("optimizer step")
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.06, top=0.98, hspace=0.08)  # a tight layout would take longer than the drawing
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    pyplot.close(figure)
    write_bytes(Path(picture_path), picture.getvalue())


def open_trackers(args, accelerator):
    """Open the trackers of --report_to, on the main process. Call it before any costly work: a login may be asked for.

    Each by itself: one that cannot be opened (no login, no network) is a warning, because metrics.jsonl has all numbers.
    """
    if args.report_to == "none" or not accelerator.is_main_process:
        return
    folder, opened = Path(args.output_dir) / args.logging_dir, []
    before = set(folder.rglob("*"))
    accelerator.project_configuration.set_directories(args.output_dir)
    accelerator.project_configuration.logging_dir = str(folder)
    values = flags.public_flags(args)
    simple = {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in values.items()}
    for name in filter_trackers([args.report_to], folder):
        accelerator.log_with, accelerator.trackers = [name], []
        try:
            folder.mkdir(parents=True, exist_ok=True)  # else wandb would take another one
            accelerator.init_trackers(args.tracker_name, config=simple, init_kwargs={"wandb": {"dir": str(folder)}})
        except Exception as error:
            warn(f"--report_to {name}: it could not be opened, and gets none of the numbers; metrics.jsonl has them ({first_line(error)})")
        else:
            opened += accelerator.trackers
    accelerator.trackers = opened
    for path in set(folder.rglob("*")) - before:
        if path.is_file():
            note_file(path)


def close_trackers(accelerator):
    """Have the trackers write what is left. A failure is a warning: the result is on disk."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:
            warn(f"{tracker.name} did not finish ({first_line(error)}); metrics.jsonl has all numbers")
    accelerator.trackers = []


def first_line(error):
    """An exception's kind and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def track_videos(trackers, folder, jobs, prompts, step, now, fps):
    """Log a validation's videos to tensorboard (as GIFs) and wandb. A tracker's failure is a warning.

    now: the steps trained so far; wandb drops what is logged for an earlier step, so step 0's videos get a name of their own.
    """
    for tracker in trackers:
        try:
            paths = [(job, Path(folder) / job["name"]) for job in jobs]
            paths = [(job, path) for job, path in paths if path.exists()]
            if tracker.name == "tensorboard":
                for job, path in paths:
                    track_gif(tracker.writer, f"validation/{job['name']}", read_video(path), step, fps)
            elif tracker.name == "wandb":
                import wandb

                videos = [wandb.Video(str(path), caption=prompts[job["prompt"]], format="mp4") for job, path in paths]
                tracker.log({"validation" if step == now else "validation, base model": videos}, step=now)
        except Exception as error:
            warn(f"{tracker.name} did not log the validation videos ({first_line(error)}); they are in {folder}")


def track_gif(writer, tag, frames, step, fps):
    """Add a GIF to tensorboard, like SummaryWriter.add_video, which needs moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=gif_bytes(frames, fps))
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
