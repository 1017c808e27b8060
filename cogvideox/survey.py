"""Open and decode every clip once, before any model loads, and say what will be trained on.

The result of decoding a file is remembered beside the encodings, under the hash of its content and the framing, so that
ten thousand clips are decoded for this once, not at every start.
"""

import functools
import importlib.util
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from cogvideox.decode import ENCODING_VERSION, Framing, clip_framing
from cogvideox.files import hash_file, key_of, write_bytes
from cogvideox.folder import count_tokens
from cogvideox.launch import say
from cogvideox.order import choose_held_out
from cogvideox.stopping import leave_if_wanted
from dataset import list_clips, list_eval_clips


@dataclass
class Data:
    """The checked clips: records and facts side by side, tokens of each caption, and what is wrong (sentences).

    held_out: the numbers of the clips that are scored and never trained on; trained: the others.
    """

    records: list
    clips: list
    tokens: list
    problems: list
    framing: Framing
    held_out: list = field(default_factory=list)

    @functools.cached_property
    def trained(self):
        held_out = set(self.held_out)
        return [number for number in range(len(self.records)) if number not in held_out]


def check_data(args, facts, tokenizer, readers, accelerator, barrier):
    """List and decode every clip, print the report, and return the Data. Of the output folder only `dataset_report.txt` is written."""
    records, problems, layout = list_clips(args)
    others, more_problems = list_eval_clips(args)
    of_data, records, problems = len(records), records + others, problems + more_problems
    framing, cache = framing_of(args, facts), Path(args.encoding_cache_dir)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    mine = survey_clips(records[rank::world_size], framing, args.seed, cache, readers, show_progress=rank == 0)
    barrier()  # one process may have had slower files than another
    numbered = gather_object(list(zip(range(rank, len(records), world_size), mine, strict=True)))
    clips = [clip for _, clip in sorted(numbered, key=lambda pair: pair[0])]
    tokens = count_tokens(tokenizer, [r.caption for r in records]) if tokenizer and records else [0] * len(records)
    bad = [f"{r.where}: {printable(r.listed)}: {clip['reason']}" for r, clip in zip(records, clips, strict=True) if "reason" in clip]
    skipped = args.bad_videos == "skip" and len(bad) <= args.max_bad_share * len(records) and len(bad) < len(records)
    problems += [] if skipped else bad
    if bad and args.bad_videos == "skip" and not skipped:
        problems.append(f"--bad_videos skip: {len(bad)} of {len(records)} clips are bad, more than --max_bad_share {args.max_bad_share:g}")
    kept = [i for i, clip in enumerate(clips) if "reason" not in clip]
    own = [i for i in kept if i < of_data]
    drawn = {own[i] for i in choose_held_out(len(own), args.eval_share, args.seed)} | {i for i in kept if i >= of_data}
    held_out = [place for place, i in enumerate(kept) if i in drawn]
    if own and drawn.issuperset(own):
        problems.append(f"--eval_share {args.eval_share:g}: of {len(own)} clips none would be left to train on; give a smaller share, or 0")
    if args.train_batch_size > 1 and not args.bucket and shapes_differ([clip for i, clip in enumerate(clips) if i not in drawn]):
        problems.append(
            f"--train_batch_size {args.train_batch_size}: the clips differ in length, and a batch has one shape; "
            "use --train_batch_size 1, --bucket, or a --max_num_frames that all reach"
        )
    report = list(table_lines(records, clips, tokens, facts.max_text_seq_length))
    summary = list(remarks(records, clips, tokens, facts.max_text_seq_length, framing))
    if drawn:
        names = ", ".join(printable(records[i].listed) for i in sorted(drawn))
        summary.append(f"{len(drawn)} clips are held out: scored, and never trained on: {names}")
        contents = {clips[i]["sha256"] for i in own if i not in drawn}
        if copies := sum(clips[i]["sha256"] in contents for i in drawn):
            summary.append(f"{copies} of the held-out clips have the same content as a trained one: their score cannot tell memorising")
    if accelerator.is_main_process:
        text = "\n".join([*report, "", *summary, *[f"ERROR: {problem}" for problem in problems]]) + "\n"
        write_bytes(Path(args.output_dir) / "dataset_report.txt", text.encode())
    shown = report if len(report) <= 13 else report[:13] + [f"... {len(report) - 13} more in dataset_report.txt"]
    for sentence in bad if skipped else []:
        say(f"warning: skipped {sentence}")
    say(f"\n{layout} of {args.dataset_name or args.instance_data_root}")
    for line in [*shown, *summary]:
        say("  " + line)
    if records:
        for record in records[:3]:
            say(f"  {printable(record.listed)}: {record.caption[:100]!r}")
    return Data([records[i] for i in kept], [clips[i] for i in kept], [tokens[i] for i in kept], problems, framing, held_out)


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
            facts[number] = json.loads(known.read_text())
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


