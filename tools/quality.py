"""How soon settings get to a held-out loss on the demo's model and clips: python -m tools.benchmark quality [flags].

Every run is the trainer itself, on 30 of the demo's clips as an old film, scored on the 8 others at fixed noise. Settings take
turns, seed by seed. The target is a held-out loss that lies by --target below the base model's. Seconds are those of training
steps alone, without loading, encoding and scoring. The ratio is the median over the seeds of the first settings' seconds / theirs.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from cogvideox import flags
from cogvideox.console import fail, progress
from cogvideox.files import read_json_lines, write_bytes
from cogvideox.scoring import evaluations
from dataset import read_records
from tools.benchmark.harness import ROOT, environment_of, table

SIZE = "--id_token OLDFILM --height 64 --width 96 --max_num_frames 17 --mixed_precision no --gradient_checkpointing none"
# What is compared: flags of the trainer. "guide" has all that the guide says about learning, "defaults" none of it.
# LoRA+ (Hayou et al., 2024) gives B a learning rate that is a ratio above A's. B begins at zero and Adam does not feel how long
# a gradient is, so that is the same as an alpha that is the ratio above the rank; and rsLoRA is an alpha too, rank^1.5.
SETTINGS = {
    "guide": "--rank 128 --lora_alpha 128 --learning_rate 1e-4 --lr_scheduler constant --lr_warmup_steps 0 --optimizer AdamW "
    "--adam_beta1 0.9 --adam_beta2 0.95 --max_grad_norm 1 --train_batch_size 1 --timestep_sampling uniform",
    "defaults": "",
    # The defaults with one thing changed.
    "learning_rate_2": "--learning_rate 1e-3",
    "learning_rate_6": "--learning_rate 3e-3",
    "lora_plus": "--learning_rate 1e-4 --lora_alpha 2048",
    "rank_32": "--rank 32",
    "warm_up": "--lr_scheduler constant_with_warmup --lr_warmup_steps 30",
    "cosine": "--lr_scheduler cosine",
    "spread": "--timestep_sampling spread",
    "logit_normal": "--timestep_sampling logit_normal",
    "min_snr": "--snr_gamma 5",
    "average": "--ema_decay 0.98",
    "beta2_999": "--adam_beta2 0.999",
    "prodigy": "--optimizer prodigy --learning_rate 1",
}
HELD_OUT = 5  # every fifth clip


def write_halves(source, work_dir):
    """Split a data folder in two, `train` and `held_out`, in work_dir. Returns both."""
    rows = [(record.caption, record.listed) for record in read_records(source)[0]]
    folders = work_dir / "train", work_dir / "held_out"
    for folder, held_out in zip(folders, (False, True), strict=True):
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        chosen = [row for number, row in enumerate(rows) if (number % HELD_OUT == 2) == held_out]
        (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt, _ in chosen), encoding="utf-8")
        (folder / "videos.txt").write_text("".join(f"{video}\n" for _, video in chosen), encoding="utf-8")
        for _, video in chosen:
            shutil.copyfile(source / video, folder / video)
    return folders


def train(name, seed, folders, options, work_dir):
    """One run of the trainer, unless work_dir has it already. Returns its output folder."""
    output_dir = work_dir / f"{name}-seed{seed}"
    if (output_dir / "status.json").exists():
        return output_dir
    line = [sys.executable, ROOT / "train_cogvideox_lora.py"]
    line += ["--pretrained_model_name_or_path", options.model, "--instance_data_root", folders[0], "--eval_data_root", folders[1]]
    line += ["--encoding_cache_dir", work_dir / "cache", "--output_dir", output_dir, "--overwrite_output_dir", *SIZE.split()]
    line += ["--max_train_steps", options.steps, "--eval_steps", options.eval_steps, "--logging_steps", options.eval_steps]
    line += ["--checkpointing_steps", options.steps, "--eval_clips", 8, "--report_to", "none", "--seed", seed, *SETTINGS[name].split()]
    environment = environment_of(options.threads)
    done = subprocess.run(list(map(str, line)), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        fail(1, f"{name}, seed {seed}: the trainer ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return output_dir


def course_of(output_dir):
    """[(step, seconds of training until then, held-out loss against the base's as a share)] of a run."""
    lines = read_json_lines(output_dir / "metrics.jsonl")
    seconds, last_step, at = 0.0, 0, {0: 0.0}
    for line in lines:
        if "seconds_per_step" in line:
            seconds, last_step = seconds + line["seconds_per_step"] * (line["step"] - last_step), line["step"]
            at[last_step] = seconds
    return [
        (line["step"], at[line["step"]], line["eval_held_out_loss"] / line["eval_held_out_base_loss"] - 1) for line in evaluations(lines)
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


def rows_of(courses, target):
    """The table. courses: settings -> one course a seed; the first settings are what the others are compared with."""
    first, rows = next(iter(courses)), []
    for name, runs in courses.items():
        found = [reached(course, target) for course in runs]
        got = [place for place in found if place]
        pairs = [(a, b) for a, b in zip([reached(course, target) for course in courses[first]], found, strict=True) if a]
        # A run that never got there counts as infinitely long.
        ratios = sorted(a[1] / b[1] if b else 0.0 for a, b in pairs)
        lowest, ends = [min(course, key=lambda score: score[2]) for course in runs], [course[-1][2] for course in runs]
        rows.append(
            {
                "settings": name,
                "got_there": f"{len(got)} of {len(runs)}",
                "steps": f"{statistics.median(p[0] for p in got):.0f} ({min(p[0] for p in got):.0f}-{max(p[0] for p in got):.0f})"
                if got
                else "",
                "seconds": f"{statistics.median(p[1] for p in got):.1f}" if got else "",
                "times_faster": f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else "",
                "held_out_at_the_end": f"{100 * statistics.median(ends):+.1f} %",
                "lowest": f"{100 * statistics.median(low[2] for low in lowest):+.1f} %",
            }
        )
    return rows


def parse(words):
    """The checked flags. Ends with exit code 2 and all problems."""
    parser = flags.new_parser(__doc__)
    parser.prog = "python -m tools.benchmark quality"
    flag = flags.flag_group(parser, "quality")
    flag("--settings", ["guide", "defaults"], "settings that take turns (default: guide defaults)", nargs="+", type=str, choices=list(SETTINGS))
    flag("--seeds", 5, "runs of each", at_least=1)
    flag("--steps", 300, "optimizer steps of a run; 300 are the guide's ten epochs", at_least=1)
    flag("--eval_steps", 20, "score every N steps", at_least=1)
    flag("--target", 0.18, "how far below the base model's the loss has to be, as a share", above=0, below=1)
    flag("--model", str(ROOT / "demo/model"), "model folder (default: the demo's)")
    flag("--work_dir", None, "keep the runs here, and reuse those that are there (default: a temporary folder)", type=Path)
    flag("--threads", 1, "OMP_NUM_THREADS of a run", at_least=1)
    flag("--json", None, "write all courses here as well", type=Path)
    return flags.parse(parser, words, check_flags)


def check_flags(options):
    """What is wrong with the flags beside their bounds, as sentences."""
    problems = [] if Path(options.model).is_dir() else [f"--model {options.model}: no such folder"]
    if options.json and not options.json.absolute().parent.is_dir():
        problems.append(f"--json {options.json}: its folder is not there")
    return problems


def main(words=None):
    """The command line."""
    options = parse(words)
    from demo.old_film import write_dataset

    work_dir = Path(options.work_dir or tempfile.mkdtemp(prefix="quality-"))
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        if not (work_dir / "old_film").exists():
            write_dataset(work_dir / "old_film")
        folders = write_halves(work_dir / "old_film", work_dir)
        turns, courses = [(seed, name) for seed in range(options.seeds) for name in options.settings], {}
        with progress(turns, "training", unit="run") as bar:
            for seed, name in bar:
                bar.set_postfix_str(f"{name}, seed {seed}")
                courses.setdefault(name, []).append(course_of(train(name, seed, folders, options, work_dir)))
    finally:
        if not options.work_dir:
            shutil.rmtree(work_dir, ignore_errors=True)
    rows = rows_of(courses, options.target)
    print(f"held-out loss {options.target:.0%} below the base model's, {options.seeds} seeds, {options.steps} steps\n\n{table(rows)}")
    if options.json:
        write_bytes(options.json, json.dumps({"rows": rows, "courses": courses, "settings": SETTINGS}, indent=1).encode())


if __name__ == "__main__":
    main()
