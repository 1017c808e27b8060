"""Decode every clip once, before any model loads, and report on the dataset.

The result of decoding a file is cached beside the encodings, under the hash of its content and the framing, so that ten thousand
clips are checked once, not at every start.
"""

import functools
import json
import platform
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import broadcast_object_list, gather_object

from cogvideox import versions
from cogvideox.console import progress, say, warn
from cogvideox.decode import (
    IMAGE_SUFFIXES,
    SURVEY_VERSION,
    VIDEO_SUFFIXES,
    Framing,
    clip_framing,
    image_request,
    longest_legal_length,
)
from cogvideox.files import at_home, hash_file, key_of, read_json, write_bytes
from cogvideox.folder import UNKNOWN_NOTED, UNKNOWN_REFUSED, short_clip_remarks, text_notes, token_ids, unknown_shares
from cogvideox.order import choose_held_out
from cogvideox.stopping import exit_if_requested
from cogvideox.windows import listed_window, place_windows, seconds_trained
from dataset import MOST_LEFT_OUT, Record, files_left_out, list_clips, list_eval_clips, list_prior_clips, locate_image

CLIPS_SHOWN = 12  # of the table, in the log
FEW_WORDS, SAME_WORDS = 20, 10  # of a caption: too few for this model; at the start of two captions that say the same


@dataclass
class Data:
    """The checked clips: parallel lists of records and facts; and the problems as sentences.

    held_out: the numbers of the clips that are scored and never trained on; trained: the others, those of --prior_data_root last.
    prior: the numbers of these; own: of the other trained clips, which the scores and the size of the videos follow. split: the facts of
    clips whose windows are in `clips` in their place. images: the facts of each clip's own image, None where its first frame is the image.
    validation_images: for an image-to-video model, uint8 [H, W, 3] of each validation prompt.
    """

    records: list
    clips: list
    problems: list
    framing: Framing
    held_out: list = field(default_factory=list)
    prior: list = field(default_factory=list)
    split: list = field(default_factory=list)
    images: list = field(default_factory=list)
    validation_images: list = field(default_factory=list)

    @functools.cached_property
    def trained(self):
        held_out = set(self.held_out)
        return [number for number in range(len(self.records)) if number not in held_out]

    @functools.cached_property
    def own(self):
        return self.trained[: len(self.trained) - len(self.prior)]

    def most_common_shape(self):
        """(frames, height, width) of most of the own training clips."""
        shapes = Counter((clip["frames"], clip["height"], clip["width"]) for clip in (self.clips[i] for i in self.own))
        return shapes.most_common(1)[0][0]


def check_lists(args, facts, tokenizer):
    """What is wrong with the lists of clips and with the captions, as sentences, without decoding a clip. tokenizer: or None."""
    found = list_clips(args), list_eval_clips(args), list_prior_clips(args)
    records, problems = ([entry for part in found for entry in part[kind]] for kind in (0, 1))
    readings = read_captions(args.id_token, tokenizer, records)
    clips = without_unreadable([{"reason": record.reason} if record.reason else {} for record in records], readings)
    problems += caption_problems(args.id_token, tokenizer, records, readings, facts.max_text_seq_length)
    return problems + (unusable(records, clips) if args.bad_videos != "skip" else [])


