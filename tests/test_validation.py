"""When videos are made, what they leave behind, and what a failure costs. No model folder, no training run."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from PIL import Image

from cogvideox import launch, report, validation
from cogvideox.files import read_json_lines, write_bytes
from tests.conftest import STEADY_ADAM, words
from tests.stand_ins import Noise, OneProcess, TwoWeights, flags_of, make_trained, plan_of, train_one_step

PROMPTS = ["a rabbit", "a bird"]


def watcher(output_dir, trained=None, plan=None, **flags):
    """A validator with a prompt, unless the flags say otherwise."""
    flags = {"prompts": PROMPTS[:1]} | flags
    images, load_vae = flags.pop("images", ()), flags.pop("load_vae", lambda: SimpleNamespace(decoder=torch.nn.Identity()))
    args = flags_of(output_dir, **flags)
    parts = make_trained() if trained is None else trained, CogVideoXDDIMScheduler(), Noise(), load_vae, (5, 32, 48)
    validator = validation.Validator(args, *parts, plan or plan_of(), data_motion=lambda: 20.0, images=images)
    validator.begin(SimpleNamespace(lines=[], log=lambda line: validator.meter.lines.append(line)))
    return validator


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline and a VAE that make grey pictures, and files in place of videos (which cost a process each).

    Returns the calls of the pipeline; `fails` names the seeds that fail.
    """
    seen = SimpleNamespace(models=[], weights=[], modes=[], settings=[], seeds=[], fails=())
    grey = np.full((5, 32, 48, 3), 128, np.uint8)

    def sample_latents(transformer, scheduler, prompt, negative_prompt, seed, device, **settings):
        seen.models.append(transformer)
        seen.weights.append(transformer.trained.detach().clone())
        seen.modes.append((transformer.training, torch.is_grad_enabled()))
        seen.settings.append(settings)
        seen.seeds.append(seed)
        torch.rand(3)  # a pipeline may draw from the stream that training draws from
        if seed in seen.fails:
            raise RuntimeError("out of memory")
        return torch.zeros(2, 4, 4, 6)

    monkeypatch.setattr(validation, "sample_latents", sample_latents)
    monkeypatch.setattr(validation, "decode_latents", lambda vae, latents: grey)
    monkeypatch.setattr(validation, "write_video", lambda path, frames, fps: write_bytes(path, frames.tobytes()))
    monkeypatch.setattr(validation, "read_video", lambda path: grey)
    monkeypatch.setattr(launch, "free_memory", lambda: None)  # a collection takes a third of a second in a process of tests
    return seen


@pytest.fixture
def made(monkeypatch):
    """The steps whose videos are made, in order; nothing is made."""
    steps = []
    monkeypatch.setattr(validation.Validator, "generate", lambda self, step, jobs, now, of_base=False: steps.append(step))
    return steps


def run(validator, first_step, total_steps):
    """The steps of a run as main takes them, as far as videos go."""
    if first_step == 0:
        validator.offer(0)
    for step in range(first_step + 1, total_steps + 1):
        validator.offer(step, last=step == total_steps)


@pytest.mark.parametrize(
    ("flags", "clips_per_step", "first_step", "total", "steps"),
    [
        ({}, 1, 0, 5, [0, 5]),  # before the first step and after the last one, whatever the flags
        ({"validation_steps": 2}, 1, 0, 5, [0, 2, 4, 5]),  # every N steps
        ({"validation_steps": 2}, 1, 0, 4, [0, 2, 4]),  # a last step that is due by itself counts once
        ({"validation_steps": 2}, 1, 3, 6, [4, 6]),  # resumed in the middle: nothing before the first step
        ({"validation_epochs": 1}, 1, 0, 9, [0, 4, 8, 9]),  # every N passes over the four clips
        ({"validation_epochs": 2}, 1, 0, 9, [0, 8, 9]),
        ({"validation_epochs": 1}, 3, 0, 5, [0, 2, 3, 4, 5]),  # three clips a step: the first step that completes an epoch
        ({"validation_epochs": 2}, 3, 0, 7, [0, 3, 6, 7]),
        ({"validation_epochs": 1}, 8, 0, 3, [0, 1, 2, 3]),  # several epochs a step are one validation
        ({"validation_steps": 3, "validation_epochs": 1}, 1, 0, 5, [0, 3, 5]),  # steps go before epochs
        ({"validation_steps": 2, "prompts": []}, 1, 0, 5, []),  # no prompt: never
    ],
)
def test_when_videos_are_made(flags, clips_per_step, first_step, total, steps, tmp_path, made):
    run(watcher(tmp_path, plan=plan_of(4, clips_per_step), **flags), first_step, total)
    assert made == steps


