"""A real training under random kills and full disks: python -m tools.chaos (or make chaos).

Starts the demo's training again and again, on one process and on two, and strikes at random moments of every phase
(checking, encoding, rehearsal, training, saving, validation): kill -9, SIGTERM or SIGINT to all processes, to the launcher
or to one trainer. Some episodes run with almost no disk. Each start is the same command with --resume_from_checkpoint latest. At the end
the weights, the optimizer and the logged losses have to equal, bit for bit, those of a run that nobody disturbed.

Exit code 0 if they do. Prints a table of what was done, and writes it with --report.
"""

import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file

from cogvideox import flags
from cogvideox.checkpoint import BadCheckpoint, list_checkpoints, read_manifest
from cogvideox.console import fail, progress
from cogvideox.files import write_bytes
from tools.benchmark.harness import ROOT, environment_of
from tools.benchmark.programs import make_clips, trainer_command
from tools.processes import family, strike, wait_for_end

LATE, CUT = "did not end in a minute", "an incomplete checkpoint"
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


def command(model, clips, output, cache, processes, steps):
    """The command line of the training; the same for every start."""
    values = {
        "height": 32,
        "width": 48,
        "max_num_frames": 9,
        "rank": 4,
        "learning_rate": 0.01,
        "lr_scheduler": "cosine",
        "caption_dropout": 0.1,
        "lora_dropout": 0.1,
        "gradient_accumulation_steps": 2 // processes,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "checkpointing_steps": 5,
        "checkpoints_total_limit": 3,
        "validation_prompt": "a rabbit",
        "validation_steps": steps // 4,
        "num_inference_steps": 2,
        "eval_clips": 1,
        "report_to": "none",
        "resume_from_checkpoint": "latest",
        "deterministic": True,  # the bits are compared, also on a GPU
    }
    return trainer_command(model, clips, output, cache, processes, values)


def start(line, log):
    """One start, in a process group of its own."""
    return subprocess.Popen(line, stdout=log, stderr=log, env=environment_of(1), start_new_session=True)


def targets(process, chance):
    """Whom to strike, as words and processes: the whole run, only who started it, or one trainer of several."""
    everyone = family(process.pid)
    trainers = [one for one in everyone[1:] if any("train_cogvideox_lora.py" in word for word in one.cmdline()[:4])]
    choices = [("all", everyone), ("the launcher", everyone[:1]), ("one trainer", [chance.choice(trainers or everyone)])]
    return chance.choice(choices if len(trainers) > 1 else choices[:1])


def wait_for_step(process, log_path):
    """Wait until a run shows its training bar, or has ended."""
    while process.poll() is None and b"loss=" not in Path(log_path).read_bytes():
        time.sleep(0.05)


def phase_of(log_path):
    """Where a run was, by what it had written last."""
    text = Path(log_path).read_bytes().decode(errors="replace")
    for words, phase in (
        ("loss=", "training"),
        ("rehearsal:", "before step 1"),
        ("encodings in", "encoding, rehearsal"),
        ("checking", "checking"),
    ):
        if words in text:
            return phase
    return "starting"


