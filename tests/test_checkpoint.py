"""When a checkpoint is written, what it holds, and what a failure costs. No model folder, no training run."""

import json
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cogvideox import checkpoint
from tests.stand_ins import RESULT, LateNames, OneProcess, flags_of, make_trained, train_one_step

FLAGS = {"training_type": "lora", "seed": 42, "eval_clips": 4}
RUN_FACTS = {"flags": FLAGS, "clips": "hash of the clips", "transformer": "hash of the model", "clips_per_step": 1}


def watcher(output_dir, trained=None, facts=RUN_FACTS, **flags):
    """A checkpointer of a new run, or of one that resumes from `resume_from_checkpoint`. Returns (checkpointer, first step)."""
    output_dir.mkdir(exist_ok=True)
    made = checkpoint.Checkpointer(flags_of(output_dir, **flags), trained or make_trained(), facts, {"rank": "4"})
    return made, made.load()


def changed_kind(**changes):
    """`RESULT` with other functions."""
    return SimpleNamespace(**vars(RESULT) | changes)


@pytest.fixture
def written(monkeypatch):
    """The steps of the checkpoints that are written, in order."""
    steps, write = [], checkpoint.write_checkpoint

    def noted(output_dir, step, *rest):
        steps.append(step)
        return write(output_dir, step, *rest)

    monkeypatch.setattr(checkpoint, "write_checkpoint", noted)
    return steps


def steps_on_disk(output_dir):
    return [step for step, _ in checkpoint.list_checkpoints(output_dir)]


def run(checkpointer, first_step, total_steps, stopped_after=None):
    """The steps of a run as main takes them, as far as checkpoints go. stopped_after: the step in which a signal came."""
    for step in range(first_step + 1, total_steps + 1):
        train_one_step(checkpointer.trained)
        checkpointer.offer(step, last=step == total_steps)
        if step == stopped_after:
            checkpointer.save(step)
            break
    return checkpointer.newest()


@pytest.mark.parametrize(
    ("every", "total", "stopped_after", "steps"),
    [
        (2, 5, None, [2, 4, 5]),  # every N steps, and after the last one
        (2, 4, None, [2, 4]),  # a last step that is due by itself is saved once
        (1, 3, None, [1, 2, 3]),
        (500, 3, None, [3]),
        (500, 5, 3, [3]),  # a stop signal saves
        (2, 5, 2, [2]),  # and saves once where a checkpoint was due
        (2, 4, 4, [2, 4]),  # or was the last
    ],
)
def test_when_a_checkpoint_is_written(every, total, stopped_after, steps, tmp_path, written):
    checkpointer, first_step = watcher(tmp_path, checkpointing_steps=every)
    newest = run(checkpointer, first_step, total, stopped_after)
    assert written == steps == steps_on_disk(tmp_path)
    assert newest == tmp_path / f"checkpoint-{steps[-1]}"
    assert not checkpointer.failed


def test_nothing_is_written_at_step_zero_and_by_other_ranks(tmp_path, written):
    checkpointer, first_step = watcher(tmp_path, checkpointing_steps=1)
    assert first_step == 0
    assert checkpointer.newest() is None
    other, _ = watcher(tmp_path, make_trained(OneProcess(process_index=1)), checkpointing_steps=1)
    assert run(other, 0, 3) is None
    assert written == steps_on_disk(tmp_path) == []


def test_a_resumed_run_counts_from_the_first_step_of_the_run(tmp_path, written):
    checkpointer, _ = watcher(tmp_path, checkpointing_steps=3)
    run(checkpointer, 0, 7, stopped_after=4)
    trained = make_trained()
    checkpointer, first_step = watcher(tmp_path, trained, checkpointing_steps=3, resume_from_checkpoint="latest")
    assert first_step == 4
    run(checkpointer, first_step, 7)
    assert written == [3, 4, 6, 7]
    unbroken = make_trained()
    for _ in range(7):
        train_one_step(unbroken)
    assert torch.equal(trained.transformer.trained, unbroken.transformer.trained)
    train_one_step(unbroken)
    assert not torch.equal(trained.transformer.trained, unbroken.transformer.trained)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"flags": FLAGS | {"seed": 43}}, "--seed was 42 and is 43"),
        ({"flags": FLAGS | {"eval_clips": 2}}, None),  # a resumed run may change it
        ({"clips": "other clips"}, "the clips, captions or their encoding changed\n"),  # the same flags, another file
        (
            {
                "clips": "other clips",
                "flags": FLAGS | {"id_token": "B", "eval_clips": 2},
            },  # of the flags that may change, those of the data
            "the clips, captions or their encoding changed (--id_token was None and is 'B')\n",
        ),
        ({"flags": FLAGS | {"id_token": "B"}}, None),  # the clips tell
        ({"clips_per_step": 2}, "clips per step (batch x processes x accumulation) changed (were 1, are 2)"),
        ({}, None),
    ],
)
def test_a_run_that_would_train_something_else_is_not_resumed(facts, sentence, tmp_path, capsys):
    run(watcher(tmp_path)[0], 0, 2)
    declared = {
        "seed": SimpleNamespace(default=42, free=False, group="training"),
        "eval_clips": SimpleNamespace(default=4, free=True, group="validation"),
        "id_token": SimpleNamespace(default=None, free=True, group="data"),
    }
    if sentence is None:
        assert watcher(tmp_path, facts=RUN_FACTS | facts, resume_from_checkpoint="latest", declared=declared)[1] == 2
        return
    with pytest.raises(SystemExit) as end:
        watcher(tmp_path, facts=RUN_FACTS | facts, resume_from_checkpoint="latest", declared=declared)
    assert end.value.code == 4
    assert sentence in capsys.readouterr().err


