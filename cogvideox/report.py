"""report.html: the whole run on one page, in one file that needs no server and no network.

Everything is read from the files of the output folder, whatever of it is there yet, so the page can be written at any
moment of a run and again years later (python -m tools.report). Nothing heavy is imported: it has to be quick.
"""

import base64
import hashlib
import html
import importlib.metadata
import json
import math
import platform
import re
import statistics
import time
from pathlib import Path

from cogvideox.files import write_bytes

NAME = "report.html"
VIDEO_BUDGET_MIB = 40  # of base64 text, over all videos in the page
MOST_STEPS, MOST_VIDEOS = 16, 160  # columns, and players: browsers open only so many at once
SHEET_MIB = 8
CURVE_POINTS, HOVER_COLUMNS = 400, 80
TABLE_ROWS = 200
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
DERIVED_FLAGS = {"prompts", "bucket_sizes", "bucket_lengths", "hub_token"}  # what repeats another flag, and the secret


# -----------------------------------------------------------------------------
# What only the trainer knows


def device_name(device):
    """A torch device in words: the GPU's name, or the CPU with its threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def write_run_facts(output_dir, flags, facts, defaults=None):
    """Write `run.json`: flags, their defaults, versions, the time, and facts of this run. Returns what failed as a sentence, or None.

    flags: as `checkpoint.public_flags` gives them. defaults: {flag: default}, to tell which were given. facts: of device,
    processes, engine, clips, clips_per_step and total_steps what is known. Tokens and the name of the home folder are left out.
    """
    try:
        versions = {"python": platform.python_version()}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "not installed"
        flags = {name: value for name, value in flags.items() if name not in DERIVED_FLAGS}
        defaults = {name: value for name, value in (defaults or {}).items() if name in flags}
        record = {"started": time.time(), "flags": flags, "defaults": defaults, "versions": versions, "facts": dict(facts)}
        write_bytes(Path(output_dir) / "run.json", json.dumps(without_secrets(record), indent=1, default=str).encode())
    except (OSError, TypeError, ValueError) as error:
        return f"run.json was not written ({type(error).__name__}: {error}); the report will lack flags and versions"
    return None


def without_secrets(value):
    """A nested value whose texts hold no hub token, and ~ for the home folder."""
    if isinstance(value, dict):
        return {name: without_secrets(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    text, home = re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_...", str(value)), str(Path.home())
    return "~" + text[len(home) :] if len(home) > 1 and (text + "/").startswith(home + "/") else text


# -----------------------------------------------------------------------------
# Reading: every file may be missing, half written or odd


def read_json(path):
    """A JSON object, {} where there is none to be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_text(path):
    """A file's text, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_lines(path):
    """The objects of a metrics.jsonl that have a step, in the order of steps."""
    lines = []
    for text in read_text(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a killed run
            continue
        if isinstance(line, dict) and number(line.get("step")) is not None:
            lines.append(line)
    return sorted(lines, key=lambda line: line["step"])


def number(value):
    """A finite number, or None for anything else."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def points_of(lines, name):
    """[(step, value)] of the lines that have a finite value of this name."""
    return [(line["step"], line[name]) for line in lines if number(line.get(name)) is not None]


def read_videos(output_dir):
    """What validation has left. Returns ({step: {file name: path}}, {file name: (prompt, seed)}, settings of the newest)."""
    steps, labels, settings = {}, {}, {}
    for folder in sorted((output_dir / "validation").glob("step-*")):
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if not match:
            continue
        record = read_json(folder / "videos.json")
        settings = record.get("settings") or settings
        jobs = record.get("videos")
        for job in jobs if isinstance(jobs, list) else []:
            if isinstance(job, dict) and "name" in job:
                labels[str(job["name"])] = (str(job.get("prompt", "")), job.get("seed"))
        # A name that begins with a dot is being written.
        found = {path.name: path for path in folder.glob("*.mp4") if not path.name.startswith(".") and path.stat().st_size}
        if found:
            steps[int(match[1])] = found
    for name in {name for found in steps.values() for name in found}:
        seed = re.search(r"-seed(\d+)\.mp4$", name)
        labels.setdefault(name, (name.removesuffix(".mp4"), int(seed[1]) if seed else None))
    return dict(sorted(steps.items())), labels, settings if isinstance(settings, dict) else {}


