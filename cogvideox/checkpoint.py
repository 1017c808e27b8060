"""Checkpoints: atomic, verified when they are read, without pickle.

`checkpoint-N/` holds `pytorch_lora_weights.safetensors` (ready to use), `adapter.safetensors` (the weights as trained),
`optimizer.safetensors` + `state.json` (optimizer, schedule, scaler, average) and `manifest.json`, written last, with the
hash of each file. Full fine-tuning has `transformer/` and `weights.safetensors` in place of the first two. Tensors are full
(not sharded), so engine and number of ranks may change. There is no random state to save (see order.py).
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file

from cogvideox import engine, lora, report, sft
from cogvideox.console import BAD_OUTPUT, fail, say, timed, warn
from cogvideox.files import at_home, file_sha256, read_json, still_missing, write_durably, write_tensors
from cogvideox.flags import public_flags
from cogvideox.launch import problem_of_any_rank
from cogvideox.owned import CHECKPOINT, remove_checkpoint

FORMAT = 1
RESULTS = {"lora": lora, "sft": sft}  # --training_type: the module that builds the trained model and exports it


class BadCheckpoint(ValueError):
    """A folder that cannot be resumed from; the message says why."""


# -----------------------------------------------------------------------------
# Writing


def pack(value, tensors, name=""):
    """A nested state as JSON-ready values; its tensors go into `tensors`, named by their path."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, pack(item, tensors, f"{name}/{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [pack(item, tensors, f"{name}/{number}") for number, item in enumerate(value)]}
    return {"value": value.item() if hasattr(value, "item") else value}


def unpack(packed, tensors):
    """The inverse of `pack`."""
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "dict" in packed:
        return {key: unpack(item, tensors) for key, item in packed["dict"]}
    if "list" in packed:
        return [unpack(item, tensors) for item in packed["list"]]
    return packed["value"]


def take_snapshot(trained):
    """Copies in host memory of everything in a checkpoint, so that training continues while they are written. A collective.

    With an average, the averaged weights are exported. Returns None on all ranks but rank 0.
    """
    live, average, scaler = trained.state(), trained.average, trained.accelerator.scaler
    with trained.averaged():
        to_export = trained.state() if average else live
    states = engine.optimizer_state(trained.optimizer, trained.parameters, keep=trained.is_main)
    shadows = [engine.whole(shadow) for shadow in average.shadow_params] if average else []
    if not trained.is_main:
        return None
    tensors = {}
    state = {
        "optimizer": pack(states, tensors, "optimizer"),
        "schedule": pack({**trained.schedule.state_dict(), "lr_lambdas": [None]}, tensors, "schedule"),
        "scaler": pack(scaler.state_dict() if scaler else {}, tensors, "scaler"),
        "average": pack({"steps": average.optimization_step, "weights": shadows} if average else {}, tensors, "average"),
    }
    exported = trained.export(trained.transformer, to_export)
    return {"exported": exported, "live": live, "optimizer": tensors, "state": state, "result": trained.kind}


