"""Make videos with a trained LoRA, in diffusers' own pipeline, beside the base model if asked.

    python -m tools.generate --pretrained_model_name_or_path THUDM/CogVideoX-2b --lora my-lora --prompt "BUNNY a rabbit"
    python -m tools.generate ... --lora_scale 0.5 0.75 1 --compare_base --seed 1 2 3     a sweep of strengths
    python -m tools.generate ... --transformer my-finetuned                              after --training_type sft
    python -m tools.generate ... --image one.png two.png --prompt "a rabbit" "a bird"    image-to-video: an image for each prompt

--lora is the folder of a run, its best/, a checkpoint-N/, or the file. Each prompt, seed and strength gives one mp4. The
noise of a video depends on its seed alone and is drawn on the CPU, so a video is the same whatever else is made with it.
With several strengths, or --compare_base, a grid video for each prompt has them side by side, a row for each seed.
contact_sheet.png has a few frames of every video, videos.json the settings. What lies in --output_dir already stays, but
for files of the same names, which are written over: videos of the same prompts, images, seeds and strengths, the sheet,
videos.json. Size, frames, sampler and guidance are what the model was made for unless given.
"""

import argparse
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from cogvideox import flags
from cogvideox.console import BAD_OUTPUT, fail, progress, say, warn
from cogvideox.decode import BadClip, Framing, read_clip
from cogvideox.device import unusable_gpu
from cogvideox.files import at_home, file_sha256, is_unicode, read_json, why_unwritable, write_bytes
from cogvideox.folder import check_geometry, check_model_folder, fill_in_defaults, find_model, geometry_notes, read_facts, stored_dtype
from cogvideox.launch import free
from cogvideox.lora import read_layers
from cogvideox.model import usable_dtype
from cogvideox.stopping import is_out_of_memory
from cogvideox.survey import of_one_picture
from cogvideox.validation import sampler_of, video_jobs
from cogvideox.video import contact_sheet, film_strip, read_video, write_video
from dataset import locate_image
from tools import lora_file

SAMPLERS = ("stored", "ddim", "dpm")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAMPLING = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "use_dynamic_cfg")
RECORDED = ("prompt", "image", "seed")
GRID_WIDTH, GRID_HEIGHT, LABEL_HEIGHT = 1920, 2160, 18  # pixels; larger videos do not play everywhere


def build_parser():
    """All flags."""
    parser = flags.new_parser(__doc__)
    parser.prog = "python -m tools.generate"
    flag = flags.flag_group(parser, "videos")
    flag("--pretrained_model_name_or_path", None, "folder or hub id of the base model, such as THUDM/CogVideoX-2b", required=True)
    flag("--lora", None, "folder of a run, its best/, a checkpoint-N/, or the .safetensors file")
    flag("--transformer", None, "instead of --lora: folder of an sft run, or its transformer/ (also that of tools.merge)")
    flag("--prompt", [], "what the videos should show", nargs="+")
    flag("--prompts_file", None, "more prompts, one a line")
    flag("--image", [], "image-to-video models: what the videos begin with, one for each prompt or one for all", nargs="+")
    flag("--negative_prompt", "", "what the videos should not show")
    flag("--seed", [42], "a video for each", nargs="+", type=int)
    flag("--lora_scale", None, "strengths of the LoRA, a video for each (default: 1, as trained; 0: the base)", nargs="+", type=float)
    flag("--compare_base", False, "make each video with the base model too")
    flag("--height", None, "pixels (default: the model's)", type=int, at_least=1)
    flag("--width", None, "pixels (default: the model's)", type=int, at_least=1)
    flag("--num_frames", None, "frames (default: the model's)", type=int, at_least=1)
    flag("--scheduler", None, "sampler: the model's own (stored), ddim or dpm (default: dpm; the 2B: stored)", choices=SAMPLERS)
    flag("--num_inference_steps", 50, "denoising steps", at_least=1)
    flag("--guidance_scale", 6.0, "classifier-free guidance; 1: off", at_least=0)
    flag(
        "--use_dynamic_cfg",
        None,
        "guidance that grows over the denoising steps (default: on; the 2B: off)",
        action=argparse.BooleanOptionalAction,
    )
    flag("--fps", None, "frames a second of the mp4 files (default: the model's, 8; 1.5: 16)", type=float, above=0)
    flag("--output_dir", "videos", "where they go; files of the same names are written over, others stay")
    flag("--dtype", None, "what the transformer computes in (default: as stored; fp32 for fp16 on a CPU)", choices=tuple(DTYPES))
    flag("--offload", "none", "keep unused models, or unused layers, in host memory", choices=("none", "model", "sequential"))
    flag("--cpu", False, "make the videos on the CPU, even if there is a GPU")
    flag("--enable_slicing", True, "VAE: decode one video at a time")
    flag("--enable_tiling", True, "VAE: decode large frames in tiles, a third of the memory")
    flag("--revision", None, "branch, tag or commit of a hub model")
    flag("--variant", None, "file variant of the weights, such as fp16")
    flag("--cache_dir", None, "where downloaded models are stored (default: the hub client's own place)")
    return parser


