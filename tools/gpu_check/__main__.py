"""Check on this machine's GPU what was predicted for GPUs: python -m tools.gpu_check

Needs no model and no network: the models have the real shapes and random weights, made on the card. Takes ten minutes on one
card, prints a table of claims with their verdicts, and writes two files: gpu_check.json with every number, and gpu_check.md, a
Markdown table with the card's name, which can be pasted into docs/performance.md. Exit code 0: no claim failed; 1: one did; 2:
there is no GPU, or a flag is wrong. Without a GPU the same code runs on tiny models: python -m tools.gpu_check --device cpu --size tiny

Each case is a process of its own, so that one that runs out of memory does not end the others:
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cogvideox.console import BAD_FLAGS, fail, progress, say
from cogvideox.files import read_json_lines, write_bytes
from cogvideox.flags import refuse
from tools.benchmark.harness import ROOT, environment_of, machine_facts
from tools.benchmark.sizes import SIZES
from tools.gpu_check.cases import CASES, ENVIRONMENT
from tools.gpu_check.rows import FAILS, not_run, summary_of, table_of
from tools.processes import family, strike

WORKER = "tools.gpu_check.worker"
BAR = "{l_bar}{bar}| {elapsed}, {remaining} left{postfix}"  # it counts expected seconds, so that a long case is a long part of it


# -----------------------------------------------------------------------------
# Flags


def build_parser():
    """The flags; the list of cases is a part of --help."""
    cases = "\n".join(f"  {name:10} {claim}" for name, (_, _, _, claim) in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__ + "\n" + cases, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--only", nargs="+", choices=list(CASES), metavar="CASE", help="run these cases only")
    flag("--minutes", type=float, default=10.0, help="start no further case after so many minutes (default: 10)")
    flag("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the check itself (default: cuda)")
    flag("--size", choices=list(SIZES), help="2b: the real one; mid: its blocks, 4 of them; tiny (default: 2b; tiny on a CPU)")
    flag("--precision", choices=("bf16", "no"), help="of training steps (default: bf16; no, which is fp32, on a CPU)")
    flag("--json", default="gpu_check.json", help="the file of all numbers; the Markdown table stands beside it (default: %(default)s)")
    return parser


def parse_options(words):
    """The checked flags, with the defaults that depend on the device."""
    parser = build_parser()
    options = parser.parse_args(words)
    problems = [] if options.minutes > 0 else [f"--minutes {options.minutes:g}: must be above 0"]
    if not Path(options.json).absolute().parent.is_dir():
        problems.append(f"--json {options.json}: its folder is not there")
    if problems:
        refuse(parser, problems)
    options.size = options.size or ("2b" if options.device == "cuda" else "tiny")
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "no")
    return options


def missing_gpu():
    """Why there is no GPU to check, as a sentence; None if there is one."""
    import torch  # after the flags are checked

    if torch.cuda.is_available():
        return None
    built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
    return (
        f"--device cuda: torch {torch.__version__}, which {built}, finds no GPU here; on a machine with one, compare its driver with "
        "`nvidia-smi`, or try the check without one: python -m tools.gpu_check --device cpu --size tiny"
    )


# -----------------------------------------------------------------------------
# Cases


def run_worker(job, seconds, tick):
    """Do one case in a process of its own, for so many seconds at most. Returns (exit code, or None if it was ended; its log).

    tick: called with the seconds so far, once a second.
    """
    environment = environment_of(job["threads"]) | ({"CUDA_VISIBLE_DEVICES": ""} if job["device"] == "cpu" else {})
    environment = ENVIRONMENT.get(job["case"], {}) | environment  # what the user has set wins
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        line = [sys.executable, "-m", WORKER, json.dumps(job)]
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() - started < seconds:
                time.sleep(0.2)
                tick(time.monotonic() - started)
            code = process.poll()
        finally:
            if process.poll() is None:
                strike(family(process.pid), signal.SIGKILL)  # also those of its launchers, which would keep their memory of the card
                process.wait()
        log.seek(0)
        return code, log.read().decode(errors="replace")


def run_case(name, options, work, tick):
    """The rows of one case, {"case", ...}; how long it took and what it said goes to each failed one. And facts of the card."""
    _, _, limit, claim = CASES[name]
    folder = work / name
    folder.mkdir()
    result = folder / "rows.jsonl"
    job = {"case": name, "folder": str(folder), "result": str(result), "threads": os.cpu_count() if options.size != "tiny" else 1}
    job |= {"device": options.device, "size": options.size, "precision": options.precision}
    code, log = run_worker(job, limit, tick)
    facts, rows = {}, []
    for line in read_json_lines(result):
        facts, rows = (line["facts"], rows) if "facts" in line else (facts, [*rows, line])
    if code is None:
        rows.append({"case": name} | not_run(claim, f"ended after {limit} s, the time of this case"))
    elif code:
        reason = "killed, perhaps for want of host memory" if code == -signal.SIGKILL else f"its process ended with code {code}"
        rows.append({"case": name} | not_run(claim, reason) | {"verdict": FAILS})
    shutil.rmtree(folder, ignore_errors=True)
    return [row | ({"log": log[-3000:]} if row["verdict"] == FAILS else {}) for row in rows], facts


def run_cases(options, work):
    """Run the cases in turn until the time is over. Returns (rows, seconds of each case, facts of the card)."""
    names, started = options.only or list(CASES), time.monotonic()
    rows, seconds, facts, stopped = [], {}, {}, None
    with progress(total=sum(CASES[name][1] for name in names), desc="checking", bar_format=BAR) as bar:
        for name in names:
            expected, claim, done = CASES[name][1], CASES[name][3], bar.n
            if not stopped and time.monotonic() - started > 60 * options.minutes:
                stopped = f"the {options.minutes:g} minutes were over; give more with --minutes, or this case with --only {name}"
            if stopped:
                rows.append({"case": name} | not_run(claim, stopped))
                continue
            bar.set_postfix_str(name)

            def tick(elapsed, done=done, expected=expected):
                bar.update(int(min(elapsed, expected)) - (bar.n - done))

            began = time.monotonic()
            try:
                found, of_card = run_case(name, options, work, tick)
            except KeyboardInterrupt:
                stopped = "stopped by Ctrl-C"
                rows.append({"case": name} | not_run(claim, stopped))
                continue
            rows, facts, seconds[name] = rows + found, facts | of_card, round(time.monotonic() - began, 3)
            bar.update(expected - (bar.n - done))
            say(f"{name}: {summary_of(found)} ({seconds[name]:.0f} s)")
    return rows, seconds, facts


# -----------------------------------------------------------------------------
# The command


def driver_facts():
    """The driver's version, and MiB of the first card that programs use already, as nvidia-smi tells them; {} without it."""
    line = ["nvidia-smi", "--query-gpu=driver_version,memory.used", "--format=csv,noheader,nounits"]
    try:
        words = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0].split(",")
        return {"driver": words[0].strip(), "used_mib_before": float(words[1])}
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}


