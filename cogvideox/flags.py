"""Declaring a flag in one place: its group, default, bounds, help, and whether a resumed run may change it.

No heavy imports: a wrong flag is rejected before torch is loaded.
"""

import argparse
import difflib
import functools
import math
import os
import re

from cogvideox import versions
from cogvideox.files import at_home, is_unicode


class Parser(argparse.ArgumentParser):
    """A parser whose own refusals are sentences like all others, and which names the flag that an unknown one may mean."""

    def error(self, message):
        """End the program; argparse calls it."""
        unknown = message.removeprefix("unrecognized arguments: ")
        names = [word.partition("=")[0] for word in unknown.split() if word.startswith("--")] if unknown != message else []
        refuse(self, [self.unknown_flag(name) for name in names] or [f"{message.removeprefix('argument ')}; --help lists all flags"])

    def unknown_flag(self, name):
        """The sentence about a flag that does not exist."""
        known = {flag.replace("-", "_"): flag for flag in self._option_string_actions}
        near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
        return f"{name}: no such flag; " + (f"did you mean {known[near[0]]}?" if near else "--help lists all flags")


def new_parser(description):
    """An empty parser. `args.declared` will hold the actions of `flag_group`'s flags by name."""
    width = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=40, width=130)
    parser = Parser(usage="%(prog)s [flags]", description=description, formatter_class=width, allow_abbrev=False)
    parser.declared = {}
    parser.set_defaults(declared=parser.declared)
    return parser


def flag_group(parser, title):
    """The function that declares the flags of one group, in the order of --help.

        flag = flag_group(parser, "LoRA")
        flag("--rank", 128, "rank of the LoRA matrices", at_least=1)

    The default implies the type: False is a switch, True a switch with its --no- form, None needs type=. at_least, above, below,
    at_most: bounds, checked by `out_of_bounds`. free: whether a resumed run may change the value, because it does not change
    the training. options: argparse's.
    """
    group = parser.add_argument_group(title)

    def flag(name, default, help, *, at_least=None, above=None, below=None, at_most=None, free=False, **options):
        if default is False:
            options["action"] = "store_true"
        elif default is True:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.setdefault("type", str if default in (None, []) else type(default))
            if "choices" not in options:
                options["metavar"] = {int: "N", float: "X"}.get(options["type"], "TEXT")
        if "(default" not in help and default is not False and default != "" and not options.get("required"):
            help += " (default: none)" if default is None else " (default: %(default)s)"
        action = group.add_argument(name, default=default, help=help, **options)
        action.bounds, action.free, action.group = (at_least, above, below, at_most), free, title
        parser.declared[action.dest] = action

    return flag


def out_of_bounds(args):
    """A sentence for each flag whose value is out of bounds or not finite. args: from a parser of `new_parser`."""
    problems = []
    for name, action in args.declared.items():
        at_least, above, below, at_most = action.bounds
        value = getattr(args, name)
        if value is None or action.bounds == (None,) * 4:
            continue
        inside = (at_least is None or value >= at_least) and (above is None or value > above)
        inside = inside and (below is None or value < below) and (at_most is None or value <= at_most)
        if not inside or not math.isfinite(value):
            bounds = [(at_least, "at least"), (above, "above"), (at_most, "at most"), (below, "below")]
            rule = " and ".join(f"{word} {bound}" for bound, word in bounds if bound is not None)
            problems.append(f"--{name} {value}: must be {rule}")
    return problems


def parse(parser, arguments, check):
    """The checked flags. check: args -> further problems as sentences. Problems end the program."""
    args = parser.parse_args(arguments)
    if problems := out_of_bounds(args) + check(args):
        refuse(parser, problems)
    return args


def refuse(parser, problems):
    """End the program with exit code 2, one line per problem."""
    parser.exit(2, "".join(f"ERROR[2]: {problem}\n" for problem in problems))


def public_flags(args):
    """The flags of a run as JSON-ready values, without the token, and with "?" for bytes that are not UTF-8: trackers take none."""
    values = {name: getattr(args, name) for name in sorted(args.declared) if name != "hub_token"}
    return {name: value.encode(errors="replace").decode() if isinstance(value, str) else value for name, value in values.items()}


def undecodable(args, *names):
    """A sentence for each of these flags whose text is not UTF-8, which no tokenizer takes, and no library that reads weights."""
    return [
        f"--{name} {getattr(args, name)!a}: is not UTF-8; write it in UTF-8, or give another"
        for name in names
        if not is_unicode(getattr(args, name) or "")
    ]


def expand_home(args, *names):
    """Replace ~/ by the home folder in these flags."""
    for name in names:
        if getattr(args, name):
            setattr(args, name, at_home(getattr(args, name)))


# -----------------------------------------------------------------------------
# The data flags, shared by the trainer and tools/check_dataset.py. Most of them are free: a change of the data shows in the hash
# of clips and captions, which a resumed run compares.


