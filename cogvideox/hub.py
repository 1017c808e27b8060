"""The model card, and the upload of what belongs to the result (and nothing else)."""

import json
import re
from pathlib import Path

from cogvideox.files import write_durably
from cogvideox.lora import LORA_FILE

UPLOADED = [LORA_FILE, "transformer/*", "README.md", "metrics.jsonl", "loss.png"]
UPLOADED += ["validation/step-*/*.mp4", "validation/step-*/contact_sheet.png"]


NO_FACTS = {"steps": 0, "clips": 0, "clips_per_step": 0, "parameters": 0, "num_frames": 0, "height": 0, "width": 0, "videos": []}


def write_model_card(folder, args, facts):
    """Write README.md: what was trained on what, how to use it, and the last validation videos.

    facts: steps, clips, clips_per_step, parameters (millions), num_frames, height and width
    of the videos, and `videos`, [(prompt, relative path)].
    """
    example = facts["videos"][0][0] if facts["videos"] else (f"{args.id_token} ..." if args.id_token else "...")
    base = args.pretrained_model_name_or_path
    # A local folder is no hub id, and its path is nobody else's business.
    base_name = Path(base).name if Path(base).expanduser().exists() else base
    with_lora = args.training_type == "lora"
    tags = ["text-to-video", "cogvideox", *(["lora"] if with_lora else []), "diffusers"]
    header = {"tags": tags, "library_name": "diffusers", "pipeline_tag": "text-to-video"}
    if base_name == base:
        header["base_model"] = base
    if args.id_token:
        header["instance_prompt"] = args.id_token
    yaml = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in header.items())
    table = {"rank": args.rank, "alpha": f"{args.lora_alpha:g}", "target modules": ", ".join(args.target_modules)} if with_lora else {}
    table |= {"parameters": f"{facts['parameters']:.1f} M", "learning rate": f"{args.learning_rate:g}", "schedule": args.lr_scheduler}
    table |= {"optimizer": args.optimizer, "precision": args.mixed_precision, "seed": args.seed}
    table |= {"average": f"decay {args.ema_decay:g}"} if args.ema_decay else {}
    size = f"num_frames={facts['num_frames']}, height={facts['height']}, width={facts['width']}"
    dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(args.mixed_precision, "float32")
    gallery = "\n".join(f"- {markdown(prompt)}: [{Path(path).name}]({path})" for prompt, path in facts["videos"])
    if with_lora:
        what, imported = f"A LoRA for `{base_name}`", "CogVideoXPipeline"
        load = f'pipe = CogVideoXPipeline.from_pretrained({json.dumps(base_name)}, torch_dtype=torch.{dtype}).to("cuda")\n'
        load += f'pipe.load_lora_weights("path/to/this/folder", weight_name="{LORA_FILE}", adapter_name="lora")'
        remark = "alpha / rank is folded into the weights: weight 1.0 is the trained strength in every loader; do not multiply by it again."
    else:
        what, imported = f"The transformer of `{base_name}`, all of it fine-tuned", "CogVideoXPipeline, CogVideoXTransformer3DModel"
        place = '"path/to/this/folder", subfolder="transformer"'
        load = f"transformer = CogVideoXTransformer3DModel.from_pretrained({place}, torch_dtype=torch.{dtype})\n"
        load += f"pipe = CogVideoXPipeline.from_pretrained({json.dumps(base_name)}, transformer=transformer, torch_dtype=torch.{dtype})"
        load += '.to("cuda")'
        remark = "`transformer/` is an ordinary diffusers folder, in the dtype that the base model is stored in."
    trigger = f"\nStart prompts with `{args.id_token}`, as the training captions did.\n" if args.id_token else ""
    card = f"""---
{yaml}
---

# {markdown(Path(args.output_dir).name)}

{what}, trained for {facts["steps"]} optimizer steps of {facts["clips_per_step"]} clips on {facts["clips"]} clips
({facts["num_frames"]} frames at most, {facts["height"]} x {facts["width"]}, {args.fps:g} frames a second).

| {" | ".join(table)} |
|{"---|" * len(table)}
| {" | ".join(map(str, table.values()))} |

## Use it
{trigger}
```python
import torch
from diffusers import {imported}
from diffusers.utils import export_to_video

{load}
video = pipe({json.dumps(example, ensure_ascii=False)}, {size}).frames[0]
export_to_video(video, "video.mp4", fps={args.fps:g})
```

{remark}

{"## Validation videos" if facts["videos"] else ""}

{gallery}
"""
    write_durably(Path(folder) / "README.md", card.rstrip().encode() + b"\n")


def markdown(text):
    """Text that Markdown does not interpret, on one line."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!" else c for c in " ".join(str(text).split()))


def push(folder, args, token):
    """Upload the LoRA, the card and the videos to the hub (a new repository is private). Returns its address.

    Checkpoints, logs and optimizer state stay here. Raises whatever the hub client raises.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    repository = api.create_repo(name, exist_ok=True, private=True)
    api.upload_folder(repo_id=repository.repo_id, folder_path=str(folder), allow_patterns=UPLOADED, commit_message="CogVideoX LoRA")
    return str(repository)


def redacted(text, token=None):
    """Text without hub tokens."""
    text = text.replace(token, "hf_...") if token else text
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_...", text)
