"""Write a transformer with a trained LoRA inside it, W + scale B A, as an ordinary diffusers folder that needs no LoRA file.

    python -m tools.merge --pretrained_model_name_or_path THUDM/CogVideoX-2b --lora my-lora --output_dir merged
    python -m tools.merge --pretrained_model_name_or_path THUDM/CogVideoX-2b --lora my-lora --output_dir merged --whole_pipeline

The first writes merged/transformer, for the pipeline of the model's family: CogVideoXPipeline, or CogVideoXImageToVideoPipeline,
each with .from_pretrained(base, transformer=...). The second writes a whole model folder; its other parts are hard links where the
file system has them. --lora is the folder of a run, its best/, a checkpoint-N/, or the file.

Sums are made in fp32 and stored in the dtype of the base. All other bytes of its files stay what they are, and one weight
is in memory at a time. What was written is read back, and the share of the LoRA that rounding took is told: fp16 keeps 11
bits of a weight and bf16 8, so a part of a small update is lost.
"""

import json
import math
import os
import shutil
from pathlib import Path

import torch

from cogvideox import flags
from cogvideox.console import BAD_OUTPUT, fail, progress
from cogvideox.files import at_home, read_json, why_unwritable, write_bytes
from cogvideox.folder import COMPONENTS, TORCH_DTYPES, check_model_folder, find_model, safetensors_header, stored_dtype, weight_files
from cogvideox.lora import base_facts, load_pairs, read_layers
from cogvideox.model import pipeline_class
from cogvideox.sft import link_or_copy
from tools.lora_file import check_fit, find_lora

MERGED_DTYPES, PARTIAL = ("F32", "F16", "BF16"), ".merge.partial"


def plain(name, variant):
    """A file's name without its variant: the result loads without one."""
    return name.replace(f".{variant}", "") if variant else name


def find_weights(folder, variant=None):
    """Where the weights of a component are stored: name -> (file, dtype, shape, first byte, byte after the last)."""
    places = {}
    for file in weight_files(folder, variant)[0]:
        with open(file, "rb") as opened:
            data = 8 + int.from_bytes(opened.read(8), "little")
        for name, entry in safetensors_header(file).items():
            places[name] = (file, entry["dtype"], entry["shape"], *(data + offset for offset in entry["data_offsets"]))
    return places


def read_raw(place):
    """The bytes of one weight."""
    file, _, _, start, end = place
    with open(file, "rb") as opened:
        opened.seek(start)
        return bytearray(opened.read(end - start))


def read_weight(place):
    """One weight, in the dtype it is stored in."""
    return torch.frombuffer(read_raw(place), dtype=TORCH_DTYPES[place[1]]).reshape(place[2])


def copy_part(part, target, variant, copy):
    """Write a component of a model folder elsewhere, without its variant's name. copy: a function of two paths."""
    target.mkdir(parents=True)
    weights = weight_files(part, variant)[0]
    words = [file for file in part.iterdir() if file.suffix in (".json", ".model", ".txt") and ".safetensors.index" not in file.name]
    for file in words + weights:
        copy(file.resolve(), target / plain(file.name, variant))  # a hub's cache has links, and a link to one would lead nowhere
    for index in part.glob(f"*.safetensors.index{'.' + variant if variant else ''}.json"):
        content = read_json(index)
        if set(content["weight_map"].values()) == {file.name for file in weights}:
            content["weight_map"] = {name: plain(file, variant) for name, file in content["weight_map"].items()}
            write_bytes(target / plain(index.name, variant), json.dumps(content, indent=2).encode())


def merge(base, target, lora, scale, bar):
    """Put base + LoRA into a copy of the base, one weight at a time. ValueError if a sum does not fit into its dtype.

    base: the base's weights, from `find_weights`; target: the folder of the copy.
    """
    places = find_weights(target)
    for layer, down, up in load_pairs(lora):
        file, kind, _, start, _ = places[f"{layer}.weight"]
        merged = (read_weight(base[f"{layer}.weight"]).float() + scale * (up @ down)).to(TORCH_DTYPES[kind])
        if not torch.isfinite(merged).all():
            raise ValueError(f"{layer}: base + LoRA is beyond what {kind} can hold; take a smaller --lora_scale")
        with open(file, "r+b") as opened:
            opened.seek(start)
            opened.write(merged.view(torch.uint8).numpy().data)
        bar.update()


def check(base, target, lora, scale, bar):
    """Read a merged transformer back and compare it with base + LoRA, summed in fp64. base, target: as in `merge`.

    Returns the share of the update that rounding took (root mean square). ValueError where rounding does not explain a
    difference, or where a weight that the LoRA leaves alone is not the base's, bit for bit.
    """
    written, changed, updated, lost = find_weights(target), set(), 0.0, 0.0
    if written.keys() != base.keys():
        raise ValueError(f"{target}: has {len(written)} weights where the base has {len(base)}")
    for layer, down, up in load_pairs(lora):
        name, down, up = f"{layer}.weight", down.double(), up.double()
        weight, update = read_weight(base[name]).double(), scale * (up @ down)
        found = read_weight(written[name])
        precision, error = torch.finfo(found.dtype), (found.double() - weight - update).abs()
        # Half a unit in the last place, and what the fp32 sum of rank + 1 products may be off by before it is rounded.
        allowed = precision.eps / 2 * (weight + update).abs() + precision.tiny * precision.eps
        allowed += (len(down) + 4) * 2**-24 * (weight.abs() + abs(scale) * (up.abs() @ down.abs()))
        if not (error <= allowed).all():
            raise ValueError(f"{target}: {name} differs from base + LoRA by {error.max().item():.1e}, more than rounding explains")
        changed.add(name)
        updated, lost = updated + update.square().sum().item(), lost + error.square().sum().item()
        bar.update()
    for name in base.keys() - changed:
        if read_raw(base[name]) != read_raw(written[name]):
            raise ValueError(f"{target}: {name} is not the base's, and the LoRA does not change it")
        bar.update()
    return math.sqrt(lost / updated) if updated else 0.0