@pytest.mark.parametrize(("prompts", "there", "steps"), [(PROMPTS, 0, [7]), (PROMPTS, 1, [7]), (PROMPTS, 2, []), ([], 0, [])])
def test_the_last_videos_are_made_by_a_complete_run_that_lacks_them(prompts, there, steps, tmp_path, made):
    validator = watcher(tmp_path, prompts=prompts)
    for job in validator.jobs[:there]:  # a stop between two videos leaves the first one, and a sheet of it
        write_bytes(validator.folder_of(7) / job["name"], b"a video")
    validator.make_missing(7)
    assert made == steps


def test_what_a_validation_leaves_behind(tmp_path, pipeline):
    validator = watcher(tmp_path, prompts=PROMPTS, num_validation_videos=2, validation_height=64)
    validator.offer(0)
    folder = tmp_path / "validation/step-000000"
    videos = [f"{job['name']}" for job in validator.jobs]
    assert len(videos) == 4
    assert {path.name for path in folder.iterdir()} == {*videos, "contact_sheet.png", "videos.json"}
    assert (tmp_path / report.NAME).exists()
    record = json.loads((folder / "videos.json").read_text())
    assert [(video["prompt"], video["seed"]) for video in record["videos"]] == [(p, s) for p in PROMPTS for s in (42, 43)]
    expected = {"height": 64, "width": 48, "num_frames": 5}  # the flag's, and the clips' own
    assert {name: record["settings"][name] for name in expected} == expected
    assert pipeline.settings[0] == record["settings"]
    assert validator.videos_of(0) == [(p, f"validation/step-000000/{name}") for p, name in zip(np.repeat(PROMPTS, 2), videos, strict=True)]
    assert validator.videos_of(1) == []


def test_videos_come_before_the_sheet_and_the_sheet_before_the_report(tmp_path, pipeline, monkeypatch):
    order = []
    for module, name in ((validation, "write_video"), (validation, "write_sheet"), (report, "refresh")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, plain=plain, name=name: order.append(name) or plain(*args))
    monkeypatch.setattr(validation.metrics, "track_videos", lambda *args: order.append("track_videos"))
    watcher(tmp_path).offer(0)
    assert order == ["write_video", "write_sheet", "track_videos", "refresh"]


def test_a_video_that_fails_costs_that_video_and_not_the_run(tmp_path, pipeline, capsys):
    pipeline.fails = (42,)
    validator = watcher(tmp_path, num_validation_videos=2)
    validator.offer(0)
    bad, good = validator.jobs
    assert not (validator.folder_of(0) / bad["name"]).exists()
    assert (validator.folder_of(0) / good["name"]).exists()
    assert (validator.folder_of(0) / "contact_sheet.png").exists()
    told = capsys.readouterr().err
    assert f"validation video {bad['name']} failed, training continues: RuntimeError: out of memory" in told
    assert good["name"] not in told
    pipeline.fails = (42, 43)
    validator.offer(1, last=True)  # nothing at all is made
    assert not validator.folder_of(1).exists()
    assert capsys.readouterr().err.count("failed, training continues") == 2


