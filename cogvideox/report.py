"""report.html: the run on one page, a single file that needs no server and no network; and run.json, the run's facts.

The page is built from the files of the output folder, complete or not, so it can be written at any time, also years later
(python -m tools.report). No heavy imports, so that it is fast. Each part of the page is a function here, which selects the
content, and the macro of the same name in templates/parts.html.j2.
"""

import argparse
import base64
import importlib.metadata
import json
import platform
import re
import statistics
import time
from pathlib import Path

from cogvideox import charts, hub
from cogvideox.charts import evenly, number, points_of
from cogvideox.files import LORA_FILE, at_home, read_json, read_json_lines, write_bytes
from cogvideox.flags import public_flags

NAME = "report.html"
VIDEO_BUDGET_MIB = 40  # of base64 text, for all videos of the page
MOST_STEPS, MOST_VIDEOS = 16, 160  # columns, and players: browsers limit how many are open at once
SHEET_MIB = 8
MOST_CLIPS = 200
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
SETTINGS = {
    "num_frames": "frames",
    "width": "pixels wide",
    "height": "pixels high",
    "num_inference_steps": "denoising steps",
    "guidance_scale": "guidance",
}


# -----------------------------------------------------------------------------
# run.json: facts that only the trainer knows


def device_name(device):
    """A torch device's description: the GPU's name, or the CPU with its threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions():
    """{package: version} of Python and of the packages whose version affects training."""
    packages = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return packages


def run_facts(flags, facts, defaults=None):
    """The content of run.json: the facts that the report and the model card need in addition to the run's other files.

    flags, defaults: {name: value}; the report shows which differ. facts: the names of `hub.NO_FACTS`, for the card, and device,
    processes, engine and total_steps. Tokens and the home folder's path are removed.
    """
    flags = {name: value for name, value in flags.items() if name != "hub_token"}
    defaults = {name: value for name, value in (defaults or {}).items() if name in flags}
    record = {"started": time.time(), "flags": flags, "defaults": defaults, "versions": versions(), "facts": dict(facts)}
    return hub.without_secrets(record)


def describe_run(args, model_facts, accelerator, engine, plan, data, video, num_trained, pipeline):
    """The content of run.json before step 1.

    model_facts: folder.ModelFacts, which has the defaults of some flags. engine: its name. video: the settings of the validation videos.
    pipeline: the name of the stock pipeline's class.
    """
    from cogvideox.folder import fill_in_defaults  # imports torch, without which a page is written

    base = args.pretrained_model_name_or_path
    is_on_hub = not Path(at_home(base)).exists()
    facts = {"name": Path(args.output_dir).resolve().name, "device": device_name(accelerator.device)}
    facts |= {"processes": accelerator.num_processes, "engine": engine, "clips": len(plan.clips)}
    facts |= {"clips_per_step": plan.clips_per_step, "total_steps": plan.total_steps, "trained_parameters": num_trained}
    # Only the name of a local folder: the card may be published.
    facts |= {"base_model": base if is_on_hub else Path(base).name, "is_base_on_hub": is_on_hub}
    facts |= {"example_prompt": args.prompts[0] if args.prompts else data.records[0].caption}
    facts |= {name: video[name] for name in ("num_frames", "height", "width")} | {"steps": 0, "videos": [], "pipeline": pipeline}
    defaults = argparse.Namespace(**{name: action.default for name, action in args.declared.items()})
    fill_in_defaults(defaults, model_facts)
    return run_facts(public_flags(args), facts, vars(defaults))


def write_run_facts(output_dir, run):
    """Write `run.json`. Returns the problem as a sentence, or None."""
    try:
        write_bytes(Path(output_dir) / "run.json", json.dumps(run, indent=1, default=str).encode())
    except (OSError, TypeError, ValueError) as error:
        return f"run.json was not written ({type(error).__name__}: {error}); the report will lack flags and versions"
    return None


# -----------------------------------------------------------------------------
# Reading: every file may be missing, incomplete or malformed


def read_object(path):
    """A JSON file's object, {} if it cannot be read."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_run(output_dir):
    """run.json with all its parts; missing or malformed ones are empty."""
    run = read_object(output_dir / "run.json")
    parts = {name: run.get(name) for name in ("flags", "defaults", "facts", "versions")}
    return {"started": number(run.get("started"))} | {n: part if isinstance(part, dict) else {} for n, part in parts.items()}


