"""Do one case in this process: python -m tools.gpu_check.worker JOB. And what the cases share.

A job is a dictionary that JSON can hold: case, device (cuda or cpu), size, precision, `folder` for files, and `result`, the file
that gets each row as a line when it is known, so that a process that is ended leaves those before.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from cogvideox import memory
from cogvideox.stopping import is_out_of_memory
from tools.benchmark.models import make_text_encoder, make_vae
from tools.benchmark.sizes import SIZES, VAES
from tools.gpu_check.cases import CASES, SHAPES, SHORT_SHAPES
from tools.gpu_check.rows import failed, not_run

OUT_OF_MEMORY = "out of memory"
SMALL_CARD = 20 * 2**30  # bytes; a card of 24 GB has room for every case but the baseline at the full size


def step_job(job, short=False, **changed):
    """The job of tools/benchmark/variants.py for steps of a case's model. short: at the smaller shape."""
    shapes = SHORT_SHAPES if short else SHAPES
    common = {"variant": "ours", "size": job["size"], "precision": job["precision"], "rank": SIZES[job["size"]]["rank"], "clock": "wall"}
    return common | {"shape": list(shapes[job["size"]]), "gradient_checkpointing": "none", "steps": 4, "warmup": 1} | changed


def stored_dtypes(job):
    """The precision in which the parts of a case's model are stored: the 2B's, or what a CPU runs them in. A small VAE is fp32."""
    dtypes = dict.fromkeys(memory.PARTS, "fp16" if job["device"] == "cuda" else "no")
    return dtypes | ({"vae": "no"} if vae_kind(job) == "small" else {})


def vae_kind(job):
    """The VAE that goes with a size."""
    return "small" if job["size"] == "tiny" else "real"


def configs_of(job):
    """The configs of a case's model, as cogvideox.memory takes them."""
    size = SIZES[job["size"]]
    text_encoder = memory.T5_XXL | size["t5"]
    parts = {"transformer": size["transformer"], "vae": VAES[vae_kind(job)], "text_encoder": text_encoder}
    return parts | {"dtypes": stored_dtypes(job)}


def build_vae(job, tiling=True):
    """The VAE of a case, as `load_vae` returns one."""
    vae = make_vae(vae_kind(job), memory.PRECISIONS[stored_dtypes(job)["vae"]], job["device"])
    vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    return vae


def build_text_encoder(job):
    """The T5 encoder of a case, as `load_text_encoder` returns one: transformers keeps `wo` in fp32 when it loads fp16."""
    dtype = memory.PRECISIONS[stored_dtypes(job)["text_encoder"]]
    encoder = make_text_encoder(job["size"], dtype, job["device"])
    for name, module in encoder.named_modules():
        if name.endswith(".wo") and dtype == torch.float16:
            module.to(torch.float32)
    return encoder


def resident_bytes(trained):
    """Bytes of weights, tables and optimizer states of a model in training."""
    tensors = [*trained.transformer.parameters(), *memory.frozen_tensors(trained.transformer)]
    tensors += [value for state in trained.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def start_afresh():
    """Free what the last variant left, and let accelerate begin anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def is_small_card():
    """Whether the GPU has less memory than the cases of one size are made for."""
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < SMALL_CARD


def reason_of(error):
    """An exception as a sentence."""
    text = (str(error).splitlines() or [""])[0][:300]
    if is_out_of_memory(error):
        return f"{OUT_OF_MEMORY}: {text}"
    return f"{type(error).__name__}: {text}"


def attempt(claim, rows, promised=False):
    """The rows of a generator; an error in it becomes a row that fails. Memory is freed before and after.

    promised: whether the memory was predicted to be enough; otherwise running out of it on a small card is no failure.
    """
    start_afresh()
    try:
        yield from rows
    except (Exception, SystemExit) as error:
        traceback.print_exc()  # into the case's log
        reason = reason_of(error)
        small = reason.startswith(OUT_OF_MEMORY) and not promised and is_small_card()
        yield not_run(claim, f"this card is too small: {reason}") if small else failed(claim, reason)
        error.__traceback__ = None  # its frames hold the model
    finally:
        rows.close()
    start_afresh()


def card_facts(device):
    """The card as torch sees it."""
    if device != "cuda":
        return {"card": "none", "memory_gib": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cards": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def main(job):
    """Do a case; its rows go to job["result"]."""
    module, _, _, claim = CASES[job["case"]]
    check = getattr(importlib.import_module(f"tools.gpu_check.{module}"), f"check_{job['case']}")
    with Path(job["result"]).open("a") as file:
        file.write(json.dumps({"facts": card_facts(job["device"])}) + "\n")
        for row in attempt(claim, check(job)):
            file.write(json.dumps({"case": job["case"]} | row) + "\n")
            file.flush()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(json.loads(sys.argv[1]))
