"""Cases of equal numbers: CPU and GPU, resumed and undisturbed, attention kernels, the base in two precisions."""

import contextlib
import functools
import math
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from cogvideox import attention
from cogvideox.files import LORA_FILE, read_json, read_json_lines
from demo.make_model import make_model
from tools.benchmark import variants
from tools.benchmark.counters import waited
from tools.benchmark.harness import ROOT, environment_of, seconds_of
from tools.benchmark.programs import trainer_command
from tools.benchmark.sizes import SIZES, tokens_of
from tools.gpu_check.phases import score_clips
from tools.gpu_check.rows import not_run, row
from tools.gpu_check.worker import start_afresh, step_job

# The run of tests/test_loss.py, whose losses are on record, and its model; tests/test_gpu_check.py compares both with that test's.
GOLDEN_MODEL = {"vae_channels": 8, "heads": 2, "head_width": 16}
SMALL_RUN = {
    "rank": 4,
    "learning_rate": 1e-2,
    "num_inference_steps": 2,
    "eval_clips": 0,
    "gradient_checkpointing": "none",
    "report_to": "none",
}
GOLDEN_RUN = {"height": 32, "width": 48, "max_num_frames": 9, "max_train_steps": 10} | SMALL_RUN
GOLDEN_CLIPS = 6
# The losses on record have six digits; ten steps of Adam make more of a first difference of rounding.
FIRST_LOSS, ALL_LOSSES = 1e-5, 2e-4
# A model whose attention has more tokens than a kernel takes at once: within a block no backward pass adds in random order.
RESUME_MODEL = {"layers": 2, "heads": 4, "head_width": 64}
RESUME_RUN = {"height": 128, "width": 192, "max_num_frames": 9, "max_train_steps": 4, "checkpointing_steps": 2} | SMALL_RUN
ROWS_COMPARED = 64  # of the output, with one computed in fp32


# -----------------------------------------------------------------------------
# Whole runs


def write_clips(folder, count):
    """A data folder with the first clips of the demo."""
    (folder / "videos").mkdir(parents=True)
    for name in ("prompts.txt", "videos.txt"):
        lines = (ROOT / "demo/dataset" / name).read_text().splitlines()[:count]
        (folder / name).write_text("\n".join(lines) + "\n")
    for line in lines:
        shutil.copy(ROOT / "demo/dataset" / line, folder / line)
    return folder


def run_trainers(lines, threads, **variables):
    """Run command lines beside each other, to their ends. variables: environment on top.

    RuntimeError with the end of its log if one failed.
    """
    environment = environment_of(threads) | variables
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in lines]
        runs = [
            subprocess.Popen(list(map(str, line)), stdout=log, stderr=log, env=environment, cwd=ROOT)
            for line, log in zip(lines, logs, strict=True)
        ]
        for run, log in zip(runs, logs, strict=True):
            if run.wait():
                log.seek(0)
                raise RuntimeError(f"a training ended with code {run.returncode}: {log.read().decode(errors='replace')[-1000:]}")


def check_golden(job):
    """The losses of the run whose losses on a CPU are on record, on this device."""
    golden = read_json(ROOT / "tests/golden_losses.json")
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        folder = Path(folder)
        clips, source = write_clips(folder / "clips", GOLDEN_CLIPS), make_model(folder / "model", **GOLDEN_MODEL)
        # By default cuDNN's convolutions multiply fp32 in TF32, and the latents of a VAE in fp32 would have three digits.
        line = trainer_command(source, clips, folder / "run", folder / "cache", 1, GOLDEN_RUN)
        run_trainers([line], job["threads"], NVIDIA_TF32_OVERRIDE="0")
        losses = [line["loss"] for line in read_json_lines(folder / "run/metrics.jsonl") if "loss" in line]
    off = [abs(ours - theirs) / theirs for theirs, ours in zip(golden, losses, strict=True)]
    claim = "the CPU's losses in fp32"
    yield row(f"{claim}: the first", golden[0], losses[0], "", off[0] <= FIRST_LOSS, f"off by {off[0]:.1e}, at most {FIRST_LOSS:.0e}")
    remark = f"off by {max(off):.1e} at most in {len(off)} steps, allowed {ALL_LOSSES:.0e}"
    yield row(f"{claim}: all {len(off)}", golden[-1], losses[-1], "", max(off) <= ALL_LOSSES, remark, losses=losses, golden=golden)