def read_lines(path):
    """The objects of a metrics.jsonl that have a step, sorted by step."""
    try:
        lines = read_json_lines(path)
    except OSError:
        return []
    return sorted(
        (line for line in lines if isinstance(line, dict) and number(line.get("step")) is not None), key=lambda line: line["step"]
    )


def read_videos(output_dir):
    """The validation videos: ({step: {file name: path}}, {file name: (prompt, seed, path of its image or None)}, settings of the newest
    step)."""
    steps, labels, settings = {}, {}, {}
    for folder in sorted((output_dir / "validation").glob("step-*")):
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if not match:
            continue
        record = read_object(folder / "videos.json")
        settings = record.get("settings") or settings
        jobs = record.get("videos")
        for job in jobs if isinstance(jobs, list) else []:
            if isinstance(job, dict) and "name" in job:
                trigger = "without the trigger: " if "without" in job else ""
                image = folder / str(job["image"]) if "image" in job else None
                labels[str(job["name"])] = (f"{trigger}{job.get('prompt', '')}", job.get("seed"), image)
        # A file whose name begins with a dot is still being written.
        paths = [path for pattern in ("*.mp4", "without_trigger/*.mp4") for path in folder.glob(pattern)]
        files = {path.relative_to(folder).as_posix(): path for path in paths if not path.name.startswith(".") and path.stat().st_size}
        if files:
            steps[int(match[1])] = files
    for name in {name for files in steps.values() for name in files}:
        seed = re.search(r"-seed(\d+)\.mp4$", name)
        labels.setdefault(name, (name.removesuffix(".mp4"), int(seed[1]) if seed else None, None))
    return dict(sorted(steps.items())), labels, settings if isinstance(settings, dict) else {}


def choose_videos(steps, budget=VIDEO_BUDGET_MIB * 2**20):
    """The videos to embed, {(step, name)}, and the steps shown.

    First the videos of the first and the newest step, row by row while they fit; then as many complete, evenly spaced steps in
    between as fit.
    """
    if not steps:
        return set(), []
    order, names = list(steps), sorted({name for files in steps.values() for name in files})
    ends, chosen, spent = sorted({order[0], order[-1]}), set(), 0
    for name in names:
        row = [(step, name) for step in ends if name in steps[step]]
        cost = sum(base64_bytes(steps[step][name]) for step, _ in row)
        if spent + cost <= budget and len(chosen) + len(row) <= MOST_VIDEOS:
            chosen.update(row)
            spent += cost
    between = order[1:-1]
    costs = {step: sum(map(base64_bytes, steps[step].values())) for step in between}
    for count in range(min(len(between), MOST_STEPS - len(ends)), 0, -1):
        kept = evenly(between, count)
        videos = [(step, name) for step in kept for name in steps[step]]
        if spent + sum(costs[step] for step in kept) <= budget and len(chosen) + len(videos) <= MOST_VIDEOS:
            return chosen | set(videos), sorted({*ends, *kept})
    return chosen, ends


def base64_bytes(path):
    """A file's size in base64."""
    return (path.stat().st_size + 2) // 3 * 4


def data_address(path, kind):
    """A file as a data: URL, "" if it cannot be read."""
    from markupsafe import Markup  # base64 needs no escaping, which would be slow for 40 MiB

    try:
        return Markup(f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}")
    except OSError:
        return ""


# -----------------------------------------------------------------------------
# The parts of the page: the content of the macros of the same names