def check_flags(args):
    """Every mistake that the flags alone show, each a sentence. Fills in args.prompts."""
    problems = flags.out_of_bounds(args) + flags.undecodable(args, "negative_prompt")
    args.prompts = [prompt.strip() for prompt in args.prompt]
    try:
        lines = Path(at_home(args.prompts_file)).read_text("utf-8-sig").split("\n") if args.prompts_file else []
        args.prompts += [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"--prompts_file {args.prompts_file}: cannot be read ({getattr(error, 'strerror', None) or error})")
    problems += [f"--prompt {prompt!a}: is not UTF-8" for prompt in args.prompts if not is_unicode(prompt)]
    if not args.prompts or not all(args.prompts):
        problems.append("--prompt: give what the videos should show, or --prompts_file with one prompt a line")
    if (args.lora is None) == (args.transformer is None):
        problems.append("--lora or --transformer: give what was trained, one of them")
    if args.transformer and args.lora_scale:
        problems.append("--lora_scale: is the strength of a LoRA, and --transformer has none; leave it out")
    args.lora_scale = [scale + 0.0 for scale in args.lora_scale or [1.0]]  # -0 is 0
    problems += [f"--lora_scale {scale}: a number" for scale in args.lora_scale if not math.isfinite(scale)]
    problems += [f"--seed {seed}: from 0 to 2^63 - 1" for seed in args.seed if not 0 <= seed < 2**63]
    named = [f"{prompt} --image {image}" for prompt, image in zip(args.prompts, args.image, strict=False)]  # a prompt may have several
    prompts = named if len(args.image) > 1 else args.prompts
    for name, words in (("prompt", prompts), ("seed", args.seed), ("lora_scale", [f"{scale:g}" for scale in args.lora_scale])):
        problems += [f"--{name} {word}: given twice; once is enough" for word, times in Counter(words).items() if times > 1]
    if problem := unusable_gpu(args.cpu):
        problems.append(problem)
    if args.cpu or not torch.cuda.is_available():
        if args.offload != "none":
            problems.append(f"--offload {args.offload}: moves weights between a GPU and host memory, and here is no GPU; leave it out")
        if args.dtype == "fp16":
            problems.append("--dtype fp16: here is no GPU, and CPUs have no fast fp16; use bf16 or fp32")
    return problems


def read_images(args, facts):
    """(the image of each prompt, uint8 [H, W, 3], cropped to the videos' size as in training, problems). No image for text-to-video."""
    if not facts.image_channels:
        rule = "this model is text-to-video and reads no image; leave it out"
        return [], [f"--image {image}: {rule}" for image in args.image[:1]]
    if len(args.image) not in (1, len(args.prompts)):
        given = f"{len(args.image)} images for {len(args.prompts)} prompts" if args.image else "this model is image-to-video"
        return [], [f"--image: {given}; give what the videos begin with, one image for each prompt or one for all"]
    size = max(1, args.height), max(1, args.width)  # 0 is refused elsewhere
    framing, pictures, problems = Framing(fps=1, max_num_frames=1, sizes=(size,)), [], []
    for image in args.image:
        path, reason = locate_image(Path.cwd(), at_home(image), allow_external_paths=True)
        try:
            frames, found = read_clip(path, framing) if not reason else (None, {"reason": reason})
            reason = of_one_picture(found).get("reason")
        except BadClip as error:
            reason = error
        if reason:
            problems.append(f"--image {image}: {reason}")
        else:
            pictures.append(frames[0])
    return pictures * (len(args.prompts) if len(args.image) == 1 else 1), problems


