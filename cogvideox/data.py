"""From the data flags to encodings: read, check, report, encode. Every function here is called by every process."""

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object

from cogvideox import cache as store
from cogvideox.launch import BAD_FLAGS, fail, say
from cogvideox.model import count_tokens, decode_latents, load_text_encoder, load_vae, usable_dtype, weight_files
from cogvideox.survey import clip_framing, remarks, remember_survey, shapes_differ, survey_clips, table_lines
from cogvideox.video import contact_sheet, write_video
from dataset import Framing, Record, locate, read_records


@dataclass
class Data:
    """The checked clips: records and facts side by side, tokens of each caption, and what is wrong (sentences)."""

    records: list
    clips: list
    tokens: list
    problems: list
    framing: Framing


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
        if isinstance(video, dict) and video.get("bytes"):
            path = Path(args.encoding_cache_dir) / "unpacked" / hashlib.sha256(video["bytes"]).hexdigest()
            path = path.with_suffix(Path(video.get("path") or "clip.mp4").suffix)
            if not path.exists():
                store.write_bytes(path, video["bytes"])
            video = {"path": str(path)}
        listed = str(video["path"] if isinstance(video, dict) else video)
        path, reason = locate(Path.cwd(), listed, allow_external_paths=True)
        if caption:
            records.append(Record(where, listed, str(path), caption, reason))
        else:
            problems.append(f"{where}: empty caption")
    return records, problems, "datasets"


def check_data(args, facts, tokenizer, readers, accelerator):
    """List and decode every clip, print the report, and return the Data. Nothing but `dataset_report.txt` is written."""
    records, problems, layout = list_clips(args)
    framing, cache = framing_of(args, facts), Path(args.encoding_cache_dir)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    mine = survey_clips(records[rank::world_size], framing, args.seed, cache, readers, show_progress=rank == 0)
    numbered = gather_object(list(zip(range(rank, len(records), world_size), mine, strict=True)))
    clips = [clip for _, clip in sorted(numbered, key=lambda pair: pair[0])]
    tokens = count_tokens(tokenizer, [r.caption for r in records]) if tokenizer and records else [0] * len(records)
    bad = [f"{r.where}: {r.listed}: {clip['reason']}" for r, clip in zip(records, clips, strict=True) if "reason" in clip]
    skipped = args.bad_videos == "skip" and len(bad) <= args.max_bad_share * len(records) and len(bad) < len(records)
    problems += [] if skipped else bad
    if bad and args.bad_videos == "skip" and not skipped:
        problems.append(f"--bad_videos skip: {len(bad)} of {len(records)} clips are bad, more than --max_bad_share {args.max_bad_share:g}")
    if args.train_batch_size > 1 and not args.bucket and shapes_differ(clips):
        problems.append(
            f"--train_batch_size {args.train_batch_size}: the clips differ in length, and a batch has one shape; "
            "use --train_batch_size 1, --bucket, or a --max_num_frames that all reach"
        )
    report = list(table_lines(records, clips, tokens, facts.max_text_seq_length))
    summary = list(remarks(records, clips, tokens, facts.max_text_seq_length, framing))
    if accelerator.is_main_process:
        text = "\n".join([*report, "", *summary, *[f"ERROR: {problem}" for problem in problems]]) + "\n"
        store.write_bytes(Path(args.output_dir) / "dataset_report.txt", text.encode())
    shown = report if len(report) <= 13 else report[:13] + [f"... {len(report) - 13} more in dataset_report.txt"]
    for sentence in bad if skipped else []:
        say(f"warning: skipped {sentence}")
    say(f"\n{layout} of {args.dataset_name or args.instance_data_root}")
    for line in [*shown, *summary]:
        say("  " + line)
    if records:
        for record in records[:3]:
            say(f"  {record.listed}: {record.caption[:100]!r}")
    kept = [i for i, clip in enumerate(clips) if "reason" not in clip]
    return Data([records[i] for i in kept], [clips[i] for i in kept], [tokens[i] for i in kept], problems, framing)


def encode_data(args, folder, facts, tokenizer, data, readers, accelerator, barrier):
    """Encode what the cache lacks, over all processes. Returns (Encodings, validation prompts, negative prompt, fingerprint).

    T5 is loaded only if a caption is missing, the VAE only if a clip is, one after the other; both have left memory when
    this returns. The fingerprint is a hash of all clips, captions and how they were encoded.
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

    store.fill_captions(cache, captions, keys.get, missing_captions, load_text, facts.max_text_seq_length, rank, world_size)
    free(device)

    def load_encoder():
        return load_vae(folder, device, variant, args.enable_slicing, args.enable_tiling)

    show = functools.partial(show_encoded, args.output_dir, args.fps, [])
    store.fill_clips(cache, list(jobs.values()), load_encoder, readers, show, rank, world_size)
    free(device)
    barrier()
    prompt_keys = [keys[record.caption] for record in data.records]
    encodings = store.Encodings(cache, clip_keys[0], clip_keys[-1], prompt_keys, keys[""])
    prompts = [store.read_entry(store.entry_path(cache, "captions", keys[prompt])) for prompt in args.prompts]
    negative = store.read_entry(store.entry_path(cache, "captions", keys[args.negative_prompt]))
    return encodings, prompts, negative, {"clips": store.key_of(clip_keys, prompt_keys), "transformer": transformer_identity}


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
    missing_captions = store.missing_entries(cache, "captions", keys.values())
    missing_clips = set(store.missing_entries(cache, "clips", sum(clip_keys, [])))
    problems = []
    for part, needed in (("text_encoder", missing_captions), ("vae", missing_clips or args.prompts)):
        problem = weight_files(folder / part, args.variant)[1]
        if problem and needed:
            problems.append(f"{problem}; {len(needed)} {'captions' if part == 'text_encoder' else 'clips or videos'} need them")
    return keys, clip_keys, missing_captions, missing_clips, transformer_identity, problems


def show_encoded(output_dir, fps, rows, vae, name, frames, moments):
    """Save a clip beside what the VAE keeps of it: `encoded/NAME.mp4` (left: the frames, right: decoded again) and a sheet."""
    mean = moments.float().chunk(2)[0].transpose(0, 1) * vae.config.scaling_factor
    decoded = decode_latents(vae, mean)
    folder = Path(output_dir) / "encoded"
    write_video(folder / f"{len(rows) // 2:02d}-{Path(name).stem}.mp4", np.concatenate([frames, decoded], axis=2), fps)
    rows += [(f"{name}: as it is trained on", frames), ("decoded from its latents", decoded)]
    contact_sheet(folder / "contact_sheet.png", rows, "what the VAE keeps of the clips")


def free(device):
    """Give memory back that a model just left."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