def write_checkpoint(output_dir, step, snapshot, facts, result_facts):
    """Write `checkpoint-{step}` from a snapshot; returns its path.

    Raises OSError (such as a full disk) or ValueError (non-finite weights); the partial folder is then removed, and older
    checkpoints stay.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.numel() * tensor.element_size() for part in TENSOR_FILES for tensor in snapshot[part].values())
    free = shutil.disk_usage(output_dir).free
    if needed * 1.05 > free:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB free")
    partial.mkdir(parents=True)
    try:
        snapshot["result"].write(partial, snapshot["exported"], result_facts)
        write_tensors(partial / snapshot["result"].WEIGHTS, snapshot["live"])
        write_tensors(partial / "optimizer.safetensors", snapshot["optimizer"])
        write_durably(partial / "state.json", json.dumps(snapshot["state"]).encode())
        written = sorted(path for path in partial.rglob("*") if path.is_file())
        files = {p.relative_to(partial).as_posix(): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in written}
        manifest = {"format": FORMAT, "step": step, "versions": report.versions(), **facts, "files": files}
        write_durably(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        if final.is_file():
            final.unlink()
        remove_checkpoint(final)
        for path in [path for path in final.rglob("*") if path.is_symlink() or path.is_file()]:  # what no run wrote
            moved = partial / path.relative_to(final)
            if not moved.exists():  # a link in the place of a folder
                moved.parent.mkdir(parents=True, exist_ok=True)
                path.rename(moved)
        shutil.rmtree(final, ignore_errors=True)  # only empty folders are left
        os.replace(partial, final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


TENSOR_FILES = ("exported", "live", "optimizer")


class Saver:
    """Writes checkpoints in a thread, one at a time, on the rank that writes; a no-op on the others.

    A failed write is a warning: the run continues and older checkpoints stay.
    """

    def __init__(self, output_dir, limit, enabled):
        self.output_dir, self.limit, self.enabled = Path(output_dir), limit, enabled
        self.thread, self.pending, self.newest, self.failed = ThreadPoolExecutor(1), None, None, False
        if enabled:
            for leftover in self.output_dir.glob("checkpoint-*.partial"):
                if not CHECKPOINT.fullmatch(leftover.name):
                    continue
                say(f"removed {leftover.name}, left incomplete by a killed run")
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step, snapshot, facts, result_facts):
        """Queue a checkpoint to be written while training continues. snapshot: from `take_snapshot`."""
        if self.enabled:
            self.pending = self.thread.submit(self.write, step, snapshot, facts, result_facts)

    def write(self, step, snapshot, facts, result_facts):
        """In the thread: write the checkpoint, publish its result, then prune old checkpoints."""
        with timed(f"write checkpoint-{step}"):
            path = write_checkpoint(self.output_dir, step, snapshot, facts, result_facts)
        snapshot["result"].publish(path, self.output_dir)
        prune_checkpoints(self.output_dir, self.limit)
        return path

    def join(self):
        """Wait until the last checkpoint is on disk. Returns the path of the newest."""
        pending, self.pending = self.pending, None
        if pending is not None:
            try:
                self.newest, self.failed = pending.result(), False
            except (OSError, ValueError) as error:
                self.failed = True
                names = [path.name for _, path in list_checkpoints(self.output_dir)]
                warn(f"a checkpoint was not written ({error}); kept: {', '.join(names) or 'none'}")
        return self.newest


def sync_folder(folder):
    """Flush a rename in `folder` to disk, if the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def report_export(result, folder, transformer):
    """Load a checkpoint's result with the stock loader and compare it with the live weights. result: one of RESULTS."""
    try:
        error, effect = result.check_export(folder, transformer)
    except Exception as problem:  # a failed check must not end the run
        warn(f"{result.RESULT} could not be checked with {result.LOADER}: {type(problem).__name__}: {problem}")
        return
    word = "PASS" if error <= result.export_tolerance(transformer) else "FAIL"
    if effect == 0:
        word = "inconclusive (no effect on the output yet)"
    say(
        f"{result.RESULT} loaded by {result.LOADER}: {word} "
        f"(relative error against the live weights: {error:.1e}; {result.EFFECT}: {effect:.1e})"
    )


def set_aside_newer(output_dir, step):
    """Rename checkpoints of later steps than the resumed one: they are damaged, or of an abandoned branch.

    Otherwise the next "latest" would resume from them, and pruning would keep them instead of new ones. Returns them.
    """
    moved = []
    for number, path in list_checkpoints(output_dir):
        if number > step:
            aside = path.with_name(path.name + ".abandoned")
            remove_checkpoint(aside)
            while aside.exists():  # it holds what no run wrote
                aside = aside.with_name(aside.name + ".abandoned")
            moved.append(path.rename(aside))
    return moved