def losses(folder):
    """What metrics.jsonl says of each step, without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines if "loss" in line]


def differences(a, b, steps):
    """What differs between two finished runs, as sentences."""
    found = []
    for name in (
        f"checkpoint-{steps}/adapter.safetensors",
        f"checkpoint-{steps}/optimizer.safetensors",
        "pytorch_lora_weights.safetensors",
    ):
        one, other = load_file(a / name), load_file(b / name)
        wrong = [key for key in one if key not in other or not one[key].equal(other[key])]
        found += [f"{name}: {len(wrong)} of {len(one)} tensors"] if wrong or one.keys() != other.keys() else []
    return found + (["metrics.jsonl"] if losses(a) != losses(b) else [])


def fill_disk(folder, leave_kib):
    """Fill a small file system up to `leave_kib`; returns the file to remove again."""
    free = shutil.disk_usage(folder).free
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        file.write(b"\0" * max(0, free - leave_kib * 1024))
    return ballast


def wait_for_moment(process, log_path, longest, chance):
    """Wait for a random moment of a run. Starting takes longer than the rest: six in ten wait for a trained step."""
    if chance.random() < 0.6:
        wait_for_step(process, log_path)
        time.sleep(chance.uniform(0, 3))
    else:
        time.sleep(chance.uniform(0.5, longest))


def disturb(process, log_path, chance, counts):
    """Strike a run, and wait until all of it has ended."""
    everyone = family(process.pid)
    name, (whom, victims) = chance.choice(list(SIGNALS)), targets(process, chance)
    words = f"{name} to {whom} in {phase_of(log_path)}"
    counts[words] += 1
    strike(victims, SIGNALS[name])
    if not wait_for_end(everyone, 60):
        counts[f"{LATE}: {words}"] += 1
    process.wait()


def last_checkpoint(output):
    """[the newest checkpoint's folder], or []."""
    return [path for _, path in list_checkpoints(output)[-1:]]


def episode(line, log_path, ballast, output, longest, chance, counts):
    """One start and its end, by a strike or by itself. Returns whether it was struck. ballast: the file that fills the disk, or None."""
    with log_path.open("wb") as log:
        process = start(line, log)
        wait_for_moment(process, log_path, longest, chance)
        struck = process.poll() is None
        if struck:
            disturb(process, log_path, chance, counts)
        else:
            counts["it had ended by itself"] += 1
    if not struck and not ballast:
        for path in last_checkpoint(output):
            shutil.rmtree(path)  # give the next strikes something to do
    if ballast:
        ballast.unlink()
    for path in last_checkpoint(output):
        try:
            read_manifest(path)
        except BadCheckpoint:
            counts[CUT] += 1
    return struck


def run_to_end(line, log_path):
    """Run a training to its end; ends the program where that fails."""
    with log_path.open("wb") as log:
        code = start(line, log).wait()
    if code:
        fail(1, f"a run that was left alone ended with code {code}:\n{log_path.read_text()[-3000:]}")


def torment(options, clips, work, processes, chance, counts):
    """Disturb one training until `options.strikes` strikes have been made, then let it end. Returns its output folder."""
    disk, output = work / f"disk-{processes}", work / f"disk-{processes}/out"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode == 0
    counts["small disk"] = "a tmpfs of 16 MiB" if mounted else "not run: no right to mount one"
    line = command(options.model, clips, output, work / f"cache-{processes}", processes, options.steps)
    try:
        with progress(total=options.strikes, desc=f"{processes} processes", unit="strike") as bar:
            number, struck = 0, 0
            while struck < options.strikes:
                number, ballast = number + 1, None
                if mounted and number % 8 == 7:  # too little for a checkpoint, enough for a line of metrics
                    ballast = fill_disk(disk, chance.choice([8, 64, 200]))
                    counts["full disk"] += 1
                if episode(line, work / f"log-{processes}-{number}", ballast, output, options.longest, chance, counts):
                    struck += 1
                    bar.update()
        run_to_end(line, work / f"log-{processes}-end")
        return Path(shutil.copytree(output, work / f"end-{processes}"))
    finally:
        if mounted:
            subprocess.run(["umount", "-l", disk])


def parse(words):
    """The checked flags. Ends with exit code 2 and all problems."""
    parser = flags.new_parser(__doc__)
    parser.prog = "python -m tools.chaos"
    flag = flags.flag_group(parser, "chaos")
    flag("--strikes", 30, "strikes that hit a running process, on each training (one process, two processes)", at_least=1)
    flag("--steps", 400, "optimizer steps of the training", at_least=4)
    flag("--longest", 14.0, "a strike comes at most so many seconds after the start", at_least=0.5)
    flag("--seed", 0, "seed of the strikes")
    flag("--model", str(ROOT / "demo/tiny_model"), "model folder; python -m demo.make_model writes a tiny one")
    flag("--report", None, "write the table here as well")
    return flags.parse(parser, words, check_flags)


def check_flags(options):
    """What is wrong with the flags beside their bounds, as sentences."""
    return [] if Path(options.model).is_dir() else [f"--model {options.model}: no such folder; python -m demo.make_model writes a tiny one"]


def main(words=None):
    """The command line."""
    options = parse(words)
    work, counts, wrong = Path(tempfile.mkdtemp(prefix="chaos-")), Counter(), []
    try:
        clips = make_clips(work / "clips", 12)
        for processes in (1, 2):
            quiet, cache = work / f"quiet-{processes}", work / f"quiet-cache-{processes}"
            run_to_end(command(options.model, clips, quiet, cache, processes, options.steps), work / f"log-quiet-{processes}")
            disturbed = torment(options, clips, work, processes, random.Random(options.seed + processes), counts)
            wrong += [f"{processes} processes: {sentence}" for sentence in differences(quiet, disturbed, options.steps)]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    lines = ["| what was done | times |", "|---|---|", *[f"| {name} | {counts[name]} |" for name in sorted(counts)]]
    verdict = "the same bits as an undisturbed run: weights, optimizer, losses" if not wrong else "DIFFERENT: " + "; ".join(wrong)
    lines += ["", f"{2 * options.strikes} strikes; {options.steps} steps on one process and on two; {verdict}."]
    print("\n".join(lines))
    if options.report:
        write_bytes(Path(options.report), ("\n".join(lines) + "\n").encode())
    bad = wrong or any(name.startswith(LATE) for name in counts) or counts[CUT]
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