def check_data(args, facts, tokenizer, readers, accelerator, barrier):
    """List and decode every clip, print the report, and return the Data. Writes dataset.json and dataset_report.txt."""
    records, problems, layout = list_clips(args)
    others, more_problems, eval_layout = list_eval_clips(args)
    priors, prior_problems, prior_layout = list_prior_clips(args)
    of_data, before_prior = len(records), len(records) + len(others)
    # The prior clips come last: those of the other folders keep their numbers, on which the noise of their scores depends.
    listed, problems = records + others + priors, problems + more_problems + prior_problems
    framing, cache = framing_of(args, facts), Path(args.encoding_cache_dir)
    rank, world_size = accelerator.process_index, accelerator.num_processes

    def on_all_ranks(survey, *lists):
        mine = survey(*(part[rank::world_size] for part in lists), framing, args.seed, cache, readers, show_progress=rank == 0)
        barrier()  # one rank may have slower files than another
        numbered = gather_object(list(zip(range(rank, len(lists[0]), world_size), mine, strict=True)))
        return [found for _, found in sorted(numbered, key=lambda pair: pair[0])]

    records, clips, parts_of, split = survey_windows(args.windows, listed, framing, functools.partial(on_all_ranks, survey_clips))
    images = on_all_ranks(survey_images, records, clips) if facts.image_channels else [None] * len(records)
    clips = without_bad_images(clips, images)
    readings = read_captions(args.id_token, tokenizer, records)
    limit, clips = facts.max_text_seq_length, without_unreadable(clips, readings)
    problems += caption_problems(args.id_token, tokenizer, records, readings, limit)
    bad = unusable(records, clips)
    skipped = args.bad_videos == "skip" and len(bad) <= args.max_bad_share * len(records) and len(bad) < len(records)
    problems += [] if skipped else bad
    if bad and args.bad_videos == "skip" and not skipped:
        problems.append(
            f"--bad_videos skip: {len(bad)} of {len(records)} clips are unusable, more than --max_bad_share {args.max_bad_share:g}"
        )
    usable = [i for i, clip in enumerate(clips) if "reason" not in clip]
    own = sorted({parts_of[i] for i in usable if parts_of[i] < of_data})  # all windows of a clip are on one side
    chosen = {own[i] for i in choose_held_out(len(own), args.eval_share, args.seed)}
    drawn = {i for i in usable if parts_of[i] in chosen or of_data <= parts_of[i] < before_prior}
    held_out = [number for number, i in enumerate(usable) if i in drawn]
    if own and chosen.issuperset(own):
        problems.append(f"--eval_share {args.eval_share:g}: leaves none of {len(own)} clips for training; give a smaller share, or 0")
    if args.train_batch_size > 1 and not args.bucket and shapes_differ([clip for i, clip in enumerate(clips) if i not in drawn]):
        problems.append(
            f"--train_batch_size {args.train_batch_size}: the clips differ in length, but a batch needs one shape; "
            "use --train_batch_size 1, --bucket, or a --max_num_frames that every clip reaches"
        )
    left_out = []
    if accelerator.is_main_process:
        left_out += files_left_out(args, args.instance_data_root, listed[:of_data], layout)
        for root, found, kind in ((args.eval_data_root, others, eval_layout), (args.prior_data_root, priors, prior_layout)):
            left_out += [str(Path(root, name)) for name in files_left_out(args, root, found, kind)]
    prior = {i for i, part in enumerate(parts_of) if part >= before_prior}
    dataset = describe(records, clips, readings, limit, framing, drawn, left_out, args.windows, prior, images)
    dataset["remarks"] += [
        *short_clip_remarks(facts, [clip for clip in clips if "reason" not in clip]),
        *caption_audit([listed[i] for i in own], args.id_token, args.instance_data_root),
    ]
    dataset = {"source": args.dataset_name or args.instance_data_root, "layout": layout} | dataset | {"problems": problems}
    if accelerator.is_main_process:
        write_bytes(Path(args.output_dir) / "dataset.json", json.dumps(dataset, indent=1).encode())
        write_bytes(Path(args.output_dir) / "dataset_report.txt", report_text(dataset).encode(errors="replace"))  # names hold any byte
    shown = list(table_lines(dataset | {"clips": dataset["clips"][:CLIPS_SHOWN]}))
    if (more := len(dataset["clips"]) - CLIPS_SHOWN) > 0:
        shown.append(f"... {more} more in dataset_report.txt")
    for sentence in bad if skipped else []:
        warn(f"skipped {sentence}")
    say(f"\n{layout} of {dataset['source']}")
    for line in [*shown, *dataset["remarks"]]:
        say("  " + line)
    if records:
        for record in records[:3]:
            say(f"  {printable(record.listed)}: {record.caption[:100]!r}")
    prompts = [(f"validation prompt {number}", prompt) for number, prompt in enumerate(args.prompts, 1)]
    for note in text_notes(tokenizer, [*prompts, ("--negative_prompt", args.negative_prompt)], limit) if tokenizer and prompts else ():
        warn(note)  # only the videos suffer, so this ends no run
    prior = [number for number, i in enumerate(usable) if i in prior]
    records, clips, images = ([values[i] for i in usable] for values in (records, clips, images))
    data = Data(records, clips, problems, framing, held_out, prior, split, images)
    if facts.image_channels and args.prompts and data.own:
        found = [read_validation_images(args, data, readers)] if accelerator.is_main_process else [None]
        data.validation_images, more_problems = broadcast_object_list(found)[0]
        data.problems += more_problems
    return data