def parse(words):
    """(flags, model folder, columns). Ends with exit code 2 and all problems, before any weight is read. Fills in args.pictures.

    columns: what is compared, from left to right: (name in files, label, folder of the transformer, strength, or None: no LoRA).
    """
    parser = build_parser()
    args = parser.parse_args(words)
    problems, columns, folder, layers = check_flags(args), [], None, {}
    args.output_dir = Path(at_home(args.output_dir))
    try:
        if args.lora:
            args.lora = lora_file.find_lora(args.lora)
            layers = read_layers(args.lora)
    except ValueError as error:
        problems.append(str(error))
    try:
        folder = find_model(args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir)
        if broken := check_model_folder(folder, args.variant):
            raise ValueError("\n".join(broken))
        facts = read_facts(folder)
        fill_in_defaults(args, facts)
        size = args.height, args.width, args.num_frames
        problems += check_geometry(facts, *size, names=("--height", "--width", "--num_frames"))
        args.pictures, unfit_images = read_images(args, facts)
        problems += unfit_images
        most = read_json(folder / "scheduler/scheduler_config.json").get("num_train_timesteps", 1000)
        if args.num_inference_steps > most:
            problems.append(f"--num_inference_steps {args.num_inference_steps}: the model's schedule has {most} steps at most")
        problems += lora_file.check_fit(args.lora, layers, folder)
        base = ("base", "base model", folder, 0.0 if args.lora else None)
        columns = [base if scale == 0 else (f"scale{scale:g}", f"LoRA {scale:g}", folder, scale) for scale in args.lora_scale]
        if args.transformer:
            columns = [("finetuned", "fine-tuned", lora_file.find_transformer(args.transformer, folder), None)]
        columns = [base] * (args.compare_base and base not in columns) + columns
    except ValueError as error:
        problems += str(error).split("\n")
    if not problems and (reason := why_unwritable(args.output_dir)):
        problems.append(f"--output_dir {args.output_dir}: cannot be written to ({reason})")
    if problems:
        flags.refuse(parser, problems)
    for note in geometry_notes(facts, *size):
        warn(note)
    return args, folder, columns


