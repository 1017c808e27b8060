"""Open and decode every clip once, before any model loads, and say what will be trained on.

The result of decoding a file is remembered beside the encodings, under the hash of its content and the framing, so that
ten thousand clips are decoded for this once, not at every start.
"""

import hashlib
import importlib.util
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from tqdm.auto import tqdm

from cogvideox.cache import ENCODING_VERSION, hash_file, key_of
from cogvideox.files import read_json, write_bytes
from cogvideox.stopping import leave_if_wanted
from dataset import Framing, Record, locate, random_crop, read_records


def framing_of(args, facts):
    """The Framing that the data flags and the model ask for."""
    return Framing(
        fps=args.fps,
        max_num_frames=max(args.bucket_lengths, default=args.max_num_frames),
        sizes=tuple(args.bucket_sizes) or ((args.height, args.width),),
        lengths=tuple(args.bucket_lengths),
        skip_frames_start=args.skip_frames_start,
        skip_frames_end=args.skip_frames_end,
        reshape_mode=args.video_reshape_mode,
        frames_per_latent=facts.frames_per_latent,
        latents_per_patch=facts.latents_per_patch,
    )


def list_clips(args):
    """The records of --instance_data_root or --dataset_name, the id token put before each caption."""
    if args.dataset_name:
        records, problems, layout = read_hub_dataset(args)
    else:
        records, problems, layout = read_records(args.instance_data_root, args.caption_column, args.video_column, args.allow_external_paths)
    if args.id_token:
        records = [replace(r, caption=f"{args.id_token} {r.caption}") for r in records]
    return records, problems, layout


def read_hub_dataset(args):
    """Records of a dataset loaded with the datasets package. Videos may be file names, or bytes, which are unpacked once."""
    import datasets

    columns = args.caption_column or "text", args.video_column or "video"
    try:
        rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, split="train")
    except Exception as error:  # the package raises many kinds; the user needs one sentence
        return [], [f"--dataset_name {args.dataset_name}: cannot be loaded ({str(error).splitlines()[0]})"], "datasets"
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        return (
            [],
            [f"--dataset_name {args.dataset_name}: no column {', '.join(missing)} (it has: {', '.join(rows.column_names)})"],
            "datasets",
        )
    if isinstance(rows.features[columns[1]], datasets.Video):
        rows = rows.cast_column(columns[1], datasets.Video(decode=False))
    records, problems = [], []
    for number, row in enumerate(rows, 1):
        where, caption, video = f"{args.dataset_name}:{number}", " ".join(str(row[columns[0]] or "").split()), row[columns[1]]
        name = None
        if isinstance(video, dict) and video.get("bytes"):
            name = video.get("path") or where
            path = Path(args.encoding_cache_dir) / "unpacked" / hashlib.sha256(video["bytes"]).hexdigest()
            path = path.with_suffix(Path(video.get("path") or "clip.mp4").suffix)
            if not path.exists():
                write_bytes(path, video["bytes"])
            video = {"path": str(path)}
        listed = str(video["path"] if isinstance(video, dict) else video)
        path, reason = locate(Path.cwd(), listed, allow_external_paths=True)
        if caption:
            records.append(Record(where, name or listed, str(path), caption, reason))
        else:
            problems.append(f"{where}: empty caption")
    return records, problems, "datasets"


def clip_framing(record, framing, seed):
    """The framing of one clip: a random crop lies at a place of its own."""
    return random_crop(framing, seed, record.listed) if framing.reshape_mode == "random" else framing


def survey_key(content, framing):
    """The name under which it is remembered what decoding a file showed: by its content, the framing, and who decodes."""
    return key_of(ENCODING_VERSION, content, asdict(framing), importlib.util.find_spec("decord") is not None)


def survey_clips(records, framing, seed, cache, readers, show_progress=True):
    """Decode every record. Returns one facts dict a record, with `sha256`, and `reason` where it cannot be used.

    Nothing but hashes of files is remembered here; `remember_survey` stores what the good ones showed.
    """
    facts, pending = [None] * len(records), []
    for number, record in enumerate(records):
        if record.reason:
            facts[number] = {"reason": record.reason, "path": record.path}
            continue
        own = clip_framing(record, framing, seed)
        content = hash_file(record.path, cache)
        known = cache / "surveys" / f"{survey_key(content, own)}.json"
        try:
            facts[number] = read_json(known)
        except (OSError, ValueError):
            pending.append((number, content, own))
    results = readers.read_all([(records[number].path, own) for number, _, own in pending], want_frames=False)
    bar = tqdm(zip(pending, results, strict=True), "checking clips", len(pending), unit="clip", disable=not show_progress or not pending)
    for (number, content, own), (clip, _, reason) in bar:
        leave_if_wanted()
        facts[number] = {"reason": reason} if reason else clip
        facts[number] |= {"sha256": content, "survey": survey_key(content, own), "path": records[number].path}
    return facts


def remember_survey(facts, cache):
    """Store what decoding showed, for the next start."""
    for clip in facts:
        path = cache / "surveys" / f"{clip['survey']}.json"
        if "reason" not in clip and not path.exists():
            write_bytes(path, json.dumps(clip).encode())


# What is not shown of a clip: where its pixels come from, and what it is called in the cache.
INNER_FACTS = {"indices", "box", "note", "survey", "path"}


