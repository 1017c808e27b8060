"""From footage to a data folder: python -m tools.prepare FOOTAGE... --output_dir DATA. Needs scenedetect, no model and no GPU.

Finds the cuts of videos of any length, places windows of the trained length between them, leaves out what would harm training, and
writes a cut list (videos.txt), captions to replace (prompts.txt) and a page to look at (review.html). Nothing is re-encoded.
"""

import json
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideox import flags, versions
from cogvideox.console import BAD_DATA, BAD_OUTPUT, fail, progress, say, warn
from cogvideox.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, longest_legal_length
from cogvideox.files import at_home, is_unicode, read_json, why_unwritable, write_bytes
from cogvideox.reader import cores
from cogvideox.windows import listed_window
from tools.footage import examine_films, film_key
from tools.review import pictures_at, write_page, write_strip
from tools.shots import (
    OVERLAY_SHOTS,
    REASONS,
    cuts_of,
    find_duplicates,
    judge,
    overlay_of,
    shots_of,
    shows_overlay,
    thumbnails_of,
    windows_of,
)

STATE = "prepare.json"
OTHER_LISTS = ("prompts.txt", "videos.txt", "labels", *(f"metadata{kind}" for kind in (".csv", ".tsv", ".jsonl", ".parquet", ".json")))


# -----------------------------------------------------------------------------
# Flags and footage


def parse(words):
    """The checked flags."""
    parser = flags.new_parser(__doc__)
    parser.usage = "python -m tools.prepare FOOTAGE... --output_dir DATA [flags]"
    parser.add_argument("footage", nargs="+", help="videos, or folders of videos")
    flag = flags.flag_group(parser, "in and out")
    flag("--output_dir", None, "the data folder, for --instance_data_root", required=True)
    flag("--caption", None, "caption of all windows until tools.caption or you write better ones (default: the video's name in words)")
    flag("--review", None, "review.txt as saved from review.html: it decides which windows are trained")
    flag("--workers", 0, "processes that read (default: one a core)", at_least=0)
    flag("--clip_timeout_seconds", 60.0, "timeout of reading 20 seconds of film", above=0)
    flag = flags.flag_group(parser, "windows: give the trainer the same values")
    flag("--windows", "one", "within a shot: its middle; one after the other; or evenly to its end", choices=("one", "slide", "spread"))
    flags.add_data_model_flag(flag)
    flag("--fps", None, "frames per second that are trained (default: 8; 1.5: 16)", type=float, above=0)
    flag("--max_num_frames", None, "frames per window: 4k + 1; 1.5: 8k + 1 (default: 49; 1.5: 81)", type=int, at_least=1)
    flag("--min_num_frames", None, "take shots too short for --max_num_frames down to so many frames (default: none)", type=int, at_least=1)
    flag(
        "--height",
        None,
        "pixels; with --width, the trained shape, which decides what black bars are cropped anyway (default: 480; 1.5: 768)",
        type=int,
        at_least=1,
    )
    flag("--width", None, "pixels (default: 720; 1.5: 1360)", type=int, at_least=1)
    flag = flags.flag_group(parser, "cuts")
    flag("--detector", "adaptive", "scenedetect's detector", choices=("adaptive", "content", "threshold", "none"))
    flag("--cut_threshold", None, "of the detector; lower finds more cuts (default: its own)", type=float, above=0)
    flag("--margin_seconds", 0.1, "left out before and after a cut: a cut may be blended, or found a frame late", at_least=0)
    flag = flags.flag_group(parser, "what is left out")
    flag("--keep", [], f"take windows in spite of: {', '.join(REASONS)}", nargs="+", choices=tuple(REASONS), metavar="REASON")
    flag("--min_motion", 1.0, "static below: grey levels of 255 that a pixel changes by from one trained frame to the next", at_least=0)
    flag("--max_blur", 0.6, "blurred above: Crete's measure, 0 to 1", at_least=0, at_most=1)
    flag("--min_bright", 50.0, "dark below: level of 255 that only 5 %% of the pixels are above", at_least=0, at_most=255)
    flag("--min_distance", 4.0, "duplicates below: grey levels between the small pictures of two windows", at_least=0)
    return flags.parse(parser, words, check_flags)