# -----------------------------------------------------------------------------
# Choosing what fits


def base64_bytes(path):
    """The length of a file in base64."""
    return (path.stat().st_size + 2) // 3 * 4


def evenly(items, count):
    """`count` of the items, evenly spaced, none of them twice."""
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)] if count else []


def choose_videos(steps, budget=VIDEO_BUDGET_MIB * 2**20):
    """Which videos go into the page: {(step, name)} and the steps shown.

    The first and the newest step come before all others, row by row while they fit; then as many of the steps between as
    fit, whole and evenly spaced.
    """
    if not steps:
        return set(), []
    order, names = list(steps), sorted({name for found in steps.values() for name in found})
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


def thin(points, most=CURVE_POINTS):
    """At most about `most` points of a curve, the lowest and the highest of each piece, so that no spike is lost."""
    if len(points) <= most:
        return points
    pieces, kept = most // 2, []
    for i in range(pieces):
        piece = points[i * len(points) // pieces : (i + 1) * len(points) // pieces]
        kept += sorted({min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1])})
    return kept


def running_mean(points, window):
    """The exponential mean over about `window` points, corrected for its start as Adam's moments are."""
    mean, weight, result = 0.0, 0.0, []
    for step, value in points:
        mean, weight = mean + (value - mean) / window, weight + (1 - weight) / window
        result.append((step, mean / weight))
    return result


# -----------------------------------------------------------------------------
# Pictures of numbers: SVG by hand, with colours of the style sheet


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 250, 56, 12, 12, 34


def escape(value):
    """Text for HTML, in an element or in quotes."""
    return html.escape(str(value), quote=True)


def short(value):
    """A number with four figures."""
    return f"{value:.4g}"