def absent_validation_images(args, facts, accelerator):
    """A sentence for each of --validation_images that is no file, or no image by its name: known before a clip is decoded. A collective."""
    found = []
    if accelerator.is_main_process and facts.image_channels and args.prompts:  # the one that reads them
        reasons = {file: locate_image(Path.cwd(), file, allow_external_paths=True)[1] for file in args.image_files}
        found = [f"--validation_images: {printable(file)}: {reason}" for file, reason in reasons.items() if reason]
    return broadcast_object_list([found])[0]


def read_validation_images(args, data, readers):
    """(the image of each validation prompt, uint8 [H, W, 3] in the videos' size, problems as sentences).

    Those of --validation_images; without it those of the first held-out clips, or else of the first trained ones, in turn.
    """
    _, height, width = data.most_common_shape()
    size = (args.validation_height or height, args.validation_width or width)
    clips = [data.records[number] for number in data.held_out or data.own]
    chosen = [clips[number % len(clips)] for number in range(len(args.prompts))]
    if args.image_files:
        files = args.image_files * (len(args.prompts) if len(args.image_files) == 1 else 1)
        located = [(file, *locate_image(Path.cwd(), file, allow_external_paths=True)) for file in files]
        chosen = [Record("--validation_images", file, str(path), "", reason, image=str(path)) for file, path, reason in located]
    framing = data.framing
    if args.image_files and framing.reshape_mode == "random":  # the card asks for a crop of the middle, as tools.generate makes
        framing = replace(framing, reshape_mode="center")
    decoded = readers.read_all([image_request(record, framing, args.seed, size) for record in chosen if not record.reason])
    found = [(None, None, record.reason) if record.reason else next(decoded) for record in chosen]
    facts = [{"reason": reason} if reason else image for image, _, reason in found]
    facts = [of_one_picture(image) if record.image else image for record, image in zip(chosen, facts, strict=True)]
    return [frames[0] for _, frames, reason in found if not reason], list(dict.fromkeys(unusable(chosen, facts)))  # one may be for all


class Reading(NamedTuple):
    """What the model reads of a caption: the token ids without truncation; and of what follows the id token the share of characters
    that T5 does not know, and whether it has a letter."""

    ids: tuple = ()
    unknown: float = 0.0
    has_letters: bool = True


def read_captions(id_token, tokenizer, records):
    """The Reading of each record's caption; empty ones without a tokenizer."""
    if not tokenizer or not records:
        return [Reading()] * len(records)
    captions = [record.caption for record in records]
    own = [caption.removeprefix(f"{id_token} ") if id_token else caption for caption in captions]
    lettered = [any(character.isalnum() for character in caption) for caption in own]
    ids = token_ids(tokenizer, captions)
    # Looking at each character takes twice as long as the tokens, seconds for ten thousand captions: only where one may be unknown.
    doubtful = [i for i in range(len(own)) if tokenizer.unk_token_id in ids[i] or not own[i].isascii()]
    shares = dict(zip(doubtful, unknown_shares(tokenizer, [own[i] for i in doubtful]) if doubtful else [], strict=True))
    return [Reading(tuple(ids[i]), shares.get(i, 0.0), lettered[i]) for i in range(len(own))]


def without_unreadable(clips, readings):
    """The facts of the clips, with a reason against those whose caption T5 mostly cannot read: the clip would be trained without one."""
    rule = "of its caption's characters are unknown to T5, which was trained on English: write it in English"
    return [
        clip | {"reason": f"{100 * reading.unknown:.0f} % {rule}"} if reading.unknown > UNKNOWN_REFUSED and "reason" not in clip else clip
        for clip, reading in zip(clips, readings, strict=True)
    ]


def unusable(records, clips):
    """A sentence for each clip that cannot be used."""
    pairs = zip(records, clips, strict=True)
    return [f"{printable(record.where)}: {printable(record.listed)}: {clip['reason']}" for record, clip in pairs if "reason" in clip]


