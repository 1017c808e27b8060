"""From the data flags to encodings: read, check, report, encode. Every function here is called by every process."""

import argparse
import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

from cogvideox import cache as store
from cogvideox import encode
from cogvideox.evaluation import choose_held_out
from cogvideox.files import read_json
from cogvideox.folder import count_tokens, latent_shape, weight_files
from cogvideox.launch import BAD_DATA, BAD_FLAGS, BAD_OUTPUT, fail, free, say
from cogvideox.model import load_text_encoder, load_vae, usable_dtype
from cogvideox.survey import (
    clip_framing,
    describe,
    framing_of,
    list_clips,
    printable,
    remember_survey,
    report_text,
    shapes_differ,
    survey_clips,
    table_lines,
)
from dataset import Framing


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

    @property
    def trained(self):
        return [number for number in range(len(self.records)) if number not in set(self.held_out)]


def check_data(args, facts, tokenizer, readers, accelerator, barrier):
    """List and decode every clip, print the report, and return the Data. Of the output folder only dataset.json and the
    text made from it, dataset_report.txt, are written."""
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
    dataset = describe(records, clips, tokens, facts.max_text_seq_length, framing, drawn)
    dataset = {"source": args.dataset_name or args.instance_data_root, "layout": layout} | dataset | {"problems": problems}
    if accelerator.is_main_process:
        store.write_bytes(Path(args.output_dir) / "dataset.json", json.dumps(dataset, indent=1).encode())
        store.write_bytes(Path(args.output_dir) / "dataset_report.txt", report_text(dataset).encode())
    table = list(table_lines(dataset))
    shown = table if len(table) <= 13 else table[:13] + [f"... {len(table) - 13} more in dataset_report.txt"]
    for sentence in bad if skipped else []:
        say(f"warning: skipped {sentence}")
    say(f"\n{layout} of {dataset['source']}")
    for line in [*shown, *dataset["remarks"]]:
        say("  " + line)
    if records:
        for record in records[:3]:
            say(f"  {printable(record.listed)}: {record.caption[:100]!r}")
    return Data([records[i] for i in kept], [clips[i] for i in kept], [tokens[i] for i in kept], problems, framing, held_out)


def list_eval_clips(args):
    """The records of --eval_data_root, and what is wrong with it, each named as the second folder's."""
    if not args.eval_data_root:
        return [], []
    of_folder = argparse.Namespace(**vars(args) | {"instance_data_root": args.eval_data_root, "dataset_name": None})
    records, problems, _ = list_clips(of_folder)
    if not records and not problems:
        problems = ["holds no clips"]
    records = [replace(record, where=f"--eval_data_root {record.where}") for record in records]
    return records, [f"--eval_data_root: {problem}" for problem in problems]


