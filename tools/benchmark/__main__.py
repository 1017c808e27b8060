"""Measure on this machine, ours against a baseline: python -m tools.benchmark step|growth|start|memory|encode|decode|scale [flags].

step     seconds of an optimizer step, and the share of the machine's matmul peak that its useful FLOPs reach
growth   how the seconds of our step grow with frames, size, rank and clips in a batch (in the data set: start, memory)
start    seconds from launch to the first step: full cache, empty cache, baseline
memory   peak memory of whole runs (encoding, training, validation), and that it does not grow with the clips
encode   clips a second of decoding, VAE and T5, each against its own limit
decode   clips a second of decoding, in five ways
scale    ours on 1, 2, 4 processes under each engine: seconds a step, bytes sent, memory of each process
quality  steps and seconds until a held-out loss is reached, with the guide's settings and with the defaults (tools/quality.py)

The baseline is tools/benchmark/reference.py: how the original trainer works, on the same machine, model and data. Every
measurement is a process of its own; the variants take turns (A B C A B C ...), and a ratio is the median over the turns of
baseline / ours within a turn. "others" is the largest share of the CPUs that other processes used meanwhile: above some 10 %
a sample is disturbed. Useful FLOPs are those of our step: no T5, nothing recomputed. Prints a Markdown table; --json FILE has
all samples.

scale counts bytes with torch's profiler: every collective of one optimizer step, with the size of its tensor. How many of them
a process sends follows from the ring that NCCL uses for large tensors; what larger clusters would send is computed from that,
in a table of its own.
"""

import argparse
import functools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from cogvideox.files import write_bytes
from cogvideox.flags import refuse
from tools.benchmark.harness import has_fast_bf16, machine_facts, table
from tools.benchmark.measurements import CONFIGS, MEASUREMENTS
from tools.benchmark.sizes import SIZES, VAES, spell

# name, help, sizes of the clip, turns, steps or calls that are timed in a process
COMMANDS = (
    ("step", "seconds of an optimizer step", "9x96x96 9x192x288", 3, 5),
    ("growth", "how the seconds of our step grow", "9x96x96", 2, 2),
    ("start", "seconds from launch to the first step", "9x96x96", 3, None),
    ("memory", "peak memory of whole runs", "9x96x96", 1, 4),
    ("encode", "clips a second of decoding, VAE and T5", "9x96x96", 3, 3),
    ("decode", "clips a second of decoding", "49x480x720", 3, 2),
    ("scale", "steps on several processes: time, bytes sent, memory", "9x96x96", 1, 3),
)


# -----------------------------------------------------------------------------
# Flags


def parse_shape(word):
    """[frames, height, width] of FRAMESxHEIGHTxWIDTH."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", word)
    shape = list(map(int, match.groups())) if match else [0, 0, 0]
    if min(shape) < 1 or shape[0] % 4 != 1 or shape[1] % 16 or shape[2] % 16:
        raise argparse.ArgumentTypeError(f"{word}: FRAMESxHEIGHTxWIDTH in pixels, 4k + 1 frames, multiples of 16 (9x96x96)")
    return shape


def parse_frames(word):
    """A number of frames, checked as a part of a shape."""
    return parse_shape(f"{word}x16x16")[0]


def parse_side(word):
    """A height or width in pixels, checked as a part of a shape."""
    return parse_shape(f"1x{word}x{word}")[1]


def count(word):
    """A whole number of 1 or more."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: a whole number, at least 1")
    return int(word)


def add_shared_flags(name, flag, shape, repeats, steps):
    """The flags that several commands have, added to command `name` by its `flag`."""
    shapes, several = [parse_shape(word) for word in shape.split()], "+" if name == "step" else 1
    flag("--shape", type=parse_shape, nargs=several, default=shapes, help=f"FRAMESxHEIGHTxWIDTH in pixels (default: {shape})")
    flag("--repeats", type=count, default=repeats, help=f"turns of all variants (default: {repeats})")
    flag("--json", help="write all rows and samples here as well")
    flag("--threads", type=count, help="OMP_NUM_THREADS of the processes (default: all cores; 1 at size tiny)")
    if steps:
        flag("--steps", type=count, default=steps, help=f"timed steps, or calls, of each process (default: {steps})")
    if name != "decode":
        flag("--size", choices=list(SIZES), default="mid", help="2b: the real one; mid: its blocks, 4 of them; tiny (default: mid)")
        flag("--precision", choices=("bf16", "no"), help="of both variants (default: bf16 where this machine multiplies it fast)")
    if name in ("step", "growth", "start", "memory", "scale"):
        flag("--rank", type=count, help="rank of the LoRA (default: 128; 4 at size tiny)")
        flag("--gradient_checkpointing", choices=("none", "all"), default="none", help="of both variants (default: none)")
    if name not in ("start", "memory", "scale"):
        flag("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, for --threads 1 on a machine that is not quiet")
    if name in ("start", "memory"):
        clips = [16] if name == "start" else [16, 256]
        flag("--model", help="model folder (default: one is generated)")
        flag("--clips", type=count, nargs="+", default=clips, help=f"sizes of the data set (default: {' '.join(map(str, clips))})")
    if name in ("start", "memory", "encode"):
        size = "small" if name == "memory" else "real"
        flag("--vae", choices=list(VAES), default=size, help=f"of the generated model (default: {size}; small at size tiny)")
    if name in ("encode", "decode"):
        source = "49x720x1280"
        flag("--source", type=parse_shape, nargs=1, default=[parse_shape(source)], help=f"size of the files to decode (default: {source})")
        flag("--data", help="folder of files to decode, and nothing else (default: some are generated)")
        flag("--clips", type=count, nargs=1, default=[4], help="files to generate (default: 4)")
        flag("--fps", type=count, default=8, help="frames a second, of the files and of the clips (default: 8)")
    if name in ("step", "growth", "scale"):
        flag("--warmup", type=count, default=1, help="steps before the timed ones, beside the one whose FLOPs are counted (default: 1)")


