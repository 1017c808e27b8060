"""Is it learning? Held-out clips, scores that only learning moves, the best LoRA, and the verdict."""

import contextlib
import json
import os
import shutil
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import CogVideoXDDIMScheduler
from safetensors.torch import load_file

import train_cogvideox_lora as script
from cogvideox import launch, order, scoring, validation
from cogvideox.files import read_json_lines
from dataset import list_clips, list_eval_clips, list_prior_clips
from tests.conftest import lora_of, same, words
from tests.stand_ins import UNSCALED, Noise, OneProcess, TwoWeights, clips_of, flags_of, make_trained, plan_of, train_one_step

KEYS = {"step", "eval_train_loss", "eval_held_out_loss", "eval_train_base_loss", "eval_held_out_base_loss", "eval_caption_gap"}
KEYS |= {"eval_caption_base_gap", "eval_bands", "eval_clips", "update_share", "best_step"}


@pytest.fixture(autouse=True)
def uncollected(request, monkeypatch):
    """Give no memory back after a score: a collection takes a third of a second in a process of tests."""
    if "plain_run" not in request.fixturenames:  # it trains with unchanged code only
        monkeypatch.setattr(launch, "free_memory", lambda: None)


def scores_of(folder):
    return scoring.evaluations(read_json_lines(folder / "metrics.jsonl"))


def losses_of(folder):
    return [line["loss"] for line in read_json_lines(folder / "metrics.jsonl") if "loss" in line]


def test_a_score_has_both_sets_with_the_lora_on_and_off(train):
    folder = train(eval_share=0.34, eval_clips=2, max_train_steps=4, eval_steps=2, rank=16)
    lines = scores_of(folder)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(set(line) == KEYS for line in lines)
    first, last = lines[0], lines[-1]
    for name in ("train", "held_out"):
        assert first[f"eval_{name}_loss"] == first[f"eval_{name}_base_loss"] == last[f"eval_{name}_base_loss"]
        assert last[f"eval_{name}_loss"] != first[f"eval_{name}_loss"]
        bands = [band[name] for band in last["eval_bands"]]
        assert sum(bands) / 4 == pytest.approx(last[f"eval_{name}_loss"])
        assert len(set(bands)) == 4
    assert first["eval_train_loss"] != first["eval_held_out_loss"]
    assert last["eval_caption_gap"] is None  # two clips say nothing
    assert [band["timestep"] for band in first["eval_bands"]] == [125, 375, 625, 875]
    assert first["update_share"] == 0 < last["update_share"] < 1


def test_the_base_is_the_model_with_the_lora_off_whatever_the_run_starts_from(train):
    trained = train(max_train_steps=3, rank=16)
    plain = train(max_train_steps=1, eval_clips=2)
    from_trained = train(max_train_steps=1, eval_clips=2, init_lora=trained, rank=16)
    first = scores_of(from_trained)[0]
    assert first["eval_train_base_loss"] == scores_of(plain)[0]["eval_train_base_loss"]
    assert first["eval_train_loss"] != first["eval_train_base_loss"]
    assert first["update_share"] > 0


@pytest.mark.slow
def test_scoring_disturbs_nothing(train, plain_run):
    watched = train(max_train_steps=4, eval_clips=2, eval_steps=1, lora_dropout=0.3)
    alone = plain_run(max_train_steps=4, lora_dropout=0.3)  # without scores, as all runs here
    other = plain_run(max_train_steps=4, lora_dropout=0.3, seed=1)
    assert losses_of(watched) == losses_of(alone) != losses_of(other)
    assert same(lora_of(watched), lora_of(alone))
    assert len(scores_of(watched)) == 5
    assert not scores_of(alone)


def test_held_out_clips_are_never_trained_on(train, monkeypatch):
    drawn = []
    plain = script.TrainingClips.item
    monkeypatch.setattr(script.TrainingClips, "item", lambda self, clip, position: drawn.append(clip) or plain(self, clip, position))
    train(eval_share=0.34, eval_clips=0, max_train_steps=12)
    assert set(drawn) == set(range(6)) - set(order.choose_held_out(6, 0.34, 42))
    drawn.clear()
    train(eval_clips=0, max_train_steps=12)
    assert set(drawn) == set(range(6))