def encode_data(args, folder, facts, tokenizer, data, readers, accelerator, barrier):
    """Encode what the cache lacks, over all processes. Returns (Encodings, validation prompts, negative prompt, fingerprint).

    T5 is loaded only if a caption is missing, the VAE only if a clip is, one after the other; both have left memory when
    this returns. The fingerprint is a hash of all trained clips, their captions and how they were encoded.
    """
    cache, rank, world_size = Path(args.encoding_cache_dir), accelerator.process_index, accelerator.num_processes
    device, variant = accelerator.device, args.variant
    captions = [record.caption for record in data.records] + [""] + args.prompts + [args.negative_prompt]
    # One process looks, and all work on what it saw: another run may be filling the same cache at the same time.
    plan = [plan_encodings(args, folder, facts, data, captions, cache, device)] if accelerator.is_main_process else [None]
    keys, clip_keys, missing_captions, missing_clips, transformer_identity, problems = broadcast_object_list(plan)[0]
    if problems:
        fail(BAD_FLAGS, problems)
    jobs = {}
    for flipped, row in enumerate(clip_keys):
        for record, clip, key in zip(data.records, data.clips, row, strict=True):
            if key in missing_clips:
                jobs[key] = (key, record.path, clip_framing(record, data.framing, args.seed), bool(flipped), clip["frames"], record.listed)
    total_clips, total_captions = len({key for row in clip_keys for key in row}), len(set(keys.values()))
    there = f"{total_clips - len(jobs)} of {total_clips} clips and {total_captions - len(missing_captions)} of {total_captions} captions"
    say(f"\nencodings in {cache}: {there} are there")

    def load_text():
        return tokenizer, load_text_encoder(folder, device, variant)

    failures = encode.fill_captions(cache, captions, keys.get, missing_captions, load_text, facts.max_text_seq_length, rank, world_size)
    free(device)

    def load_encoder():
        return load_vae(folder, device, variant, args.enable_slicing, args.enable_tiling)

    show = functools.partial(encode.show_encoded, args.output_dir, args.fps, [])
    failures += encode.fill_clips(cache, list(jobs.values()), load_encoder, readers, show, barrier, rank, world_size)
    if failures := gather_object(failures):
        fail(BAD_OUTPUT if any("--encoding_cache_dir" in failure for failure in failures) else BAD_DATA, list(dict.fromkeys(failures)))
    free(device)
    prompt_keys = [keys[record.caption] for record in data.records]
    encodings = store.Encodings(cache, clip_keys[0], clip_keys[-1], prompt_keys, keys[""])
    prompts = [store.read_entry(store.entry_path(cache, "captions", keys[prompt])) for prompt in args.prompts]
    negative = store.read_entry(store.entry_path(cache, "captions", keys[args.negative_prompt]))
    trained_keys = [[row[clip] for clip in data.trained] for row in clip_keys], [prompt_keys[clip] for clip in data.trained]
    return encodings, prompts, negative, {"clips": store.key_of(*trained_keys), "transformer": transformer_identity}


def plan_encodings(args, folder, facts, data, captions, cache, device):
    """The keys of all captions and clips, and which of them have to be encoded. Raises nothing: problems are returned."""
    remember_survey(data.clips, cache)
    text_identity, text_dtype = store.identify(folder, "text_encoder", cache, args.variant)
    vae_identity, vae_dtype = store.identify(folder, "vae", cache, args.variant)
    tokenizer_identity, _ = store.identify(folder, "tokenizer", cache)
    transformer_identity, _ = store.identify(folder, "transformer", cache, args.variant)
    text = (store.key_of(text_identity, tokenizer_identity), usable_dtype(text_dtype, device), facts.max_text_seq_length)
    vae = (vae_identity, usable_dtype(vae_dtype, device), args.enable_slicing, args.enable_tiling)
    keys = {caption: store.caption_key(caption, *text) for caption in captions}
    clip_keys = [
        [store.clip_key(clip, *vae, flipped) for clip in data.clips] for flipped in ((False, True) if args.random_flip else (False,))
    ]
    caption_shape = (facts.max_text_seq_length, read_json(folder / "text_encoder/config.json").get("d_model", 512))
    clip_shapes = {key: moments_shape(clip, facts) for row in clip_keys for key, clip in zip(row, data.clips, strict=True)}
    missing_captions = store.missing_entries(cache, "captions", dict.fromkeys(keys.values(), caption_shape))
    missing_clips = set(store.missing_entries(cache, "clips", clip_shapes))
    problems = []
    for part, needed in (("text_encoder", missing_captions), ("vae", missing_clips or args.prompts)):
        problem = weight_files(folder / part, args.variant)[1]
        if problem and needed:
            problems.append(f"{problem}; {len(needed)} {'captions' if part == 'text_encoder' else 'clips or videos'} need them")
    return keys, clip_keys, missing_captions, missing_clips, transformer_identity, problems


def moments_shape(clip, facts):
    """[2C, F', H', W'] of a clip's posterior: mean and log-variance of each latent channel."""
    frames, channels, height, width = latent_shape(facts, clip["frames"], clip["height"], clip["width"])
    return 2 * channels, frames, height, width