def check_flags(args):
    """What is wrong with the flags beside their bounds, as sentences. Fills in paths and lengths."""
    from cogvideox.folder import clip_step, facts_for_data  # imports torch, which wrong flags need not wait for

    flags.expand_home(args, "output_dir", "review")
    args.output_dir = Path(args.output_dir).absolute()
    problems = flags.undecodable(args, "caption")
    faults = [versions.misfit(f"{name}>=0.7,<0.8") for name in ("scenedetect-headless", "scenedetect")]
    if all(faults):
        problems.append(f"finding cuts: {faults[0]}; run pip install 'scenedetect-headless>=0.7,<0.8'")
    problems += [f"{name}: no such file or folder" for name in args.footage if not os.path.exists(at_home(name))]
    if args.caption is not None and not args.caption.strip():
        problems.append("--caption: is empty; every window needs a caption")
    if args.review and not Path(args.review).is_file():
        problems.append(f"--review {args.review}: no such file; save it from review.html")
    if args.detector == "none" and args.cut_threshold is not None:
        problems.append("--cut_threshold: --detector none finds no cuts; leave it out")
    args.caption = args.caption and " ".join(args.caption.split())
    facts, found = facts_for_data(args)
    problems += found
    if found:
        return problems
    args.facts = facts
    args.frames = legal_length(args, args.max_num_frames)
    args.least = args.frames if args.min_num_frames is None else legal_length(args, args.min_num_frames + clip_step(facts) - 1)
    if args.least > args.frames:
        problems.append(f"--min_num_frames {args.min_num_frames}: is above --max_num_frames {args.max_num_frames}")
    return problems


def legal_length(args, num_frames):
    """The longest clip of at most so many frames that the model accepts."""
    return longest_legal_length(num_frames, latents_per_patch=args.facts.latents_per_patch)


def list_footage(names, output_dir):
    """(videos, problems) of files and folders: absolute paths, each file once, without the output folder's own."""
    videos, problems = {}, []
    for name in names:
        path = Path(at_home(name)).absolute()
        if path.is_file():
            found = [path]
        else:
            found = []
            for place, folders, files in os.walk(path):
                folders[:] = sorted(folder for folder in folders if not folder.startswith(".") and Path(place, folder) != output_dir)
                found += [Path(place, file) for file in sorted(files) if not file.startswith(".")]
            found = [file for file in found if file.suffix.lower() in VIDEO_SUFFIXES]
            if not found:
                problems.append(f"{name}: no video in it (a video ends in {', '.join(sorted(VIDEO_SUFFIXES))})")
        for file in found:
            if file.suffix.lower() in IMAGE_SUFFIXES:
                problems.append(f"{file}: a picture has no windows; list it in videos.txt yourself")
            elif not is_unicode(str(file)) or not set("|\r\n").isdisjoint(file.name):
                problems.append(f"{str(file)!a}: a name in a list is UTF-8, without | and line ends; rename it")
            else:
                videos.setdefault(os.path.realpath(file), file)
    return list(videos.values()), problems


def why_foreign(folder):
    """A sentence if a folder holds another data set, or a list that cannot be read, else None."""
    if not folder.exists() or (folder / STATE).is_file():
        return None
    if other := [name for name in OTHER_LISTS if (folder / name).exists()]:
        return f"--output_dir {folder}: has a {other[0]} that tools.prepare did not write; give another folder"
    return None


# -----------------------------------------------------------------------------
# Lists


def name_films(films, folder):
    """{film: its name in videos.txt}. A film outside the folder is linked as videos/NAME, without a copy of its data.

    A hard link is a file of the folder for the trainer, for rsync and after a move; on another file system the list names the path.
    """
    names = {}
    for film in films:
        if film.is_relative_to(folder) and Path(os.path.realpath(film)).is_relative_to(os.path.realpath(folder)):
            names[film] = film.relative_to(folder).as_posix()
            continue
        source, number = Path(os.path.realpath(film)), 1
        while True:
            link = folder / "videos" / (f"{film.stem}-{number}{film.suffix}" if number > 1 else film.name)
            number += 1
            if not link.exists() and not link.is_symlink():
                try:
                    link.parent.mkdir(parents=True, exist_ok=True)
                    os.link(source, link)
                except OSError:  # another file system, or one without links
                    names[film] = str(film)
                    break
            if link.exists() and os.path.samefile(link, source):
                names[film] = f"videos/{link.name}"
                break
    return names


