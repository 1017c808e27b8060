"""Full fine-tuning: every weight of the transformer is trained in fp32, and one ordinary diffusers folder comes out.

The module has what lora.py has for a LoRA: the trained weights, how they are shipped, and a check of what was shipped.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel

from cogvideox.engine import trained_state, trained_weights, write_trained
from cogvideox.files import write_durably, write_tensors
from cogvideox.lora import check_finite
from cogvideox.model import load_transformer

RESULT, WEIGHTS, LOADER = "transformer", "weights.safetensors", "diffusers"
EFFECT = "largest weight"
FILES = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]


def build(args, folder, dtype):
    """The transformer of a model folder as training starts with it: every weight trainable and in fp32; on the CPU.

    fp32 whatever is computed in: near 0.05 a bf16 weight cannot move by less than 2e-4, more than a usual step.
    """
    return load_transformer(folder, torch.float32, args.variant).requires_grad_(True)


def facts(args, transformer):
    """What `write` has to know of the model: its config as JSON."""
    return {"config": transformer.to_json_string()}


def live_state(transformer, keep=True):
    """The trained weights, name -> fp32 CPU tensor; {} where `keep` is false. A collective."""
    return trained_state(transformer, keep)


def load_live(transformer, state):
    """Put weights back that `live_state` gave. ValueError if any is missing, unknown or of another shape."""
    write_trained(dict(trained_weights(transformer)), state, "weights do not fit this model")


def export(transformer, live, stored_dtype):
    """The weights as they are shipped: in the dtype that the base model is stored in."""
    return {name: tensor.to(stored_dtype) for name, tensor in live.items()}


def write(folder, exported, facts):
    """Write what `export` gave as a `transformer` folder that diffusers loads. facts: `config`, the model's as JSON, and strings.

    ValueError, and nothing written, if a weight is not finite (in fp16 that is above 65504 too).
    """
    check_finite(exported, "weights")
    folder, facts = Path(folder) / RESULT, dict(facts)
    config = {name: value for name, value in json.loads(facts.pop("config")).items() if name != "_name_or_path"}
    write_durably(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    write_tensors(folder / "diffusion_pytorch_model.safetensors", exported, {"format": "pt"} | facts)


def publish(checkpoint, output_dir):
    """Put a checkpoint's transformer beside it. By links where the file system has them: it is several GB."""
    new, final = Path(output_dir) / f".{RESULT}.partial", Path(output_dir) / RESULT
    shutil.rmtree(new, ignore_errors=True)
    try:
        shutil.copytree(checkpoint / RESULT, new, copy_function=link_or_copy)
        shutil.rmtree(final, ignore_errors=True)
        new.rename(final)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def link_or_copy(source, target):
    """A second name for a file, or a copy of it."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def export_tolerance(transformer):
    """The largest error that `check_export` may find: the rounding to a dtype with eight bits of precision."""
    return 2**-7


@torch.no_grad()
def check_export(folder, transformer):
    """Load the written folder with diffusers and compare it with the live model. Returns (largest relative error, largest weight).

    The error is relative to each weight's size, so what is to be expected of it is half a unit in the last place of the dtype.
    """
    loaded = CogVideoXTransformer3DModel.from_pretrained(Path(folder) / RESULT, local_files_only=True)
    state, error, size = loaded.state_dict(), 0.0, 0.0
    for name, parameter in transformer.named_parameters():
        live = parameter.detach().float().cpu()
        error = max(error, ((state[name].float() - live).abs() / (live.abs() + 1e-3)).max().item())
        size = max(size, live.abs().max().item())
    return error, size
