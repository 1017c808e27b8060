"""Full fine-tuning: trains every weight of the transformer in fp32 and exports an ordinary diffusers folder.

Same interface as lora.py: the trained weights, their export, and a check of the export.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel

from cogvideox.engine import trained_state, trained_weights, write_trained
from cogvideox.files import note_file, write_durably, write_tensors
from cogvideox.lora import check_finite
from cogvideox.model import load_transformer

RESULT, WEIGHTS, LOADER = "transformer", "weights.safetensors", "diffusers"
EFFECT = "largest weight"
FILES = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]


def build(args, folder, dtype, device="cpu"):
    """The transformer before training: every weight trainable and in fp32. device: as in `load_transformer`.

    fp32 with every compute dtype: near 0.05 a bf16 weight cannot change by less than 2e-4, more than a usual step.
    """
    return load_transformer(folder, torch.float32, args.variant, device).requires_grad_(True)


def facts(args, transformer):
    """The facts for `write`: the model's config as JSON."""
    return {"config": transformer.to_json_string()}


def live_state(transformer, keep=True):
    """The trained weights, name -> fp32 CPU tensor; {} if `keep` is false. A collective."""
    return trained_state(transformer, keep)


def load_live(transformer, state):
    """Restore the weights that `live_state` returned. ValueError if any is missing, unknown or of another shape."""
    write_trained(dict(trained_weights(transformer)), state, "weights do not fit this model")


def export(transformer, live, stored_dtype):
    """The exported weights, in the base model's stored dtype, with what else the model keeps: learned positions are no parameters."""
    return {name: tensor.to("cpu", stored_dtype) for name, tensor in (live | stored_buffers(transformer)).items()}


def stored_buffers(transformer):
    """The buffers of a transformer that are in its file, name -> tensor."""
    stored = transformer.state_dict()
    return {name: buffer for name, buffer in transformer.named_buffers() if name in stored}


def write(folder, exported, facts):
    """Write the weights of `export` as a `transformer` folder for diffusers. facts: the model's `config` as JSON, and other strings.

    ValueError, and no file, if a weight is not finite (in fp16, also if it is above 65504).
    """
    check_finite(exported, "weights")
    folder, facts = Path(folder) / RESULT, dict(facts)
    config = {name: value for name, value in json.loads(facts.pop("config")).items() if name != "_name_or_path"}
    write_durably(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    write_tensors(folder / "diffusion_pytorch_model.safetensors", exported, {"format": "pt"} | facts)


def publish(checkpoint, output_dir):
    """Link (or copy) a checkpoint's transformer, several GB, to the output folder, file by file."""
    for name in FILES:
        final = Path(output_dir) / name
        partial = final.with_name(f".{final.name}.partial")
        final.parent.mkdir(exist_ok=True)
        note_file(final)
        partial.unlink(missing_ok=True)
        try:
            link_or_copy(checkpoint / name, partial)
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)


def link_or_copy(source, target):
    """Hard-link a file, or copy it if the file system has no links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def export_tolerance(transformer):
    """The tolerance of `check_export`'s error: the rounding of a dtype with eight bits of precision."""
    return 2**-7


@torch.no_grad()
def check_export(folder, transformer):
    """Load the exported folder with diffusers and compare it with the live model. Returns (largest relative error, largest weight).

    The expected error is half a unit in the last place of the stored dtype.
    """
    loaded = CogVideoXTransformer3DModel.from_pretrained(Path(folder) / RESULT, local_files_only=True)
    state, error, size = loaded.state_dict(), 0.0, 0.0
    for name, parameter in (dict(transformer.named_parameters()) | stored_buffers(transformer)).items():
        live = parameter.detach().float().cpu()
        error = max(error, ((state[name].float() - live).abs() / (live.abs() + 1e-3)).max().item())
        size = max(size, live.abs().max().item())
    return error, size