def in_words(name):
    """A file's name as words, for a caption: Big_Buck-Bunny.720p is "Big Buck Bunny 720p"."""
    return " ".join(re.sub(r"[\W_]+", " ", name).split()) or "a video"


def read_review(path):
    """({line: whether it is trained}, problems) of a review.txt."""
    choices, problems = {}, []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        word, _, listed = line.strip().partition(" ")
        if word in ("keep", "leave") and listed.strip():
            choices[listed.strip()] = word == "keep"
        elif line.strip():
            problems.append(f"{path}:{number}: {line[:60]!r} is neither 'keep FILE | START-END' nor 'leave FILE | START-END'")
    return choices, problems


def read_lists(folder):
    """([(line of videos.txt, caption)], state, problem) of a folder that was prepared before."""
    state, pairs = {"placeholders": {}, "captions": {}}, []
    if not (folder / STATE).exists():
        return pairs, state, None
    try:
        state |= read_json(folder / STATE)
        if "lists" in state:  # the program was killed while it wrote them
            pairs = [tuple(pair) for pair in state.pop("lists")]
        elif (folder / "videos.txt").exists() or (folder / "prompts.txt").exists():
            videos, prompts = (
                (folder / name).read_text(encoding="utf-8-sig").rstrip("\n").split("\n") for name in ("videos.txt", "prompts.txt")
            )
            if len(videos) != len(prompts):
                return [], state, f"{folder}: prompts.txt has {len(prompts)} lines, videos.txt {len(videos)}; a caption would be lost"
            pairs = [(video.strip(), prompt.strip()) for video, prompt in zip(videos, prompts, strict=True)]
    except (OSError, ValueError) as error:
        return [], state, f"{folder}: its lists or {STATE} cannot be read ({error}); restore them, or give another folder"
    return pairs, state, None


def write_lists(folder, lists, state):
    """Write both lists and the state. Until all are written the state holds the lists: a kill in between would part captions and clips."""
    write_bytes(folder / STATE, json.dumps(state | {"lists": lists}, ensure_ascii=False).encode())
    for name, column in (("prompts.txt", 1), ("videos.txt", 0)):
        write_bytes(folder / name, "".join(f"{row[column]}\n" for row in lists).encode())
    write_bytes(folder / STATE, json.dumps(state, indent=1, ensure_ascii=False).encode())


def merge(chosen, placeholders, pairs, state):
    """The new lists, with every caption that somebody wrote.

    chosen: lines of videos.txt. placeholders: {line: caption} of all windows. pairs, state: from `read_lists`. Returns ([(line, caption)],
    the new state, sentences on what was done). A window that is left out now keeps its caption in the state; a line that this
    program never wrote stays.
    """
    written = {line: caption for line, caption in pairs if caption and caption != state["placeholders"].get(line)}
    captions = state["captions"] | written
    own = [(line, caption) for line, caption in pairs if line and line not in state["placeholders"] and line not in chosen]
    lists = [(line, captions.get(line, placeholders[line])) for line in chosen] + own
    kept = {line for line, _ in lists}
    aside = {line: caption for line, caption in captions.items() if line not in kept}
    told = [f"{sum(line in captions for line in chosen)} captions kept"] if any(line in captions for line in chosen) else []
    told += [f"{len(own)} lines of videos.txt that you wrote stay"] if own else []
    told += [f"{len(aside)} captions of windows that are left out wait in {STATE}"] if aside else []
    return lists, {"placeholders": state["placeholders"] | placeholders, "captions": aside}, told


# -----------------------------------------------------------------------------
# Windows