def ticks(low, high, count=5):
    """Round numbers from low to high, about `count` of them, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    gap = min((scale * factor for factor in (1, 2, 5, 10)), key=lambda gap: abs(math.log(gap / rough)))
    return [i * gap for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def axis(values, length, is_log=False, margin=0.05):
    """A scale for values: (value -> distance from the start in pixels, ticks)."""
    change = math.log10 if is_log else float
    low, high = change(min(values)), change(max(values))
    if high - low <= 1e-12 * max(1.0, abs(high)):  # one value: give it room
        low, high = low - max(abs(low), 1e-9) * 0.1, high + max(abs(high), 1e-9) * 0.1
    low, high = low - margin * (high - low), high + margin * (high - low)
    marks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)] if is_log else ticks(low, high)
    return lambda value: (change(value) - low) / (high - low) * length, marks


def chart(title, series, note="", mark=None):
    """A line chart over steps as HTML. series: [(label, class, points)]; mark: (step, words) for an upright line.

    Where positive values span more than a factor of 100 their axis is logarithmic.
    """
    series = [(label, kind, points) for label, kind, points in series if points]
    if not series:
        return missing(title, "no value is logged yet")
    values = [value for _, _, points in series for _, value in points]
    steps = [step for _, _, points in series for step, _ in points] + ([mark[0]] if mark else [])
    is_log = min(values) > 0 and max(values) / min(values) > 100
    across, step_marks = axis(steps, WIDTH - LEFT - RIGHT, margin=0.01)
    up, value_marks = axis(values, HEIGHT - TOP - BOTTOM, is_log)
    x, y = (lambda step: LEFT + across(step)), (lambda value: HEIGHT - BOTTOM - up(value))
    parts = [grid_line(y(value), short(value)) for value in value_marks]
    for step in step_marks:
        if step == int(step):
            parts.append(f'<text class="tick" text-anchor="middle" x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 14}">{int(step)}</text>')
    parts.append(f'<text class="tick" text-anchor="middle" x="{(WIDTH + LEFT) / 2:.0f}" y="{HEIGHT - 4}">optimizer step</text>')
    if mark:
        parts.append(f'<line class="mark" x1="{x(mark[0]):.1f}" x2="{x(mark[0]):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for _, kind, points in series:
        drawn = thin(points)
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in drawn)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        if len(drawn) <= 30 and "base" not in kind:
            parts += [f'<circle class="dot {kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"/>' for step, value in drawn]
    parts += hover_columns(series, x)
    legend = [(label, kind) for label, kind, _ in series] + ([(mark[1], "marked")] if mark else [])
    note = " ".join(part for part in (note, "Logarithmic." if is_log else "") if part)
    return figure(title, parts, legend, note)


def hover_columns(series, x):
    """Invisible columns over a chart, each with the values at its step as the title that a pointer shows."""
    known = {}
    for label, _, points in series:
        for step, value in points:
            known.setdefault(step, []).append(f"{label} {short(value)}")
    steps = sorted(known)
    steps = steps if len(steps) <= HOVER_COLUMNS else evenly(steps, HOVER_COLUMNS)
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in zip(steps, steps[1:], strict=False)), WIDTH - RIGHT]
    for step, start, end in zip(steps, edges, edges[1:], strict=False):
        size = f'x="{start:.1f}" y="{TOP}" width="{max(0, end - start):.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        yield f'<rect class="hover" {size}><title>step {step}: {escape(", ".join(known[step]))}</title></rect>'


def bars(title, bands, note):
    """Grouped bars as HTML: for each band of timesteps the loss now beside the base model's, on either split."""
    splits = [("training clips", "one", "train"), ("held-out clips", "two", "held_out")]
    shown = [split for split in splits if any(number(band.get(split[2])) is not None for band in bands)]
    values = [number(band.get(key + end)) for band in bands for _, _, key in shown for end in ("", "_base")]
    values = [value for value in values if value is not None and value >= 0]
    if not values:
        return missing(title, "no evaluation has been made yet")
    up, value_marks = axis([0, *values], HEIGHT - TOP - BOTTOM, margin=0.0)
    parts = [grid_line(HEIGHT - BOTTOM - up(value), short(value)) for value in value_marks]
    room = (WIDTH - LEFT - RIGHT) / len(bands)
    width = min(34, room * 0.8 / (2 * len(shown)))
    for place, band in enumerate(bands):
        middle = LEFT + (place + 0.5) * room
        name = escape(band.get("timestep", ""))
        parts.append(f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 14}">{name}</text>')
        left = middle - width * len(shown)
        for label, kind, key in shown:
            for end, words in (("_base", "base model"), ("", "now")):
                value = number(band.get(key + end))
                if value is not None and value >= 0:
                    tall, style = up(value), f"{kind} base" if end else kind
                    size = f'x="{left + 1:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" width="{width - 2:.1f}" height="{tall:.1f}"'
                    words = f"timestep {name}, {label}, {words}: {short(value)}"
                    parts.append(f'<rect class="bar {style}" {size}><title>{words}</title></rect>')
                left += width
    parts.append(f'<text class="tick" text-anchor="middle" x="{(WIDTH + LEFT) / 2:.0f}" y="{HEIGHT - 4}">timestep (0: no noise)</text>')
    legend = [
        (f"{label}, {words}", f"{kind} {end}") for label, kind, _ in shown for words, end in (("base model", "pale"), ("now", "full"))
    ]
    return figure(title, parts, legend, note)


def grid_line(y, words):
    """A horizontal line of a chart with its value."""
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{words}</text>'


def figure(title, parts, legend, note):
    """A chart with heading, legend and note."""
    keys = "".join(f'<span class="key"><i class="{kind}"></i>{escape(label)}</span>' for label, kind in legend)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    small = f"<p class=small>{escape(note)}</p>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{svg}<p class=legend>{keys}</p>{small}</figure>"


def missing(title, why):
    """A figure's place while there is nothing to draw."""
    return f"<figure><h3>{escape(title)}</h3><p class=absent>{escape(why)}</p></figure>"


# -----------------------------------------------------------------------------
# The parts of the page, each a string of HTML