def prune_checkpoints(output_dir, limit):
    """Remove the oldest complete checkpoints beyond `limit` (None: keep all). Returns them."""
    complete = [path for _, path in list_checkpoints(output_dir) if (path / "manifest.json").is_file()]
    old = complete[:-limit] if limit else []
    for path in old:
        remove_checkpoint(path)
    return old


# -----------------------------------------------------------------------------
# Reading


def list_checkpoints(output_dir):
    """(step, path) of the checkpoint folders below `output_dir`, oldest first; other names are ignored."""
    output_dir = Path(output_dir)
    entries = output_dir.iterdir() if output_dir.is_dir() else []
    checkpoints = [(int(m[1]), p) for p in entries if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)) and p.is_dir()]
    return sorted(checkpoints)


def read_manifest(path):
    """The manifest of a checkpoint, after verifying every file against it. Raises BadCheckpoint."""
    path = Path(path)
    try:
        manifest = read_json(path / "manifest.json")
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise BadCheckpoint(f"{path}: has format {manifest['format']}, but this script reads format {FORMAT}")
        for part in ("step", "flags", "clips", "transformer", "clips_per_step"):
            if part not in manifest:
                raise BadCheckpoint(f"{path}: its manifest lacks {part}")
        result = RESULTS[manifest["flags"].get("training_type", "lora")]
        for name in ("optimizer.safetensors", "state.json", result.WEIGHTS, *result.FILES):
            if name not in files:
                raise BadCheckpoint(f"{path}: its manifest lacks {name}")
        for name, entry in files.items():
            file = path / name
            if Path(name).is_absolute() or ".." in Path(name).parts or file.is_symlink():
                raise BadCheckpoint(f"{path}: its manifest names {name}, which is not a plain file in it")
            if not file.is_file():
                raise BadCheckpoint(f"{path}: lacks {name}")
            if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                raise BadCheckpoint(f"{path}: {name} does not match the manifest (truncated or changed)")
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: not a complete checkpoint (no manifest.json)") from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadCheckpoint):
            raise
        raise BadCheckpoint(f"{path}: its manifest cannot be read ({type(error).__name__}: {error})") from None
    return manifest


def find_checkpoint(requested, output_dir):
    """The folder that --resume_from_checkpoint names, as it is or in `output_dir`. Raises BadCheckpoint if there is none."""
    path = Path(at_home(requested))
    if not path.is_dir() and (Path(output_dir) / requested).is_dir():
        path = Path(output_dir) / requested
    if not path.is_dir():
        existing = ", ".join(p.name for _, p in list_checkpoints(output_dir)) or "none"
        raise BadCheckpoint(f"--resume_from_checkpoint {requested}: no such folder ({output_dir} has: {existing})")
    return path


def choose_checkpoint(requested, output_dir):
    """The checkpoint to resume from. Returns (path, manifest, remarks); path is None where "latest" finds nothing.

    "latest" takes the newest valid one and remarks on those that it skipped; a given path must be valid. Raises BadCheckpoint.
    """
    if requested != "latest":
        path = find_checkpoint(requested, output_dir)
        return path, read_manifest(path), []
    remarks = []
    for _, path in reversed(list_checkpoints(output_dir)):
        try:
            return path, read_manifest(path), remarks
        except BadCheckpoint as error:
            remarks.append(f"skipped {error}")
    if remarks:
        raise BadCheckpoint(f"--resume_from_checkpoint latest: no checkpoint in {output_dir} is valid: {'; '.join(remarks)}")
    return None, None, [f"no checkpoint in {output_dir}: starting at step 0"]


