"""How soon settings get to a held-out loss on the demo's model and clips: python -m tools.benchmark quality [flags].

Every run is the trainer itself, on 30 of the demo's clips, changed into something new to the base model (demo/tasks.py: a style, a
subject, a motion), scored on the 8 others at fixed noise. Settings and tasks take turns, seed by seed. The target of a task is the
held-out loss that every seed of the first settings has reached at its end, or lies --target below the base model's. Seconds are
those of training steps alone, without loading, encoding and scoring. A ratio is the median over the seeds of the first settings'
steps or seconds / theirs.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
from pathlib import Path

from cogvideox import flags
from cogvideox.console import fail, progress
from cogvideox.files import read_json_lines, write_bytes
from cogvideox.scoring import evaluations
from dataset import read_records
from demo.old_film import is_held_out
from demo.tasks import TASKS, write_task
from tools.benchmark.harness import ROOT, environment_of, table

SIZE = "--height 64 --width 96 --max_num_frames 17 --mixed_precision no --gradient_checkpointing none"
# What is compared: flags of the trainer. "guide" has all that the guide says about learning, "defaults" none of it.
# LoRA+ (Hayou et al., 2024) gives B a learning rate that is a ratio above A's. B begins at zero and Adam does not feel how long
# a gradient is, so that is the same as an alpha that is the ratio above the rank; and rsLoRA is an alpha too, rank^1.5.
SETTINGS = {
    "guide": "--rank 128 --lora_alpha 128 --learning_rate 1e-4 --lr_scheduler constant --lr_warmup_steps 0 --optimizer AdamW "
    "--adam_beta1 0.9 --adam_beta2 0.95 --max_grad_norm 1 --train_batch_size 1 --timestep_sampling uniform",
    "defaults": "",
    # The defaults with one thing changed.
    "learning_rate_2": "--learning_rate 1e-3",
    "learning_rate_4": "--learning_rate 2e-3",
    "learning_rate_6": "--learning_rate 3e-3",
    "lora_plus": "--learning_rate 1e-4 --lora_alpha 2048",
    "rs_lora": "--learning_rate 1e-4 --lora_alpha 1448",
    "rank_32": "--rank 32",
    "rank_64": "--rank 64",
    "rank_256": "--rank 256",
    "warm_up": "--lr_scheduler constant_with_warmup --lr_warmup_steps 30",
    "cosine": "--lr_scheduler cosine",
    "spread": "--timestep_sampling spread",
    "logit_normal": "--timestep_sampling logit_normal",
    "min_snr": "--snr_gamma 5",
    "caption_dropout": "--caption_dropout 0.1",
    "average": "--ema_decay 0.98",
    "beta2_999": "--adam_beta2 0.999",
    "prodigy": "--optimizer prodigy --learning_rate 1",
    # Several things changed.
    "cosine_2": "--learning_rate 1e-3 --lr_scheduler cosine",
    "cosine_4": "--learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 20",
    "average_2": "--learning_rate 1e-3 --ema_decay 0.98",
    "average_4": "--learning_rate 2e-3 --ema_decay 0.98",
    "cosine_average_2": "--learning_rate 1e-3 --lr_scheduler cosine --ema_decay 0.98",
    "lora_plus_cosine": "--learning_rate 1e-4 --lora_alpha 2048 --lr_scheduler cosine",
    "lora_plus_average": "--learning_rate 1e-4 --lora_alpha 2048 --ema_decay 0.98",
}


def write_halves(source, work_dir):
    """Split a data folder in two, `train` and `held_out`, in work_dir. Returns both."""
    rows = [(record.caption, record.listed) for record in read_records(source)[0]]
    folders = work_dir / "train", work_dir / "held_out"
    for folder, held_out in zip(folders, (False, True), strict=True):
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        chosen = [row for number, row in enumerate(rows) if is_held_out(number) == held_out]
        (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt, _ in chosen), encoding="utf-8")
        (folder / "videos.txt").write_text("".join(f"{video}\n" for _, video in chosen), encoding="utf-8")
        for _, video in chosen:
            shutil.copyfile(source / video, folder / video)
    return folders


def run_trainer(words, log):
    """The trainer with these words, in this process, which it ends. Its output goes to the file log."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import train_cogvideox_lora as trainer

    trainer.main(trainer.parse_args(words))