def caption_problems(id_token, tokenizer, records, readings, limit):
    """Sentences that end the run: an id token that T5 cannot read, and unlike captions that are all the same to the model."""
    problems = []
    if id_token and tokenizer and (share := unknown_shares(tokenizer, [id_token])[0]) > UNKNOWN_REFUSED:
        problems.append(f"--id_token {id_token}: {100 * share:.0f} % of its characters are unknown to T5; use plain Latin letters")
    readable = [number for number, reading in enumerate(readings) if reading.unknown <= UNKNOWN_REFUSED]
    alike = alike_to_the_model([records[i].caption for i in readable], [readings[i] for i in readable], limit)
    if any(len(numbers) == len(readable) for numbers in alike):
        problems.append(
            f"all {len(readable)} captions are the same tokens to the model, though they differ (in characters that T5 does not know, "
            f"or after {limit} tokens): write what sets the clips apart in English, at the start"
        )
    return problems


def alike_to_the_model(captions, readings, limit):
    """Lists of the numbers of captions that differ, but in nothing that the model reads of its first `limit` tokens."""
    groups = {}
    for number, reading in enumerate(readings):
        used = reading.ids if len(reading.ids) <= limit else reading.ids[: limit - 1] + reading.ids[-1:]
        groups.setdefault(used, []).append(number)
    return [
        numbers
        for used, numbers in groups.items()
        if used and len({captions[i] for i in numbers}) > 1 and any(readings[i].unknown or len(readings[i].ids) > limit for i in numbers)
    ]


def framing_of(args, facts):
    """The Framing of the data flags and the model."""
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
        background=args.background,
    )


def survey_key(content, framing):
    """The cache key of a file's decoding result: from its content, the framing, and the decoders."""
    settings = {name: value for name, value in asdict(framing).items() if name != "window" or value}
    return key_of(SURVEY_VERSION, content, settings, decoders())


@functools.cache
def decoders():
    """The installed releases of the decoders; a missing one is None."""
    return [versions.installed(name) for name in ("decord", "av", "imageio-ffmpeg")]


def survey_windows(kind, records, framing, survey):
    """Survey the records, and the windows in which --windows `kind` splits them: (records, facts, for each the number of the listed
    record that it is a part of, facts of the records that were split).

    survey: records -> facts. A record's length, which decides its windows, is known only then.
    """
    whole = survey(records)
    if kind == "one":
        return records, whole, range(len(records)), []
    num_frames = max(framing.lengths, default=0) or longest_legal_length(
        framing.max_num_frames, framing.frames_per_latent, framing.latents_per_patch
    )
    parts, split = [], []  # (record, number, facts or None)
    for number, (record, clip) in enumerate(zip(records, whole, strict=True)):
        windows = []
        if "reason" not in clip and clip["source_frames"] > 1:
            start, end = clip.get("window", (0.0, clip["source_seconds"]))
            windows = place_windows(kind, start, end, seconds_trained(num_frames, framing.fps, clip["source_fps"]))
        if len(windows) < 2:  # what is trained without --windows
            parts.append((record, number, clip))
            continue
        split.append(clip)
        name = record.listed.rpartition("|")[0].rstrip() if record.window else record.listed
        parts += [(replace(record, listed=listed_window(name, window), window=window), number, None) for window in windows]
    found = iter(survey([record for record, _, clip in parts if clip is None]) if split else ())
    facts = [next(found) if clip is None else clip for _, _, clip in parts]
    return [record for record, _, _ in parts], facts, [number for _, number, _ in parts], split


def survey_clips(records, framing, seed, cache, readers, show_progress=True):
    """Decode every record. Returns one facts dict per record, with `sha256`, and `reason` if it is unusable.

    Caches only the hashes of files; `remember_survey` stores the results of usable clips.
    """
    good = [number for number, record in enumerate(records) if not record.reason]
    requests = [(records[number].path, clip_framing(records[number], framing, seed)) for number in good]
    found = dict(zip(good, survey_files(requests, cache, readers, "clip", show_progress), strict=True))
    return [found.get(number, {"reason": record.reason, "path": record.path}) for number, record in enumerate(records)]


