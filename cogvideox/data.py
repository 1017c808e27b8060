"""From the data flags to encodings: read, check, report, encode. Every function here is called by every process."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

from cogvideox import cache as store
from cogvideox.launch import say
from cogvideox.model import count_tokens, load_text_encoder, load_vae, stored_dtype, usable_dtype
from cogvideox.survey import clip_framing, remarks, remember_survey, shapes_differ, survey_clips, table_lines
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
        max_num_frames=args.max_num_frames,
        sizes=((args.height, args.width),),
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
        records = [Record(r.where, r.listed, r.path, f"{args.id_token} {r.caption}") for r in records]
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
        path, problem = locate(Path.cwd(), listed, allow_external_paths=True)
        if problem or not caption:
            problems.append(f"{where}: {problem or 'empty caption'}")
        else:
            records.append(Record(where, listed, str(path), caption))
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
    problems += [f"{r.where}: {r.listed}: {clip['reason']}" for r, clip in zip(records, clips, strict=True) if "reason" in clip]
    if args.train_batch_size > 1 and shapes_differ(clips):
        problems.append(
            f"--train_batch_size {args.train_batch_size}: the clips differ in length, and a batch has one shape; "
            "use --train_batch_size 1, or a --max_num_frames that all reach"
        )
    data = Data(records, clips, tokens, problems, framing)
    report = list(table_lines(records, clips, tokens, facts.max_text_seq_length))
    summary = list(remarks(records, clips, tokens, facts.max_text_seq_length, framing))
    if accelerator.is_main_process:
        text = "\n".join([*report, "", *summary, *[f"ERROR: {problem}" for problem in problems]]) + "\n"
        store.write_bytes(Path(args.output_dir) / "dataset_report.txt", text.encode())
    shown = report if len(report) <= 13 else report[:13] + [f"... {len(report) - 13} more in dataset_report.txt"]
    say(f"\n{layout} of {args.dataset_name or args.instance_data_root}")
    for line in [*shown, *summary]:
        say("  " + line)
    if records:
        for record in records[:3]:
            say(f"  {record.listed}: {record.caption[:100]!r}")
    return data


def encode_data(args, folder, facts, tokenizer, data, readers, accelerator, barrier):
    """Encode what the cache lacks, over all processes. Returns (Encodings, validation prompts, negative prompt, fingerprint).

    T5 is loaded only if a caption is missing, the VAE only if a clip is, one after the other; both have left memory when
    this returns. The fingerprint is a hash of all clips, captions and how they were encoded.
    """
    cache, rank, world_size = Path(args.encoding_cache_dir), accelerator.process_index, accelerator.num_processes
    device, variant = accelerator.device, args.variant
    text_dtype = usable_dtype(stored_dtype(folder, "text_encoder", variant), device)
    vae_dtype = usable_dtype(stored_dtype(folder, "vae", variant), device)
    captions = [record.caption for record in data.records] + [""] + args.prompts + [args.negative_prompt]
    plan = [None]
    if accelerator.is_main_process:
        remember_survey(data.clips, cache)
        text_identity = store.key_of(store.identity(folder, "text_encoder", cache, variant), store.identity(folder, "tokenizer", cache))
        vae_identity = store.identity(folder, "vae", cache, variant)
        keys = {caption: store.caption_key(caption, text_identity, text_dtype, facts.max_text_seq_length) for caption in captions}
        flips = (False, True) if args.random_flip else (False,)
        clip_keys = [
            [store.clip_key(c, vae_identity, vae_dtype, args.enable_slicing, args.enable_tiling, flip) for c in data.clips]
            for flip in flips
        ]
        missing_captions = store.missing_entries(cache, "captions", keys.values())
        missing_clips = set(store.missing_entries(cache, "clips", sum(clip_keys, [])))
        transformer_identity = store.identity(folder, "transformer", cache, variant)
        plan = [(keys, clip_keys, missing_captions, missing_clips, transformer_identity)]
    keys, clip_keys, missing_captions, missing_clips, transformer_identity = broadcast_object_list(plan)[0]
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
    store.fill_clips(
        cache,
        list(jobs.values()),
        lambda: load_vae(folder, device, variant, args.enable_slicing, args.enable_tiling),
        readers,
        rank,
        world_size,
    )
    free(device)
    barrier()
    prompt_keys = [keys[record.caption] for record in data.records]
    encodings = store.Encodings(cache, clip_keys[0], clip_keys[-1], prompt_keys, keys[""])
    prompts = [store.read_entry(store.entry_path(cache, "captions", keys[prompt])) for prompt in args.prompts]
    negative = store.read_entry(store.entry_path(cache, "captions", keys[args.negative_prompt]))
    return encodings, prompts, negative, {"clips": store.key_of(clip_keys, prompt_keys), "transformer": transformer_identity}


def free(device):
    """Give memory back that a model just left."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