def state_part(output_dir, status, run, lines):
    """How far the run is, how it ended, and the verdict on it."""
    facts = run.get("facts") if isinstance(run.get("facts"), dict) else {}
    total, logged = number(facts.get("total_steps")), max((line["step"] for line in lines), default=0)
    step = max(logged, number(status.get("step")) or 0)
    if status and is_of_an_earlier_start(output_dir, status, run, logged):
        status = {}
    code, reason = status.get("code"), str(status.get("reason", ""))
    if not status:
        state, words = "running", "running, or killed without a word, when this page was written"
    elif code == 0:
        state, words = "done", "done"
    elif isinstance(code, int) and code >= 128:
        state, words = "stopped", reason or "stopped"
    else:
        state, words = "failed", f"failed: {reason}"
    of_total = f" of {total:.0f}" if total else ""
    parts = [f'<p class=state><b class="{state}">{escape(words)}</b> step {step:.0f}{of_total}</p>']
    if total:
        parts.append(f'<progress max="{total:.0f}" value="{min(step, total):.0f}"></progress>')
    seconds = [value for _, value in points_of(lines, "seconds_per_step")][-50:]
    if not status and total and seconds and step < total:
        parts.append(f"<p class=small>About {duration(statistics.median(seconds) * (total - step))} of training left.</p>")
    if verdict := status.get("verdict"):
        sentences = status.get("verdict_sentences")
        sentences = [sentences] if isinstance(sentences, str) else sentences if isinstance(sentences, list) else []
        parts.append(f"<p class=verdict>{escape(verdict)}</p>{''.join(f'<p>{escape(sentence)}</p>' for sentence in sentences)}")
    else:
        parts.append("<p class=absent>There is no verdict yet: it is given when the run ends.</p>" if not status else "")
    written = time.strftime("%Y-%m-%d %H:%M")
    parts.append(f"<p class=small>Written {written}. Everything is read from the files of <code>{escape(output_dir.name)}</code>.</p>")
    return "".join(parts)


def is_of_an_earlier_start(output_dir, status, run, logged):
    """Whether status.json tells of the end of an earlier start, and the run has been resumed since."""
    started = number(run.get("started"))
    try:
        is_older = started is not None and (output_dir / "status.json").stat().st_mtime < started
    except OSError:
        is_older = False
    return is_older or logged > (number(status.get("step")) or logged)