def survey_images(records, clips, framing, seed, cache, readers, show_progress=True):
    """Decode the own image of every usable clip, in the clip's size. Returns facts as `survey_clips`, None for a clip without one.

    clips: the facts of the records.
    """
    own = [number for number, record in enumerate(records) if record.image and "reason" not in clips[number]]
    sizes = [(clips[number]["height"], clips[number]["width"]) for number in own]
    requests = [image_request(records[number], framing, seed, size) for number, size in zip(own, sizes, strict=True)]
    found = map(of_one_picture, survey_files(requests, cache, readers, "image", show_progress))
    images = dict(zip(own, found, strict=True))
    return [images.get(number) for number in range(len(records))]


def of_one_picture(facts):
    """The facts of an image, with a reason against one of several pictures."""
    animated = facts.get("source_frames", 1) > 1
    return facts | {"reason": f"an animation of {facts['source_frames']} pictures; give one"} if animated else facts


def without_bad_images(clips, images):
    """The facts of the clips, with a reason against those whose own image cannot be used. images: from `survey_images`."""
    return [
        clip | {"reason": f"its image {image['path']}: {image['reason']}"} if image and "reason" in image else clip
        for clip, image in zip(clips, images, strict=True)
    ]


def survey_files(requests, cache, readers, unit, show_progress):
    """The facts of (path, framing) pairs, as `survey_clips`. unit: what they are, for the progress bar."""
    facts, pending, contents = [None] * len(requests), [], {}
    for number, (path, own) in enumerate(requests):
        try:
            if path not in contents:  # a film has hundreds of windows
                contents[path] = hash_file(path, cache)
            content = contents[path]
        except OSError as error:  # the main process saw the file: another machine may not
            facts[number] = {"reason": f"cannot be read on {platform.node()} ({error.strerror})", "path": path}
            continue
        known = cache / "surveys" / f"{survey_key(content, own)}.json"
        try:
            facts[number] = read_json(known)
        except (OSError, ValueError):
            pending.append((number, content, own))
    results = readers.read_all([requests[number] for number, *_ in pending], want_frames=False)
    bar = progress(
        zip(pending, results, strict=True), f"checking {unit}s", total=len(pending), unit=unit, disable=not show_progress or not pending
    )
    for (number, content, own), (clip, _, reason) in bar:
        exit_if_requested()
        facts[number] = {"reason": reason} if reason else clip
        facts[number] |= {"sha256": content, "survey": survey_key(content, own), "path": requests[number][0]}
    return facts


def remember_survey(facts, cache):
    """Cache the decoding results of usable clips for the next start."""
    for clip in facts:
        path = cache / "surveys" / f"{clip['survey']}.json"
        if "reason" not in clip and not path.exists():
            write_bytes(path, json.dumps(clip).encode())


# Facts of a clip that the report omits: the frames, the crop, and its cache key.
INNER_FACTS = {"indices", "box", "stored_width", "stored_height", "treatment", "decoder", "note", "survey", "path"}


def describe(records, facts, readings, limit, framing, held_out=(), left_out=(), windows="one", prior=(), images=()):
    """The content of dataset.json, the source of the text report and the page: {clips, totals, remarks, left_out}, JSON-ready.

    facts: one dict per record, from `survey_clips`. readings: of each caption, which is truncated at `limit` tokens. held_out: the
    numbers of the records that are scored and never trained on; prior: of those of --prior_data_root. left_out: from
    `files_left_out`. windows: the value of --windows. images: from `survey_images`.
    """
    clips, images = [], images or [None] * len(records)
    for number, (record, clip, reading) in enumerate(zip(records, facts, readings, strict=True)):
        described = {"line": record.where, "path": record.listed, "caption": record.caption, "tokens": len(reading.ids)}
        described |= {
            "unknown_percent": round(100 * reading.unknown, 1),
            "is_caption_cut": len(reading.ids) > limit,
            "split": "held out" if number in held_out else "prior" if number in prior else "trained",
            "problem": None,
            "notes": [],
        }
        if "reason" in clip:
            clips.append(described | {"split": None, "problem": clip["reason"]})
            continue
        described |= {name: value for name, value in clip.items() if name not in INNER_FACTS}
        described |= {"fps": framing.fps, "bucket": f"{clip['frames']}x{clip['height']}x{clip['width']}"}
        clips.append(described | {"notes": [note for note in (clip["note"], image_note(images[number])) if note]})
    usable = [clip for clip in clips if not clip["problem"]]
    totals = {"clips": len(clips), "usable": len(usable), "held_out": sum(clip["split"] == "held out" for clip in usable)}
    totals |= {"prior": sum(clip["split"] == "prior" for clip in usable)}
    totals |= {"seconds": sum(clip["seconds"] for clip in usable), "source_seconds": sum(clip["source_seconds"] for clip in usable)}
    totals |= {"buckets": dict(Counter(clip["bucket"] for clip in usable).most_common())}
    alike = alike_to_the_model([clip["caption"] for clip in clips], readings, limit)
    alike = [clips[i] for i in sorted(i for numbers in alike for i in numbers) if not clips[i]["problem"]]
    mute = [clip for clip, reading in zip(clips, readings, strict=True) if not reading.has_letters and not clip["problem"]]
    listed = len({clip["line"] for clip in clips})
    found = [f"{listed} clips give {len(clips)} windows (--windows {windows})"] if windows != "one" and clips else []
    found += [*remarks(clips, usable, totals, limit, framing), *content_remarks(clips, facts), *shot_remarks(usable, windows)]
    found += [*caption_remarks(usable, alike, mute, limit), *left_out_remarks(left_out)]
    return {"clips": clips, "totals": totals, "remarks": found, "left_out": list(left_out)}


