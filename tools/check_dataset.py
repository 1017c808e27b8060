"""Look at a data folder before training: python -m tools.check_dataset ROOT [the trainer's data flags].

Needs no model. Prints a table of the clips and a verdict in plain words, writes contact_sheet.png with what the model
will see of each clip, and ends with exit code 3 if any clip cannot be used.
"""

import re
from pathlib import Path

import numpy as np

from cogvideox import flags
from cogvideox.console import BAD_DATA, fail, warn
from cogvideox.decode import clip_framing, image_request
from cogvideox.folder import check_sizes, facts_for_data, load_tokenizer, rate_notes, short_clip_remarks, what_it_is
from cogvideox.motion import STATIC, motion
from cogvideox.reader import Readers, decode_workers
from cogvideox.survey import (
    caption_audit,
    caption_problems,
    describe,
    framing_of,
    printable,
    read_captions,
    survey_clips,
    survey_images,
    survey_windows,
    table_lines,
    unusable,
    without_bad_images,
    without_unreadable,
)
from cogvideox.video import contact_sheet, film_strip
from dataset import files_left_out, list_clips, list_prior_clips

DEMO = Path(__file__).resolve().parent.parent / "demo"
MOST_ON_SHEET = 100
ALIKE = 4.0  # mean difference between thumbnails of two clips, in grey levels of 255
ALIKE_WORDS, MOST_COMPARED = 0.8, 2000  # share of the different words of two captions; captions that are compared in pairs


def thumbnail(frames):
    """Three frames of a clip at 8 x 12 pixels, for comparing clips: float [3, 8, 12, 3]."""
    chosen = frames[np.linspace(0, len(frames) - 1, 3).round().astype(int)].astype(np.float32)
    rows = [part.mean(axis=1) for part in np.array_split(chosen, 8, axis=1)]
    columns = [[part.mean(axis=1) for part in np.array_split(row, 12, axis=1)] for row in rows]
    return np.stack([np.stack(row, axis=1) for row in columns], axis=1)


def look(records, clips, framing, seed, readers):
    """Decode the clips that can be used, and their own images. Returns (rows of the contact sheet, names of static clips, pairs of
    near-duplicates)."""
    good = [record for record, clip in zip(records, clips, strict=True) if "reason" not in clip]
    rows, static, small = [], [], []
    for record, (clip, frames, reason) in zip(
        good, readers.read_all([(r.path, clip_framing(r, framing, seed)) for r in good]), strict=True
    ):
        if reason:
            continue
        moves = motion(frames, framing.fps)
        static += [printable(record.listed)] if moves is not None and moves < STATIC else []
        small.append((printable(record.listed), thumbnail(frames)))
        if len(rows) < MOST_ON_SHEET:
            strip, label = film_strip(frames, widest=160), record.listed
            if record.image:
                [(_, image, _)] = readers.read_all([image_request(record, framing, seed, (clip["height"], clip["width"]))])
                gap = np.full((len(strip), 4, 3), 255, np.uint8)
                strip = strip if image is None else np.concatenate([film_strip(image, widest=160), gap, strip], axis=1)
                label = f"{Path(record.image).name} + {label}"
            rows.append((f"{label}: {record.caption}", strip[None]))
    names, pictures = [name for name, _ in small], np.stack([t.ravel() for _, t in small]) if small else np.zeros((0, 1))
    pairs = []
    for i in range(len(names)):
        distance = np.abs(pictures[i + 1 :] - pictures[i]).mean(axis=1)
        pairs += [(names[i], names[i + 1 + int(j)]) for j in np.nonzero(distance < ALIKE)[0]]
    return rows, static, pairs


def alike_captions(records):
    """A sentence about captions that share ALIKE_WORDS or more of their different words with another.

    Compares the first MOST_COMPARED captions in pairs. Equal captions are told elsewhere.
    """
    texts = {}
    for record in records[:MOST_COMPARED]:
        texts.setdefault(record.caption, record.listed)
    words, names = [set(re.findall(r"\w+", text.lower())) for text in texts], list(texts.values())
    pairs = [
        (names[i], names[j])
        for i in range(len(words))
        for j in range(i + 1, len(words))
        if len(words[i] & words[j]) >= ALIKE_WORDS * len(words[i] | words[j])
    ]
    if pairs:
        named = ", ".join(f"{printable(a)} and {printable(b)}" for a, b in pairs[:5])
        yield f"{len(pairs)} pairs of captions have {100 * ALIKE_WORDS:.0f} % of their words in common: {named}"