def find_windows(film, key, args, folder):
    """(windows with what speaks against them, their thumbnails, shots that are too short, shots) of a film."""
    data = dict(np.load(folder / f"{key}.npz"))
    preview = folder / f"{key}.mp4"
    shots = shots_of(data, cuts_of(data, args.detector, args.cut_threshold), args.margin_seconds)
    windows, short = windows_of(film, shots, args.windows, args.fps, args.frames, args.least, args.facts.latents_per_patch)
    thumbnails = [thumbnails_of(data, window) for window in windows]
    if not windows:
        return windows, thumbnails, short, shots
    height, width = pictures_at(preview, [0.0])[0].shape[:2]
    rules = {"fps": args.fps, "min_motion": args.min_motion, "max_blur": args.max_blur, "min_bright": args.min_bright}
    rules |= {"aspect": width / height, "trained_aspect": args.width / args.height}
    middles = [(start + end) / 2 for start, end in shots if end > start]
    few = [middles[i] for i in np.unique(np.linspace(0, len(middles) - 1, OVERLAY_SHOTS[1]).round().astype(int))]
    overlay = overlay_of(pictures_at(preview, few)) if len(few) >= OVERLAY_SHOTS[0] else None
    for window in windows:
        judge(data, window, rules)
        if overlay and (found := shows_overlay(pictures_at(preview, [(window.start + window.end) / 2])[0], overlay)):
            window.reasons["overlay"] = found
        for reason in args.keep:
            window.reasons.pop(reason, None)
    return windows, thumbnails, short, shots


def clock(seconds):
    """Seconds as m:ss.s."""
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"


