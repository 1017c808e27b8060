"""Which files of --output_dir a run wrote: only those are replaced or removed.

Each process names a file in `.files_of_runs.jsonl`, in the folder, before it writes it. Checkpoints are known by their names
and need no list. Folders of versions without a list are recognised by their JSON files, and their files by their names.
"""

import contextlib
import hashlib
import json
import re
from pathlib import Path

from cogvideox.files import FILE_LIST, LORA_FILE, lists_of_ranks, note_file, read_json, read_json_lines, write_bytes

CARD, OTHER_CARD = "README.md", "model_card.md"
# Files of a checkpoint: a LoRA's, those of all weights, and both kinds'.
SFT_FILES = ("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors")
CHECKPOINT_FILES = (
    LORA_FILE,
    "adapter.safetensors",
    *SFT_FILES,
    "weights.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
CHECKPOINT = re.compile(r"checkpoint-\d+(\.partial|(\.abandoned)*)")
RESULT = "|".join(re.escape(name) for name in (LORA_FILE, *SFT_FILES))
# All that a run replaces, below its folder; trackers add files and replace none.
REPLACED = re.compile(
    rf"(best/)?({RESULT})|report\.html|run\.json|metrics\.jsonl|loss\.png|status\.json|dataset\.json|dataset_report\.txt"
    rf"|{re.escape(OTHER_CARD)}|encoded/(\d\d\.mp4|contact_sheet\.png)"
    r"|validation/step-\d{6}/((without_trigger/)?\d+-.*-seed\d+\.mp4|contact_sheet\.png|image-\d+\.png|videos\.json)"
)
FOLDERS = ("best", "encoded", "transformer", "validation")
TRACKED = r"(.+/)?(events\.out\.tfevents\..+|hparams\.yml)"  # tensorboard's, below --logging_dir
WRITTEN_BY_RUNS = {"run.json": "facts", "dataset.json": "layout", "status.json": "reason"}  # and a value that each of them has


def listed(folder):
    """The files that runs have named in a folder: relative name -> the content's SHA-256 when it was last written, or None."""
    found = {}
    for entry in (entry for path in lists_of_ranks(folder) for entry in read_json_lines(path)):
        with contextlib.suppress(TypeError, KeyError):
            if not Path(entry["file"]).is_absolute() and ".." not in Path(entry["file"]).parts:
                found[entry["file"]] = entry.get("sha256")
    return found


def present(folder, pattern, through_links=False):
    """The relative names of the files below a folder that match a pattern. Looks only where runs write.

    through_links: also in linked folders, where a run replaces files too but never removes any.
    """
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_file() or path.is_symlink()]
    for part in FOLDERS:
        if (folder / part).is_dir() and (through_links or not (folder / part).is_symlink()):
            names += [path.relative_to(folder).as_posix() for path in (folder / part).rglob("*") if path.is_file()]
    return sorted(name for name in names if pattern.fullmatch(name))


def holds_files_of_runs(folder):
    """Whether a run, of this or an earlier version, has written into a folder."""
    folder = Path(folder)
    if (folder / FILE_LIST).exists() or any(folder.glob("checkpoint-*/manifest.json")):
        return True
    for name, key in WRITTEN_BY_RUNS.items():
        with contextlib.suppress(OSError, ValueError, TypeError):
            if key in read_json(folder / name):
                return True
    return False


def adopt_earlier_version(folder, logging_dir):
    """List the files of a run of a version that had no list. Call it after `list_files_in`."""
    folder = Path(folder)
    names = present(folder, REPLACED)
    names += [path.relative_to(folder).as_posix() for path in (folder / logging_dir).rglob("*") if re.fullmatch(TRACKED, path.name)]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        card = (folder / CARD).read_text(encoding="utf-8")
        if re.search(r"\n# .*\n\n(A LoRA for|The fully fine-tuned transformer of) `.*`, trained for \d+ optimizer steps of ", card):
            names.append(CARD)
    for name in names:
        note_file(folder / name)


def in_the_way(folder, training_type):
    """The files that a run would replace and that no run wrote, by relative name. Empty files hold nothing to lose."""
    known, folder = listed(folder), Path(folder)
    names = present(folder, REPLACED, through_links=True)
    names = [name for name in names if name not in known and (folder / name).lstat().st_size]
    return [name for name in names if training_type == "sft" or name not in SFT_FILES]


def card_name(folder):
    """The name of the model card: README.md, or model_card.md beside one that no run wrote or that was changed since."""
    path, own = Path(folder) / CARD, listed(folder)
    if not path.is_file():
        return CARD
    unchanged = CARD in own and own[CARD] in (None, hashlib.sha256(path.read_bytes()).hexdigest())
    return CARD if unchanged else OTHER_CARD


def remove_files_of_runs(folder, parts=None, keep=()):
    """Delete the listed files of a folder (or only those below `parts` of it) and the folders that this empties, and nothing else.

    keep: relative names. A model card that was changed since stays; a link is removed, and what it leads to stays.
    """
    folder = Path(folder)
    card = card_name(folder)
    for name in listed(folder):
        path, parents = folder / name, [folder / parent for parent in Path(name).parents][:-1]
        inside = parts is None or Path(name).parts[0] in parts
        if not inside or name in keep or (name == CARD != card) or any(parent.is_symlink() for parent in parents):
            continue
        with contextlib.suppress(OSError):  # FileNotFoundError, or a folder that this user may not write
            path.unlink()
        remove_empty(parents)


def remove_empty(folders):
    """Remove those of the folders that are empty, in this order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def remove_checkpoint(folder):
    """Delete the files that a run writes into a checkpoint. The folder stays if it holds others, and what a link leads to."""
    folder = Path(folder)
    if folder.is_symlink():
        folder.unlink()
        return
    for name in CHECKPOINT_FILES:
        if not (folder / name).parent.is_symlink():
            with contextlib.suppress(OSError):
                (folder / name).unlink()
    remove_empty([folder / "transformer", folder])


def forget_missing_files(folder):
    """Drop the names of files that are gone from the list: what will have such a name may be somebody else's."""
    folder, own = Path(folder), listed(folder)
    there = {name: digest for name, digest in own.items() if (folder / name).exists()}
    if len(there) < len(own):
        entries = [{"file": name} | ({"sha256": digest} if digest else {}) for name, digest in there.items()]
        write_bytes(folder / FILE_LIST, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
        for path in lists_of_ranks(folder):
            if path.name != FILE_LIST:
                path.unlink()