def test_a_contact_sheet_that_fails_is_told_and_the_report_is_written_all_the_same(tmp_path, pipeline, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(validation, "contact_sheet", full)
    watcher(tmp_path).offer(0)
    assert "the contact sheet of step 0 was not written (OSError: [Errno 28] No space left on device)" in capsys.readouterr().err
    assert (tmp_path / report.NAME).exists()


def test_videos_show_the_averaged_weights_in_evaluation_mode_and_leave_no_trace(tmp_path, pipeline):
    trained = make_trained(ema_decay=0.5)
    trained.transformer.train()
    for _ in range(2):
        train_one_step(trained)
    live, random = trained.transformer.trained.detach().clone(), torch.random.get_rng_state()
    watcher(tmp_path, trained).offer(0)
    assert pipeline.modes == [(False, False)]
    assert torch.equal(pipeline.weights[0], trained.average.shadow_params[0])
    assert not torch.equal(pipeline.weights[0], live)
    assert torch.equal(trained.transformer.trained, live)
    assert trained.transformer.training
    assert torch.equal(torch.random.get_rng_state(), random)


def test_every_rank_makes_its_share_and_the_main_one_shows_them(tmp_path, pipeline):
    shares = []
    for rank in (1, 0):  # the main one last: it waits for the others
        accelerator = OneProcess(process_index=rank)
        accelerator.num_processes = 2
        validator = watcher(tmp_path, make_trained(accelerator), num_validation_videos=3, validation_steps=1)
        validator.offer(1)
        shares.append(list(pipeline.seeds))
        pipeline.seeds.clear()
        assert (tmp_path / report.NAME).exists() is (rank == 0)
    assert shares == [[43], [42, 44]]
    assert len(json.loads((validator.folder_of(1) / "videos.json").read_text())["videos"]) == 3


@pytest.mark.parametrize(("engine", "copies"), [(DistributedType.FSDP, 1), (DistributedType.NO, 0)])
def test_a_sharded_model_is_copied_once_for_all_videos_of_a_step(engine, copies, tmp_path, pipeline):
    built = []

    def build(device):
        built.append(TwoWeights().to(device))
        return built[-1]

    trained = make_trained(OneProcess(distributed_type=engine), build=build)
    train_one_step(trained)
    watcher(tmp_path, trained, prompts=PROMPTS).offer(0)
    assert len(built) == copies
    assert all((model is trained.transformer) is (copies == 0) for model in pipeline.models)
    assert all(torch.equal(weights, trained.transformer.trained) for weights in pipeline.weights)


def test_prompts_take_turns_and_all_are_shown_first_and_last(tmp_path):
    prompts = ["a rabbit", "a bird", "a fox"]

    def turns(**flags):
        validator = watcher(tmp_path, prompts=prompts, plan=plan_of(total_steps=10), **flags)
        return [[job["prompt"] for job in validator.jobs_of(step)] for step in (0, 2, 4, 6, 8, 10)]

    everything = [0, 1, 2]
    assert turns(validation_steps=2, validation_prompts_at_once=1) == [everything, [1], [2], [0], [1], everything]
    assert turns(validation_steps=2, validation_prompts_at_once=2) == [everything, [0, 2], [1, 2], [0, 1], [0, 2], everything]
    assert turns(validation_steps=2) == turns(validation_steps=2, validation_prompts_at_once=3) == [everything] * 6
    by_epochs = watcher(tmp_path, prompts=prompts, plan=plan_of(clips=2), validation_epochs=1, validation_prompts_at_once=1)
    assert [[job["prompt"] for job in by_epochs.jobs_of(step)] for step in (2, 4, 6)] == [[1], [2], [0]]


OLD_FILM = {"prompts": ["OLDFILM a rabbit", "a bird"], "id_token": "OLDFILM", "plain_prompt": (0, "a rabbit")}


def test_one_more_video_is_made_without_the_trigger_beside_its_partner_and_only_if_asked_for(tmp_path, pipeline):
    asked = watcher(tmp_path / "asked", **OLD_FILM, num_validation_videos=2, validation_steps=1)
    plain = watcher(tmp_path / "plain", **OLD_FILM | {"plain_prompt": None}, num_validation_videos=2, validation_steps=1)
    assert asked.jobs[:-1] == plain.jobs  # names and cache keys of the others stay
    assert [asked.base_key(job) for job in asked.jobs[:-1]] == [plain.base_key(job) for job in plain.jobs]
    extra = asked.jobs[-1]
    assert asked.base_key(extra) not in [asked.base_key(job) for job in plain.jobs]
    assert (extra["without"], extra["partner"], extra["seed"]) == ("OLDFILM", plain.jobs[0]["name"], 42)
    for validator in (asked, plain):
        for step in (0, 1):
            validator.offer(step)
        folder = validator.folder_of(1)
        assert (folder / "without_trigger").exists() is (validator is asked)
        assert len(list(folder.rglob("*.mp4"))) == len(validator.jobs) == (5 if validator is asked else 4)
        assert len(list(validator.folder_of(0).rglob("*.mp4"))) == len(validator.jobs)
        [_, line] = validator.meter.lines
        assert ("trigger_leak" in line) is (validator is asked)
        assert len(validator.videos_of(1)) == 4
    listed = json.loads((asked.folder_of(1) / "videos.json").read_text())["videos"][-1]
    assert (listed["prompt"], listed["without"]) == ("a rabbit", "OLDFILM")
    assert (tmp_path / "asked" / report.NAME).read_text().count("without the trigger: a rabbit") > 0
    assert "without the trigger" not in (tmp_path / "plain" / report.NAME).read_text()


def test_the_video_without_the_trigger_comes_when_its_partner_does_and_not_twice(tmp_path):
    in_turns = watcher(tmp_path, **OLD_FILM, plan=plan_of(total_steps=10), validation_steps=2, validation_prompts_at_once=1)
    assert [[job["prompt"] for job in in_turns.jobs_of(step)] for step in (0, 2, 4, 10)] == [[0, 1, 2], [1], [0, 2], [0, 1, 2]]
    both = watcher(tmp_path, **OLD_FILM | {"prompts": ["OLDFILM a rabbit", "a rabbit"]})
    assert len(both.jobs) == 2  # one of the prompts is the other without the trigger
    assert both.pair == (both.jobs[0]["name"], both.jobs[1]["name"])


def test_the_motion_of_videos_is_logged_beside_that_of_step_0_and_of_the_data(tmp_path, pipeline, monkeypatch, capsys):
    still, moving = (np.zeros((9, 32, 48, 3), np.uint8) for _ in range(2))
    for frame in range(9):
        moving[frame, 8:24, 4 * frame : 4 * frame + 16] = 200
    validator = watcher(tmp_path, **OLD_FILM, validation_steps=1)
    with_trigger = [job["name"] for job in validator.jobs[:2]]
    changed = {validator.folder_of(2) / name: still for name in with_trigger}
    monkeypatch.setattr(validation, "read_video", lambda path: changed.get(path, moving))
    for step in (0, 1, 2):
        validator.offer(step)
    first, same_as_first, other = validator.meter.lines
    assert first["step"] == 0
    assert first["motion"] == first["motion_base"] == same_as_first["motion"] > 10
    assert "trigger_leak" not in first
    assert (same_as_first["moved_with_trigger"], same_as_first["trigger_leak"]) == (0, None)  # nothing changed, so nothing leaks
    assert (other["motion"], other["motion_base"], other["motion_data"]) == (0, first["motion"], 20.0)
    assert other["moved_with_trigger"] > 2
    assert (other["moved_without_trigger"], other["trigger_leak"]) == (0, 0)
    assert [video["motion"] for video in other["videos"]] == [0, 0, first["motion"]]
    told = capsys.readouterr().err
    assert f"step 2: the videos move by 0.0 grey levels per second (step 0's by {first['motion']:.1f}, the training clips by 20.0)" in told
    assert "step 2: without the trigger the video changed 0.00 times as much as with it" in told


def test_motion_that_cannot_be_measured_costs_the_numbers_and_not_the_run(tmp_path, pipeline, monkeypatch, capsys):
    def broken(path):
        raise OSError("no such codec")

    validator = watcher(tmp_path, validation_steps=1)
    monkeypatch.setattr(validation, "read_video", broken)
    validator.offer(1)
    assert "the motion of the videos of step 1 was not measured (OSError: no such codec)" in capsys.readouterr().err
    assert validator.meter.lines == []
    assert (tmp_path / report.NAME).exists()


def test_a_video_that_failed_is_left_out_of_the_motion_and_a_partner_that_failed_of_the_leak(tmp_path, pipeline):
    validator = watcher(tmp_path, **OLD_FILM, validation_steps=1)
    names = [job["name"] for job in validator.jobs]
    for step in (0, 1):
        validator.offer(step)
    (validator.folder_of(1) / names[0]).unlink()
    (validator.folder_of(0) / names[1]).unlink()
    validator.measure(1, validator.jobs)
    line = validator.meter.lines[-1]
    assert [(video["name"], video["base"]) for video in line["videos"]] == [(names[1], None), (names[2], 0)]
    assert (line["motion"], line["motion_base"], line["trigger_leak"]) == (0, None, None)


def test_a_video_that_a_signal_stopped_is_told_without_the_class_of_an_error(tmp_path, pipeline):
    stopped, failed = (validation.failure({"name": "x.mp4"}, kind("SIGINT requested a stop")) for kind in (InterruptedError, raised))
    assert stopped == "validation video x.mp4 was not made: SIGINT requested a stop"
    assert failed.startswith("validation video x.mp4 failed, training continues: ValueError: SIGINT requested a stop (test_validation.py:")


def raised(words):
    """An error that has been raised."""
    try:
        raise ValueError(words)
    except ValueError as error:
        return error


def test_a_vae_that_does_not_load_costs_the_videos_and_not_the_run(tmp_path, pipeline, capsys):
    def load():
        raise OSError("vae: no such file")

    args = flags_of(tmp_path, prompts=PROMPTS[:1], validation_steps=1)
    validator = validation.Validator(args, make_trained(), CogVideoXDDIMScheduler(), Noise(), load, (5, 32, 48), plan_of())
    validator.offer(1)
    assert "OSError: vae: no such file" in capsys.readouterr().err
    assert pipeline.seeds == [42]


def pictures(count):
    """Images of the videos' size."""
    return [np.full((32, 48, 3), 60 * number, np.uint8) for number in range(1, count + 1)]


def test_an_image_to_video_model_gets_each_prompts_image_and_the_vae_before_it_samples(tmp_path, pipeline):
    loaded = []

    def load():
        loaded.append((SimpleNamespace(decoder=torch.nn.Identity()), len(pipeline.seeds)))
        return loaded[-1][0]

    watcher(tmp_path / "a", images=pictures(2), prompts=PROMPTS, load_vae=load, num_validation_videos=2).offer(0)
    [(vae, videos_so_far)] = loaded  # once, and kept
    assert videos_so_far == 0
    assert all(settings.pop("vae") is vae for settings in pipeline.settings)
    assert [np.asarray(settings.pop("image"))[0, 0, 0] for settings in pipeline.settings] == [60, 60, 120, 120]
    text = watcher(tmp_path / "b", prompts=PROMPTS, load_vae=load)
    text.offer(0)
    assert loaded[1][1] == len(pipeline.seeds) == 6  # a text-to-video model loads it to decode
    assert pipeline.settings[-1] == text.settings == pipeline.settings[0]


def test_a_vae_that_does_not_load_costs_an_image_to_video_model_its_videos_and_not_the_run(tmp_path, pipeline, capsys):
    def load():
        raise OSError("vae: no such file")

    watcher(tmp_path, images=pictures(2), prompts=PROMPTS, load_vae=load).offer(0)
    assert pipeline.seeds == []
    assert capsys.readouterr().err.count("failed, training continues: OSError: vae: no such file") == 2


def test_a_video_of_step_0_is_kept_under_its_image_and_one_without_an_image_under_the_name_of_earlier_versions(tmp_path):
    plain = watcher(tmp_path, prompts=PROMPTS)
    assert plain.base_key(plain.jobs[0]) == "1dfb1f0c580f22e815a84a0ad28ccf2814d143c0"
    first, second = pictures(2)
    with_images = [watcher(tmp_path, prompts=PROMPTS, images=images) for images in ([first, second], [second, first], [first, first])]
    keys = [[validator.base_key(job) for job in validator.jobs] for validator in with_images]
    assert keys[0][0] == keys[2][0]
    assert keys[0][1] != keys[2][1]
    assert len({plain.base_key(plain.jobs[0]), keys[0][0], keys[1][0]}) == 3


def test_the_video_without_the_trigger_begins_with_its_partners_image(tmp_path, pipeline):
    both = OLD_FILM | {"prompts": ["a bird", "OLDFILM a rabbit"], "plain_prompt": (1, "a rabbit")}
    watcher(tmp_path, **both, images=pictures(2)).offer(0)
    assert [np.asarray(settings["image"])[0, 0, 0] for settings in pipeline.settings] == [60, 120, 120]


def test_the_video_without_the_trigger_is_one_of_the_same_image(tmp_path, pipeline):
    first, second = pictures(2)
    both = OLD_FILM | {"prompts": ["OLDFILM a rabbit", "a rabbit"]}
    for images, count in (([first, second], 3), ([first, first.copy()], 2)):
        validator = watcher(tmp_path / str(count), **both, images=images)
        pair = [next(job for job in validator.jobs if job["name"] == name) for name in validator.pair]
        assert len(validator.jobs) == count
        assert [validator.texts[job["prompt"]] for job in pair] == both["prompts"]
        assert [validator.images[job["prompt"]][0, 0, 0] for job in pair] == [60, 60]


def test_videos_of_the_same_prompt_and_another_image_have_other_names(tmp_path):
    first, second = pictures(2)
    of_images = [
        [job["name"] for job in watcher(tmp_path, prompts=PROMPTS, images=images).jobs] for images in ([first] * 2, [first, second])
    ]
    assert of_images[0][0] == of_images[1][0]
    assert of_images[0][1] != of_images[1][1]
    of_text = [job["name"] for job in watcher(tmp_path, prompts=PROMPTS).jobs]
    assert of_text[0] not in of_images[0]


def test_the_image_stands_above_its_videos_in_the_sheet_and_in_the_report(tmp_path, pipeline):
    for name, images in (("with", pictures(2)), ("without", ())):
        validator = watcher(tmp_path / name, images=images, prompts=PROMPTS)
        validator.offer(0)
        folder = validator.folder_of(0)
        sheet = np.asarray(Image.open(folder / "contact_sheet.png").convert("RGB"))
        found = [any((sheet[y : y + 32, 4:52] == 60 * number).all() for y in range(len(sheet) - 32)) for number in (1, 2)]
        assert found == [name == "with"] * 2
        assert len(list(folder.glob("image-*.png"))) == len(images)
        record = json.loads((folder / "videos.json").read_text())["videos"]
        assert [video.get("image") for video in record] == (["image-00.png", "image-01.png"] if images else [None, None])
        [first, second] = report.videos(tmp_path / name, [])["rows"]
        assert (first["image"] != second["image"]) is (name == "with")
        assert (tmp_path / name / report.NAME).read_text().count("<img src=") == len(images)


@pytest.mark.parametrize(
    ("name", "kind"), [("stored", CogVideoXDDIMScheduler), ("ddim", CogVideoXDDIMScheduler), ("dpm", CogVideoXDPMScheduler)]
)
def test_a_sampler_keeps_the_noise_schedule_of_the_model(name, kind):
    stored = CogVideoXDDIMScheduler(snr_shift_scale=2.0, beta_end=0.011)
    sampler = validation.sampler_of(stored, name)
    assert type(sampler) is kind
    assert torch.equal(sampler.alphas_cumprod, stored.alphas_cumprod)
    assert not torch.equal(kind().alphas_cumprod, stored.alphas_cumprod)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_chosen_sampler_begins_at_the_last_timestep_as_the_cards_does_and_the_models_own_stays_as_it_is(spacing):
    stored = CogVideoXDDIMScheduler(snr_shift_scale=3.0, timestep_spacing=spacing)
    for name in ("ddim", "dpm", "stored"):
        sampler = validation.sampler_of(stored, name)
        sampler.set_timesteps(4)
        assert sampler.config.snr_shift_scale == 3.0
        assert (sampler.timesteps.tolist() == [999, 749, 499, 249]) is (spacing == "trailing" or name != "stored")


@pytest.mark.slow
def test_the_dpm_sampler_makes_other_videos_of_the_same_model(train):
    def videos(scheduler):
        folder = train(validation_prompt="a rabbit", max_train_steps=1, num_inference_steps=3, validation_scheduler=scheduler)
        return next((folder / "validation/step-000000").glob("*.mp4")).read_bytes()

    assert videos("ddim") == videos("stored") != videos("dpm")


VIDEOS = {"validation_prompt": "OLDFILM a rabbit:::a bird", "id_token": "OLDFILM", "validation_frames": 5, "validation_steps": 2}


def motion_lines(folder):
    return [line for line in read_json_lines(folder / "metrics.jsonl") if "motion" in line]


@pytest.mark.slow
def test_a_run_with_a_trigger_makes_and_measures_the_video_without_it_and_goes_on_after_a_resume(train, capsys):
    folder = train(**VIDEOS, max_train_steps=2, eval_clips=1)
    first, last = motion_lines(folder)
    assert (first["step"], last["step"]) == (0, 2)
    for step in (0, 2):
        place = folder / f"validation/step-{step:06d}"
        assert [path.name[:11] for path in (place / "without_trigger").glob("*.mp4")] == ["00-a-rabbit"]
        assert len(list(place.rglob("*.mp4"))) == 3
    assert last["moved_with_trigger"] > 0
    assert last["moved_without_trigger"] > 0
    assert last["moved_with_trigger"] != last["moved_without_trigger"]
    assert last["motion_data"] > 0
    assert [video["base"] for video in last["videos"]] == [video["motion"] for video in first["videos"]]
    resumed = train(**VIDEOS, max_train_steps=4, eval_clips=1, output=folder, resume_from_checkpoint="latest")
    assert [line["step"] for line in motion_lines(resumed)] == [0, 2, 4]
    assert motion_lines(resumed)[:2] == [first, last]
    sentences = json.loads((folder / "status.json").read_text())["verdict_sentences"]
    assert any("without the trigger" in sentence.lower() for sentence in sentences) is (
        motion_lines(folder)[-1]["trigger_leak"] is not None
    )
    page = (folder / report.NAME).read_text()
    assert "without the trigger: a rabbit" in page
    assert "Motion of the videos" in page
    off = train(**VIDEOS, max_train_steps=2, validation_without_trigger=False)
    assert not list(off.rglob("without_trigger"))
    assert "trigger_leak" not in motion_lines(off)[-1]
    assert [video["name"] for video in motion_lines(off)[-1]["videos"]] == [video["name"] for video in last["videos"][:2]]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(train, forked, tiny_model, six_clips, encodings, tmp_path):
    steady = VIDEOS | STEADY_ADAM | {"max_train_steps": 2, "learning_rate": 0.5, "rank": 16}
    alone = train(**steady, train_batch_size=2)
    codes, output = forked.run(words(tiny_model, six_clips, tmp_path / "two", encodings, **steady), processes=2)
    assert codes == [0, 0], output
    [one, both] = [motion_lines(folder)[-1] for folder in (alone, tmp_path / "two")]
    assert one.keys() == both.keys()
    for name in ("motion", "motion_base", "motion_data", "moved_with_trigger", "moved_without_trigger"):
        assert both[name] == pytest.approx(one[name], rel=0.01, abs=0.01), name
    assert one["moved_with_trigger"] > 1  # what is compared did change
    assert len(both["videos"]) == 3


def test_a_video_on_a_gpu_saves_the_generators_of_that_gpu_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=None: asked.append(devices) or contextlib.nullcontext())

    def model_on(*place):
        parameter = SimpleNamespace(device=torch.device(*place))
        return SimpleNamespace(training=True, eval=lambda: None, train=lambda mode: None, parameters=lambda: iter([parameter]))

    for place in (("cuda", 1), ("cpu",)):
        with validation.undisturbed(model_on(*place)):
            pass
    assert asked == [[torch.device("cuda", 1)], []]  # None would be those of all GPUs