def test_what_the_manifests_refuse_is_known_before_anything_is_encoded(tmp_path):
    run(watcher(tmp_path, checkpointing_steps=1)[0], 0, 2)
    declared = {"seed": SimpleNamespace(default=42, free=False, group="training")}
    other = RUN_FACTS | {"flags": FLAGS | {"seed": 43}}

    def foreseen(facts, requested="latest"):
        return checkpoint.foreseen_refusal(flags_of(tmp_path, resume_from_checkpoint=requested, declared=declared), facts)

    assert foreseen(RUN_FACTS) is foreseen(RUN_FACTS, "checkpoint-1") is None
    assert foreseen(other) == f"--resume_from_checkpoint {tmp_path / 'checkpoint-2'}: other training settings: --seed was 42 and is 43"
    assert "checkpoint-1: other training settings" in foreseen(other, "checkpoint-1")
    assert "checkpoint-7: no such folder" in foreseen(RUN_FACTS, "checkpoint-7")
    # An older one may fit where the newest does not, and "latest" takes it if the newest is damaged, which only verifying tells.
    manifest = json.loads((tmp_path / "checkpoint-1/manifest.json").read_text()) | {"flags": FLAGS | {"seed": 43}}
    (tmp_path / "checkpoint-1/manifest.json").write_text(json.dumps(manifest))
    assert foreseen(RUN_FACTS) is foreseen(other) is None
    for damage in ("", "[]", "{}"):
        (tmp_path / "checkpoint-2/manifest.json").write_text(damage)
        assert "checkpoint-1: other training settings: --seed was 43 and is 42" in foreseen(RUN_FACTS)
        assert foreseen(RUN_FACTS, "checkpoint-2") is None


def test_a_resumed_run_that_is_complete_writes_nothing(tmp_path, written):
    run(watcher(tmp_path)[0], 0, 2)
    checkpointer, first_step = watcher(tmp_path, resume_from_checkpoint="latest")
    run(checkpointer, first_step, 2)
    assert written == [2]
    assert checkpointer.newest() is None


def test_a_checkpoint_has_every_file_that_its_manifest_names_and_the_result_lies_beside_it(tmp_path):
    trained = make_trained(ema_decay=0.5)
    checkpointer, _ = watcher(tmp_path, trained)
    newest = run(checkpointer, 0, 2)
    manifest = checkpoint.read_manifest(newest)
    assert manifest["step"] == 2
    assert manifest["clips"] == RUN_FACTS["clips"]
    assert {path.name for path in newest.iterdir()} == {*manifest["files"], "manifest.json"}
    live, shipped = load_file(newest / RESULT.WEIGHTS), load_file(newest / RESULT.RESULT)
    assert torch.equal(live["trained"], trained.transformer.trained)
    assert torch.equal(shipped["trained"], trained.average.shadow_params[0])
    assert not torch.equal(live["trained"], shipped["trained"])
    assert (tmp_path / RESULT.RESULT).read_bytes() == (newest / RESULT.RESULT).read_bytes()
    assert not list(tmp_path.glob("**/*.partial"))


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (2, [3, 4]), (1, [4])])
def test_only_the_newest_are_kept(limit, kept, tmp_path):
    checkpointer, _ = watcher(tmp_path, checkpointing_steps=1, checkpoints_total_limit=limit)
    run(checkpointer, 0, 4)
    assert steps_on_disk(tmp_path) == kept


