"""The model card, and the upload of the result. Both read run.json."""

import base64
import functools
import hashlib
import json
import re
from pathlib import Path

from cogvideox.files import LORA_FILE, note_file, write_durably
from cogvideox.owned import CARD, OTHER_CARD, card_name

UPLOADED = [LORA_FILE, "transformer/*", "README.md", "metrics.jsonl", "loss.png"]
UPLOADED += ["validation/step-*/*.mp4", "validation/step-*/contact_sheet.png", "validation/step-*/image-*.png"]
TEMPLATES = Path(__file__).parent / "templates"
TEXT_TO_VIDEO = "CogVideoXPipeline"
# Placeholder facts, with which the rehearsal writes a card.
NO_FACTS = {"name": "", "base_model": "", "is_base_on_hub": False, "example_prompt": "", "steps": 0, "clips": 0, "clips_per_step": 0}
NO_FACTS |= {"trained_parameters": 0, "num_frames": 0, "height": 0, "width": 0, "videos": [], "pipeline": TEXT_TO_VIDEO}
SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}  # of --validation_scheduler


@functools.cache
def template(name):
    """A template of templates/. HTML templates escape every value not marked as safe; a missing name is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)  # a JSON string is a valid Python string
    return environment.get_template(name)


def page(name, **content):
    """An HTML page that needs no network: NAME.html.j2 with NAME.css and NAME.js in it, the only script that its policy allows."""
    from markupsafe import Markup

    style, script = ((TEMPLATES / f"{name}{ending}").read_text(encoding="utf-8") for ending in (".css", ".js"))
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template(f"{name}.html.j2").render(**content, style=Markup(style), script=Markup(script), script_hash=script_hash)


def snippet(run):
    """Python code that generates a video with the result. run: from `report.run_facts`. KeyError if a fact is missing."""
    flags, facts = run["flags"], run["facts"]
    # What runs of earlier versions lack is as it was then.
    is_lora, scheduler = flags["training_type"] == "lora", SCHEDULERS.get(flags.get("validation_scheduler"))
    pipeline = facts.get("pipeline", TEXT_TO_VIDEO)
    return template("snippet.py.j2").render(
        is_lora=is_lora,
        pipeline=pipeline,
        takes_image=pipeline != TEXT_TO_VIDEO,
        scheduler=scheduler,
        classes={pipeline} | ({scheduler} if scheduler else set()) | (set() if is_lora else {"CogVideoXTransformer3DModel"}),
        dynamic=flags.get("use_dynamic_cfg"),
        lora_file=LORA_FILE,
        base_model=facts["base_model"],
        dtype={"fp16": "float16", "bf16": "bfloat16"}.get(flags["mixed_precision"], "float32"),
        prompt=facts["example_prompt"],
        num_frames=facts["num_frames"],
        height=facts["height"],
        width=facts["width"],
        fps=f"{flags['fps']:g}",
    )


def write_model_card(folder, run):
    """Write the model card: base model, data, settings, usage, and the last validation videos. Returns its path.

    It is README.md, or model_card.md beside a README.md that no run wrote (or that was changed since).

    run: from `report.run_facts`, with all names of NO_FACTS in its facts. steps: optimizer steps. trained_parameters: a count.
    num_frames, height, width: of the videos. videos: [(prompt, relative path)].
    """
    from huggingface_hub import ModelCard, ModelCardData

    flags, facts = run["flags"], run["facts"]
    is_lora = flags["training_type"] == "lora"
    task = "text-to-video" if facts.get("pipeline", TEXT_TO_VIDEO) == TEXT_TO_VIDEO else "image-to-video"
    data = ModelCardData(
        base_model=facts["base_model"] if facts["is_base_on_hub"] else None,  # a local folder is not a hub id
        instance_prompt=flags["id_token"] or None,
        library_name="diffusers",
        pipeline_tag=task,
        tags=[task, "cogvideox", *(["lora"] if is_lora else []), "diffusers"],
    )
    table = {"rank": flags["rank"], "alpha": f"{flags['lora_alpha']:g}"} if is_lora else {}
    table |= {"target modules": ", ".join(flags["target_modules"])} if is_lora else {}
    table |= {"parameters": f"{facts['trained_parameters'] / 1e6:.1f} M", "learning rate": f"{flags['learning_rate']:g}"}
    precision = flags["mixed_precision"].replace("no", "fp32")
    table |= {"schedule": flags["lr_scheduler"], "optimizer": flags["optimizer"], "precision": precision}
    table |= {"seed": flags["seed"]} | ({"average": f"decay {flags['ema_decay']:g}"} if flags["ema_decay"] else {})
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md.j2"),
        facts=facts,
        is_lora=is_lora,
        fps=f"{flags['fps']:g}",
        table=table,
        trigger=flags["id_token"],
        snippet=snippet(run),
        markdown=markdown,
    )
    path, content = Path(folder) / card_name(folder), str(card).rstrip().encode(errors="replace") + b"\n"
    note_file(path, content)
    write_durably(path, content)
    return path


def markdown(text):
    """The text on one line, escaped for Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!" else c for c in " ".join(str(text).split()))


def repository_name(args):
    """The name of the repository that `push` writes: --hub_model_id, or the name of --output_dir."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def unfit_name(args):
    """Why the hub has no repository of this name, as a sentence, or None. Asks nobody."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = repository_name(args)
    way_out = "" if args.hub_model_id else f" (the name of --output_dir {args.output_dir}; give another one as --hub_model_id)"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return f"--hub_model_id {name}: {str(error).splitlines()[0]}{way_out}"
    if not name.isascii():  # the client's older releases leave that to the hub
        return f"--hub_model_id {name}: Repo id must use alphanumeric chars of ASCII, -, _ and .{way_out}"
    return None


def push(folder, args, token):
    """Upload the LoRA, the card and the videos to the hub (a new repository is private). Returns its URL.

    Checkpoints, logs and optimizer states are not uploaded. Raises the hub client's errors.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repository = api.create_repo(repository_name(args), exist_ok=True, private=True)
    own = card_name(folder) == CARD
    patterns = UPLOADED if own else [name for name in UPLOADED if name != CARD]
    api.upload_folder(repo_id=repository.repo_id, folder_path=str(folder), allow_patterns=patterns, commit_message="CogVideoX LoRA")
    if not own:
        api.upload_file(repo_id=repository.repo_id, path_or_fileobj=str(Path(folder) / OTHER_CARD), path_in_repo=CARD)
    return str(repository)


def without_secrets(value, token=None):
    """A nested value without hub tokens (or `token`), and with ~ for the home folder."""
    if isinstance(value, dict):
        return {name: without_secrets(item, token) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, token) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    text, home = str(value).replace(token, "hf_...") if token else str(value), str(Path.home())
    text = re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_...", text)
    return "~" + text[len(home) :] if len(home) > 1 and (text + "/").startswith(home + "/") else text
