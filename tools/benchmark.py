"""Measure on this machine: python -m tools.benchmark encode|start [flags].

encode   peak memory of a run that encodes 16 clips and one that encodes 256, on one process and on two
start    seconds from launch to the first step: an empty cache, then a full one

Each run is a process of its own, on the demo's clips and its tiny model. Prints a table, and JSON with --json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def make_clips(folder, count):
    """A data folder of `count` clips of different content: the demo's, each with a box of its own at the end of the file."""
    captions = (ROOT / "demo/dataset/prompts.txt").read_text().splitlines()
    sources = sorted((ROOT / "demo/dataset/videos").glob("*.mp4"))
    (folder / "videos").mkdir(parents=True)
    for i in range(count):
        mark = f"{i:08d}".encode()
        # An empty `free` box: players skip it, and the content's hash is another.
        extra = (8 + len(mark)).to_bytes(4, "big") + b"free" + mark
        (folder / f"videos/{i:04d}.mp4").write_bytes(sources[i % len(sources)].read_bytes() + extra)
    (folder / "videos.txt").write_text("".join(f"videos/{i:04d}.mp4\n" for i in range(count)))
    (folder / "prompts.txt").write_text("".join(f"{captions[i % len(captions)]} {i}\n" for i in range(count)))
    return folder


def trainer_command(model, clips, output, cache, processes, flags):
    """The command line of a training on one process or several."""
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    line = [sys.executable, *launcher, str(ROOT / "train_cogvideox_lora.py")]
    paths = {"pretrained_model_name_or_path": model, "instance_data_root": clips, "output_dir": output, "encoding_cache_dir": cache}
    for name, value in (paths | flags).items():
        line += [f"--{name}", str(value)]
    return line


def run_trainer(model, clips, output, cache, processes=1, **flags):
    """One short training in a process of its own. Returns (seconds from launch to the first logged step, peak MiB of a trainer process)."""
    values = {
        "height": 64,
        "width": 96,
        "max_num_frames": 17,
        "rank": 4,
        "max_train_steps": 1,
        "report_to": "none",
        "fixed_loss_clips": 0,
    }
    line = trainer_command(model, clips, output, cache, processes, values | flags)
    started, peak, first_step = time.perf_counter(), 0, None
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            peak = max([peak, *trainer_peaks(process.pid)])
            if first_step is None and (Path(output) / "metrics.jsonl").exists() and (Path(output) / "metrics.jsonl").stat().st_size:
                first_step = time.perf_counter() - started
            time.sleep(0.02)
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read().decode()[-2000:])
    return first_step, peak / 1024


def trainer_peaks(pid):
    """The peak resident memory so far, in KiB, of a process and all below it that run the trainer (Linux)."""
    for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split():
        yield from trainer_peaks(int(child))
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(part.endswith(b"train_cogvideox_lora.py") for part in command[1:2]) or b"-u" in command[1:2]:
            status = Path(f"/proc/{pid}/status").read_text()
            yield next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return  # it ended meanwhile


def measure_encode(work, model, options):
    """Peak memory by clips and processes."""
    rows = []
    plan = [(processes, count) for processes in options.processes for count in options.clips]
    for processes, count in tqdm(plan, "runs", unit="run"):
        clips = make_clips(work / f"clips-{processes}-{count}", count)
        seconds, peak = run_trainer(model, clips, work / f"out-{processes}-{count}", work / f"cache-{processes}-{count}", processes)
        rows.append(
            {"processes": processes, "clips": count, "peak_mib_of_a_process": round(peak), "seconds_to_first_step": round(seconds, 1)}
        )
    for row in rows:
        base = next(r for r in rows if r["processes"] == row["processes"])
        row["ratio"] = round(row["peak_mib_of_a_process"] / base["peak_mib_of_a_process"], 3)
    return rows


def measure_start(work, model, options):
    """Seconds to the first step with an empty and with a full cache, interleaved."""
    rows = []
    for count in options.clips:
        clips, seconds = make_clips(work / f"clips-{count}", count), {"empty": [], "full": []}
        for repeat in tqdm(range(options.repeats), f"{count} clips", unit="pair"):
            cache = work / f"cache-{count}-{repeat}"
            seconds["empty"].append(run_trainer(model, clips, work / f"a-{count}-{repeat}", cache)[0])
            seconds["full"].append(run_trainer(model, clips, work / f"b-{count}-{repeat}", cache)[0])
        empty, full = statistics.median(seconds["empty"]), statistics.median(seconds["full"])
        rows.append(
            {"clips": count, "empty_cache_seconds": round(empty, 1), "full_cache_seconds": round(full, 1), "ratio": round(empty / full, 2)}
        )
    return rows


def print_table(rows):
    """Rows as a Markdown table."""
    print("| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encode", "start"))
    parser.add_argument("--clips", type=int, nargs="+", default=[16, 256], help="sizes of the data set")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="encode: processes of a run")
    parser.add_argument("--repeats", type=int, default=3, help="start: pairs of runs")
    parser.add_argument("--model", default=str(ROOT / "demo/model"), help="model folder (default: the demo's; make demo-model writes it)")
    parser.add_argument("--json", help="write the rows here as well")
    options = parser.parse_args()
    if not Path(options.model).is_dir():
        parser.exit(2, f"ERROR[2]: {options.model}: no such folder; make demo-model writes the demo's\n")
    work = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        rows = {"encode": measure_encode, "start": measure_start}[options.what](work, options.model, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print_table(rows)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