def add_data_flags(parser):
    """Declare the flags that select the clips and how they are cut."""
    flag = flag_group(parser, "data")
    flag("--instance_data_root", None, "data folder: prompts.txt and videos.txt (or a table, or a text file per clip)", free=True)
    flag("--id_token", None, "trigger word, put before every training caption with a space", free=True)
    flag("--height", None, "pixels, a multiple of 16 (default: the model's; 480, 1.5: 768)", type=int, at_least=1, free=True)
    flag("--width", None, "pixels, a multiple of 16 (default: the model's; 720, 1.5: 1360)", type=int, at_least=1, free=True)
    flag("--fps", None, "frames per second to sample clips at (default: 8; 1.5: 16)", type=float, above=0, free=True)
    flag("--max_num_frames", None, "most frames per clip: 4k + 1; 1.5: 8k + 1 (default: 49; 1.5: 81)", type=int, at_least=1, free=True)
    flag(
        "--windows",
        "one",
        "what of a clip is trained: one: its start; slide: windows one after the other; spread: to its end, overlapping",
        choices=("one", "slide", "spread"),
        free=True,
    )
    flag("--eval_share", 0.0, "share of the clips held out of training and scored, such as 0.1", at_least=0, below=1, free=True)
    flag("--eval_data_root", None, "a second data folder like --instance_data_root, all of it held out and scored", free=True)
    flag("--prior_data_root", None, "another one, trained beside the clips with its captions as they are, without --id_token", free=True)
    flag("--caption_column", None, "file of captions, one per line, or a table's column (default: prompts.txt, or text)", free=True)
    flag("--video_column", None, "file of video paths, one per line, or a table's column (default: videos.txt, or video)", free=True)
    flag("--image_column", None, "image-to-video: file of images, one per line, or a table's column (default: first frames)", free=True)
    flag("--bucket", [], "sizes (480x720) and lengths (49); each clip gets the nearest of each (default: one size)", nargs="+")
    flag("--video_reshape_mode", "center", "where to crop after resizing; none: stretch", choices=("center", "random", "none"), free=True)
    flag("--alpha_background", "white", "colour behind transparent pixels: a name, or #rrggbb", free=True)
    flag("--random_flip", False, "flip each clip horizontally with probability 0.5")
    flag("--skip_frames_start", 0, "source frames to skip at the start of each clip", at_least=0, free=True)
    flag("--skip_frames_end", 0, "source frames to skip at the end of each clip", at_least=0, free=True)
    flag("--dataset_name", None, "hub id or folder of a dataset for the datasets package, instead of --instance_data_root", free=True)
    flag("--dataset_config_name", None, "configuration of that dataset", free=True)
    flag("--allow_external_paths", False, "allow listed files outside --instance_data_root by .. or links", free=True)
    flag("--bad_videos", "error", "unusable clips: abort, or train without them", choices=("error", "skip"), free=True)
    flag("--max_bad_share", 0.1, "with --bad_videos skip: abort if more than this share is unusable", at_least=0, at_most=1, free=True)
    flag("--clip_timeout_seconds", 60.0, "timeout of decoding one clip", above=0, free=True)
    flag("--encoding_cache_dir", None, "folder of encoded clips and captions (default: in --cache_dir, or ~/.cache)", free=True)
    flag("--enable_slicing", True, "VAE: encode and decode one clip at a time", free=True)
    flag(
        "--enable_tiling",
        True,
        "VAE: decode in tiles, a third of the memory; encode so where whole frames do not fit",
        free=True,
    )
    flag("--dataloader_num_workers", 0, "processes that load encodings (0: a thread on a GPU, none on a CPU)", at_least=0, free=True)


def add_data_model_flag(flag):
    """Declare the model of a tool that only looks at data."""
    flag("--pretrained_model_name_or_path", None, "the model to be trained: its configs give the sizes (default: as CogVideoX-2B)")


def check_data_flags(args):
    """Further problems of the flags of `add_data_flags`, as sentences. Fills in the values that depend on other flags."""
    from PIL import ImageColor  # not before a wrong flag has been refused

    problems = undecodable(args, "id_token", "encoding_cache_dir", "cache_dir")
    if args.eval_share and args.eval_data_root:
        problems.append("--eval_share and --eval_data_root: both hold clips out; give only one")
    if args.windows != "one" and (args.skip_frames_start or args.skip_frames_end):
        rule = "would skip in each window; name the part of a clip in the list (FILE | START-END)"
        problems.append(f"--windows {args.windows}: --skip_frames_start and --skip_frames_end {rule}")
    if args.windows != "one" and args.image_column:
        rule = "the windows of a clip would share one image, which shows the first of them; leave it out to train each with its first frame"
        problems.append(f"--image_column {args.image_column}: unsupported with --windows {args.windows}: {rule}")
    args.bucket_sizes, args.bucket_lengths = [], []
    for word in args.bucket:
        if match := re.fullmatch(r"(\d+)x(\d+)", word):
            args.bucket_sizes.append((int(match[1]), int(match[2])))
        elif word.isdecimal():
            args.bucket_lengths.append(int(word))
        else:
            problems.append(f"--bucket {word}: a size as HEIGHTxWIDTH (480x720), or a number of frames (49)")
    try:
        args.background = ImageColor.getrgb(args.alpha_background)
    except ValueError:
        args.background = ()
    if len(args.background) != 3:
        problems.append(f"--alpha_background {args.alpha_background}: a colour without transparency, such as black or #00ff00")
    if not args.instance_data_root and not args.dataset_name:
        problems.append("--instance_data_root: give the folder of the clips (or --dataset_name)")
    if args.instance_data_root and args.dataset_name:
        problems.append("--instance_data_root and --dataset_name: give only one")
    if args.dataset_name and (fault := versions.misfit("datasets>=3.1")):
        problems.append(f"--dataset_name: {fault}; run pip install 'datasets>=3.1'")
    expand_home(args, "instance_data_root", "eval_data_root", "prior_data_root", "dataset_name", "cache_dir", "encoding_cache_dir")
    args.encoding_cache_dir = args.encoding_cache_dir or os.path.join(args.cache_dir or at_home("~/.cache"), "cogvideox-encodings")
    return problems


