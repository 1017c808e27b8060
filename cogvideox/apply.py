"""A trained LoRA read from its file: where it lies, which layers it changes, and whether it fits a model."""

import json
import re
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open

from cogvideox.folder import safetensors_header
from cogvideox.lora import LORA_FILE


def find_lora(name):
    """The LoRA file that `name` means: the file itself, or a run's folder, its best/ or a checkpoint-N/. ValueError if there is none."""
    path = Path(name).expanduser()
    file = path / LORA_FILE if path.is_dir() else path
    if file.is_file():
        return file
    if (path / "transformer/config.json").is_file():
        raise ValueError(f"--lora {name}: holds a whole transformer/ and no LoRA; tools.generate takes it as --transformer")
    if path.is_dir():
        raise ValueError(f"--lora {name}: no {LORA_FILE} in it; give the folder of a run, its best/ or a checkpoint-N/, or the file")
    raise ValueError(f"--lora {name}: no such file or folder")


def read_layers(file):
    """Which layers a LoRA file changes: layer -> (rank, inputs, outputs), from its header alone.

    Takes diffusers' names with the whole strength in the weights, as lora.py writes them. ValueError with a sentence for
    any other file, also for one whose metadata asks for another factor than 1: not every program here would apply it.
    """
    try:
        header = safetensors_header(file)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except Exception as error:  # safetensors raises its own kinds, OSError and ValueError for a damaged file
        raise ValueError(f"--lora {file}: cannot be read ({(str(error).splitlines() or ['no reason given'])[0][:100]})") from None
    shapes = {}
    for name, entry in header.items():
        found = re.fullmatch(r"transformer\.(.+)\.lora_([AB])\.weight", name)
        if not found or len(entry["shape"]) != 2:
            comfyui = " (ComfyUI's names: give the file that this one was exported from)" if name.startswith("diffusion_model.") else ""
            raise ValueError(
                f"--lora {file}: {name} is not a weight of a LoRA in diffusers' names, transformer.LAYER.lora_A.weight{comfyui}"
            )
        shapes.setdefault(found[1], {})[found[2]] = entry["shape"]
    if not shapes:
        raise ValueError(f"--lora {file}: holds no weights")
    layers = {}
    for layer, pair in shapes.items():
        if set(pair) != {"A", "B"} or pair["A"][0] != pair["B"][1]:
            raise ValueError(f"--lora {file}: {layer} needs lora_A [rank, in] and lora_B [out, rank], and has {pair}")
        layers[layer] = pair["A"][0], pair["A"][1], pair["B"][0]
    asked = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    asked = {name.removeprefix("transformer."): value for name, value in asked.items()}
    patterns = [name for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if asked.get(name)]
    if patterns or asked.get("lora_alpha") != asked.get("r"):
        found = ", ".join(patterns) or f"alpha {asked.get('lora_alpha')} of rank {asked.get('r')}"
        raise ValueError(f"--lora {file}: its metadata asks for {found}; only files with the whole strength in their weights are taken")
    return layers


def check_fit(file, layers, folder):
    """A sentence for each way in which a LoRA does not fit the transformer in `folder`. Reads its config only."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(CogVideoXTransformer3DModel.load_config(folder / "transformer"))
    known = {name: (m.in_features, m.out_features) for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    unknown = [layer for layer in layers if layer not in known]
    other = [layer for layer in layers if layer in known and layers[layer][1:] != known[layer]]
    problems, where = [], f"{folder / 'transformer'}"
    if unknown:
        problems.append(f"--lora {file}: {len(unknown)} of its {len(layers)} layers are not in {where} (the first is {unknown[0]})")
    if other:
        made, has = layers[other[0]][1:], known[other[0]]
        problems.append(
            f"--lora {file}: made for another model than {where}: {other[0]} maps {made[0]} to {made[1]} values in the LoRA "
            f"and {has[0]} to {has[1]} in the model ({len(other)} such layers)"
        )
    return problems


def load_pairs(file):
    """Yield (layer, lora_A [rank, in], lora_B [out, rank]) in fp32, one layer at a time. The update of its weight is B A.

    ValueError for weights that are not finite.
    """
    with safe_open(file, framework="pt") as opened:
        for layer in sorted({name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in opened.keys()}):  # noqa: SIM118
            down, up = (opened.get_tensor(f"transformer.{layer}.lora_{side}.weight").float() for side in "AB")
            if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
                raise ValueError(f"--lora {file}: the weights of {layer} are not finite")
            yield layer, down, up