def image_note(image):
    """What the report says of a clip's own image; "" of a first frame. image: its facts, or None."""
    if image is None:
        return ""
    size = f"{image['source_width']}x{image['source_height']}, cut {image['cropped_percent']:.0f}%"
    return f"image {Path(image['path']).name}: {size}{'; ' * bool(image['note'])}{image['note']}"


def table_lines(dataset):
    """The clips of `describe` as a table of one line per clip, with its notes below."""
    yield f"{'clip':<28} {'source':>20} {'reader':>7} {'frames':>6} {'seconds':>7} {'used':>5} {'cut':>5} {'size':>9} {'tokens':>6}"
    for clip in dataset["clips"]:
        name = printable(clip["path"])[-28:]
        if clip["problem"]:
            yield f"{name:<28} unusable: {clip['problem']}"
            continue
        source = f"{clip['source_width']}x{clip['source_height']} {clip['source_frames']}f @{clip['source_fps']:g}"
        tokens = f"{clip['tokens']:>6}{'!' if clip['is_caption_cut'] else ''}{'?' if clip['unknown_percent'] > 100 * UNKNOWN_NOTED else ''}"
        yield (
            f"{name:<28} {source:>20} {clip['reader']:>7} {clip['frames']:>6} {clip['seconds']:>7.2f} {clip['used_percent']:>4.0f}% "
            f"{clip['cropped_percent']:>4.0f}% {clip['width']:>4}x{clip['height']:<4} {tokens}"
        )
        for note in clip["notes"]:
            yield f"{'':<28} {printable(note)}"


def report_text(dataset):
    """The content of dataset_report.txt: dataset.json as text."""
    problems = [f"ERROR: {problem}" for problem in dataset["problems"]]
    return "\n".join([*table_lines(dataset), "", *dataset["remarks"], *problems]) + "\n"