def grid(rows):
    """Videos side by side, each under its label, as one: uint8 [F, H, W, 3]. rows: [[(label, frames [F, H, W, 3])]]."""
    height, width = rows[0][0][1].shape[1:3]
    shrink = min(1, GRID_WIDTH / (width * len(rows[0])), GRID_HEIGHT / (height * len(rows)))
    width, height = (max(2, int(shrink * side) // 2 * 2) for side in (width, height))

    def cell(label, frames):
        strip = Image.new("RGB", (width, LABEL_HEIGHT), "white")
        ImageDraw.Draw(strip).text((4, 2), label, "black")
        return np.stack([np.concatenate([strip, Image.fromarray(frame).resize((width, height))]) for frame in frames])

    return np.concatenate([np.concatenate([cell(*video) for video in row], axis=2) for row in rows], axis=1)


def write_overview(args, columns, jobs, settings):
    """The grids, contact_sheet.png and videos.json of the videos of this call."""
    sheet, videos = [], [(job, column, f"{job['stem']}-{column[0]}.mp4") for job in jobs for column in columns]
    for number, prompt in enumerate(args.prompts):
        mine = [video for video in videos if video[0]["number"] == number]
        cells = [(f"{column[1]}, seed {job['seed']}", read_video(args.output_dir / name)) for job, column, name in mine]
        image_cell = [("image", args.pictures[number][None])] if args.pictures else []
        sheet += [(prompt, None)] + [(label, film_strip(frames)[None]) for label, frames in image_cell + cells]
        if len(columns) > 1:
            rows = [cells[i : i + len(columns)] for i in range(0, len(cells), len(columns))]
            stem = mine[0][0]["stem"].rsplit("-seed", 1)[0]
            write_video(args.output_dir / f"{stem}-grid.mp4", grid(rows), args.fps)
    contact_sheet(args.output_dir / "contact_sheet.png", sheet, ", ".join(f"{name} {settings[name]}" for name in SAMPLING[:5]))
    record = [{"name": name, "made_with": column[1]} | {key: job[key] for key in RECORDED if key in job} for job, column, name in videos]
    write_bytes(args.output_dir / "videos.json", json.dumps({"settings": settings, "videos": record}, indent=1).encode())


def jobs_of(args):
    """A job for each prompt and seed: {"prompt", "number" of the prompt, "seed", "stem": the beginning of its files' names}. With images
    also {"image": its file, "picture": uint8 [H, W, 3]}."""
    jobs = []
    for job in (job for seed in args.seed for job in video_jobs(args.prompts, 1, seed, args.pictures)):
        number, stem = job["prompt"], job["name"].removesuffix(".mp4")
        jobs.append({"prompt": args.prompts[number], "number": number, "seed": job["seed"], "stem": stem})
        if args.pictures:
            jobs[-1] |= {"image": args.image[number % len(args.image)], "picture": args.pictures[number]}
    return jobs


def main(words=None):
    """The command line."""
    args, folder, columns = parse(words)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    dtype = DTYPES[args.dtype] if args.dtype else usable_dtype(stored_dtype(folder, "transformer", args.variant), device)
    settings = {name: getattr(args, name) for name in SAMPLING}
    jobs = jobs_of(args)
    count, size = len(jobs) * len(columns), f"{args.num_frames} frames of {args.height} x {args.width}"
    say(f"videos: {count} of {size}, {args.num_inference_steps} steps each, in {str(dtype).removeprefix('torch.')} on {device.type}")
    try:
        embeddings = lora_file.encode_prompts(folder, [*args.prompts, args.negative_prompt], device, args.variant)
        with progress(total=count * args.num_inference_steps, desc="denoising", unit="step") as bar:
            for trained_folder, group in itertools.groupby(columns, key=lambda column: column[2]):
                pipeline = None  # before the next one is loaded
                free(device)
                pipeline = lora_file.load_pipeline(args, folder, trained_folder, dtype, device)
                pipeline.scheduler = sampler_of(pipeline.scheduler, args.scheduler)
                for job, column in itertools.product(jobs, list(group)):
                    texts = embeddings[job["prompt"]], embeddings[args.negative_prompt]
                    given = settings | ({"image": Image.fromarray(job["picture"])} if args.pictures else {})
                    frames = lora_file.make_video(pipeline, texts, job["seed"], column[3], device, bar.update, **given)
                    write_video(args.output_dir / f"{job['stem']}-{column[0]}.mp4", frames, args.fps)
        trained = {"lora": str(args.lora), "sha256": file_sha256(args.lora)} if args.lora else {"transformer": args.transformer}
        facts = {"model": args.pretrained_model_name_or_path, "negative_prompt": args.negative_prompt, "fps": args.fps, "dtype": str(dtype)}
        facts |= {"scheduler": args.scheduler}
        write_overview(args, columns, jobs, facts | trained | settings)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fail(1, f"out of memory at {size}: try --offload model, then sequential, --dtype bf16, a smaller size or fewer frames")
    except KeyboardInterrupt:
        fail(130, f"stopped; the videos that were done are in {args.output_dir}")
    except OSError as error:
        fail(BAD_OUTPUT, f"--output_dir {args.output_dir}: {error.strerror or error}")
    print(f"videos: {count} in {args.output_dir}; all at a glance: {args.output_dir / 'contact_sheet.png'}")


if __name__ == "__main__":
    main()