def state(output_dir, run, lines):
    """The run's progress, its end and its verdict."""
    status = read_object(output_dir / "status.json")
    total, logged = number(run["facts"].get("total_steps")), max((line["step"] for line in lines), default=0)
    step = max(logged, number(status.get("step")) or 0)
    if status and is_from_earlier_start(output_dir, status, run, logged):
        status = {}
    code, reason = status.get("code"), str(status.get("reason", ""))
    if not status:
        kind, text = "running", "running, or killed, when this page was written"
    elif code == 0:
        kind, text = "done", "done"
    elif isinstance(code, int) and code >= 128:
        kind, text = "stopped", reason or "stopped"
    else:
        kind, text = "failed", f"failed: {reason}"
    seconds = [value for _, value in points_of(lines, "seconds_per_step")][-50:]
    is_running = not status and total and seconds and step < total
    sentences = status.get("verdict_sentences")
    return {
        "state": kind,
        "text": text,
        "has_ended": bool(status),
        "step": int(step),
        "total": int(total or 0),
        "left": duration(statistics.median(seconds) * (total - step)) if is_running else "",
        "verdict": status.get("verdict"),
        "sentences": [sentences] if isinstance(sentences, str) else sentences if isinstance(sentences, list) else [],
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "folder": output_dir.name,
    }


def is_from_earlier_start(output_dir, status, run, logged):
    """Whether status.json is from before the run was resumed."""
    try:
        is_older = run["started"] is not None and (output_dir / "status.json").stat().st_mtime < run["started"]
    except OSError:
        is_older = False
    return is_older or logged > (number(status.get("step")) or logged)


def duration(seconds):
    """A duration with its unit."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def videos(output_dir, lines):
    """One row per prompt and seed, one column per step that fits, the first step (the base model) in front, with their motion."""
    steps, labels, settings = read_videos(output_dir)
    chosen, shown = choose_videos(steps)
    sizes = [f"{settings[name]} {unit}" for name, unit in SETTINGS.items() if name in settings]
    notes = [", ".join(sizes) + "."] if sizes else []
    notes.append("Each row has one prompt and one seed.")
    if len(shown) < len(steps):
        notes.append(f"{len(shown)} of {len(steps)} steps are shown, to keep the page small; all are in validation/.")
    rows, measured = [], motion_of_videos(lines)
    if measured:
        notes.append("Motion in grey levels per second.")
    for name in sorted({name for step in shown for name in steps[step]}):
        cells = [video_cell(step, name, steps[step].get(name), (step, name) in chosen, measured) for step in shown]
        prompt, seed, image = labels[name]
        rows.append({"prompt": prompt, "seed": seed, "image": data_address(image, "image/png") if image else "", "cells": cells})
    if linked := sum(bool(cell["link"]) for row in rows for cell in row["cells"]):
        notes.append(f"{linked} videos did not fit in {VIDEO_BUDGET_MIB} MiB and are links to the files beside this page.")
    return {"steps": shown, "rows": rows, "notes": notes}


def video_cell(step, name, path, is_chosen, measured):
    """One video, embedded or as a link to its file. measured: from `motion_of_videos`."""
    link = f"validation/step-{step:06d}/{name}" if path and not is_chosen else ""
    source = data_address(path, "video/mp4") if path and is_chosen else ""
    motion = f"motion {measured[step, name]:.1f}" if path and (step, name) in measured else ""
    return {"step": step, "source": source, "link": link, "motion": motion, "absent": "cannot be read" if path else "none"}


def motion_of_videos(lines):
    """{(step, file name): the motion} of the validation videos in metrics.jsonl."""
    found = {}
    for line in lines:
        videos = line.get("videos")
        for video in videos if isinstance(videos, list) else []:
            if isinstance(video, dict) and number(video.get("motion")) is not None:
                found[line["step"], str(video.get("name"))] = video["motion"]
    return found


def curves(lines):
    """The curves of training and of evaluations."""
    frame = {name: getattr(charts, name.upper()) for name in ("width", "height", "left", "right", "top", "bottom")}
    return {"charts": charts.charts_of(lines) if lines else [], "frame": frame, "newest": charts.newest_numbers(lines)}


def data(output_dir):
    """The VAE reconstructions of a few clips, and dataset.json: clips and remarks."""
    sheet = output_dir / "encoded/contact_sheet.png"
    is_small = sheet.exists() and sheet.stat().st_size <= SHEET_MIB * 2**20
    dataset = hub.without_secrets(read_object(output_dir / "dataset.json"))
    clips = dataset.get("clips")
    return {
        "sheet": data_address(sheet, "image/png") if is_small else "",
        "sheet_link": "encoded/contact_sheet.png" if sheet.exists() and not is_small else "",
        "clips": None if clips is None else clips[:MOST_CLIPS],
        "more": max(0, len(clips or []) - MOST_CLIPS),
        "remarks": dataset.get("remarks", []),
        "problems": dataset.get("problems", []),
    }


def use(output_dir, run):
    """The model card's snippet, which does not change during the run."""
    if "base_model" not in run["facts"]:
        return {"snippet": ""}
    result = LORA_FILE if run["flags"].get("training_type") == "lora" else "transformer"
    is_there = (output_dir / result).exists()
    return {"snippet": hub.snippet(run), "trigger": run["flags"].get("id_token"), "result": result, "is_there": is_there}