def test_which_clips_are_held_out_depends_on_the_seed_and_the_share():
    assert order.choose_held_out(20, 0.0, 1) == []
    assert len(order.choose_held_out(20, 0.25, 1)) == 5
    assert len(order.choose_held_out(20, 0.001, 1)) == 1
    assert order.choose_held_out(20, 0.25, 1) == order.choose_held_out(20, 0.25, 1) != order.choose_held_out(20, 0.25, 2)


@pytest.mark.slow
def test_a_second_folder_is_held_out_whole(train, clips, tmp_path, capsys):
    second = shutil.copytree(clips, tmp_path / "second")
    for name in ("prompts.txt", "videos.txt"):
        lines = (clips / name).read_text().splitlines()
        (clips / name).write_text("\n".join(lines[:4]) + "\n")
        (second / name).write_text("\n".join(lines[4:]) + "\n")
    folder = train(data=clips, eval_data_root=second, eval_clips=4, max_train_steps=1)
    assert "2 clips are held out" in (folder / "dataset_report.txt").read_text()
    assert "\n4 clips; 1 per batch" in capsys.readouterr().err
    alone = train(data=clips, max_train_steps=1, eval_clips=4)
    assert scores_of(folder)[0]["eval_train_loss"] == scores_of(alone)[0]["eval_train_loss"]
    assert scores_of(folder)[0]["eval_held_out_loss"] is not None
    assert scores_of(alone)[0]["eval_held_out_loss"] is None
    # Another set to look at does not make it another run; other clips to train on do.
    train(data=clips, output=folder, max_train_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(SystemExit) as stop:
        train(data=clips, output=folder, max_train_steps=3, resume_from_checkpoint="latest", eval_share=0.25)
    assert stop.value.code == 4


@pytest.fixture
def four_and_two(clips, tmp_path):
    """(a folder of four of the clips, one of the other two)."""
    prior = shutil.copytree(clips, tmp_path / "prior")
    for name in ("prompts.txt", "videos.txt"):
        lines = (clips / name).read_text().splitlines()
        (clips / name).write_text("\n".join(lines[:4]) + "\n")
        (prior / name).write_text("\n".join(lines[4:]) + "\n")
    return clips, prior


def test_captions_of_the_prior_folder_stay_as_they_are(four_and_two, tmp_path):
    own, prior = four_and_two
    args = script.parse_args(words("m", own, "o", tmp_path, id_token="OLDFILM", prior_data_root=prior, eval_data_root=prior))
    assert [record.caption for record in list_prior_clips(args)[0]] == (prior / "prompts.txt").read_text().splitlines()
    for records in (list_clips(args)[0], list_eval_clips(args)[0]):
        assert all(record.caption.startswith("OLDFILM ") for record in records)
    (prior / "prompts.txt").write_text("")
    _, problems, _ = list_prior_clips(args)
    assert problems == [f"--prior_data_root: {prior / 'prompts.txt'}: no entries"]
    args.prior_data_root = None
    assert list_prior_clips(args) == ([], [], "nothing")


@pytest.mark.slow
def test_prior_clips_are_trained_and_never_held_out_nor_scored(train, four_and_two, tmp_path, monkeypatch, capsys):
    own, prior = four_and_two
    flags = {"data": own, "id_token": "OLDFILM", "eval_share": 0.25, "eval_clips": 4, "max_train_steps": 10}
    drawn, plain = [], script.TrainingClips.__getitem__
    monkeypatch.setattr(
        script.TrainingClips, "__getitem__", lambda self, position: drawn.append(self.clip_of(position)) or plain(self, position)
    )
    alone = train(**flags)
    drawn_alone = set(drawn)
    drawn.clear()
    beside = train(**flags, prior_data_root=prior)
    assert len(drawn_alone) == 3
    assert set(drawn) == drawn_alone | {4, 5}
    splits = [[clip["split"] for clip in json.loads((folder / "dataset.json").read_text())["clips"]] for folder in (alone, beside)]
    assert splits[1] == [*splits[0], "prior", "prior"]
    assert sorted(splits[0]) == ["held out", "trained", "trained", "trained"]
    captions = [clip["caption"].startswith("OLDFILM ") for clip in json.loads((beside / "dataset.json").read_text())["clips"]]
    assert captions == [True] * 4 + [False] * 2
    assert "2 clips are of --prior_data_root: trained with their captions as they are" in (beside / "dataset_report.txt").read_text()
    assert scores_of(beside)[0] == scores_of(alone)[0] | {"eval_clips": scores_of(beside)[0]["eval_clips"]}  # of the same clips and noise
    assert not same(lora_of(beside), lora_of(alone))
    train(**flags | {"max_train_steps": 11}, output=beside, resume_from_checkpoint="latest", prior_data_root=prior)
    with pytest.raises(SystemExit) as stop:  # other clips are another run
        train(**flags | {"max_train_steps": 12}, output=beside, resume_from_checkpoint="latest")
    assert stop.value.code == 4


def test_copies_in_both_sets_are_told(train, six_clips):
    folder = train(eval_data_root=six_clips, max_train_steps=1)
    assert "6 of the held-out clips have the same content as a training clip" in (folder / "dataset_report.txt").read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"eval_share": 1.0}, "--eval_share 1.0: must be at least 0 and below 1"),
        ({"eval_share": "nan"}, "--eval_share nan: must be at least 0"),
        ({"eval_share": 0.1, "eval_data_root": "."}, "--eval_share and --eval_data_root: both hold clips out"),
        ({"eval_clips": -1}, "--eval_clips -1: must be at least 0"),
        ({"eval_steps": -1}, "--eval_steps -1: must be at least 0"),
    ],
)
def test_wrong_flags_are_sentences(tiny_model, six_clips, tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(words(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache", **flags))
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("what", ["missing", "nothing left"])
def test_wrong_data_is_told_before_a_model_loads(train, capsys, what):
    flags = {"eval_data_root": "/nowhere"} if what == "missing" else {"eval_share": 0.95}
    with pytest.raises(SystemExit) as stop:
        train(**flags)
    assert stop.value.code == 3
    assert ("--eval_data_root: /nowhere: no such folder" if what == "missing" else "clips for training") in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_lora_is_kept_through_a_resume(train):
    flags = {"eval_share": 0.34, "eval_clips": 2, "eval_steps": 1, "checkpointing_steps": 1, "rank": 16}
    folder = train(max_train_steps=2, **flags)
    train(output=folder, max_train_steps=5, resume_from_checkpoint="latest", **flags)
    unbroken = train(max_train_steps=5, **flags)
    lines = scores_of(folder)
    assert lines == scores_of(unbroken)
    best = min(lines[1:], key=lambda line: line["eval_held_out_loss"])["step"]
    assert lines[-1]["best_step"] == best
    assert same(lora_of(folder / "best"), lora_of(folder / f"checkpoint-{best}"))
    assert not same(lora_of(folder / "best"), lora_of(folder / f"checkpoint-{1 if best != 1 else 2}"))
    assert not (train(max_train_steps=1, eval_clips=2) / "best").exists()


def test_the_best_of_full_fine_tuning_and_its_base(train):
    folder = train(
        training_type="sft", rank=None, learning_rate=1e-3, eval_share=0.34, eval_clips=1, max_train_steps=2, checkpointing_steps=1
    )
    lines = scores_of(folder)
    assert lines[0]["eval_train_loss"] == lines[-1]["eval_train_base_loss"] != lines[-1]["eval_train_loss"]
    best = folder / "best/transformer/diffusion_pytorch_model.safetensors"
    assert same(load_file(best), load_file(folder / f"checkpoint-{lines[-1]['best_step']}/transformer/diffusion_pytorch_model.safetensors"))


def test_a_learning_rate_of_zero_changes_nothing_and_the_verdict_says_so(train, capsys):
    folder = train(learning_rate=0, eval_share=0.34, eval_clips=2, max_train_steps=3)
    first, last = scores_of(folder)
    assert {**first, "step": 0, "best_step": None} == {**last, "step": 0, "best_step": None}
    status = json.loads((folder / "status.json").read_text())
    assert status["verdict"] == "nothing happening"
    assert "has not changed: the learning rate is 0" in " ".join(status["verdict_sentences"])
    assert "verdict: nothing happening." in capsys.readouterr().err


@pytest.mark.numeric
@pytest.mark.slow
def test_scores_of_two_processes_are_those_of_one(train, forked, tiny_model, six_clips, encodings, tmp_path):
    flags = {"eval_share": 0.67, "eval_clips": 4, "max_train_steps": 2, "checkpointing_steps": 1}
    one = train(train_batch_size=2, **flags)
    line = words(tiny_model, six_clips, tmp_path / "two", encodings, **flags)
    codes, output = forked.run(line, processes=2)
    assert codes == [0, 0], output[-3000:]
    assert "x 2 processes x" in output
    for a, b in zip(scores_of(one), scores_of(tmp_path / "two"), strict=True):
        assert a["eval_clips"] == b["eval_clips"]  # the same clips under both
        for name in KEYS - {"step", "eval_bands", "eval_clips", "best_step"}:
            expected = b[name] if b[name] is None else pytest.approx(b[name], rel=1e-4, abs=1e-7)  # no caption gap between the ends
            assert a[name] == expected, name
    assert scores_of(one)[-1]["eval_caption_gap"] != scores_of(one)[-1]["eval_caption_base_gap"]
    assert scores_of(one)[0]["eval_train_loss"] != scores_of(one)[-1]["eval_train_loss"]


# -----------------------------------------------------------------------------
# When clips are scored, and what comes of it, without a training run


class Watcher:
    """Stands in for the meter, the checkpointer and the validator that a scorer asks: notes what it is given."""

    def __init__(self, due=()):
        self.due, self.lines, self.best, self.order = due, [], [], []

    def is_due(self, step, last=False):
        return last or step in self.due

    def log(self, line):
        self.order.append("log")
        self.lines.append(line)

    def save_best(self, step):
        self.order.append("best")
        self.best.append(step)


def loss_of_weight(model, batch):
    """The loss of a clip: the mean of the trained weight, which a test sets."""
    return model.trained.mean().expand(len(batch["latents"]))


def scorer_of(output_dir, trained=None, saves=(), videos=(), held_out=2, run_identity=(), image=None, **flags):
    """A scorer of a new run. saves, videos: the steps at which a checkpoint and videos are due. image: facts of the last clip's own.
    Returns (scorer, watcher)."""
    trained, data = trained or make_trained(), clips_of(4, held_out)
    encodings, data.images[3] = Noise(), image
    encodings.image_keys = [f"{image['sha256']} encoded"] * 4 if image else ()
    args = flags_of(output_dir, **{"eval_clips": 2} | flags)
    scorer = scoring.Scorer(args, trained, loss_of_weight, encodings, data, UNSCALED, 1000, run_identity, run_identity)
    watcher = Watcher(saves)
    scorer.follow(watcher, SimpleNamespace(is_due=lambda step, last=False: step in videos))
    scorer.score_what_training_changes()
    scorer.begin(watcher)
    return scorer, watcher


def watch(scorer, first_step, total_steps, weights=None):
    """The steps of a run as main takes them, as far as scores go. weights: the trained weight after each step."""
    if first_step == 0:
        scorer.offer(0)
    for number, step in enumerate(range(first_step + 1, total_steps + 1)):
        with torch.no_grad():
            scorer.trained.transformer.trained.fill_(weights[number] if weights else 3.0)
        scorer.offer(step, last=step == total_steps)


@pytest.mark.parametrize(
    ("flags", "first_step", "total", "steps"),
    [
        ({}, 0, 5, [0, 5]),  # the last step has a checkpoint; the base is logged with the first score
        ({"saves": [0, 2, 4]}, 0, 5, [0, 2, 4, 5]),  # at every checkpoint (one is "due" at step 0)
        ({"videos": [0, 3, 5]}, 0, 5, [0, 3, 5]),  # with every validation; once where both are due
        ({"eval_steps": 2}, 0, 5, [0, 2, 4, 5]),  # every N steps, and at step 0
        ({"eval_steps": 2, "saves": [3], "videos": [4]}, 0, 5, [0, 2, 3, 4, 5]),
        ({"eval_steps": 2}, 3, 7, [0, 4, 6, 7]),  # resumed before anything was scored
        ({"eval_steps": 2, "saves": [2], "eval_clips": 0}, 0, 5, []),  # no clips: never
    ],
)
def test_when_clips_are_scored(flags, first_step, total, steps, tmp_path):
    scorer, watcher = scorer_of(tmp_path, **flags)
    watch(scorer, first_step, total)
    assert [line["step"] for line in watcher.lines] == steps
    assert scorer.lines == watcher.lines


def test_a_scorer_without_clips_asks_nothing_of_the_model(tmp_path):
    def score(model, batch):
        raise AssertionError("scored")

    args = flags_of(tmp_path, eval_clips=0)
    assert scoring.Scorer(args, make_trained(), score, Noise(), clips_of(4), UNSCALED, 1000).base is None
    with pytest.raises(AssertionError, match="scored"):
        scoring.Scorer(
            flags_of(tmp_path, eval_clips=1), make_trained(), score, Noise(), clips_of(4), UNSCALED, 1000
        ).score_what_training_changes()


def test_the_base_is_scored_before_a_weight_changes_and_found_again_by_a_resumed_run(tmp_path):
    scorer, watcher = scorer_of(tmp_path, eval_steps=1)
    watch(scorer, 0, 1)
    assert [(line["eval_train_loss"], line["eval_train_base_loss"]) for line in watcher.lines] == [(4.0, 4.0), (3.0, 4.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in watcher.lines))
    changed = make_trained()
    torch.nn.init.constant_(changed.transformer.trained, 2.0)
    assert scorer_of(tmp_path, changed, resume_from_checkpoint="latest")[0].base["train"] == [4.0] * 4
    assert scorer_of(tmp_path, changed, resume_from_checkpoint="latest", eval_clips=1)[0].base["train"] == [2.0] * 4  # other clips


def test_the_lowest_held_out_loss_so_far_is_kept_as_the_best(tmp_path):
    scorer, watcher = scorer_of(tmp_path, eval_steps=1)
    watch(scorer, 0, 5, weights=[5.0, 3.0, 3.5, 2.0, 2.0])
    assert watcher.best == [1, 2, 4]  # never step 0, nor a loss that is only as low
    assert [line["best_step"] for line in watcher.lines] == [None, 1, 2, 2, 4, 4]
    scorer, watcher = scorer_of(tmp_path, eval_steps=1, held_out=0)
    watch(scorer, 0, 2)
    assert watcher.best == []


def test_a_score_is_logged_before_the_best_is_written_and_the_report_comes_last(tmp_path, monkeypatch):
    scorer, watcher = scorer_of(tmp_path)
    monkeypatch.setattr(scoring.report, "refresh", lambda folder: watcher.order.append("report"))
    watch(scorer, 0, 1)
    assert watcher.order == ["log", "log", "best", "report"]  # the base, then the step
    scorer.trained.accelerator.is_main_process = False
    scorer.offer(2, last=True)
    assert watcher.order == ["log", "log", "best", "report", "log"]  # other ranks take part; Meter and Checkpointer know who writes


def test_a_score_is_of_the_averaged_weights_and_leaves_no_trace(tmp_path):
    trained = make_trained(ema_decay=0.5)
    scorer, watcher = scorer_of(tmp_path, trained)
    for _ in range(3):
        train_one_step(trained)
    live, random = trained.transformer.trained.detach().clone(), torch.random.get_rng_state()
    scorer.offer(3, last=True)
    assert watcher.lines[-1]["eval_train_loss"] == pytest.approx(trained.average.shadow_params[0].mean().item())
    assert watcher.lines[-1]["eval_train_loss"] != pytest.approx(live.mean().item())
    assert torch.equal(trained.transformer.trained, live)
    assert trained.transformer.training
    assert torch.equal(torch.random.get_rng_state(), random)


def test_ranks_share_the_clips_and_their_sum_is_the_score(tmp_path):
    sums = []
    for rank in (0, 1):
        accelerator = OneProcess(process_index=rank)
        accelerator.num_processes = 2
        accelerator.reduce = lambda tensor, how: sums.append(tensor.clone()) or tensor
        scorer_of(tmp_path, make_trained(accelerator))
    mine, theirs = sums
    assert torch.equal(mine + theirs, torch.full_like(mine, 4.0))
    assert 0 < mine.count_nonzero() == theirs.count_nonzero()


@pytest.mark.parametrize(("engine", "shared", "builds"), [("FSDP", True, 1), ("FSDP", False, 2), ("NO", True, 0)])
def test_scores_and_videos_of_a_step_share_one_copy_of_a_sharded_model(engine, shared, builds, tmp_path, monkeypatch):
    built, seen = [], []

    def build(device):
        model = TwoWeights().to(device)
        built.append(weakref.ref(model))
        return model

    def score(self, model, with_gap=True):
        seen.append((model.trained.mean().item(), model is trained.transformer))
        return self.base

    def validate(folder, jobs, rank, world_size, model, *rest):
        seen.append((model.trained.mean().item(), model is trained.transformer))
        return []

    trained = make_trained(OneProcess(distributed_type=DistributedType[engine]), ema_decay=0.5, build=build)
    scorer, _ = scorer_of(tmp_path, trained)
    args = flags_of(tmp_path, prompts=["a rabbit"])
    videos = validation.Validator(args, trained, CogVideoXDDIMScheduler(), Noise(), None, (5, 32, 48), plan_of())
    monkeypatch.setattr(scoring.Scorer, "score", score)
    monkeypatch.setattr(validation, "validate", validate)
    freed = []  # which copies are still there when memory is given back for the last time
    monkeypatch.setattr(launch, "free_memory", lambda: freed.append([copy for copy in built if copy()]))
    for step in (1, 2):
        train_one_step(trained)
        train_one_step(trained)
        built.clear()
        seen.clear()
        with trained.one_full_model() if shared else contextlib.nullcontext():
            assert built == []  # made for the first who asks
            scorer.offer(step, last=True)
            videos.offer(step, last=True)
        assert len(built) == builds
        averaged = trained.average.shadow_params[0].mean().item()
        assert seen == [(averaged, engine == "NO")] * 2  # both see the averaged weights of this step
        if shared:
            assert freed[-1] == []
            assert trained.shared_model is None


def test_a_failure_in_a_shared_block_lets_go_of_the_copy():
    trained = make_trained(OneProcess(distributed_type=DistributedType.FSDP))

    def fails_inside():
        with trained.one_full_model(), trained.full_model():
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails_inside()
    assert trained.sharing is trained.shared_model is None


# -----------------------------------------------------------------------------
# The verdict


def run_of(train, held_out=None, gap=None, share=0.05):
    """Lines as a run would write them: losses by evaluation, the first of each the base model's. gap: (of the last, its error)."""
    lines = []
    for number, loss in enumerate(train):
        held = None if held_out is None else held_out[number]
        scores = {"train": [loss] * 4, "held_out": None if held is None else [held] * 4}
        base = {"train": [train[0]] * 4, "held_out": None if held is None else [held_out[0]] * 4, "gap": gap and (0.05, 0.02)}
        scores["gap"] = gap if number == len(train) - 1 else None
        lines.append(scoring.line_of(100 * number, scores, base, {}, share if number else 0.0, lines, 1000))
    return lines


def test_the_word_for_each_kind_of_run():
    def word(*args, **kwargs):
        return scoring.verdict(run_of(*args, **kwargs), 1e-4)[0]

    assert word([1.0, 0.9, 0.8], [1.0, 0.92, 0.85]) == "learning"
    assert word([1.0, 0.9, 0.8], [1.0, 0.95, 1.1]) == "memorising"
    assert word([1.0, 0.7, 0.5], [1.0, 0.9, 0.96]) == "memorising"
    assert word([1.0, 0.9, 0.8], [1.0, 1.0, 0.999]) == "memorising"
    assert word([1.0, 0.998, 0.995], [1.0, 0.999, 0.998]) == "nothing happening"
    assert word([1.0, 1.1, 1.2], [1.0, 1.1, 1.3]) == "getting worse"
    assert word([1.0, 0.9, 0.8]) == "learning"
    assert word([1.0, 1.0]) == "nothing happening"
    assert word([1.0]) == "not measured"
    assert word([1.0, 0.8], [1.0, 0.85], gap=(0.003, 0.01)) == "learning the look, not the captions"
    assert word([1.0, 0.8], [1.0, 0.85], gap=(-0.03, 0.01)) == "learning the look, not the captions"
    assert word([1.0, 0.8], [1.0, 0.85], gap=(0.003, 0.002)) == "learning"
    assert word([1.0, 0.8], [1.0, 0.85], gap=(0.06, 0.07)) == "learning"  # few clips, but much
    assert word([1.0, 0.8], gap=(0.06, 0.01)) == "learning"
    assert word([1.0, 0.999], [1.0, 0.999], gap=(0.0, 0.01)) == "nothing happening"


def test_the_sentences_name_the_step_the_cause_and_the_way_out():
    def said(*args, rate=1e-4, **kwargs):
        return " ".join(scoring.verdict(run_of(*args, **kwargs), rate)[1])

    memorising = said([1.0, 0.7, 0.5], [1.0, 0.9, 0.99])
    assert "from step 100 on" in memorising
    assert "use best/" in memorising
    assert "-50.0 %" in memorising
    assert "--eval_share 0.1" in said([1.0, 0.9])
    assert "--eval_share" not in said([1.0, 0.9], [1.0, 0.9])
    assert "raise --learning_rate (it was 1e-09)" in said([1.0, 0.9999], [1.0, 1.0], share=1e-6, rate=1e-9)
    assert "inspect the videos" in said([1.0, 0.9999], [1.0, 1.0], share=0.1)
    assert "lower --learning_rate (it was 0.1)" in said([1.0, 2.0], [1.0, 2.0], rate=0.1)
    assert "still decreasing" in said([1.0, 0.8], [1.0, 0.9])
    assert "best/ has those weights" in said([1.0, 0.8, 0.79], [1.0, 0.8, 0.801])


@pytest.mark.numeric
def test_the_size_of_the_update_is_that_of_the_products():
    from peft import LoraConfig, inject_adapter_in_model

    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]), model)
    assert scoring.update_share(model) == 0
    added, whole = [], []
    for layer in model:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        added.append(3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        whole.append(layer.get_base_layer().weight)
    expected = torch.cat([a.flatten() for a in added]).norm() / torch.cat([w.flatten() for w in whole]).norm()
    assert scoring.update_share(model) == pytest.approx(expected.item(), rel=1e-5)


def test_the_plot_has_what_was_scored(train, with_plot):
    folder = train(eval_share=0.34, eval_clips=2, max_train_steps=2)
    assert os.path.getsize(folder / "loss.png") > 10_000


@pytest.mark.slow
def test_a_resumed_run_that_scores_other_clips_scores_the_base_again(train):
    folder = train(max_train_steps=2, eval_clips=2, rank=16)
    plain = scores_of(train(max_train_steps=1, eval_clips=3))[0]
    train(output=folder, max_train_steps=4, eval_clips=3, rank=16, resume_from_checkpoint="latest")
    two, three = [line for line in scores_of(folder) if line["step"] == 2], scores_of(folder)[-1]
    assert two[0]["eval_train_base_loss"] != three["eval_train_base_loss"] == plain["eval_train_base_loss"]
    assert three["eval_train_loss"] != three["eval_train_base_loss"]
    assert three["best_step"] is None
    again = train(output=folder, max_train_steps=5, eval_clips=3, rank=16, resume_from_checkpoint="latest")
    assert scores_of(again)[-1]["eval_train_base_loss"] == three["eval_train_base_loss"]


def test_what_an_earlier_run_left_in_best_is_not_taken_for_this_ones(train, tmp_path):
    (tmp_path / "out/best").mkdir(parents=True)
    (tmp_path / "out/best/pytorch_lora_weights.safetensors").write_bytes(b"of another run")
    (tmp_path / "out/status.json").write_text('{"reason": "killed"}')  # a run of a version that did not list its files
    assert not (train(output=tmp_path / "out", max_train_steps=1, eval_clips=0) / "best").exists()


@pytest.mark.numeric
def test_the_caption_gap_sees_what_belongs_together_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    hard, plain = torch.rand(6, 1, generator=generator), torch.rand(1, 6, generator=generator)
    mixed = 1 + hard + plain  # hard clips, and captions that fit all clips better
    gap, error = scoring.caption_gap(mixed)
    assert abs(gap) < 1e-6
    assert error < 1e-6
    belonging = mixed - 0.1 * torch.eye(6)
    gap, error = scoring.caption_gap(belonging)
    assert gap == pytest.approx(0.1 / belonging.diagonal().mean().item(), rel=1e-4)
    assert error < 1e-6
    off = (belonging.sum() - belonging.diagonal().sum()) / 30
    assert gap == pytest.approx((off / belonging.diagonal().mean() - 1).item(), rel=1e-4)
    gap, error = scoring.caption_gap(mixed + torch.rand(6, 6, generator=generator))
    assert abs(gap) < 3 * error


def test_captions_are_swapped_at_the_first_and_the_last_score_of_enough_clips(train):
    lines = scores_of(train(eval_clips=5, max_train_steps=4, eval_steps=2, rank=16))
    first, between, last = (line["eval_caption_gap"] for line in lines)
    assert first == lines[0]["eval_caption_base_gap"] == lines[2]["eval_caption_base_gap"]
    assert between is None
    assert last != first
    assert len(last) == 2


@pytest.mark.parametrize(
    ("identity", "flags", "scored_again"),
    [
        (("model",), {}, False),
        (("other",), {}, True),
        (("model",), {"seed": 1}, True),
        (("model",), {"image": {"sha256": "of another image"}}, True),
        (("model",), {"image": None}, True),
    ],
)
def test_the_base_of_another_model_another_image_or_other_noise_is_scored_again(identity, flags, scored_again, tmp_path, monkeypatch):
    flags = {"image": {"sha256": "of the held-out clip's image"}} | flags
    scorer, _ = scorer_of(tmp_path, run_identity=("model",), image={"sha256": "of the held-out clip's image"})
    line = scoring.line_of(0, scorer.base, scorer.base, scorer.clips, None, [], 1000)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    asked, score_base = [], scoring.base_score
    monkeypatch.setattr(scoring, "base_score", lambda *args: asked.append(1) or score_base(*args))
    resumed, _ = scorer_of(tmp_path, run_identity=identity, resume_from_checkpoint="latest", **flags)
    assert bool(asked) == scored_again
    assert (resumed.earlier_lines() == []) == scored_again


class NoiseAndImage(Noise):
    """The same of an image-to-video model, whose images are ones."""

    image_keys = [f"image {number}" for number in range(9)]

    def image(self, clip, flipped=False):
        return torch.cat([torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), -30.0)], dim=1)