def test_a_full_disk_costs_one_checkpoint_and_not_the_run_nor_an_older_one(tmp_path, monkeypatch, capsys):
    checkpointer, _ = watcher(tmp_path, checkpointing_steps=1, checkpoints_total_limit=1)
    train_one_step(checkpointer.trained)
    checkpointer.offer(1)
    assert not checkpointer.failed
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(0))
        checkpointer.offer(2)
        assert checkpointer.newest() == tmp_path / "checkpoint-1"
    assert checkpointer.failed
    assert steps_on_disk(tmp_path) == [1]
    assert "a checkpoint was not written" in (told := capsys.readouterr().err)
    assert "kept: checkpoint-1" in told
    checkpointer.offer(3, last=True)  # there is room again
    assert not checkpointer.failed
    assert steps_on_disk(tmp_path) == [3]


def test_the_first_checkpoint_alone_is_loaded_again_with_the_weights_that_were_shipped(tmp_path):
    seen = []

    def check_export(folder, model):
        seen.append((folder.name, model.trained.detach().clone(), trained.average.shadow_params[0].clone()))
        return 0.0, 1.0

    trained = make_trained(ema_decay=0.5, kind=changed_kind(check_export=check_export))
    checkpointer, _ = watcher(tmp_path, trained, checkpointing_steps=2)
    run(checkpointer, 0, 6)
    ((folder, loaded, averaged),) = seen
    assert folder == "checkpoint-2"
    assert torch.equal(loaded, averaged)
    assert not torch.equal(trained.transformer.trained, averaged)


@pytest.mark.parametrize(
    ("outcome", "word"), [((1e-7, 0.5), "PASS"), ((0.1, 0.5), "FAIL"), ((0.0, 0.0), "inconclusive"), (None, "could not be checked")]
)
def test_what_the_check_of_the_first_checkpoint_finds_is_told_and_ends_nothing(outcome, word, tmp_path, capsys):
    def check_export(folder, model):
        if outcome is None:
            raise RuntimeError("a loader that fails")
        return outcome

    checkpointer, _ = watcher(tmp_path, make_trained(kind=changed_kind(check_export=check_export)), checkpointing_steps=1)
    run(checkpointer, 0, 2)
    assert capsys.readouterr().err.count(word) == 1
    assert steps_on_disk(tmp_path) == [1, 2]


def test_the_best_weights_are_the_averaged_ones_and_training_goes_on_from_the_live_ones(tmp_path):
    trained = make_trained(ema_decay=0.5)
    checkpointer, _ = watcher(tmp_path, trained)
    for _ in range(3):
        train_one_step(trained)
    live = trained.transformer.trained.detach().clone()
    checkpointer.save_best(3)
    assert torch.equal(trained.transformer.trained, live)
    best = load_file(tmp_path / "best" / RESULT.RESULT)["trained"]
    assert torch.equal(best, trained.average.shadow_params[0])
    assert not torch.equal(best, live)


@pytest.mark.parametrize("problem", [OSError("no space left"), ValueError("1 LoRA weights are not finite")])
def test_best_weights_that_cannot_be_written_are_told_and_end_nothing(problem, tmp_path, capsys):
    def write(folder, exported, facts):
        raise problem

    checkpointer, _ = watcher(tmp_path, make_trained(kind=changed_kind(write=write)))
    checkpointer.save_best(3)
    assert f"best/ was not written at step 3 ({problem})" in capsys.readouterr().err


def test_an_average_stands_in_for_the_block_only_and_is_not_nested():
    trained = make_trained(ema_decay=0.5)
    for _ in range(2):
        train_one_step(trained)
    live = trained.transformer.trained.detach().clone()

    def fails_inside():
        with trained.averaged():
            assert torch.equal(trained.transformer.trained, trained.average.shadow_params[0])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails_inside()
    assert torch.equal(trained.transformer.trained, live)
    with trained.averaged(), pytest.raises(AssertionError):
        trained.averaged().__enter__()
    assert torch.equal(trained.transformer.trained, live)


def test_a_checkpoint_whose_files_this_machine_does_not_see_yet_is_waited_for(tmp_path, monkeypatch):
    made, _ = watcher(tmp_path)
    train_one_step(made.trained)
    made.save(1)
    path = made.newest()
    (path / "state.json").rename(tmp_path / "late")
    client = LateNames(monkeypatch, 30, lambda: (tmp_path / "late").rename(path / "state.json"))
    trained = make_trained()
    checkpoint.load_checkpoint(path, trained)
    assert client.now == 30
    assert torch.equal(trained.transformer.trained, made.trained.transformer.trained)
    (path / "state.json").unlink()
    with pytest.raises(checkpoint.BadCheckpoint, match=r"state\.json: process 0 on .* does not see it"):
        checkpoint.load_checkpoint(path, trained)
    assert client.now == 120