def duration(seconds):
    """A time in words."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def videos_part(output_dir):
    """A row for each prompt and seed, a column for each step that fits, the first one (the base model) before all."""
    steps, labels, settings = read_videos(output_dir)
    if not steps:
        return "<p class=absent>There are no validation videos yet (--validation_prompt asks for them).</p>"
    chosen, shown = choose_videos(steps)
    sizes = [f"{settings[name]} {unit}" for name, unit in SETTINGS.items() if name in settings]
    notes = [", ".join(sizes) + "." if sizes else "", "Every row has one prompt and one seed."]
    if len(shown) < len(steps):
        notes.append(f"{len(shown)} of {len(steps)} steps are here, so that the page stays small; all are in validation/.")
    rows = sorted({name for step in shown for name in steps[step]})
    linked = sum(name in steps[step] and (step, name) not in chosen for step in shown for name in rows)
    if linked:
        notes.append(f"{linked} videos did not fit into {VIDEO_BUDGET_MIB} MiB and are links to the files beside this page.")
    heads = "".join(f"<th>{'base model, step 0' if step == 0 else f'step {step}'}</th>" for step in shown)
    body = []
    for row, name in enumerate(rows):
        prompt, seed = labels[name]
        cells = "".join(f"<td>{video_cell(steps[step].get(name), step, row, (step, name) in chosen)}</td>" for step in shown)
        seed = "" if seed is None else f", seed {escape(seed)}"
        heading = f"<b>{escape(prompt)}</b><span class=small>{seed}</span>"
        body.append(f'<tr class=prompt><th colspan="{len(shown)}"><div>{heading}</div></th></tr><tr>{cells}</tr>')
    options = "".join(
        f'<option value="{row}">{escape(labels[name][0][:90])} (seed {escape(labels[name][1])})</option>' for row, name in enumerate(rows)
    )
    return (
        f"<p class=small>{escape(' '.join(note for note in notes if note))}</p>"
        f"<div id=compare hidden><p class=controls><button id=play>Play all</button><select id=row aria-label=prompt>{options}</select></p>"
        "<p class=controls><label for=step>step <output id=shown></output></label><input id=step type=range min=0 value=0></p>"
        "<div class=pair><div><p id=first></p><video id=left controls loop muted playsinline></video></div>"
        "<div><p id=now></p><video id=right controls loop muted playsinline></video></div></div></div>"
        f"<div class=scroll><table class=videos><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


SETTINGS = {
    "num_frames": "frames",
    "width": "pixels wide",
    "height": "pixels high",
    "num_inference_steps": "denoising steps",
    "guidance_scale": "guidance",
}


def video_cell(path, step, row, embedded):
    """One video: in the page, or a link to its file."""
    if path is None:
        return "<span class=absent>none</span>"
    if not embedded:
        return f'<a href="validation/{escape(path.parent.name)}/{escape(path.name)}">open the file</a>'
    source = data_address(path, "video/mp4")
    if not source:
        return "<span class=absent>cannot be read</span>"
    return f'<video controls loop muted playsinline data-step="{step}" data-row="{row}" src="{source}"></video>'


def data_address(path, kind):
    """A file as a data: address, "" where it cannot be read."""
    try:
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return ""


def curves_part(lines):
    """The curves of training and of the evaluations."""
    if not lines:
        return "<p class=absent>There is no metrics.jsonl with a step yet.</p>"
    losses, window = points_of(lines, "loss"), 0
    if losses:
        window = max(10, len(losses) // 50)
    odd = sum(isinstance(line.get("loss"), float) and not math.isfinite(line["loss"]) for line in lines)
    evaluations = [line for line in lines if "eval_train_loss" in line]
    newest = evaluations[-1] if evaluations else {}
    best = number(newest.get("best_step"))
    bands = [band for band in newest.get("eval_bands") or [] if isinstance(band, dict)]
    parts = [
        chart(
            "Training loss",
            [("as logged", "faint", losses), (f"running mean over about {window} lines", "one", running_mean(losses, window))],
            f"{odd} values that are not finite are left out." if odd else "",
        ),
        chart(
            "Loss on fixed noise",
            [
                ("training clips", "one", points_of(lines, "eval_train_loss")),
                ("base model", "one base", points_of(lines, "eval_train_base_loss")),
                ("held-out clips", "two", points_of(lines, "eval_held_out_loss")),
                ("base model on them", "two base", points_of(lines, "eval_held_out_base_loss")),
                ("fixed clips", "one", points_of(lines, "fixed_loss")),
            ],
            mark=(best, f"best step: {best:.0f}") if best is not None else None,
        ),
        bars("Loss by timestep", bands, f"At step {newest['step']}." if newest else ""),
        chart("Learning rate", [("learning rate", "one", points_of(lines, "learning_rate"))]),
        chart("Gradient norm", [("before clipping", "one", points_of(lines, "grad_norm"))]),
        chart("Seconds a step", [("seconds", "one", points_of(lines, "seconds_per_step"))]),
    ]
    return f"<div class=figures>{''.join(parts)}</div>{newest_numbers(lines, newest)}"


def newest_numbers(lines, newest):
    """What the newest evaluation and the newest step say, as a table."""
    rows = []
    for words, name in (("training clips", "train"), ("held-out clips", "held_out")):
        now, base = number(newest.get(f"eval_{name}_loss")), number(newest.get(f"eval_{name}_base_loss"))
        if now is not None:
            change = f"{100 * (now - base) / base:+.1f} %" if base else ""
            rows.append((f"loss, {words}", short(now), "" if base is None else short(base), change))
    head = "<tr><th>at step {}</th><th>now</th><th>base model</th><th>change</th></tr>".format(escape(newest.get("step", "")))
    table = f"<table class=plain>{head}{''.join(table_row(row) for row in rows)}</table>" if rows else ""
    facts = []
    if number(newest.get("update_share")) is not None:
        facts.append(f"the update is {100 * newest['update_share']:.3g} % of the weights it is added to")
    gap, base_gap = newest.get("eval_caption_gap"), newest.get("eval_caption_base_gap")
    if gap and base_gap:
        facts.append(f"with another clip's caption the loss is {100 * gap[0]:+.1f} % (base model: {100 * base_gap[0]:+.1f} %)")
    for name, words in (("data_wait_percent", "waiting for data {:.0f} % of a step"), ("peak_memory_gib", "peak memory {:.2f} GiB")):
        if points := points_of(lines, name):
            facts.append(words.format(points[-1][1]))
    return f"<div class=scroll>{table}</div><p class=small>{escape('; '.join(facts))}</p>"


def table_row(cells):
    """A row of a table; the first cell is its heading."""
    return f"<tr><th>{escape(cells[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells[1:])}</tr>"


CLIP_COLUMNS = ["clip", "source", "reader", "frames", "seconds", "used", "cut", "size", "tokens"]
CLIP = re.compile(r"(.{28}) +(\S+ \d+f @\S+) +(\S+) +(\d+) +([\d.]+) +([\d.]+%) +([\d.]+%) +(\d+x *\d+) +(\d+!?)")


def data_part(output_dir):
    """What the VAE keeps of a few clips, and dataset_report.txt as a table with its remarks."""
    parts, sheet = [], output_dir / "encoded/contact_sheet.png"
    try:
        size = sheet.stat().st_size
    except OSError:
        size = None
    if size is None:
        parts.append("<p class=absent>encoded/ has no contact sheet: no clip was encoded by this run, or not yet.</p>")
    elif size > SHEET_MIB * 2**20:
        parts.append('<p><a href="encoded/contact_sheet.png">encoded/contact_sheet.png</a> is too large for this page.</p>')
    elif source := data_address(sheet, "image/png"):
        parts.append(f'<img src="{source}" alt="clips as they are trained on, and decoded from their latents">')
    text = read_text(output_dir / "dataset_report.txt")
    if not text.strip():
        return "".join(parts) + "<p class=absent>There is no dataset_report.txt yet.</p>"
    table, _, remarks = text.partition("\n\n")
    lines = table.splitlines()[1:]
    rows = []
    for line in lines[:TABLE_ROWS]:
        if match := CLIP.fullmatch(line.rstrip()):
            rows.append(table_row([cell.strip() for cell in match.groups()]))
        else:  # a clip that cannot be used, or a remark on the one above
            rows.append(f'<tr><td colspan="9">{escape(" ".join(line.split()))}</td></tr>')
    heads = "".join(f"<th>{words}</th>" for words in CLIP_COLUMNS)
    for remark in remarks.splitlines():
        if remark.strip():
            parts.append(f'<p class="{"failed" if remark.startswith("ERROR") else "remark"}">{escape(remark)}</p>')
    more = f"<p class=small>{len(lines) - TABLE_ROWS} more lines are in dataset_report.txt.</p>" if len(lines) > TABLE_ROWS else ""
    table = f"<div class=scroll><table class=plain><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{more}"
    parts.append(f"<details{' open' if len(rows) <= 12 else ''}><summary>clip by clip</summary>{table}</details>")
    return "".join(parts)


def use_part(output_dir):
    """The snippet of the model card, with a button that copies it."""
    match = re.search(r"```python\n(.*?)```", read_text(output_dir / "README.md"), re.DOTALL)
    if not match:
        return "<p class=absent>The model card (README.md) is written at the end of the run.</p>"
    return f"<div class=code><button id=copy hidden>Copy</button><pre><code id=snippet>{escape(match[1].rstrip())}</code></pre></div>"


def settings_part(run):
    """The flags, those that differ from their defaults first, and what the run ran on."""
    if not run:
        return "<p class=absent>There is no run.json: flags and versions are not known.</p>"
    flags, defaults, facts, versions = (
        part if isinstance(part := run.get(name), dict) else {} for name in ("flags", "defaults", "facts", "versions")
    )
    started = number(run.get("started"))
    known = {name.replace("_", " "): value for name, value in facts.items()}
    known |= {"started": time.strftime("%Y-%m-%d %H:%M", time.localtime(started))} if started is not None else {}
    own = [name for name in flags if name not in defaults or flags[name] != defaults[name]]
    rest = [name for name in flags if name not in own]
    facts_table = "".join(table_row((name, value)) for name, value in (known | versions).items())
    own_table = "".join(table_row((f"--{name}", flag_text(flags[name]))) for name in own)
    rest_table = "".join(table_row((f"--{name}", flag_text(flags[name]))) for name in rest)
    parts = [f"<div class=scroll><table class=plain>{facts_table}</table></div>"]
    if own:
        heading = "Flags that differ from their defaults, or were filled in" if rest else "Flags"
        parts.append(f"<h3>{heading}</h3><div class=scroll><table class=plain>{own_table}</table></div>")
    if rest:
        parts.append(f"<details><summary>{len(rest)} flags at their defaults</summary>")
        parts.append(f"<div class=scroll><table class=plain>{rest_table}</table></div></details>")
    return "".join(parts)


def flag_text(value):
    """A flag's value as one would read it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return {None: "not given", True: "yes", False: "no"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