def summarise(args, films, shots, windows, trained, short, counts):
    """What was found, as sentences."""
    seconds = args.frames / args.fps
    told = [f"{len(films)} video{'s' * (len(films) != 1)}, {shots} shots, {len(windows)} windows of {args.frames} frames ({seconds:.2f} s)"]
    told[0] += f", {sum(trained)} trained"
    told += [f"{number} left out: {reason}, {REASONS[reason]}" for reason, number in counts.most_common()]
    if short:
        told.append(f"{len(short)} shots are too short")
        half = legal_length(args, args.frames // 2 + 1)
        more = sum((end - start) * args.fps + 1e-3 >= half for _, start, end in short)
        if half < args.least and more:
            told[-1] += f"; --min_num_frames {half} ({half / args.fps:.1f} s) takes {more} of them"
    return told


def write_review(args, windows, lines, trained, captions, short, keys, folder, summary, counts):
    """Write review.html in the data folder, and the strips that it shows."""
    rows = []
    for window, line, is_trained in zip(progress(windows, "writing review.html", unit="window"), lines, trained, strict=True):
        key = keys[window.film]
        strip = f".prepare/strips/{key}-{round(1000 * window.start)}-{round(1000 * window.end)}.jpg"
        write_strip(folder / strip, folder / ".prepare" / f"{key}.mp4", window)
        with Image.open(folder / strip) as picture:
            width, height = picture.size
        row = {"listed": line, "train": is_trained, "reasons": window.reasons, "frames": window.frames, "caption": captions.get(line, "")}
        row |= {"strip": strip, "width": width, "height": height, "preview": f".prepare/{key}.mp4"}
        rows.append(row | {"start": window.start, "end": window.end})
    too_short = [f"{film.name} {clock(start)} to {clock(end)}: {end - start:.2f} s" for film, start, end in short]
    reasons = {reason: (REASONS[reason], number) for reason, number in counts.most_common()}
    page = folder / "review.html"
    write_page(page, f"Windows of {folder.name}", "; ".join(summary), rows, too_short, reasons, review_command(args))


def review_command(args):
    """The command that takes the list that the page saves: this one, with --review."""
    words = list(args.words)
    if "--review" in words:
        del words[words.index("--review") : words.index("--review") + 2]
    return shlex.join(["python", "-m", "tools.prepare", *words, "--review", "review.txt"])


def following_commands(args):
    """(the command that captions the data, the command that trains on it), for the same model, size, length and frame rate."""
    facts, model, data = args.facts, args.pretrained_model_name_or_path, shlex.quote(str(args.output_dir))
    chosen = {"height": args.height, "width": args.width, "max_num_frames": args.frames, "fps": args.fps}

    def beside(*values):
        return "".join(f" --{name} {value:g}" for (name, value), known in zip(chosen.items(), values, strict=True) if value != known)

    of_captions = beside(*facts.sample_size, facts.sample_frames, facts.fps)
    of_script = beside(*((768, 1360, 81, 16) if facts.latents_per_patch > 1 else (480, 720, 49, 8)))  # the scripts give these
    script = "finetune_single_gpu.sh"
    if facts.positions != "sincos":
        release = "1.5_5b" if facts.latents_per_patch > 1 else "_5b"
        script = f"examples/cogvideox{release}{'_i2v' if facts.image_channels else ''}.sh"
    of_model = f" --pretrained_model_name_or_path {shlex.quote(model)}" if model else ""
    at_model = f"MODEL_PATH={shlex.quote(model)} " if model else ""
    return f"python -m tools.caption {data}{of_model}{of_captions}", f"{at_model}DATASET_PATH={data} bash {script}{of_script}"


def main(words=None):
    """The command line."""
    args = parse(words)
    args.words = sys.argv[1:] if words is None else words
    output_dir, folder = args.output_dir, args.output_dir / ".prepare"
    films, problems = list_footage(args.footage, output_dir)
    choices, wrong = read_review(args.review) if args.review else ({}, [])
    if problems + wrong:
        fail(BAD_DATA, problems + wrong)
    pairs, state, problem = read_lists(output_dir)
    if problem := why_foreign(output_dir) or problem:
        fail(BAD_OUTPUT, problem)
    if reason := why_unwritable(output_dir):
        fail(BAD_OUTPUT, f"--output_dir {output_dir}: cannot be written ({reason})")
    try:
        prepare(args, films, choices, pairs, state, output_dir, folder)
    except OSError as error:
        fail(BAD_OUTPUT, f"--output_dir {output_dir}: {error.strerror or error}; what has been read is kept, run the same command again")


def prepare(args, films, choices, pairs, state, output_dir, folder):
    """Everything after the checks."""
    keys = {film: film_key(film, args.fps) for film in films}
    bad = examine_films(films, args.fps, folder, args.clip_timeout_seconds, args.workers or cores())
    for film, reason in bad.items():
        warn(f"{film}: left out: {reason}")
    films = [film for film in films if film not in bad]
    names = name_films(films, output_dir)
    windows, thumbnails, short, shots = [], [], [], 0
    for film in progress(films, "placing windows", unit="file"):
        found, small, too_short, of_film = find_windows(film, keys[film], args, folder)
        windows, thumbnails, shots = windows + found, thumbnails + small, shots + len(of_film)
        short += [(film, start, end) for start, end in too_short]

    def listed(window):
        return listed_window(names[window.film], (window.start, window.end))

    if "duplicate" not in args.keep:
        find_duplicates(windows, thumbnails, args.min_distance, listed)
    lines = [listed(window) for window in windows]
    trained = [choices.get(line, not window.reasons) for line, window in zip(lines, windows, strict=True)]
    placeholders = {line: args.caption or in_words(window.film.stem) for line, window in zip(lines, windows, strict=True)}
    chosen = [line for line, is_trained in zip(lines, trained, strict=True) if is_trained]
    lists, state, told = merge(chosen, placeholders, pairs, state)

    for line in choices.keys() - set(lines):
        warn(f"--review: {line} is no window of this command; give the flags that the page was made with")
    counts = Counter(reason for window in windows for reason in window.reasons)
    summary = summarise(args, films, shots, windows, trained, short, counts)
    write_review(args, windows, lines, trained, dict(lists), short, keys, output_dir, summary, counts)
    if not lists:
        fail(BAD_DATA, f"nothing is left to train on: {'; '.join(summary)}; see {output_dir / 'review.html'}")
    write_lists(output_dir, lists, state)
    say("\n".join(["", *summary, *told]))
    say(f"\nlook at   {output_dir / 'review.html'}")
    captions, train = following_commands(args)
    say(f"captions  {captions}")
    say(f"train     {train}")


if __name__ == "__main__":
    main()