def how_to_load(args, folder):
    """The call of diffusers that loads the result."""
    pipeline = pipeline_class(base_facts(read_json(folder / "transformer/config.json"))).__name__
    dtype = f"torch_dtype={stored_dtype(folder, 'transformer', args.variant)}"  # without it, fp32
    if args.whole_pipeline:
        return f'{pipeline}.from_pretrained("{args.output_dir}", {dtype})'
    transformer = f'CogVideoXTransformer3DModel.from_pretrained("{args.output_dir}/transformer", {dtype})'
    return f'{pipeline}.from_pretrained("{args.pretrained_model_name_or_path}", transformer={transformer}, {dtype})'


def parse(words):
    """(flags, model folder, LoRA file, its layers, weights of the base). Ends with exit code 2 and all problems."""
    parser = flags.new_parser(__doc__)
    parser.prog = "python -m tools.merge"
    flag = flags.flag_group(parser, "merge")
    flag("--pretrained_model_name_or_path", None, "folder or hub id of the model that the LoRA was trained on", required=True)
    flag("--lora", None, "folder of a run, its best/, a checkpoint-N/, or the .safetensors file", required=True)
    flag("--output_dir", None, "folder of the result, which is written to its transformer/", required=True)
    flag("--lora_scale", 1.0, "strength of the LoRA; 1: as trained")
    flag("--whole_pipeline", False, "write the model's other parts beside it")
    flag("--overwrite", False, "replace files and folders of the same names; others stay")
    flag("--revision", None, "branch, tag or commit of a hub model")
    flag("--variant", None, "file variant of the weights to read, such as fp16; the result has none")
    flag("--cache_dir", None, "where downloaded models are stored (default: the hub client's own place)")
    args = parser.parse_args(words)
    args.output_dir, problems, folder, file, layers, base = Path(at_home(args.output_dir)), [], None, None, {}, {}
    if not math.isfinite(args.lora_scale) or args.lora_scale == 0:
        problems.append(f"--lora_scale {args.lora_scale:g}: a number other than 0, which would copy the base")
    try:
        file = find_lora(args.lora)
        layers = read_layers(file)
    except ValueError as error:
        problems.append(str(error))
    try:
        folder = find_model(args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir)
        broken = check_model_folder(folder, args.variant, may_lack=() if args.whole_pipeline else ("text_encoder", "vae"))
        if args.whole_pipeline and not (folder / "model_index.json").is_file():
            broken.append(f"{folder}: no model_index.json, without which a whole pipeline cannot be loaded; leave --whole_pipeline out")
        problems += broken or check_fit(file, layers, folder)
        base = {} if broken else find_weights(folder / "transformer", args.variant)
        kinds = {base[f"{layer}.weight"][1] for layer in layers if f"{layer}.weight" in base} - set(MERGED_DTYPES)
        if kinds:
            problems.append(f"{folder / 'transformer'}: is stored in {', '.join(sorted(kinds))}; sums can be stored in F32, F16 and BF16")
        if args.output_dir.resolve() in (folder.resolve(), (folder / "transformer").resolve()):
            problems.append(f"--output_dir {args.output_dir}: is the base model itself; name another folder")
    except ValueError as error:
        problems.append(str(error))
    if not args.overwrite and any(path.name != PARTIAL for path in args.output_dir.glob("*")):
        problems.append(f"--output_dir {args.output_dir}: is not empty; name another folder, or give --overwrite")
    if not problems and (reason := why_unwritable(args.output_dir)):
        problems.append(f"--output_dir {args.output_dir}: cannot be written to ({reason})")
    if problems:
        flags.refuse(parser, problems)
    return args, folder, file, layers, base


def main(words=None):
    """The command line."""
    args, folder, file, layers, base = parse(words)
    partial, scale = args.output_dir / PARTIAL, args.lora_scale
    shutil.rmtree(partial, ignore_errors=True)
    try:
        parts = COMPONENTS if args.whole_pipeline else ("transformer",)
        for part in progress(parts, "copying", unit="part"):
            copy_part(folder / part, partial / part, args.variant, shutil.copyfile if part == "transformer" else link_or_copy)
        if args.whole_pipeline:
            shutil.copyfile(folder / "model_index.json", partial / "model_index.json")
        with progress(total=len(layers), desc="merging", unit="layer") as bar:
            merge(base, partial / "transformer", file, scale, bar)
        with progress(total=len(base), desc="checking", unit="weight") as bar:
            lost = check(base, partial / "transformer", file, scale, bar)
        for new in partial.iterdir():
            old = args.output_dir / new.name
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
            os.replace(new, old)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        fail(BAD_OUTPUT if isinstance(error, OSError) else 1, f"--output_dir {args.output_dir}: the merge was given up: {reason}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{args.output_dir}: base + {scale:g} x LoRA in {len(layers)} weights, {len(base) - len(layers)} others as they were (read back)")
    print(f"load it with {how_to_load(args, folder)}")
    print(f"rounding to {base[f'{next(iter(layers))}.weight'][1]} took {lost:.2%} of the LoRA's update (root mean square)")


if __name__ == "__main__":
    main()
