"""Predict what a run will need of the device's memory, before any weight is loaded: python -m tools.estimate [flags].

    python -m tools.estimate --preset 2b --rank 64 --card 24          the 2B with these flags, on a card of 24 GB
    python -m tools.estimate --model FOLDER --height 256 --width 384   another model: its configs and the headers of its files are read
    python -m tools.estimate --presets                                each family on cards of 8 to 80 GB, and the flags for each

All flags of the trainer are taken; those that matter are sizes, batch, rank, targets, precision, optimizer, checkpointing,
offload, tiling and validation. Bytes are those of tensors: a GPU's context, its libraries and fragmentation come on top;
a tenth of the card, and at least 1 GiB, is left free for them.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

from cogvideox import flags
from cogvideox.console import progress
from cogvideox.files import at_home, write_bytes

FAMILIES = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
CARDS = (8, 12, 16, 24, 48, 80)
# From the least costly. Offload computes the same numbers as none; weights of 8 bits do not.
SAVINGS = (
    {},
    {"offload": True},
    {"offload": True, "optimizer": "adamw8bit"},
    {"offload": True, "base_precision": "int8", "optimizer": "adamw8bit"},
)
# Full fine-tuning has no frozen weights to offload; engines that shard the weights take none of the flags above.
SAVINGS_SFT, SAVINGS_SHARDED = ({}, {"optimizer": "adamw8bit"}), ({},)


def usable(card):
    """Bytes of tensors that a card of so many GB should be trusted with."""
    return int((card - max(1, 0.1 * card)) * 2**30)


def parse(words):
    """(this tool's options, [(name, configs, the trainer's flags) of each model]). Exit code 2 and all problems where flags are wrong."""
    parser = flags.new_parser(__doc__)
    parser.prog = "python -m tools.estimate"
    flag = flags.flag_group(parser, "estimate")
    flag("--preset", None, f"a model whose configs are known here: {', '.join(FAMILIES)} (default: 2b)", choices=FAMILIES)
    flag("--model", None, "folder of another model, whose configs are read, and the headers of its files")
    flag("--card", None, "memory of the card in GB; auto then recomputes only what does not fit", type=float, above=0)
    flag("--device", "cuda", "device of the run", choices=("cuda", "cpu"))
    flag("--engine", "DDP", "engine of a run on several GPUs; DDP does not shard", choices=("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"))
    flag("--processes", 1, "number of GPUs", at_least=1)
    flag("--presets", False, "a table of cards, and the flags for each: of --preset or --model, or else of every preset")
    flag("--json", None, "write the bytes here as well")
    options, rest = parser.parse_known_args(words)

    import train_cogvideox_lora as trainer

    names = [options.model or options.preset or "2b"]
    if options.presets and not options.model and not options.preset:
        names = list(FAMILIES)
    args = trainer.build_parser().parse_args(["--pretrained_model_name_or_path", names[0], *rest])
    args.instance_data_root = args.instance_data_root or (None if args.dataset_name else ".")
    # Packages that are missing here may be there where the run will be.
    problems = flags.out_of_bounds(options) + flags.out_of_bounds(args)
    problems += [problem for problem in trainer.check_flags(args) if " needs " not in problem]
    models = [read_model(options, args, name) for name in names]
    problems += [problem for *_, found in models for problem in found]
    if problems:
        flags.refuse(parser, dict.fromkeys(problems))
    return options, [model[:3] for model in models]


def read_model(options, args, name):
    """(name, configs, flags with the model's own defaults, problems) of a folder or a preset."""
    from cogvideox import memory
    from cogvideox.folder import check_sizes, facts_of, fill_in_defaults

    try:
        configs = memory.read_configs(Path(at_home(name)), args.variant) if options.model else memory.PRESETS[name]
    except (OSError, ValueError) as error:
        return name, {}, args, [f"--model {name}: {error}; give a model's folder, or --preset"]
    configs, args = memory.on_device(configs, options.device), argparse.Namespace(**vars(args))
    stored = configs["dtypes"]["transformer"]
    # Like the trainer, which does not scale an fp16 loss there.
    args.mixed_precision = args.mixed_precision or ("bf16" if options.engine != "DDP" and stored == "fp16" else stored)
    facts = facts_of(configs["transformer"], configs["vae"])
    fill_in_defaults(args, facts)
    problems, _ = check_sizes(args, facts)
    return name, configs, args, problems


def chosen_recomputation(memory, configs, args, compute_loss, room, device, phases, engine="DDP", processes=1):
    """The least recomputation whose predicted peak is within `room` bytes, and its prediction: (plan, prediction)."""
    from cogvideox import rehearsal

    layers = memory.layers_of(configs)
    shape = memory.latents_of(configs, *memory.largest_shape(args))
    predict = functools.partial(memory.predict, configs, args, compute_loss, device, phases=phases, engine=engine, processes=processes)
    none = predict(recomputation=(0, True))
    if none["training"] <= room:
        return (0, True), none
    blocks = memory.block_bytes(configs, args, compute_loss, shape, device)
    plan, _ = rehearsal.fewest_recomputed(layers, blocks["kept"], blocks["attention"], room - none["training"] + layers * blocks["kept"])
    for recomputed in range(plan, layers + 1):  # the estimate by blocks is a block off at most
        found = predict(recomputation=(recomputed, True))
        if found["training"] <= room:
            return (recomputed, True), found
    return (layers, False), predict(recomputation=(layers, False))


def spell_recomputation(plan, layers):
    """(blocks recomputed, whether their attention is kept) in words."""
    recomputed, keep_attention = plan
    if recomputed == 0:
        return "none"
    return f"{recomputed} of {layers}" + ("" if keep_attention else ", attention too")


def print_parts(memory, options, models, compute_loss):
    """The parts of one set of flags. Returns them."""
    ((name, configs, args),) = models
    phases = memory.phase_parts(configs, args, options.device, usable(options.card) if options.card else None)
    layers = memory.layers_of(configs)
    if options.card and args.gradient_checkpointing == "auto":
        engine = options.engine, options.processes
        plan, parts = chosen_recomputation(memory, configs, args, compute_loss, usable(options.card), options.device, phases, *engine)
    else:
        plan = memory.blocks_to_recompute(args.gradient_checkpointing, layers)
        parts = memory.predict(configs, args, compute_loss, options.device, plan, phases, options.engine, options.processes)
    clip = memory.largest_shape(args)
    blocks = memory.block_bytes(configs, args, compute_loss, memory.latents_of(configs, *clip), options.device)
    size = "x".join(map(str, clip))
    what = f"rank {args.rank}" if args.training_type == "lora" else "full fine-tuning"
    spread = f"; each of {options.processes} processes under {options.engine}" if options.processes > 1 else ""
    print(f"{name} on {options.device}, {size}, batch {args.train_batch_size}, {what}, {args.mixed_precision}{spread}")
    print(f"blocks recomputed: {spell_recomputation(plan, layers)}; the peak of training is in the {parts['training_peak_at']} pass\n")
    print("\n".join(memory.table(parts)))
    for name, words in (("kept", "not recomputed"), ("attention", "recomputed except attention"), ("full", "recomputed")):
        print(f"| a block's activations, {words} | {blocks[name] / 2**30:.3f} |")
    if options.card:
        # T5 is split between the card and the host where it has to be.
        fits = "fits" if max(parts["training"], parts["validation"], parts["clips"]) <= usable(options.card) else "does not fit"
        print(f"\n{fits} a card of {options.card:g} GB, of which {usable(options.card) / 2**30:.1f} GiB are counted on")
    return parts | {f"block_{name}": size for name, size in blocks.items()}


def flags_for(card, memory, configs, args, compute_loss, device, phases, engine="DDP", processes=1):
    """The first of SAVINGS that fits a card of so many GB, or the last: (saving, the flags with it, plan of recomputation, prediction)."""
    room, sharded = usable(card), engine in memory.SHARDING
    phases = phases | {"clips_encode": memory.encoding_bytes(configs, args, room)}
    for saving in SAVINGS_SHARDED if sharded else SAVINGS_SFT if args.training_type == "sft" else SAVINGS:
        changed = argparse.Namespace(**vars(args) | saving)
        plan, parts = chosen_recomputation(memory, configs, changed, compute_loss, room, device, phases, engine, processes)
        if max(parts["training"], parts["validation"], parts["clips"]) <= room:
            break
    return saving, changed, plan, parts


def spell_flags(saving):
    """One of SAVINGS as words of a command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in saving.items())


def print_presets(memory, options, models, compute_loss):
    """For each model and card the first of SAVINGS that fits it. Returns the rows."""
    rows, cards = [], (options.card,) if options.card else CARDS
    with progress(desc="models and cards", total=len(models) * len(cards), unit="card") as bar:
        for name, configs, args in models:
            layers = memory.layers_of(configs)
            args.validation_prompt = args.validation_prompt or "x"  # a run that validates needs more
            phases = memory.phase_parts(configs, args, options.device)
            engine = options.engine, options.processes
            for card in cards:
                saving, _, plan, parts = flags_for(card, memory, configs, args, compute_loss, options.device, phases, *engine)
                clip, recomputed = "x".join(map(str, memory.largest_shape(args))), spell_recomputation(plan, layers)
                row = {"model": name, "clip": clip, "card_gb": card, "flags": spell_flags(saving), "recomputed": recomputed}
                rows.append(row | {"room": usable(card)} | parts)
                bar.update(1)
    print("| model | frames, height, width | card, GB | flags beside the defaults | blocks recomputed by auto |", end="")
    print(" training | validation | clips | captions (T5) | fits |")
    print("| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | --- |")
    for row in rows:
        peaks = {name: row[name] for name in ("training", "validation", "clips", "captions")}
        above = [name for name, size in peaks.items() if size > row["room"]]
        sizes = " | ".join(f"{size / 2**30:.1f}" for size in peaks.values())
        fits = "yes, T5 partly in host memory" if above == ["captions"] else f"no: {', '.join(above)}" if above else "yes"
        what = f"| {row['model']} | {row['clip']} | {row['card_gb']:g} | {row['flags'] or '-'} | {row['recomputed']} |"
        print(f"{what} {sizes} | {fits} |")
    each = f" of each of {options.processes} processes under {options.engine}" if options.processes > 1 else ""
    print(f"\nGiB of tensors at the peak of each phase{each}; a tenth of each card, and at least 1 GiB, is left free.\n")
    for row in rows if options.processes == 1 else ():
        print(f"# {row['model']}, {row['card_gb']:g} GB")
        print(f"python train_cogvideox_lora.py --pretrained_model_name_or_path {memory.HUB_NAMES.get(row['model'], row['model'])}", end=" ")
        print(f"--instance_data_root DATA --output_dir OUT {row['flags']}".rstrip())
    return rows


def main(words=None):
    """The command line."""
    options, models = parse(words)
    import train_cogvideox_lora as trainer
    from cogvideox import memory

    show = print_presets if options.presets else print_parts
    result = show(memory, options, models, trainer.velocity_loss)
    if options.json:
        write_bytes(Path(options.json), json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