def settings(run):
    """The flags, first those that differ from their defaults, and the run's device and versions."""
    flags, defaults, started = run["flags"], run["defaults"], run["started"]
    known = {name.replace("_", " "): value for name, value in run["facts"].items() if name not in SHOWN_ELSEWHERE}
    known |= {"started": time.strftime("%Y-%m-%d %H:%M", time.localtime(started))} if started is not None else {}
    own = [name for name in flags if name not in defaults or flags[name] != defaults[name]]
    table = {name: (f"--{name}", flag_text(value)) for name, value in flags.items()}
    return {
        "known": list((known | run["versions"]).items()),
        "own": [table[name] for name in own],
        "rest": [table[name] for name in flags if name not in own],
    }


SHOWN_ELSEWHERE = {"name", "videos", "example_prompt", "is_base_on_hub", "steps", "num_frames", "height", "width", "pipeline"}


def flag_text(value):
    """A flag's value as text."""
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "yes", False: "no"}[value]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# -----------------------------------------------------------------------------
# The page


def page(output_dir):
    """The page as HTML text. output_dir: a Path."""
    run, lines, macros = read_run(output_dir), read_lines(output_dir / "metrics.jsonl"), hub.template("parts.html.j2").module
    parts = [
        ("", state, (output_dir, run, lines)),
        ("Videos by step", videos, (output_dir, lines)),
        ("Curves", curves, (lines,)),
        ("The data", data, (output_dir,)),
        ("How to use it", use, (output_dir, run)),
        ("Flags and versions", settings, (run,)),
    ]
    sections = []
    for heading, part, arguments in parts:
        content, problem = "", ""
        try:
            content = getattr(macros, part.__name__)(part(*arguments))
        except Exception as error:  # a malformed file costs its part, not the page
            problem = f"{type(error).__name__}: {error}"
        sections.append((heading, content, problem))
    return hub.page("report", title=output_dir.name, sections=sections)


def write_report(output_dir):
    """Write `report.html` from the files of a run's output folder. Returns the problem as a sentence, or None; never raises."""
    try:
        output_dir = Path(output_dir).absolute()
        for leftover in output_dir.glob(f".{NAME}.*.partial"):  # left by a run that was killed while writing
            if time.time() - leftover.stat().st_mtime > 600:
                leftover.unlink(missing_ok=True)
        write_bytes(output_dir / NAME, page(output_dir).encode(errors="replace"))
    except Exception as error:  # a report must not end the run
        return f"{NAME} was not written ({type(error).__name__}: {error}); python -m tools.report rewrites it"
    return None


def refresh(output_dir):
    """Rewrite the report; a failure is a warning."""
    from cogvideox.console import warn

    if problem := write_report(output_dir):
        warn(f"{problem}")