def remarks(clips, usable, totals, limit, framing):
    """Warnings and facts about the data, as sentences. clips: from `describe`."""
    if not usable:
        return
    buckets = ", ".join(f"{count} of {bucket}" for bucket, count in totals["buckets"].items())
    used = f"{totals['seconds']:.1f} of {totals['source_seconds']:.1f} seconds used"
    yield f"{len(usable)} clips, {used}, as frames x height x width: {buckets}"
    checks = [
        (
            lambda c: c["used_percent"] < 90,
            "use less than 90 % of their clip (--max_num_frames, --fps, --windows); the caption should match what is left",
        ),
        (lambda c: c["frames"] < framing.max_num_frames, f"are shorter than --max_num_frames {framing.max_num_frames}"),
        (lambda c: c["repeated_frames"] > 0, f"have fewer frames per second than --fps {framing.fps:g}: some frames repeat"),
        (lambda c: c["cropped_percent"] > 5, "lose more than 5 % of the picture to cropping (--video_reshape_mode, --height, --width)"),
        (lambda c: c["stretch_percent"] > 5, "are stretched by more than 5 % (--video_reshape_mode none)"),
        (
            lambda c: c["source_height"] * c["source_width"] < c["height"] * c["width"] * 0.8,
            "are upscaled: the source is smaller than the training size",
        ),
        (
            lambda c: framing.latents_per_patch > 1 and (c["frames"] - 1) % 16,
            "have a length that is not 16N + 1 frames, and this model was trained on no other; --bucket 81 65 49 33 17 cuts clips to these",
        ),
    ]
    for test, finding in checks:
        if hits := [clip for clip in usable if test(clip)]:
            yield f"{len(hits)} of {len(usable)} clips {finding}: {some(hits)}"
    if cut := [clip for clip in clips if clip["is_caption_cut"]]:
        yield f"{len(cut)} captions are longer than {limit} tokens and will be truncated: {some(cut)}"
    captions = Counter(caption for caption, _ in {(clip["caption"], clip["line"]) for clip in usable})  # windows of one line share theirs
    if alike := [clip for clip in usable if captions[clip["caption"]] > 1]:
        yield f"{len(alike)} clips share their caption with another: {some(alike)}"
    if prior := [clip for clip in usable if clip["split"] == "prior"]:
        yield f"{len(prior)} clips are of --prior_data_root: trained with their captions as they are: {some(prior)}"
    if held_out := [clip for clip in usable if clip["split"] == "held out"]:
        yield f"{len(held_out)} clips are held out: scored, and never trained on: {some(held_out, most=len(held_out))}"


def content_remarks(clips, facts):
    """Sentences about clips of different lines with the same frames of the same content. clips, facts: as in `describe`."""
    lines = Counter(content for content, _ in {(clip["sha256"], clip["line"]) for clip in clips if not clip["problem"]})
    spans = [
        (clip, {(fact["sha256"], index) for index in range(fact["indices"][0], fact["indices"][-1] + 1)})
        for clip, fact in zip(clips, facts, strict=True)
        if not clip["problem"] and lines[clip["sha256"]] > 1
    ]
    of_line = {}
    for clip, span in spans:
        of_line.setdefault(clip["line"], set()).update(span)
    uses = Counter(frame for frames in of_line.values() for frame in frames)
    alike = "overlap" if any("window" in clip for clip, _ in spans) else "have the same content as"
    if copies := [clip for clip, span in spans if any(uses[frame] > 1 for frame in span)]:
        yield f"{len(copies)} clips {alike} another{' of the same file' * (alike == 'overlap')}: {some(copies)}"
    trained = {frame for clip, span in spans if clip["split"] != "held out" for frame in span}
    if copies := [clip for clip, span in spans if clip["split"] == "held out" and not trained.isdisjoint(span)]:
        score = "their score does not detect memorising"
        yield f"{len(copies)} of the held-out clips {alike} a training clip: {score}: {some(copies)}"


def shot_remarks(usable, windows):
    """Sentences about clips whose first or last frames seem to be of another shot. usable, windows: clips and --windows of `describe`."""
    rule = "name the part to train in the list (FILE | START-END)"
    if begin := [clip for clip in usable if clip.get("shot_before")]:
        image = "the first frame has a latent of its own, and is the image of image-to-video"
        # With other windows it would skip frames of each, and is refused.
        skip = f"--skip_frames_start {max(clip['shot_before'] for clip in begin)}, or " if windows == "one" else ""
        yield f"{len(begin)} clips begin with frames that seem to be of the shot before; {image}: {skip}{rule}: {some(begin)}"
    if end := [clip for clip in usable if clip.get("shot_after")]:
        yield f"{len(end)} clips end with frames that seem to be of the shot after: {rule}: {some(end)}"


def caption_remarks(usable, alike, mute, limit):
    """Sentences about captions that the model reads in part. alike: clips whose captions differ, but not to the model. mute: those
    whose captions have no letter."""
    if unknown := [clip for clip in usable if clip["unknown_percent"] > 100 * UNKNOWN_NOTED]:
        share = f"more than {100 * UNKNOWN_NOTED:.0f} % of characters that T5 does not know"
        yield f"{len(unknown)} captions have {share} ({unknown[0]['unknown_percent']:.0f} % in the first): {some(unknown)}"
    if alike:
        reason = f"they differ in characters that T5 does not know, or after {limit} tokens"
        yield f"{len(alike)} captions are the same to the model as another, unlike one ({reason}): {some(alike)}"
    if mute:
        yield f"{len(mute)} captions have no letter: {some(mute)}"


