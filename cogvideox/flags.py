"""The flags that say which clips are trained on, shared by the trainer and the tools, and the checks that all flags share.

Nothing heavy is imported here: a wrong flag is told before torch is loaded.
"""

import argparse
import importlib.util
import math
import os
import re


def add_data_flags(parser):
    """The flags that say which clips are trained on, and how they are cut."""
    switch = argparse.BooleanOptionalAction
    flag = parser.add_argument_group("data").add_argument
    flag("--instance_data_root", help="data folder: prompts.txt and videos.txt (or a table, or a text file a clip)")
    flag("--dataset_name", help="hub id or folder of a dataset for the datasets package, instead of --instance_data_root")
    flag("--dataset_config_name", help="its configuration")
    flag("--caption_column", help="file of captions, one a line, or a table's column (default: prompts.txt, or text)")
    flag("--video_column", help="file of video paths, one a line, or a table's column (default: videos.txt, or video)")
    flag("--allow_external_paths", action="store_true", help="allow listed files outside --instance_data_root by .. or links")
    flag("--bad_videos", choices=("error", "skip"), default="error", help="clips that cannot be used: end the run, or train without them")
    flag("--max_bad_share", type=float, default=0.1, help="with --bad_videos skip: end the run if more than this share is bad")
    flag("--eval_share", type=float, default=0.0, help="share of the clips that is held out of training and scored (0: none; 0.1 of 50)")
    flag("--eval_data_root", help="a second data folder like --instance_data_root, all of it held out and scored")
    flag("--id_token", help="identifier put before every training caption, with a space")
    flag("--height", type=int, default=480, help="pixels, a multiple of 16 for CogVideoX")
    flag("--width", type=int, default=720, help="pixels, a multiple of 16 for CogVideoX")
    flag("--fps", type=float, default=8.0, help="frames a second to sample clips at; 8 is what CogVideoX 1.0 was trained on")
    flag("--max_num_frames", type=int, default=49, help="frames a clip at most: 4k + 1")
    flag(
        "--bucket", nargs="+", default=[], help="sizes (480x720) and lengths (49) that clips may get, each the nearest (default: one size)"
    )
    flag("--skip_frames_start", type=int, default=0, help="source frames to leave out at the start of each clip")
    flag("--skip_frames_end", type=int, default=0, help="source frames to leave out at the end of each clip")
    flag("--video_reshape_mode", choices=("center", "random", "none"), default="center", help="resize and crop there; none: stretch")
    flag("--random_flip", action="store_true", help="mirror a whole clip left to right, half of the times")
    flag("--enable_slicing", action=switch, default=True, help="VAE: encode and decode one clip at a time")
    flag("--enable_tiling", action=switch, default=True, help="VAE: large frames in tiles, a third of the memory")
    flag("--dataloader_num_workers", type=int, default=0, help="processes that read encodings in training (0: none, the fastest here)")
    flag(
        "--encoding_cache_dir",
        help="where encoded clips and captions are kept (default: cogvideox-encodings, below --cache_dir or ~/.cache)",
    )
    flag("--clip_timeout_seconds", type=float, default=60.0, help="how long decoding one clip may take")


def below(args, least, *names):
    """A sentence for each of these flags that is less than `least`, or no number."""
    values = [(name, getattr(args, name)) for name in names]
    return [
        f"--{name} {value}: at least {least}" for name, value in values if value is not None and not value >= least or value == math.inf
    ]


def not_above_zero(args, *names):
    """A sentence for each of these flags that is not a number above 0."""
    values = [(name, getattr(args, name)) for name in names]
    return [f"--{name} {value}: above 0" for name, value in values if value is not None and not 0 < value < math.inf]


def check_data_flags(args):
    """As `check_flags`, for the flags of `add_data_flags`."""
    problems = below(args, 1, "height", "width", "max_num_frames") + below(args, 0, "skip_frames_start", "skip_frames_end")
    problems += below(args, 0, "dataloader_num_workers") + not_above_zero(args, "fps", "clip_timeout_seconds")
    if not 0 <= args.max_bad_share <= 1:
        problems.append(f"--max_bad_share {args.max_bad_share}: a share from 0 to 1")
    if not 0 <= args.eval_share < 1:
        problems.append(f"--eval_share {args.eval_share}: a share from 0 to below 1, such as 0.1")
    if args.eval_share and args.eval_data_root:
        problems.append("--eval_share and --eval_data_root: both hold clips out; give one of them")
    args.bucket_sizes, args.bucket_lengths = [], []
    for word in args.bucket:
        if match := re.fullmatch(r"(\d+)x(\d+)", word):
            args.bucket_sizes.append((int(match[1]), int(match[2])))
        elif word.isdecimal():
            args.bucket_lengths.append(int(word))
        else:
            problems.append(f"--bucket {word}: a size as HEIGHTxWIDTH (480x720), or a number of frames (49)")
    if not args.instance_data_root and not args.dataset_name:
        problems.append("--instance_data_root: give the folder of the clips (or --dataset_name)")
    if args.instance_data_root and args.dataset_name:
        problems.append("--instance_data_root and --dataset_name: give one of them")
    if args.dataset_name and importlib.util.find_spec("datasets") is None:
        problems.append("--dataset_name needs the datasets package: pip install datasets")
    for name in ("instance_data_root", "eval_data_root", "dataset_name", "cache_dir", "encoding_cache_dir"):
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    args.encoding_cache_dir = args.encoding_cache_dir or os.path.join(
        args.cache_dir or os.path.expanduser("~/.cache"), "cogvideox-encodings"
    )
    return problems