def train(start, task, name, seed, options, work_dir):
    """One run of the trainer, unless work_dir has it already. Returns its output folder. start: starts a process, as Process does.

    The first settings may take more steps; they are scored as often as the others.
    """
    steps = options.first_steps or options.steps if name == options.settings[0] else options.steps
    eval_steps = max(1, options.eval_steps * steps // options.steps)
    folder, output_dir = work_dir / task, work_dir / task / f"{name}-{steps}-steps-seed{seed}"
    if (output_dir / "status.json").exists():
        return output_dir
    words = ["--pretrained_model_name_or_path", options.model, "--instance_data_root", folder / "train"]
    words += ["--eval_data_root", folder / "held_out", "--id_token", TASKS[task][1], "--encoding_cache_dir", work_dir / "cache"]
    words += ["--output_dir", output_dir, "--overwrite_output_dir", *SIZE.split(), "--max_train_steps", steps]
    words += ["--eval_steps", eval_steps, "--logging_steps", eval_steps, "--checkpointing_steps", steps]
    words += ["--eval_clips", 8, "--report_to", "none", "--seed", seed, *SETTINGS[name].split()]
    log = work_dir / "log.txt"
    process = start(target=run_trainer, args=(list(map(str, words)), log))
    process.start()
    process.join()
    if process.exitcode:
        fail(1, f"{task}, {name}, seed {seed}: the trainer ended with code {process.exitcode}:\n{log.read_text(errors='replace')[-2000:]}")
    return output_dir


def course_of(output_dir):
    """[(step, seconds of training until then, held-out loss against the base's as a share)] of a run.

    The seconds are the run's median seconds per step times the step: what disturbs a part of a run does not count.
    """
    lines = read_json_lines(output_dir / "metrics.jsonl")
    pace = statistics.median(line["seconds_per_step"] for line in lines if "seconds_per_step" in line)
    return [
        (line["step"], pace * line["step"], line["eval_held_out_loss"] / line["eval_held_out_base_loss"] - 1) for line in evaluations(lines)
    ]


def reached(course, target):
    """(step, seconds) of the first score at or below the target, between scores as on a straight line; None if there is none."""
    before = course[0]
    for now in course[1:]:
        if now[2] <= -target:
            part = (before[2] + target) / (before[2] - now[2])
            return tuple(before[i] + part * (now[i] - before[i]) for i in (0, 1))
        before = now
    return None


def target_of(courses):
    """The level that every course reached at its end, as a share below the base model's; at least 0.1 %, if they learned nothing."""
    return max(0.001, min(-course[-1][2] for course in courses))


def ratios_of(courses, name, target, what):
    """The first settings' steps (what = 0) or seconds (1) to the target / those of `name`, sorted; 0 for a run that never got there."""
    pairs = [[reached(course, target) for course in pair] for pair in zip(next(iter(courses.values())), courses[name], strict=True)]
    return sorted(first[what] / own[what] if own else 0.0 for first, own in pairs if first)


def with_range(values, form):
    """The median of sorted values and, in brackets, the least and the greatest."""
    return f"{statistics.median(values):{form}} ({values[0]:{form}}-{values[-1]:{form}})" if values else ""


def end_of(runs):
    """The median of the last held-out losses of courses, compared with the base model's, in percent."""
    return f"{100 * statistics.median(course[-1][2] for course in runs):+.1f} %"


def rows_of(courses, target):
    """The table of a task. courses: settings -> one course a seed; the first settings are what the others are compared with."""
    rows = []
    for name, runs in courses.items():
        got = [place for place in (reached(course, target) for course in runs) if place]
        rows.append(
            {
                "settings": name,
                "got_there": f"{len(got)} of {len(runs)}",
                "steps": with_range(sorted(place[0] for place in got), ".0f"),
                "seconds": f"{statistics.median(place[1] for place in got):.1f}" if got else "",
                "times_fewer_steps": with_range(ratios_of(courses, name, target, 0), ".2f"),
                "times_faster": with_range(ratios_of(courses, name, target, 1), ".2f"),
                "held_out_at_the_end": end_of(runs),
                "lowest": f"{100 * statistics.median(min(score[2] for score in course) for course in runs):+.1f} %",
            }
        )
    return rows


def rows_of_all(tasks, targets):
    """The table of all tasks: how many times fewer steps and seconds than the first settings, and the held-out loss at the end.

    tasks: task -> settings -> one course a seed. targets: task -> share.
    """
    rows = []
    for name in next(iter(tasks.values())):
        row = {"settings": name}
        for what, title in enumerate(("times_fewer_steps", "times_faster")):
            ratios = {task: ratios_of(courses, name, targets[task], what) for task, courses in tasks.items()}
            row |= {f"{task}: {title}": f"{statistics.median(got):.2f}" if got else "" for task, got in ratios.items()}
        rows.append(row | {f"{task}: at_the_end": end_of(courses[name]) for task, courses in tasks.items()})
    return rows


def parse(words):
    """The checked flags. Ends with exit code 2 and all problems."""
    parser = flags.new_parser(__doc__)
    parser.prog = "python -m tools.benchmark quality"
    flag = flags.flag_group(parser, "quality")
    flag("--tasks", list(TASKS), f"what is learned (default: {' '.join(TASKS)})", nargs="+", type=str, choices=list(TASKS))
    flag(
        "--settings",
        ["guide", "defaults"],
        "settings that take turns (default: guide defaults)",
        nargs="+",
        type=str,
        choices=list(SETTINGS),
    )
    flag("--seeds", 5, "runs of each", at_least=1)
    flag("--steps", 300, "optimizer steps of a run; 300 are the guide's ten epochs", at_least=1)
    flag("--first_steps", None, "steps of the first settings, which set the target (default: --steps)", type=int, at_least=1)
    flag("--eval_steps", 20, "score every N steps", at_least=1)
    flag("--target", None, "share below the base model's loss (default: what the first settings reach)", type=float, above=0, below=1)
    flag("--model", str(ROOT / "demo/model"), "model folder (default: the demo's)")
    flag("--work_dir", None, "keep the runs here, and reuse those that are there (default: a temporary folder)", type=Path)
    flag("--threads", 1, "OMP_NUM_THREADS of a run", at_least=1)
    flag("--json", None, "write all courses here as well", type=Path)
    return flags.parse(parser, words, check_flags)


def steps_of(options):
    """How long the runs are, in words."""
    first = options.first_steps or options.steps
    return f"{options.steps} steps" + (f" ({options.settings[0]}: {first})" if first != options.steps else "")


def check_flags(options):
    """What is wrong with the flags beside their bounds, as sentences."""
    problems = [] if Path(options.model).is_dir() else [f"--model {options.model}: no such folder"]
    if options.json and not options.json.absolute().parent.is_dir():
        problems.append(f"--json {options.json}: its folder is not there")
    return problems


def main(words=None):
    """The command line."""
    options = parse(words)
    work_dir = Path(options.work_dir or tempfile.mkdtemp(prefix="quality-")).absolute()
    os.environ.update(environment_of(options.threads))
    # Every run is forked from a process that has imported the trainer and done nothing else, which saves ten seconds a run.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train_cogvideox_lora"])
    turns = [(seed, task, name) for seed in range(options.seeds) for task in options.tasks for name in options.settings]
    courses = {task: {name: [] for name in options.settings} for task in options.tasks}
    try:
        for task in options.tasks:
            write_task(task, work_dir / task / "clips")
            write_halves(work_dir / task / "clips", work_dir / task)
        with progress(turns, "training", unit="run") as bar:
            for seed, task, name in bar:
                bar.set_postfix_str(f"{task}, {name}, seed {seed}")
                courses[task][name].append(course_of(train(processes.Process, task, name, seed, options, work_dir)))
    finally:
        if not options.work_dir:
            shutil.rmtree(work_dir, ignore_errors=True)
    targets = {task: options.target or target_of(courses[task][options.settings[0]]) for task in options.tasks}
    rows = {task: rows_of(courses[task], targets[task]) for task in options.tasks}
    for task in options.tasks:
        print(f"{task}: held-out loss {targets[task]:.1%} below the base model's, {options.seeds} seeds, {steps_of(options)}\n")
        print(f"{table(rows[task])}\n")
    print(f"all tasks\n\n{table(rows_of_all(courses, targets))}")
    if options.json:
        chosen = {name: SETTINGS[name] for name in options.settings}
        write_bytes(options.json, json.dumps({"targets": targets, "rows": rows, "courses": courses, "settings": chosen}, indent=1).encode())


if __name__ == "__main__":
    main()