def advice(clips, static, pairs):
    """Plain words on whether this is enough, and what to look at."""
    count, seconds = len(clips), sum(clip["seconds"] for clip in clips)
    if count < 10:
        yield f"{count} clips are few: a LoRA will repeat them; 25 or more work best for a new concept or style"
    elif count < 25:
        yield f"{count} clips can do; 25 or more work best for a new concept or style"
    else:
        yield f"{count} clips, {seconds:.0f} seconds: enough for a new concept or style"
    if static:
        yield f"{len(static)} clips hardly move, and a LoRA learns that too: {', '.join(static[:5])}"
    if pairs:
        yield f"{len(pairs)} pairs of clips look alike: {', '.join(f'{a} and {b}' for a, b in pairs[:5])}"


def main(words=None):
    """The command line."""
    parser = flags.new_parser(__doc__)
    parser.prog = "python -m tools.check_dataset"
    parser.add_argument("root", nargs="?", help="the data folder; or --instance_data_root, or --dataset_name")
    parser.add_argument("--tokenizer", default=str(DEMO), help="model folder whose tokenizer counts (default: CogVideoX's own)")
    parser.add_argument("--sheet", default="contact_sheet.png", help="where the picture goes")
    parser.add_argument("--cache_dir", help="where downloaded datasets are stored")
    parser.add_argument("--seed", type=int, default=42, help="seed of random crops")
    flags.add_data_flags(parser)
    flags.add_data_model_flag(flags.flag_group(parser, "model"))
    args = parser.parse_args(words)
    args.instance_data_root = args.root or args.instance_data_root
    problems = flags.out_of_bounds(args) + flags.check_data_flags(args)
    facts, found = facts_for_data(args)
    unfit, notes = check_sizes(args, facts) if not found else ([], [])
    if problems := problems + found + unfit:
        flags.refuse(parser, problems)

    records, problems, layout = list_clips(args)
    priors, prior_problems, _ = list_prior_clips(args)
    left_out, before_prior = files_left_out(args, args.instance_data_root, records, layout), len(records)
    listed, problems = records + priors, problems + prior_problems
    framing, cache = framing_of(args, facts), Path(args.encoding_cache_dir)
    tokenizer, limit = load_tokenizer(Path(args.tokenizer)), facts.max_text_seq_length
    with Readers(decode_workers(), args.clip_timeout_seconds) as readers:
        records, clips, parts_of, _ = survey_windows(
            args.windows, listed, framing, lambda records: survey_clips(records, framing, args.seed, cache, readers)
        )
        images = survey_images(records, clips, framing, args.seed, cache, readers)
        clips = without_bad_images(clips, images)
        readings = read_captions(args.id_token, tokenizer, records)
        problems += caption_problems(args.id_token, tokenizer, records, readings, limit)
        clips = without_unreadable(clips, readings)
        rows, static, pairs = look(records, clips, framing, args.seed, readers)
    prior = {i for i, part in enumerate(parts_of) if part >= before_prior}
    good = [clip for clip in clips if "reason" not in clip]
    own = [clip for i, clip in enumerate(clips) if "reason" not in clip and i not in prior]
    dataset = describe(records, clips, readings, limit, framing, left_out=left_out, windows=args.windows, prior=prior, images=images)
    captioned = [listed[part] for part in sorted({parts_of[i] for i, clip in enumerate(clips) if "reason" not in clip and i not in prior})]
    dataset["remarks"] += [*short_clip_remarks(facts, good)]
    dataset["remarks"] += [*caption_audit(captioned, args.id_token, args.instance_data_root), *alike_captions(captioned)]
    print(f"{layout} of {args.dataset_name or args.instance_data_root}, for {args.pretrained_model_name_or_path or 'the 2B'}:", end=" ")
    print(f"{what_it_is(facts)}\n")
    for note in notes + rate_notes(args, facts) if args.pretrained_model_name_or_path else ():  # the data may be another model's
        warn(note)
    print("\n".join([*table_lines(dataset), "", *dataset["remarks"], *advice(own, static, pairs)]))
    problems += unusable(records, clips)
    if rows:
        contact_sheet(args.sheet, rows, f"{len(rows)} of {len(good)} clips as the model will see them")
        print(f"\nwhat the model will see: {args.sheet}")
    if problems:
        fail(BAD_DATA, problems)


if __name__ == "__main__":
    main()
