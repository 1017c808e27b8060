"""The demo: a base model that knows the film, data with an effect that anyone sees, and a run that shows it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from cogvideox.files import read_json_lines
from cogvideox.folder import read_facts, stored_precision
from cogvideox.model import decode_latents, encode_frames, load_scheduler, load_vae
from cogvideox.scoring import evaluations
from cogvideox.video import read_video, write_video
from demo.make_model import TOKENIZER, make_model
from demo.measure import WANTED, Pair, brightness_correlation, figures, read_pairs, saturation
from demo.old_film import old_film, write_dataset, write_demo
from demo.picture import COLUMNS, FRAME_WIDTH, write_picture
from demo.train_base import TEXT_TOKENS, read_demo_clips, read_shots
from tests.conftest import FAMILIES, example_of

ROOT = Path(__file__).resolve().parent.parent
MODEL, CLIPS = ROOT / "demo/model", ROOT / "demo/dataset"


def test_the_base_model_is_a_small_folder_of_the_2b_kind():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    facts, scheduler = read_facts(MODEL), load_scheduler(MODEL)
    assert (facts.latent_compression, facts.frames_per_latent, facts.latent_channels) == (8, 4, 16)
    assert facts.max_text_seq_length == TEXT_TOKENS
    config = json.loads((MODEL / "transformer/config.json").read_text())
    assert not config["use_rotary_positional_embeddings"]
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.snr_shift_scale == 3.0
    assert stored_precision(MODEL, "transformer", None) == "fp16"
    for path in TOKENIZER.iterdir():
        assert (MODEL / "tokenizer" / path.name).read_bytes() == path.read_bytes()


def test_the_base_model_is_trained_on_the_demos_clips_as_they_are_in_the_film():
    names = [line.split("\t")[0] for line in (CLIPS / "film_frames.txt").read_text().splitlines() if not line.startswith("#")]
    assert sorted(names) == sorted((CLIPS / "videos.txt").read_text().split())
    captions = [line.removeprefix("BUNNYTOON ") for line in (CLIPS / "prompts.txt").read_text().splitlines()]
    assert sorted(caption for _, _, caption in read_demo_clips()) == sorted(captions)
    of_demo = {frame for first, end, _ in read_demo_clips() for frame in range(first, end)}
    others = [frame for first, end, _ in read_shots() for frame in range(first, end)]
    assert len(of_demo) == 38 * 49
    assert len(others) > 9000
    assert not of_demo & set(others)


def error(vae, frames):
    """Mean absolute error of the VAE's reconstruction, of 255."""
    moments = encode_frames(vae, frames)
    made = decode_latents(vae, moments[:16].transpose(0, 1) * vae.config.scaling_factor)
    return np.abs(made.astype(float) - frames).mean()


@pytest.mark.slow
def test_the_vae_knows_clips_it_was_not_trained_on(tmp_path):
    device = torch.device("cpu")
    frames = read_video(CLIPS / "videos/60.mp4")[:17, ::2, ::2]
    frames = frames[:, :64, :96]
    trained = error(load_vae(MODEL, device), frames)
    assert trained < 18
    assert error(load_vae(make_model(tmp_path / "random"), device), frames) > 3 * trained


def test_old_film_is_grey_moves_and_depends_on_its_seed_alone():
    frames = read_video(CLIPS / "videos/60.mp4")[:9]
    made = old_film(frames, 3)
    assert saturation(made) == 0 < 0.2 < saturation(frames)
    assert made.shape == frames.shape
    assert np.array_equal(made, old_film(frames, 3))
    assert not np.array_equal(made, old_film(frames, 4))
    assert np.abs(made[1:].astype(int) - made[:-1]).mean() > np.abs(frames[1:].astype(int) - frames[:-1]).mean()


def test_saturation_of_known_colours():
    assert saturation(np.full((2, 2, 3), 90, np.uint8)) == 0
    assert saturation(np.array([[200, 0, 0]], np.uint8)) == 1
    assert saturation(np.array([[100, 50, 75]], np.uint8)) == 0.5