def caption_audit(records, id_token=None, root=None):
    """Sentences about captions that are words as T5 knows them, and yet not what should be trained on. Rules: docs/data.md.

    records: whose captions begin with `id_token`, if there is one. root: the data folder, with what tools.prepare keeps there.
    """
    own = [record.caption.removeprefix(f"{id_token} ") if id_token else record.caption for record in records]
    named = [{"path": record.listed} for record in records]
    empty = read_placeholders(root)
    waiting = [clip for clip, text in zip(named, own, strict=True) if is_placeholder(clip["path"], text, empty)]
    if waiting:
        yield f"{len(waiting)} captions are placeholders of tools.prepare (python -m tools.caption writes captions): {some(waiting)}"
    told = {clip["path"] for clip in waiting}
    short = [clip for clip, text in zip(named, own, strict=True) if len(text.split()) < FEW_WORDS and clip["path"] not in told]
    if short:
        yield f"{len(short)} captions have fewer than {FEW_WORDS} words; CogVideoX was trained on 90 to 100 (tools.caption): {some(short)}"
    starts = [" ".join(text.lower().split()[:SAME_WORDS]) for text in own]
    counts = Counter(start for start, _ in {(start, text) for start, text in zip(starts, own, strict=True)})  # equal ones are told above
    if alike := [clip for clip, start in zip(named, starts, strict=True) if counts[start] > 1 and clip["path"] not in told]:
        yield f"{len(alike)} captions begin with the same {SAME_WORDS} words as another that differs: {some(alike)}"
    if twice := begin_with(records, id_token, own):
        yield f"{len(twice)} captions already begin with {id_token}, which --id_token puts there once more: {some(twice)}"
    is_fused = re.compile(rf"{re.escape(id_token)}[a-z]|\w{re.escape(id_token)}\b" if id_token else r"^[A-Z][A-Z0-9]{2,}[a-z]").search
    if fused := [(clip, found[0]) for clip, text in zip(named, own, strict=True) if (found := is_fused(text))]:
        clips = [clip for clip, _ in fused]
        yield f"{len(fused)} captions have a trigger word without a space after it ({fused[0][1]}... in the first): {some(clips)}"


def begin_with(records, id_token, captions=None):
    """The clips, as `some` takes them, whose own captions already begin with the trigger word."""
    captions = captions or [record.caption for record in records]
    pairs = zip(records, captions, strict=True) if id_token else ()
    return [{"path": record.listed} for record, text in pairs if re.match(rf"{re.escape(id_token)}(?!\w)", text)]


def read_placeholders(root):
    """Clip as listed -> the text that tools.prepare wrote in place of its caption; {} without its file."""
    try:
        place = Path(at_home(root or ""))
        found = read_json((place.parent if place.is_file() else place) / "prepare.json")["placeholders"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def is_placeholder(listed, caption, placeholders):
    """Whether a clip's caption is still the text of `read_placeholders`."""
    return listed in placeholders and caption == " ".join(str(placeholders[listed]).split())


def left_out_remarks(names):
    """Sentences about the files of the data folder that the run does not read. names: from `files_left_out`."""
    clips = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    others = [name for name in names if Path(name).suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    end = f" (more than {MOST_LEFT_OUT} files are left out)" if len(names) >= MOST_LEFT_OUT else ""
    for kind, group in (("clips or pictures", clips), ("other files", others)):
        if group:
            yield f"{len(group)} {kind} of the folder are not trained on: {some([{'path': name} for name in group], most=8)}{end}"


def some(clips, most=4):
    """The first names of a list of clips."""
    names = [printable(clip["path"]) for clip in clips[:most]]
    return ", ".join(names) + (f" and {len(clips) - most} more" if len(clips) > most else "")


def printable(text):
    """The text with unprintable characters, such as terminal control codes and bytes that are not UTF-8, replaced by "?"."""
    return "".join(character if character.isprintable() else "?" for character in text)


def shapes_differ(facts):
    """Whether the clips have several shapes, so that they cannot share a batch."""
    return len({(clip["frames"], clip["height"], clip["width"]) for clip in facts if "reason" not in clip}) > 1