def without_token(text, token):
    """The text without the id token where it stands as a word of its own; "" if it does not, or if nothing else is left."""
    rest, count = re.subn(rf"(?<!\w){re.escape(token)}(?!\w)", " ", text) if token else ("", 0)
    return " ".join(rest.split()).lstrip(",.;: ") if count else ""


# -----------------------------------------------------------------------------
# Flags that nothing reads beside the others. A value that is not the default was given by somebody who expects something of it.

VIDEO_FLAGS = ("validation_prompt_separator", "validation_epochs", "validation_steps", "num_validation_videos")
VIDEO_FLAGS += ("validation_prompts_at_once", "num_inference_steps", "validation_scheduler", "guidance_scale", "use_dynamic_cfg")
VIDEO_FLAGS += ("validation_without_trigger", "validation_images", "negative_prompt", "validation_height", "validation_width")
VIDEO_FLAGS += ("validation_frames",)
SCRIPT_FLAGS = {"validation_epochs": 2}  # values of both shell scripts that are not defaults: whoever runs one did not give them
IDLE = [  # flags, when nothing reads them, why
    (("num_train_epochs",), lambda args: args.max_train_steps, "--max_train_steps decides"),
    (("max_bad_share",), lambda args: args.bad_videos != "skip", "only --bad_videos skip reads it"),
    (("dataset_config_name",), lambda args: not args.dataset_name, "there is no --dataset_name"),
    (("height", "width"), lambda args: args.bucket_sizes, "--bucket has the sizes"),
    (("max_num_frames",), lambda args: args.bucket_lengths, "--bucket has the lengths"),
    (("revision",), lambda args: os.path.isdir(at_home(args.pretrained_model_name_or_path)), "the model is a local folder"),
    (("rank", "lora_alpha", "target_modules"), lambda args: args.training_type == "sft", "--training_type sft has no LoRA"),
    (VIDEO_FLAGS, lambda args: not args.prompts, "there is no --validation_prompt"),
    (("validation_epochs",), lambda args: args.prompts and args.validation_steps, "--validation_steps decides"),
    (("validation_without_trigger",), lambda args: args.prompts and not args.prompts_have_trigger, "no prompt has an --id_token"),
    (("negative_prompt", "use_dynamic_cfg"), lambda args: args.prompts and args.guidance_scale <= 1, "--guidance_scale is off"),
    (("eval_steps",), lambda args: not args.eval_clips, "--eval_clips 0 scores nothing"),
    (("eval_share", "eval_data_root"), lambda args: not args.eval_clips, "its clips are held out, but --eval_clips 0 scores nothing"),
    (("offload", "allow_tf32"), lambda args: args.cpu, "it is for GPUs"),
    (("tracker_name", "logging_dir"), lambda args: args.report_to == "none", "--report_to none has no tracker"),
    (("hub_model_id",), lambda args: not args.push_to_hub, "there is no --push_to_hub"),
]
REFUSED_IDLE = [  # the same, where the run would train something else than was meant
    (("lr_num_cycles",), lambda args: args.lr_scheduler != "cosine_with_restarts", "only --lr_scheduler cosine_with_restarts has cycles"),
    (("lr_power",), lambda args: args.lr_scheduler != "polynomial", "only --lr_scheduler polynomial has a power"),
    (
        ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"),
        lambda args: args.optimizer != "prodigy",
        "only --optimizer prodigy reads it",
    ),
]


def idle_flags(args, rules):
    """(flag with its value, why) for each flag with a value of its own that nothing reads. rules: IDLE or REFUSED_IDLE. args: checked."""
    ordinary = {name: action.default for name, action in args.declared.items()} | {"lora_alpha": float(args.rank)}
    found = []
    for names, idle, reason in rules:
        for name in names if idle(args) else ():
            value = getattr(args, name)
            if value not in (ordinary[name], SCRIPT_FLAGS.get(name, ordinary[name])):
                found.append((f"--no-{name}" if value is False else f"--{name}" if value is True else f"--{name} {value}", reason))
    return found
