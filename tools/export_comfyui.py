"""Write a trained LoRA with the names that ComfyUI's own CogVideoX nodes read.

    python -m tools.export_comfyui --lora my-lora --output ~/ComfyUI/models/loras/my-lora.safetensors

--lora is the folder of a run, its best/, a checkpoint-N/, or the file. Each pair of matrices gets an alpha equal to its
rank: alpha / rank of the training is in lora_B already, so strength 1.0 in ComfyUI is the trained strength. The file is
read back and every update (alpha / rank) B A is compared with the trained one.

What is known of ComfyUI (0.33, which takes no other names): these weights are all used, but its videos of the
CogVideoX-2B are not those of diffusers, with or without a LoRA, since it gives the 2B rotary positions. People who use
the 2B there go through the CogVideoX wrapper nodes, which take pytorch_lora_weights.safetensors as the trainer writes it.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from cogvideox import flags
from cogvideox.console import BAD_OUTPUT, fail, progress
from cogvideox.files import at_home, write_durably
from cogvideox.lora import load_pairs, read_layers
from tools.lora_file import find_lora

IN_BLOCKS = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}
REMARK = (
    "strength 1.0 is the trained strength. ComfyUI's own CogVideoX nodes treat the 2B as a rotary model, so its videos differ from "
    "diffusers' there, with or without a LoRA; the CogVideoX wrapper nodes take the trainer's own file as it is"
)


def comfyui_name(layer):
    """What ComfyUI calls a layer of diffusers' transformer. ValueError if that is not known."""
    if found := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer):
        if found[2] in IN_BLOCKS:
            return f"diffusion_model.blocks.{found[1]}.{IN_BLOCKS[found[2]]}"
    elif found := re.fullmatch(r"time_embedding\.(linear_\d)", layer):
        return f"diffusion_model.time_embedding_{found[1]}"
    raise ValueError(f"{layer}: its name in ComfyUI is not known, only those of {', '.join(IN_BLOCKS)} and time_embedding.linear_N")


def exported(file):
    """The tensors of the ComfyUI file of a LoRA file, in fp32."""
    tensors = {}
    for layer, down, up in load_pairs(file):
        name = comfyui_name(layer)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(float(len(down)))}
    return tensors


def check(file, output):
    """Compare each update in the written file, (alpha / rank) B A, with the trained one, B A.

    Returns (matrices compared, largest difference, largest update). ValueError if the file holds more or less than the LoRA.
    """
    written = load_file(output)
    compared, difference, largest = 0, 0.0, 0.0
    for layer, down, up in progress(list(load_pairs(file)), "checking", unit="layer"):
        name = comfyui_name(layer)
        kept = [written.pop(f"{name}.{part}", None) for part in ("lora_A.weight", "lora_B.weight", "alpha")]
        if any(tensor is None for tensor in kept):
            raise ValueError(f"{output}: lacks {name}, which was to be in it")
        update = up @ down
        found = kept[2].item() / len(kept[0]) * (kept[1].float() @ kept[0].float())
        compared, largest = compared + 1, max(largest, update.abs().max().item())
        difference = max(difference, (found - update).abs().max().item())
    if written:
        raise ValueError(f"{output}: holds {next(iter(written))}, which is not of this LoRA")
    return compared, difference, largest


def main(words=None):
    """The command line."""
    parser = flags.new_parser(__doc__)
    parser.prog = "python -m tools.export_comfyui"
    flag = flags.flag_group(parser, "export")
    flag("--lora", None, "folder of a run, its best/, a checkpoint-N/, or the .safetensors file", required=True)
    flag("--output", None, "the file to write, in ComfyUI's models/loras; an older one is replaced", required=True)
    args = parser.parse_args(words)
    output, problems = Path(at_home(args.output)), []
    if output.suffix != ".safetensors" or output.is_dir():
        problems.append(f"--output {output}: the name of a file, ending in .safetensors")
    try:
        file = find_lora(args.lora)
        for layer in read_layers(file):
            comfyui_name(layer)
        tensors = exported(file)
        if output.resolve() == file.resolve():
            problems.append(f"--output {output}: is the LoRA itself; name another file")
    except ValueError as error:
        problems.append(str(error))
    if problems:
        flags.refuse(parser, problems)

    try:
        write_durably(output, save(tensors, metadata={"format": "pt"}))
    except OSError as error:
        fail(BAD_OUTPUT, f"--output {output}: cannot be written ({error.strerror})")
    try:
        compared, difference, largest = check(file, output)
    except ValueError as error:
        fail(1, str(error))
    if difference > 1e-6 * largest:
        fail(1, f"{output}: its updates differ from the trained ones by up to {difference:.1e} of {largest:.1e}")
    print(f"{output}: {compared} weights are changed as trained (read back; the largest difference is {difference:.1e} of {largest:.1e})")
    print(REMARK)


if __name__ == "__main__":
    main()