def add_own_flags(commands):
    """The flags that one command has. commands: name -> its parser."""
    flag = commands["growth"].add_argument
    for name, kind, values, words in (
        ("frames", parse_frames, [9, 17, 33], "frames of a clip"),
        ("sides", parse_side, [96, 192, 288], "height and width of a square clip, pixels"),
        ("ranks", count, [32, 128, 512], "ranks of the LoRA"),
        ("batches", count, [1, 2, 4], "clips in a batch"),
    ):
        words += f", all else as --shape and --rank (default: {' '.join(map(str, values))})"
        flag(f"--{name}", type=kind, nargs="+", default=values, help=words)
    flag = commands["step"].add_argument
    flag("--plain_linears", action="store_true", help="a third variant: ours without row-chunked linear layers")
    flag = commands["scale"].add_argument
    flag("--engines", nargs="+", choices=list(CONFIGS), default=["ddp", "fsdp2"], help="what runs the processes (default: ddp fsdp2)")
    flag("--processes", type=count, nargs="+", default=[1, 2, 4], help="numbers of processes (default: 1 2 4)")
    flag("--training_type", choices=("lora", "sft"), default="lora", help="a LoRA, or all weights (default: lora)")
    flag = commands["memory"].add_argument
    flag("--part", nargs="+", choices=("runs", "growth"), default=["runs", "growth"], help="whole runs; ours by clips and processes")
    flag("--processes", type=count, nargs="+", default=[1, 2], help="growth: processes of a run (default: 1 2)")


def build_parser():
    """One subcommand a measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="what", required=True, metavar="|".join((*MEASUREMENTS, "quality")))
    commands = {}
    for name, summary, *defaults in COMMANDS:
        commands[name] = subparsers.add_parser(name, help=summary, description=summary)
        add_shared_flags(name, commands[name].add_argument, *defaults)
    add_own_flags(commands)
    subparsers.add_parser("quality", help="steps and seconds to a held-out loss, by settings", add_help=False)  # has its own flags
    for each in (parser, *commands.values()):
        each.error = functools.partial(end, each)
    return parser


def end(parser, message):
    """A mistake of the user: one sentence, exit code 2."""
    refuse(parser, [message])


def parse_options(words):
    """The checked flags of one command, with the defaults that depend on the machine and on --size."""
    parser = build_parser()
    options = parser.parse_args(words)
    for name in ("model", "data"):
        folder = getattr(options, name, None)
        if folder and not Path(folder).is_dir():
            parser.error(f"--{name} {folder}: no such folder")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: its folder is not there")
    if options.what not in ("step", "growth", "scale") and options.shape[0][2] in (16, 48):
        parser.error(f"--shape {spell(options.shape[0])}: decord, which the baseline decodes with, refuses this width; try 96")
    tiny = getattr(options, "size", None) == "tiny"
    options.threads = options.threads or (1 if tiny or options.what == "scale" else os.cpu_count())
    if "precision" in options and options.precision is None:
        options.precision = "bf16" if has_fast_bf16() else "no"
    if tiny and "vae" in options:
        options.vae = "small"
    return options


# -----------------------------------------------------------------------------
# The command


def main(words=None):
    """The command line."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["quality"]:
        from tools import quality  # imports torch, which the other commands leave to their workers

        quality.main(words[1:])
        return
    options = parse_options(words)
    # So that a benchmark that is stopped leaves nothing running, and nothing on the disk.
    handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    work = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        result = MEASUREMENTS[options.what](work, options)
    finally:
        signal.signal(signal.SIGTERM, handler)
        shutil.rmtree(work, ignore_errors=True)
    samples = result["samples"]
    machine = next((sample["machine"] for sample in samples if "machine" in sample), machine_facts(options.threads)["machine"])
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "model", "data")}
    shown = [f"{name} {settings[name]}" for name in ("size", "precision", "vae", "gradient_checkpointing") if name in settings]
    print(f"{'; '.join([machine, *shown])}\n")
    print("\n\n".join(table(result[part]) for part in ("rows", "growth", "fits", "computed") if result.get(part)))
    if options.json:
        write_bytes(Path(options.json), json.dumps({"machine": machine, "settings": settings} | result, indent=1).encode())


if __name__ == "__main__":
    main()