def heading_of(facts, options):
    """The card, its driver and the versions, as one line."""
    card = facts.get("card", "none")
    parts = [f"{facts['cards']} x {card}, {facts['memory_gib']} GiB" if facts.get("cards", 1) > 1 else card]
    if facts.get("cards", 1) == 1 and facts.get("memory_gib"):
        parts[0] += f", {facts['memory_gib']} GiB"
    parts += [f"driver {facts['driver']}"] if "driver" in facts else []
    parts += [f"CUDA {facts['cuda']}, cuDNN {facts['cudnn']}"] if facts.get("cuda") else []
    return f"GPU: {'; '.join(parts)}; {machine_facts()['machine']}; size {options.size}, precision {options.precision}"


def main(words=None):
    """The command line."""
    options = parse_options(words)
    if options.device == "cuda" and (problem := missing_gpu()):
        fail(BAD_FLAGS, problem)
    facts = driver_facts() if options.device == "cuda" else {}
    if facts.get("used_mib_before", 0) > 1024:
        say(f"note: other programs use {facts['used_mib_before']:.0f} MiB of the card; seconds and memory will suffer")
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    # So that a check that is stopped leaves nothing running, and nothing on the disk.
    handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        rows, seconds, of_card = run_cases(options, work)
    finally:
        signal.signal(signal.SIGTERM, handler)
        shutil.rmtree(work, ignore_errors=True)
    heading = heading_of(facts | of_card, options)
    shown, total = table_of(rows), f"{summary_of(rows)}, in {sum(seconds.values()) / 60:.1f} minutes"
    print(f"\n{heading}\n\n{shown}\n\n{total}")
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    result = {"heading": heading, "facts": facts | of_card, "settings": settings, "seconds": seconds, "rows": rows}
    target = Path(options.json)
    write_bytes(target, json.dumps(result, indent=1).encode())
    command = f"`python -m tools.gpu_check --device {options.device} --size {options.size} --precision {options.precision}`"
    write_bytes(target.with_suffix(".md"), f"{command}\n\n{heading}; {total}.\n\n{shown}\n".encode())
    say(f"\nall numbers: {target}; the table: {target.with_suffix('.md')}")
    if any(row["verdict"] == FAILS for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
