"""A trained LoRA or transformer: found, checked against a model by headers and configs, read, and run in diffusers' pipeline."""

from pathlib import Path

import torch
from peft import get_peft_model_state_dict

from cogvideox import model
from cogvideox.console import progress, warn
from cogvideox.files import LORA_FILE, at_home, lora_path, read_json
from cogvideox.folder import broken_safetensors, linear_layers, load_tokenizer, read_facts, text_notes, weight_files
from cogvideox.lora import load_pairs, other_family


def find_lora(name):
    """The LoRA file that `name` means: the file itself, or a run's folder, its best/ or a checkpoint-N/. ValueError if there is none."""
    path, file = Path(at_home(name)), lora_path(name)
    if file.is_file():
        return file
    if (path / "transformer/config.json").is_file():
        raise ValueError(f"--lora {name}: holds a whole transformer/ and no LoRA; tools.generate takes it as --transformer")
    if path.is_dir():
        raise ValueError(f"--lora {name}: no {LORA_FILE} in it; give the folder of a run, its best/ or a checkpoint-N/, or the file")
    raise ValueError(f"--lora {name}: no such file or folder")


def check_fit(file, layers, folder):
    """A sentence for each way in which a LoRA does not fit the transformer in `folder`. Reads its config only.

    layers: of `read_layers`; none of them without a file.
    """
    if layers and (problem := other_family(file, folder)):
        return [problem]
    known = linear_layers(folder)
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


def find_transformer(name, folder):
    """The folder whose transformer/ is meant by `name`. ValueError if it is none, or not of the kind of the base in `folder`."""
    path = Path(at_home(name))
    run = path.parent if path.name == "transformer" and (path / "config.json").is_file() else path
    if not (run / "transformer/config.json").is_file():
        raise ValueError(f"--transformer {name}: no transformer/config.json; give a run of --training_type sft, or its transformer/")
    files, problem = weight_files(run / "transformer")
    if problem := problem or next((f"{file}: {reason}" for file in files if (reason := broken_safetensors(file))), None):
        raise ValueError(f"--transformer {name}: {problem}")
    base, found = read_json(folder / "transformer/config.json"), read_json(run / "transformer/config.json")
    for key in base.keys() & found.keys():
        if not key.startswith("_") and base[key] != found[key]:
            raise ValueError(f"--transformer {name}: made from another model: its {key} is {found[key]}, the base model's {base[key]}")
    return run


# -----------------------------------------------------------------------------
# Videos


def encode_prompts(folder, texts, device, variant=None):
    """The T5 embedding of each text, made once: text -> [T, D] on the CPU. Says which are too long for the model."""
    tokenizer, length, texts = load_tokenizer(folder), read_facts(folder).max_text_seq_length, list(dict.fromkeys(texts))
    for note in text_notes(tokenizer, [("this prompt", text) for text in texts], length):
        warn(note)
    encoder = model.load_text_encoder(folder, device, variant)
    return {text: model.encode_captions(tokenizer, encoder, [text], length)[0].cpu() for text in progress(texts, "encoding", unit="prompt")}


def load_pipeline(args, folder, trained_folder, dtype, device):
    """diffusers' pipeline of the base in `folder`, without its T5, with the LoRA if there is one, placed as --offload says.

    trained_folder: whose transformer to take. ValueError if the loader leaves weights of the LoRA out.
    """
    transformer = model.load_transformer(trained_folder, dtype, args.variant if trained_folder == folder else None)
    vae = model.load_vae(folder, device, args.variant, args.enable_slicing, args.enable_tiling)
    scheduler = model.load_scheduler(folder)
    pipeline = model.bare_pipeline(transformer, vae=vae, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if args.lora:
        weights = {}  # as every program here reads them: diffusers' own reading of a file knows no .alpha
        for layer, down, up in load_pairs(args.lora):
            weights |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        pipeline.load_lora_weights(weights, adapter_name="lora")
        used, held = len(get_peft_model_state_dict(transformer, adapter_name="lora")), len(weights)
        if used != held:
            raise ValueError(f"--lora {args.lora}: diffusers' loader used {used} of its {held} weights")
    offload = {"model": pipeline.enable_model_cpu_offload, "sequential": pipeline.enable_sequential_cpu_offload}
    offload.get(args.offload, pipeline.to)(device=device)
    return pipeline


@torch.no_grad()
def make_video(pipeline, embeddings, seed, scale, device, after_step, **settings):
    """uint8 frames [F, H, W, 3] of one video.

    embeddings: of the prompt and the negative one, [T, D] each; scale: strength of the LoRA (0: the base; None: there is
    none); after_step: called after each denoising step; settings: what else the pipeline is told, for image-to-video an `image`.
    """
    if scale is not None:
        (pipeline.enable_lora if scale else pipeline.disable_lora)()
        pipeline.set_adapters("lora", scale)

    def count(pipeline, step, timestep, tensors):
        after_step()
        return tensors

    prompt, negative = (text[None].to(device, pipeline.transformer.dtype) for text in embeddings)
    settings |= {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "callback_on_step_end": count, "output_type": "latent"}
    with model.whole_frames(pipeline.vae):
        latents = pipeline(generator=torch.Generator().manual_seed(seed), **settings).frames[0]
    latents = model.drop_padding(latents, settings["num_frames"], pipeline.vae_scale_factor_temporal)
    video = pipeline.decode_latents(latents[None].to(pipeline.vae.dtype))[0].float()  # [3, F, H, W]
    pipeline.maybe_free_model_hooks()
    video = video[:, -settings["num_frames"] :]  # of an even number of latents the VAE makes three frames too many, at the start
    return ((video / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