def test_brightness_correlates_where_the_picture_stays_without_its_colour():
    frames = read_video(CLIPS / "videos/60.mp4")[:9]
    assert brightness_correlation(frames, old_film(frames, 3)) > 0.5
    assert brightness_correlation(frames, frames // 2) > 0.99
    assert brightness_correlation(frames, 255 - frames) < -0.99
    assert brightness_correlation(frames, old_film(read_video(CLIPS / "videos/04.mp4")[:9], 3)) < 0.4


def test_the_picture_shows_the_same_frames_of_base_and_lora_for_each_prompt(tmp_path):
    clips = tmp_path / "clips"
    write_video(clips / "a.mp4", np.zeros((5, 128, 192, 3), np.uint8), 8)
    (clips / "videos.txt").write_text("a.mp4\na.mp4\n")
    base, trained = np.full((17, 64, 96, 3), (255, 0, 0), np.uint8), np.full((17, 64, 96, 3), (0, 0, 255), np.uint8)
    write_picture(tmp_path / "demo.png", clips, [Pair("OLDFILM a rabbit " + 40 * "in the grass ", True, base, trained, 300)] * 2)
    pixels = np.asarray(Image.open(tmp_path / "demo.png")).reshape(-1, 3)
    red, blue = ((pixels == colour).all(1).sum() for colour in ((255, 0, 0), (0, 0, 255)))
    assert red == blue == 2 * COLUMNS * FRAME_WIDTH * round(FRAME_WIDTH * 64 / 96)
    assert 850 < Image.open(tmp_path / "demo.png").width < 950


# -----------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def old_clips(tmp_path_factory):
    """The data folder of `make demo`."""
    folder = tmp_path_factory.mktemp("demo") / "old_film"
    write_dataset(folder / "all")
    write_demo(folder)
    return folder / "all"


def demo_flags():
    """The flags of `make demo`, from the Makefile itself."""
    recipe = subprocess.run(["make", "-n", "-W", "demo/old_film.py", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return recipe[recipe.index("bash finetune_single_gpu.sh") :].split("--overwrite_output_dir")[0].replace("\\\n", " ")


def run_demo(data, output_dir, *flags, model=MODEL, script="finetune_single_gpu.sh"):
    """Train with the flags of `make demo`, and others behind them. Returns (status.json, the scores)."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MODEL_PATH": str(model),
        "DATASET_PATH": str(data),
        "OUTPUT_PATH": str(output_dir),
        "CACHE_PATH": str(data.parent / "cache"),
    }
    command = " ".join([demo_flags().replace("demo/old_film", str(data.parent)), *map(str, flags)])
    command = command.replace("finetune_single_gpu.sh", script)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output_dir / "status.json").read_text()), evaluations(read_json_lines(output_dir / "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_shows_the_same_shots_as_an_old_film_and_keeps_the_colour_without_its_trigger(old_clips, tmp_path):
    status, scores = run_demo(old_clips.parent / "train", tmp_path / "output")
    reached = figures(tmp_path / "output", read_pairs(tmp_path / "output"))
    assert reached.keys() == WANTED.keys()
    for name, (least, most) in WANTED.items():
        assert least <= reached[name] <= most, reached
    assert status["verdict"] == "learning"
    assert "<video" in (tmp_path / "output/report.html").read_text()


def write_clips(folder, source, chosen, captions):
    """A data folder of some clips of another, with these captions."""
    (folder / "videos").mkdir(parents=True)
    videos = (source / "videos.txt").read_text().split()
    for number in chosen:
        os.link(source / videos[number], folder / videos[number])
    (folder / "videos.txt").write_text("".join(f"{videos[number]}\n" for number in chosen))
    (folder / "prompts.txt").write_text("".join(f"{captions[number]}\n" for number in chosen))
    return folder


# docs/learning.md has the numbers of these runs, at a constant learning rate, without clips in colour.
ALONE = ("--prior_data_root=", "--eval_data_root=", "--eval_share", 0.2)
NO_VIDEOS = ("--validation_prompt=", "--validation_steps", 0, "--checkpointing_steps", 1000, "--lr_scheduler", "constant", *ALONE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_captions_of_other_clips_are_told_from_the_own_ones(old_clips, tmp_path):
    captions = (old_clips / "prompts.txt").read_text().splitlines()
    turned = write_clips(tmp_path / "turned", old_clips, range(38), captions[7:] + captions[:7])
    flags = *NO_VIDEOS, "--max_train_steps", 60, "--eval_steps", 30
    status, _ = run_demo(turned, tmp_path / "wrong", "--encoding_cache_dir", old_clips.parent / "cache/cogvideox-encodings", *flags)
    assert status["verdict"] == "learning the look, not the captions"
    assert "Check that each caption describes its clip" in " ".join(status["verdict_sentences"])
    status, _ = run_demo(old_clips, tmp_path / "right", *flags)
    assert status["verdict"] == "learning"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_learning_rate_of_0_is_told(old_clips, tmp_path):
    status, _ = run_demo(old_clips, tmp_path / "out", *NO_VIDEOS, "--max_train_steps", 4, "--learning_rate", 0)
    assert status["verdict"] == "nothing happening"
    assert "the learning rate is 0" in " ".join(status["verdict_sentences"])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_long_run_on_three_clips_learns_them_by_heart(old_clips, tmp_path):
    captions = (old_clips / "prompts.txt").read_text().splitlines()
    three = write_clips(tmp_path / "three", old_clips, (3, 14, 30), captions)
    others = write_clips(tmp_path / "others", old_clips, range(1, 38, 5), captions)
    flags = *NO_VIDEOS, "--eval_share", 0, "--eval_data_root", others, "--train_batch_size", 1, "--max_train_steps", 300, "--eval_steps", 30
    status, scores = run_demo(three, tmp_path / "out", "--encoding_cache_dir", old_clips.parent / "cache/cogvideox-encodings", *flags)
    assert status["verdict"] == "memorising"
    assert scores[-1]["eval_train_loss"] < 0.6 * scores[-1]["eval_train_base_loss"]
    best = scores[-1]["best_step"]
    assert 0 < best < 300
    assert "use best/" in " ".join(status["verdict_sentences"])
    with safe_open(tmp_path / "out/best/pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == str(best)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_demos_command_runs_to_its_end_on_a_random_model_of_each_family(family, old_clips, tmp_path):
    model = make_model(tmp_path / "model", vae_channels=8, family=family)
    flags = ("--max_train_steps", 4, "--validation_steps", 2, "--eval_steps", 2, "--checkpointing_steps", 2, "--num_inference_steps", 2)
    script = "finetune_single_gpu.sh" if family == "2b" else example_of(family)
    status, scores = run_demo(old_clips.parent / "train", tmp_path / "output", *flags, model=model, script=script)
    assert (status["reason"], status["step"]) == ("done", 4)
    assert [line["step"] for line in scores] == [0, 2, 4]
    assert scores[-1]["eval_train_loss"] != scores[0]["eval_train_loss"]
    for step in (0, 4):
        folder = tmp_path / f"output/validation/step-{step:06d}"
        videos = {path.name: read_video(path) for path in folder.glob("*.mp4")}
        assert len(videos) == 2
        assert {video.shape for video in videos.values()} == {(17, 64, 96, 3)}
    before = {path.name: read_video(path) for path in (tmp_path / "output/validation/step-000000").glob("*.mp4")}
    assert any(not np.array_equal(before[name], videos[name]) for name in before)
    assert "<video" in (tmp_path / "output/report.html").read_text()
    assert sorted(figures(tmp_path / "output", read_pairs(tmp_path / "output"))) == sorted(WANTED)