def changed_settings(stored, current, declared):
    """Settings that differ from the checkpoint's and change the training, as sentences.

    declared: the flags by name, see `flags.flag_group`; a flag that the checkpoint lacks had its default.
    """
    changes, of_data = [], []
    for name, action in declared.items():
        before, now = stored["flags"].get(name, action.default), current["flags"].get(name)
        if before != now and not action.free:
            changes.append(f"--{name} was {before!r} and is {now!r}")
        elif before != now and action.group == "data":  # some of them change the clips: named if those changed
            of_data.append(f"--{name} was {before!r} and is {now!r}")
    labels = {
        "clips": "the clips, captions or their encoding",
        "transformer": "the base model's transformer",
        "clips_per_step": "clips per step (batch x processes x accumulation)",
    }
    for name, label in labels.items():
        if stored[name] != current[name]:
            values = f" (were {stored[name]}, are {current[name]})" if name == "clips_per_step" else ""
            values = f" ({'; '.join(of_data)})" if name == "clips" and of_data else values
            changes.append(f"{label} changed{values}")
    return changes


def refusal(path, changes):
    """The sentence about a checkpoint of other settings, or None. changes: from `changed_settings`."""
    return f"--resume_from_checkpoint {path}: other training settings: {'; '.join(changes)}" if changes else None


def facts_of_run(args, clips_per_step, identities):
    """What a manifest has of the run, and `changed_settings` compares. identities: from `encodings.encode_data`."""
    return {"flags": public_flags(args), "clips_per_step": clips_per_step, **identities}


def refuse_missing(args, accelerator, problems):
    """End the run, with `problems`, before a clip is decoded if the checkpoint to resume from is not there. A collective."""
    problem = None
    if accelerator.is_main_process and args.resume_from_checkpoint not in (None, "latest"):
        try:
            find_checkpoint(args.resume_from_checkpoint, args.output_dir)
        except BadCheckpoint as error:
            problem = str(error)
    if problem := problem_of_any_rank(problem):
        fail(BAD_OUTPUT, [problem, *problems])


def refuse_ahead(args, accelerator, clips_per_step, identities):
    """End the run before anything is encoded if `resume` would refuse it for what the manifests say, unverified. A collective."""
    if not args.resume_from_checkpoint:
        return
    problem = None
    if accelerator.is_main_process:
        problem = foreseen_refusal(args, facts_of_run(args, clips_per_step, identities))
    if problem := problem_of_any_rank(problem):
        fail(BAD_OUTPUT, problem)


def foreseen_refusal(args, facts):
    """The sentence with which `resume` will end the run, or None if a checkpoint fits, or only verifying can tell."""
    requested, problem = args.resume_from_checkpoint, None
    try:
        newest_first = [path for _, path in reversed(list_checkpoints(args.output_dir))]
        paths = newest_first if requested == "latest" else [find_checkpoint(requested, args.output_dir)]
    except BadCheckpoint as error:
        return str(error)
    for path in paths:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: "latest" skips it
            found = refusal(path, changed_settings(read_json(path / "manifest.json"), facts, args.declared))
            if not found:
                return None
            problem = problem or found
    return problem


def load_checkpoint(path, trained):
    """Restore a verified checkpoint's weights and states. Raises BadCheckpoint if they do not fit. A collective."""
    path, average, scaler = Path(path), trained.average, trained.accelerator.scaler
    if lacking := still_missing([path / name for name in (trained.kind.WEIGHTS, "optimizer.safetensors", "state.json")]):
        raise BadCheckpoint(f"{lacking[0]}: process {trained.accelerator.process_index} on {platform.node()} does not see it")
    try:
        trained.kind.load_live(trained.transformer, load_file(path / trained.kind.WEIGHTS))
        tensors = load_file(path / "optimizer.safetensors")
        state = read_json(path / "state.json")
        engine.load_optimizer_state(trained.optimizer, trained.parameters, unpack(state["optimizer"], tensors))
        trained.schedule.load_state_dict(unpack(state["schedule"], tensors))
        if scaler and (scaler_state := unpack(state["scaler"], tensors)):
            scaler.load_state_dict(scaler_state)
        if average:
            stored = unpack(state["average"], tensors)
            average.optimization_step = stored["steps"]
            for shadow, value in zip(average.shadow_params, stored["weights"], strict=True):
                engine.write_weight(shadow, value)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BadCheckpoint(f"{path}: does not fit this run: {error}") from None