# -----------------------------------------------------------------------------
# The page


STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1b1f24;--soft:#5c6570;--edge:#d8dde3;--panel:#f5f7f9;
--one:#2463c4;--two:#c2570c;--good:#1b7f3b;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--page:#15181c;--text:#e6e9ed;--soft:#9aa4af;--edge:#343b44;--panel:#1e2329;
--one:#7fb0ff;--two:#ff9f5a;--good:#5fce85;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;margin:.2em 0;overflow-wrap:anywhere}h2{font-size:1.25rem;margin:2em 0 .5em;border-bottom:1px solid var(--edge)}
h3{font-size:1rem;margin:.6em 0 .2em}p{margin:.4em 0;overflow-wrap:anywhere}
.small,.absent,.legend,.tick{color:var(--soft);font-size:.85rem}.absent{font-style:italic}.remark{font-size:.95rem}
.state b{border:1px solid;border-radius:6px;padding:.1em .5em;margin-right:.4em}.running{color:var(--one)}.done{color:var(--good)}
.stopped{color:var(--two)}.failed{color:var(--bad)}
.verdict{font-size:2.2rem;font-weight:700;line-height:1.15;margin:.5em 0 .1em}progress{width:100%;accent-color:var(--one)}
.scroll{overflow-x:auto}table{border-collapse:collapse}
.plain td,.plain th{padding:.15em .8em .15em 0;text-align:left;font-size:.85rem;vertical-align:top;border-bottom:1px solid var(--edge)}
.plain th{font-weight:600;white-space:nowrap}.plain td{overflow-wrap:anywhere}
.videos td{padding:0 8px 14px 0;vertical-align:top}.videos thead th{text-align:left;padding-right:8px;font-size:.9rem}
.prompt th{text-align:left;font-weight:400;padding-top:6px}.prompt div{position:sticky;left:0;max-width:min(1100px,calc(100vw - 40px))}
.videos video{width:220px;display:block;background:#000;border-radius:4px}
#compare{background:var(--panel);border:1px solid var(--edge);border-radius:8px;padding:10px;margin:10px 0 16px}
#compare[hidden]{display:none}.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px}
.pair video{width:100%;background:#000;border-radius:4px}
.pair p{margin:0 0 2px;font-size:.9rem}.controls{display:flex;gap:10px;flex-wrap:wrap;align-items:center}
.controls input{flex:1;min-width:140px;accent-color:var(--one)}.controls select{flex:1;min-width:0;max-width:100%}
button,select{font:inherit;color:inherit;background:var(--page);border:1px solid var(--edge);border-radius:6px;padding:.25em .8em}
button{cursor:pointer}label{min-width:6.5em}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:12px;
margin-bottom:12px}
figure{margin:0;background:var(--panel);border:1px solid var(--edge);border-radius:8px;padding:4px 10px 8px}
svg{width:100%;height:auto;display:block}.tick{fill:var(--soft);font-size:12px}
.grid{stroke:var(--edge);stroke-width:1}.line{fill:none;stroke-width:2;stroke-linejoin:round}.hover{fill:transparent}
.hover:hover{fill:var(--soft);fill-opacity:.15}.mark{stroke:var(--good);stroke-width:1.5;stroke-dasharray:2 3}
.one{stroke:var(--one);--c:var(--one)}.two{stroke:var(--two);--c:var(--two)}
.faint{stroke:var(--one);--c:var(--one);opacity:.4}
.line.faint{stroke-width:1}.line.base{stroke-dasharray:6 4;stroke-width:1.5}
.dot{fill:var(--c)}.bar{fill:var(--c)}.bar.base{fill-opacity:.25}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px}.key i{display:inline-block;width:18px;height:0;border-top:3px solid var(--c);
vertical-align:middle;margin-right:5px}.key i.base{border-top-style:dashed;border-top-width:2px}
.key i.pale,.key i.full{width:12px;border-top-width:12px}.key i.pale{opacity:.3}.marked{--c:var(--good)}
.key i.marked{border-top-style:dotted}
img{max-width:100%;border-radius:4px}.code{position:relative}#copy{position:absolute;right:8px;top:8px}
pre{background:var(--panel);border:1px solid var(--edge);border-radius:8px;padding:12px;overflow-x:auto;font-size:.85rem}
@media(max-width:600px){.pair{gap:4px}.videos video{width:150px}main{padding:10px}#copy{position:static}}
"""

# Data addresses become blobs: Safari plays only those, and the large players then share them.
SCRIPT = """
"use strict";
const $ = id => document.getElementById(id);
const cells = [...document.querySelectorAll("video[data-step]")];
for (const video of cells) {
  const bytes = Uint8Array.from(atob(video.getAttribute("src").split(",")[1]), c => c.charCodeAt(0));
  video.src = URL.createObjectURL(new Blob([bytes], {type: "video/mp4"}));
  // Controls would cover a small picture; they come with the pointer, a touch or the tabulator.
  video.controls = false;
  video.tabIndex = 0;
  video.onmouseenter = video.onfocus = () => { video.controls = true; };
  video.onmouseleave = video.onblur = () => { video.controls = false; };
}
if (cells.length) {
  const [left, right] = [$("left"), $("right")];
  let row = [], playing = false;
  const start = videos => videos.forEach(video => { video.currentTime = 0; if (playing) video.play().catch(() => {}); });
  const say = video => video.dataset.step === "0" ? "base model, step 0" : "step " + video.dataset.step;
  const show = () => {
    const now = row[$("step").value];
    $("shown").textContent = now.dataset.step;
    $("first").textContent = say(row[0]);
    $("now").textContent = say(now);
    if (left.src !== row[0].src) left.src = row[0].src;
    if (right.src !== now.src) right.src = now.src;
    start([left, right]);
  };
  const choose = () => {
    row = cells.filter(video => video.dataset.row === $("row").value);
    $("step").max = row.length - 1;
    $("step").value = row.length - 1;
    show();
  };
  for (const option of [...$("row").options]) if (!cells.some(video => video.dataset.row === option.value)) option.remove();
  $("compare").hidden = false;
  $("row").onchange = choose;
  $("step").oninput = show;
  $("play").onclick = () => {
    playing = !playing;
    $("play").textContent = playing ? "Pause all" : "Play all";
    const all = [left, right, ...cells];
    if (playing) start(all); else all.forEach(video => video.pause());
  };
  choose();
}
if ($("copy")) {
  $("copy").hidden = false;
  $("copy").onclick = () => {
    getSelection().selectAllChildren($("snippet"));
    document.execCommand("copy");  // the newer way is not there for files
    $("copy").textContent = "Copied";
  };
}
"""


def page(output_dir):
    """The whole page as text. output_dir: a Path."""
    status, run, lines = read_json(output_dir / "status.json"), read_json(output_dir / "run.json"), read_lines(output_dir / "metrics.jsonl")
    parts = [
        ("", state_part, (output_dir, status, run, lines)),
        ("Videos by step", videos_part, (output_dir,)),
        ("Curves", curves_part, (lines,)),
        ("The data", data_part, (output_dir,)),
        ("How to use it", use_part, (output_dir,)),
        ("Flags and versions", settings_part, (run,)),
    ]
    body = []
    for heading, write, arguments in parts:
        try:
            content = write(*arguments)
        except Exception as error:  # a file of another kind than expected costs its part, not the page
            content = f"<p class=absent>This part could not be made ({escape(type(error).__name__)}: {escape(error)}).</p>"
        body.append(f"<section>{f'<h2>{heading}</h2>' if heading else ''}{content}</section>")
    title = escape(output_dir.name)
    # Only this script may run, whatever a caption holds, and nothing may be fetched.
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; img-src data:; media-src data: blob:"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def write_report(output_dir):
    """Write `report.html` from the files of a run's output folder. Returns what failed as a sentence, or None; never raises."""
    try:
        output_dir = Path(output_dir).resolve()
        for leftover in output_dir.glob(f".{NAME}.*.partial"):  # of a run that was killed while it wrote
            if time.time() - leftover.stat().st_mtime > 600:
                leftover.unlink(missing_ok=True)
        write_bytes(output_dir / NAME, page(output_dir).encode(errors="replace"))
    except Exception as error:  # no page is worth the run
        return f"{NAME} was not written ({type(error).__name__}: {error}); python -m tools.report writes it again"
    return None


def refresh(output_dir):
    """Write the report of a run that goes on; a failure is only told."""
    from cogvideox.launch import say

    if problem := write_report(output_dir):
        say(f"warning: {problem}")