def describe(records, facts, tokens, limit, framing, held_out=()):
    """The content of dataset.json, from which the text report and the page are made: {clips, totals, remarks}, JSON-ready.

    facts: one dict a record, as `survey_clips` gives them. tokens: of each caption, which is cut at `limit`. held_out: the
    numbers of the records that are scored and never trained on.
    """
    clips = []
    for number, (record, clip, count) in enumerate(zip(records, facts, tokens, strict=True)):
        described = {"line": record.where, "path": record.listed, "caption": record.caption, "tokens": count}
        described |= {
            "is_caption_cut": count > limit,
            "split": "held out" if number in held_out else "trained",
            "problem": None,
            "notes": [],
        }
        if "reason" in clip:
            clips.append(described | {"split": None, "problem": clip["reason"]})
            continue
        described |= {name: value for name, value in clip.items() if name not in INNER_FACTS}
        described |= {"fps": framing.fps, "bucket": f"{clip['frames']}x{clip['height']}x{clip['width']}"}
        clips.append(described | {"notes": [clip["note"]] if clip["note"] else []})
    usable = [clip for clip in clips if not clip["problem"]]
    totals = {"clips": len(clips), "usable": len(usable), "held_out": sum(clip["split"] == "held out" for clip in usable)}
    totals |= {"seconds": sum(clip["seconds"] for clip in usable), "source_seconds": sum(clip["source_seconds"] for clip in usable)}
    totals |= {"buckets": dict(Counter(clip["bucket"] for clip in usable).most_common())}
    return {"clips": clips, "totals": totals, "remarks": list(remarks(clips, usable, totals, limit, framing))}


def table_lines(dataset):
    """The clips of `describe` as a table of one line a clip, with notes below it."""
    yield f"{'clip':<28} {'source':>20} {'reader':>7} {'frames':>6} {'seconds':>7} {'used':>5} {'cut':>5} {'size':>9} {'tokens':>6}"
    for clip in dataset["clips"]:
        name = printable(clip["path"])[-28:]
        if clip["problem"]:
            yield f"{name:<28} unusable: {clip['problem']}"
            continue
        source = f"{clip['source_width']}x{clip['source_height']} {clip['source_frames']}f @{clip['source_fps']:g}"
        tokens = f"{clip['tokens']:>6}{'!' if clip['is_caption_cut'] else ''}"
        yield (
            f"{name:<28} {source:>20} {clip['reader']:>7} {clip['frames']:>6} {clip['seconds']:>7.2f} {clip['used_percent']:>4.0f}% "
            f"{clip['cropped_percent']:>4.0f}% {clip['width']:>4}x{clip['height']:<4} {tokens}"
        )
        for note in clip["notes"]:
            yield f"{'':<28} {note}"


def report_text(dataset):
    """dataset_report.txt: what dataset.json says, for reading in a terminal."""
    problems = [f"ERROR: {problem}" for problem in dataset["problems"]]
    return "\n".join([*table_lines(dataset), "", *dataset["remarks"], *problems]) + "\n"


def remarks(clips, usable, totals, limit, framing):
    """What a user would want to know of the data before hours are spent on it, each a sentence. clips: as `describe` has them."""
    if not usable:
        return
    buckets = ", ".join(f"{count} of {bucket}" for bucket, count in totals["buckets"].items())
    used = f"{totals['seconds']:.1f} of {totals['source_seconds']:.1f} seconds used"
    yield f"{len(usable)} clips, {used}, as frames x height x width: {buckets}"
    checks = [
        (
            lambda c: c["used_percent"] < 90,
            "use less than 90 % of their clip (--max_num_frames, --fps); the caption should match what is left",
        ),
        (lambda c: c["frames"] < framing.max_num_frames, f"are shorter than --max_num_frames {framing.max_num_frames}"),
        (lambda c: c["repeated_frames"] > 0, f"have fewer frames a second than --fps {framing.fps:g}: some frames repeat"),
        (lambda c: c["cropped_percent"] > 5, "lose more than 5 % of the picture to the crop (--video_reshape_mode, --height, --width)"),
        (lambda c: c["stretch_percent"] > 5, "are stretched by more than 5 % (--video_reshape_mode none)"),
        (
            lambda c: c["source_height"] * c["source_width"] < c["height"] * c["width"] * 0.8,
            "are enlarged: the source is smaller than the training size",
        ),
    ]
    for test, words in checks:
        if hits := [clip for clip in usable if test(clip)]:
            yield f"{len(hits)} of {len(usable)} clips {words}: {some(hits)}"
    if cut := [clip for clip in clips if clip["is_caption_cut"]]:
        yield f"{len(cut)} captions are longer than {limit} tokens and will be cut there: {some(cut)}"
    contents = Counter(clip["sha256"] for clip in usable)
    if copies := [clip for clip in usable if contents[clip["sha256"]] > 1]:
        yield f"{len(copies)} clips have the same content as another: {some(copies)}"
    captions = Counter(clip["caption"] for clip in usable)
    if alike := [clip for clip in usable if captions[clip["caption"]] > 1]:
        yield f"{len(alike)} clips share their caption with another: {some(alike)}"
    if held_out := [clip for clip in usable if clip["split"] == "held out"]:
        yield f"{len(held_out)} clips are held out: scored, and never trained on: {some(held_out, most=len(held_out))}"
        trained = {clip["sha256"] for clip in usable if clip["split"] == "trained"}
        if copies := sum(clip["sha256"] in trained for clip in held_out):
            yield f"{copies} of the held-out clips have the same content as a trained one: their score cannot tell memorising"


def some(clips, most=4):
    """A few names of many."""
    names = [printable(clip["path"]) for clip in clips[:most]]
    return ", ".join(names) + (f" and {len(clips) - most} more" if len(clips) > most else "")


def printable(text):
    """Text without characters that would move a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)


def shapes_differ(facts):
    """Whether the clips do not all have one shape, so that they cannot share a batch."""
    return len({(clip["frames"], clip["height"], clip["width"]) for clip in facts if "reason" not in clip}) > 1