def resume(args, trained, facts):
    """Resume from --resume_from_checkpoint, on every rank. Returns the number of steps already trained.

    Ends the run with a sentence if the checkpoint is invalid, or was written with other training settings.
    """
    if not args.resume_from_checkpoint:
        return 0
    choice = [None]
    if trained.is_main:
        try:
            path, manifest, remarks = choose_checkpoint(args.resume_from_checkpoint, args.output_dir)
            changes = changed_settings(manifest, facts, args.declared) if path else []
            choice = [(path, manifest and manifest["step"], remarks, refusal(path, changes))]
        except BadCheckpoint as error:
            choice = [(None, None, [], str(error))]
    path, step, remarks, problem = broadcast_object_list(choice)[0]
    for remark in remarks:
        say(f"resume: {remark}")
    if problem:
        fail(BAD_OUTPUT, problem)
    if path is None:
        return 0
    problem = None
    try:
        load_checkpoint(path, trained)
    except BadCheckpoint as error:
        problem = str(error)
    if problem := problem_of_any_rank(problem):
        fail(BAD_OUTPUT, problem)
    say(f"resuming from {path}, step {step}")
    if trained.is_main:
        for aside in set_aside_newer(args.output_dir, step):
            say(f"resume: renamed a checkpoint of a later step to {aside.name}")
    trained.accelerator.wait_for_everyone()
    return step


# -----------------------------------------------------------------------------
# In the loop


class Checkpointer:
    """Writes a checkpoint every --checkpointing_steps optimizer steps and after the last one; every rank calls every method.

    run_facts: the manifest's facts about the run. result_facts: the metadata of the exported file.
    """

    def __init__(self, args, trained, run_facts, result_facts):
        self.args, self.trained, self.run_facts, self.result_facts = args, trained, run_facts, result_facts
        self.output_dir, self.saver, self.saved_step = Path(args.output_dir), None, None

    def load(self):
        """Resume from --resume_from_checkpoint. Returns the number of steps already trained, 0 for a new run."""
        first_step = resume(self.args, self.trained, self.run_facts)
        self.saver = Saver(self.output_dir, self.args.checkpoints_total_limit, enabled=self.trained.is_main)
        return first_step

    def is_due(self, step, last=False):
        """Whether a checkpoint is written after this step."""
        return last or step % self.args.checkpointing_steps == 0

    def offer(self, step, last=False):
        """Save if due. Waits for the last checkpoint, so that it is on disk before the final scores and videos."""
        if self.is_due(step, last):
            self.save(step)
        if last:
            self.saver.join()

    def save(self, step):
        """Write a checkpoint while training continues; waits for the first one and compares it with the live model."""
        if self.saved_step == step:
            return
        trained, self.saved_step = self.trained, step
        first = self.saver.join() is None  # one snapshot in memory at a time
        self.saver.save(step, take_snapshot(trained), self.run_facts, self.result_facts | {"step": str(step)})
        if broadcast_object_list([first])[0]:
            with trained.averaged(), trained.full_model() as full_model:
                if trained.is_main and self.saver.join():
                    report_export(trained.kind, self.saver.newest, full_model)
        trained.barrier()

    def save_best(self, step):
        """Export the current weights to best/, ready to use."""
        trained = self.trained
        with trained.averaged():
            state = trained.state()
        try:
            if trained.is_main:
                exported = trained.export(trained.transformer, state)
                trained.kind.write(self.output_dir / "best", exported, self.result_facts | {"step": str(step)})
        except (OSError, ValueError) as error:
            warn(f"best/ was not written at step {step} ({error})")

    def newest(self):
        """Wait for the last checkpoint. Returns the path of the newest that this run wrote, or None."""
        return self.saver.join()

    @property
    def failed(self):
        """Whether writing the last checkpoint failed."""
        return self.saver.failed