def table_lines(records, facts, tokens, limit):
    """The per-clip report: a table of one line a clip, and the remarks below it."""
    yield f"{'clip':<28} {'source':>20} {'reader':>7} {'frames':>6} {'seconds':>7} {'used':>5} {'cut':>5} {'size':>9} {'tokens':>6}"
    for record, clip, count in zip(records, facts, tokens, strict=True):
        name = printable(record.listed)[-28:]
        if "reason" in clip:
            yield f"{name:<28} unusable: {clip['reason']}"
            continue
        source = f"{clip['source_width']}x{clip['source_height']} {clip['source_frames']}f @{clip['source_fps']:g}"
        yield (
            f"{name:<28} {source:>20} {clip['reader']:>7} {clip['frames']:>6} {clip['seconds']:>7.2f} {clip['used_percent']:>4.0f}% "
            f"{clip['cropped_percent']:>4.0f}% {clip['width']:>4}x{clip['height']:<4} {count:>6}{'!' if count > limit else ''}"
        )
        if clip["note"]:
            yield f"{'':<28} {clip['note']}"


def remarks(records, facts, tokens, limit, framing):
    """What a user would want to know of the data before hours are spent on it, each a sentence."""
    good = [(record, clip) for record, clip in zip(records, facts, strict=True) if "reason" not in clip]
    if not good:
        return
    seconds, total = sum(c["seconds"] for _, c in good), sum(c["source_seconds"] for _, c in good)
    lengths = Counter((c["frames"], c["height"], c["width"]) for _, c in good)
    shapes = ", ".join(f"{n} of {f}x{h}x{w}" for (f, h, w), n in lengths.most_common())
    yield f"{len(good)} clips, {seconds:.1f} of {total:.1f} seconds used, as frames x height x width: {shapes}"
    checks = [
        (
            lambda r, c: c["used_percent"] < 90,
            "use less than 90 % of their clip (--max_num_frames, --fps); the caption should match what is left",
        ),
        (lambda r, c: c["frames"] < framing.max_num_frames, f"are shorter than --max_num_frames {framing.max_num_frames}"),
        (lambda r, c: c["repeated_frames"] > 0, f"have fewer frames a second than --fps {framing.fps:g}: some frames repeat"),
        (lambda r, c: c["cropped_percent"] > 5, "lose more than 5 % of the picture to the crop (--video_reshape_mode, --height, --width)"),
        (lambda r, c: c["stretch_percent"] > 5, "are stretched by more than 5 % (--video_reshape_mode none)"),
        (
            lambda r, c: c["source_height"] * c["source_width"] < c["height"] * c["width"] * 0.8,
            "are enlarged: the source is smaller than the training size",
        ),
    ]
    for test, words in checks:
        hits = [r for r, c in good if test(r, c)]
        if hits:
            yield f"{len(hits)} of {len(good)} clips {words}: {some(hits)}"
    cut = [record for record, count in zip(records, tokens, strict=True) if count > limit]
    if cut:
        yield f"{len(cut)} captions are longer than {limit} tokens and will be cut there: {some(cut)}"
    twice = Counter(c["sha256"] for _, c in good)
    copies = [r for r, c in good if twice[c["sha256"]] > 1]
    if copies:
        yield f"{len(copies)} clips have the same content as another: {some(copies)}"
    same = Counter(record.caption for record, _ in good)
    alike = [record for record, _ in good if same[record.caption] > 1]
    if alike:
        yield f"{len(alike)} clips share their caption with another: {some(alike)}"


def some(records, most=4):
    """A few names of many."""
    names = [printable(record.listed) for record in records[:most]]
    return ", ".join(names) + (f" and {len(records) - most} more" if len(records) > most else "")


def printable(text):
    """Text without characters that would move a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)


def shapes_differ(facts):
    """Whether the clips do not all have one shape, so that they cannot share a batch."""
    return len({(clip["frames"], clip["height"], clip["width"]) for clip in facts if "reason" not in clip}) > 1