@pytest.mark.parametrize(("known_factor", "is_doubtful"), [(1 / 0.7, False), (0.7, True), (1.0, True)])
def test_the_base_tells_which_scaling_of_the_image_its_weights_know(tmp_path, monkeypatch, capsys, known_factor, is_doubtful):
    facts = replace(UNSCALED, image_channels=2, scaling_factor=0.7, image_scaling_factor=1 / 0.7)

    def losses(model, batch):  # least where the image is as large as the weights know it
        return 1 + (batch["image"][:, 0].mean(dim=(1, 2, 3)) - known_factor).abs()

    args = flags_of(tmp_path, eval_clips=2)
    scorer, scored, score = scoring.Scorer(args, make_trained(), losses, NoiseAndImage(), clips_of(4, 2), facts, 1000), [], scoring.score
    monkeypatch.setattr(scoring, "score", lambda *args: scored.append(args) or score(*args))
    base = scorer.score_base(scorer.trained.transformer)
    assert len(scored) == len(base["image_scalings"]) == 3  # the score itself is that of the pipeline's own factor
    assert base["image_scalings"][f"{1 / 0.7:.6g}"] == pytest.approx(sum(base["train"] + base["held_out"]) / 8)
    least = min(base["image_scalings"], key=base["image_scalings"].get)
    assert float(least) == pytest.approx(known_factor, rel=1e-4)
    first = capsys.readouterr()
    assert scoring.Scorer(args, make_trained(), losses, NoiseAndImage(), clips_of(4, 2), facts, 1000).base == base  # from the cache
    for told in (first, capsys.readouterr()):
        assert ("are scaling_factor and invert_scale_latents in vae/config.json those of this model?" in told.err) == is_doubtful
        assert ("and so does training" in told.out + told.err) != is_doubtful


def test_a_text_to_video_model_has_no_scaling_of_an_image(tmp_path, capsys):
    scorer, _ = scorer_of(tmp_path, eval_steps=1)
    assert "image_scalings" not in scorer.score_base(scorer.trained.transformer)
    assert "image scaling" not in "".join(capsys.readouterr())