def check_resume(job):
    """A run, and the same one resumed in its middle: with --deterministic the same bits."""
    kinds = {"without --deterministic": {}, "with --deterministic": {"deterministic": True}}
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        folder = Path(folder)
        source, clips = make_model(folder / "model", **RESUME_MODEL), write_clips(folder / "clips", 4)
        flags = RESUME_RUN | {"mixed_precision": job["precision"]}
        outputs = {kind: (folder / f"{number}-whole", folder / f"{number}-resumed") for number, kind in enumerate(kinds)}

        def line_of(kind, output, **more):
            return trainer_command(source, clips, output, folder / f"cache-{output.name[0]}", 1, flags | kinds[kind] | more)

        began = time.perf_counter()
        run_trainers([line_of(kind, whole) for kind, (whole, _) in outputs.items()], job["threads"])
        for whole, resumed in outputs.values():
            shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
        run_trainers([line_of(kind, resumed, resume_from_checkpoint="latest") for kind, (_, resumed) in outputs.items()], job["threads"])
        seconds = time.perf_counter() - began
        for kind, pair in outputs.items():
            before, after, moved = (load_file(path / LORA_FILE) for path in (*pair, pair[0] / "checkpoint-2"))
            apart = max((before[name] - after[name]).abs().max().item() for name in before)
            trained = max((before[name] - moved[name]).abs().max().item() for name in before)
            remark = f"steps 3 and 4 moved a weight by up to {trained:.1e}; {seconds:.0f} s for all runs"
            claim = f"resumed {kind}: largest difference of a weight"
            holds = (apart == 0 and trained > 0) if kind.startswith("with ") or job["device"] == "cpu" else None
            yield row(claim, 0.0 if holds is not None else None, apart, "", holds, remark, moved=trained)


# -----------------------------------------------------------------------------
# Attention


def attention_inputs(job):
    """Queries, keys, values and the output's gradient [1, heads, tokens, width] of the largest shape."""
    config = SIZES[job["size"]]["transformer"]
    heads, width = config.get("num_attention_heads", 30), config.get("attention_head_dim", 64)
    shape = 4, 1, heads, tokens_of(step_job(job)["shape"]), width
    dtype = torch.bfloat16 if job["device"] == "cuda" else torch.float32
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(job["device"], dtype)
    return drawn.unbind()


def exact_rows(query, key, value, gradient):
    """(output, the queries' gradient) of the first rows, computed in fp32 from the definition."""
    rows = query[:, :, :ROWS_COMPARED].detach().float().requires_grad_()
    scores = rows @ key.detach().float().transpose(-1, -2) / rows.shape[-1] ** 0.5
    output = scores.softmax(-1) @ value.detach().float()
    return output.detach(), torch.autograd.grad(output, rows, gradient[:, :, :ROWS_COMPARED].float())[0]


def error_of(result, exact):
    """The largest error of the rows compared, against the largest exact number."""
    pairs = zip((result[0], result[1]), exact, strict=True)
    return max(((ours[:, :, :ROWS_COMPARED].float() - true).abs().max() / true.abs().max()).item() for ours, true in pairs)


def check_attention(job):
    """Seconds of each kernel, forward and backward, its error, and whether --attention_backend auto takes the fastest exact one."""
    inputs = attention_inputs(job)
    exact, (_, _, tokens, width) = exact_rows(*inputs), inputs[0].shape
    device, dtype = torch.device(job["device"]), inputs[0].dtype
    most = 2e-2 if dtype == torch.bfloat16 else 1e-5  # bf16 has three digits
    found, seconds, fits = attention.usable(device, dtype, width), {}, {}
    for name in attention.KERNELS:
        claim = f"{name} attention, {tokens} tokens: largest relative error"
        if name == "math":
            continue  # keeps tokens x tokens numbers
        if name not in found:
            yield not_run(claim, "torch has no such kernel here")
            continue
        attention.select_flash(name)
        call = waited(functools.partial(attention.attend, name, *inputs), device)
        error = error_of(call(), exact)
        seconds[name] = sorted(seconds_of(call, 5, "wall")[0])[2]
        attention.select_flash("flash")
        if error <= most:
            fits[name] = seconds[name]
        yield row(claim, f"{most} or less", error, "", error <= most, f"{1000 * seconds[name]:.2f} ms forward and backward")
    best = min(fits, key=fits.get)
    chosen, sentence = attention.pick(attention.measure(list(seconds), device, dtype, inputs[0].shape), dtype)
    claim = "--attention_backend auto: its kernel's time, at most 1.1 times that of the fastest exact one"
    holds = chosen in fits and (job["device"] == "cpu" or seconds[chosen] <= 1.1 * fits[best])
    yield row(claim, 1000 * fits[best], 1000 * seconds.get(chosen, math.inf), "ms", holds, sentence, kernels=seconds, chosen=chosen)


# -----------------------------------------------------------------------------
# The base in two precisions


def check_base(job):
    """The base's loss on fixed noise, in its stored precision and in bf16."""
    stored, losses = ("fp16" if job["device"] == "cuda" else "no"), {}
    for precision in (stored, "bf16"):
        start_afresh()
        with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
            run = variants.our_run(step_job(job | {"precision": precision}), Path(folder))
            scores = score_clips(run, 2)["train"]  # a new LoRA has no effect
            losses[precision] = sum(scores) / len(scores)
            del run
    off = abs(losses["bf16"] / losses[stored] - 1)
    remark = f"off by {100 * off:.3f} %; random weights, so this says nothing about the 2B's"
    name = stored.replace("no", "fp32")
    yield row(f"the base's loss in {name} and in bf16, within 1 %", losses[stored], losses["bf16"], "", off <= 0.01, remark, off=off)
