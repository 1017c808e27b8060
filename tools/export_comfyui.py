"""Write a trained LoRA with the names that ComfyUI's own CogVideoX nodes read.

    python -m tools.export_comfyui --lora my-lora --output ~/ComfyUI/models/loras/my-lora.safetensors

--lora is the folder of a run, its best/, a checkpoint-N/, or the file. Each pair of matrices gets an alpha equal to its
rank: alpha / rank of the training is in lora_B already, so strength 1.0 in ComfyUI is the trained strength. The file is
read back and every update (alpha / rank) B A is compared with the trained one.

The file is for ComfyUI's own CogVideoX nodes (0.33), which take no other names. The CogVideoX wrapper nodes take
pytorch_lora_weights.safetensors as the trainer writes it. docs/comfyui.md says which file goes to which node.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from cogvideox import flags
from cogvideox.console import BAD_OUTPUT, fail, progress, warn
from cogvideox.files import LORA_FILE, at_home, write_durably
from cogvideox.lora import load_pairs, read_layers, trained_on
from tools.lora_file import find_lora

# ComfyUI's name of each linear layer: in a block, and outside them. Its class has no other linear layers.
IN_BLOCKS = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
    "norm1.linear": "norm1.linear",
    "norm2.linear": "norm2.linear",
}
OUTSIDE = {f"{part}_embedding.linear_{n}": f"{part}_embedding_linear_{n}" for part in ("time", "ofs") for n in (1, 2)}
OUTSIDE |= {name: name for name in ("patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out")}
STRENGTH = "strength 1.0 is the trained strength; docs/comfyui.md says which node takes which file"
OF_THE_2B = (
    "this LoRA is of the CogVideoX-2B, and ComfyUI's own nodes (0.33) compute that model wrongly without a LoRA already: they leave its "
    "sincos positions out, and the output is off by 62 to 128 % of its largest value. A checkpoint that carries patch_embed.pos_embedding "
    "agrees with diffusers to 2.5e-7, at 60x90 latents (480 x 720 pixels) only. Otherwise use the CogVideoX wrapper nodes, "
    f"with the trainer's own {LORA_FILE}"
)
OF_THE_5B = (
    "this LoRA is of a rotary model of CogVideoX 1.0, and ComfyUI's own nodes (0.33) give that model other positions than diffusers, with "
    f"or without a LoRA. Use the CogVideoX wrapper nodes, with the trainer's own {LORA_FILE}"
)
OF_15 = (
    "at an odd number of latents (81 frames are 21) ComfyUI's own nodes (0.33) put the copy of the first latent of "
    "CogVideoX 1.5 at the end, and diffusers at the front"
)
OF_15_IMAGES = (
    "both kinds of nodes make the latent of 1.5's image 2.04 times too small; the wrapper's CogVideo ImageEncode corrects that with "
    f"strength 2.04, native nodes do not: use the wrapper, with the trainer's own {LORA_FILE}"
)
WIDTH_OF_THE_2B = 1920


def comfyui_name(layer):
    """What ComfyUI calls a layer of diffusers' transformer. ValueError if it has no such layer."""
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    if found and found[2] in IN_BLOCKS:
        return f"diffusion_model.blocks.{found[1]}.{IN_BLOCKS[found[2]]}"
    if layer in OUTSIDE:
        return f"diffusion_model.{OUTSIDE[layer]}"
    raise ValueError(
        f"{layer}: is no linear layer of a CogVideoX transformer; those are, in blocks and outside, {', '.join([*IN_BLOCKS, *OUTSIDE])}"
    )


def remarks(file):
    """What ComfyUI's own nodes do wrongly with the model of a LoRA, as sentences. A file that names no base is judged by its widths."""
    base = trained_on(file)
    sizes = [size for _, *both in read_layers(file).values() for size in both]
    if not base.get("use_rotary_positional_embeddings", all(size % WIDTH_OF_THE_2B for size in sizes)):
        return [OF_THE_2B]
    if not base:
        return []
    if not base.get("patch_size_t"):
        return [OF_THE_5B]
    return [OF_15, OF_15_IMAGES] if base.get("in_channels") != base.get("out_channels") else [OF_15]


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
    print(STRENGTH)
    for remark in remarks(file):
        warn(remark)


if __name__ == "__main__":
    main()
