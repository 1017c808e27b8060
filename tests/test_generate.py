"""Videos with a trained LoRA: what is written, what is the same, and what is refused."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, DiffusionPipeline
from PIL import Image

from cogvideox import folder as folder_of
from cogvideox.lora import LORA_FILE, read_layers
from cogvideox.validation import video_jobs
from cogvideox.video import read_video, write_video
from demo.make_model import make_model
from tests.conftest import FAMILIES
from tests.test_export_comfyui import make_lora, nameless, refused
from tools import generate, lora_file, merge

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
NAME = video_jobs(["a rabbit"], 1, 0)[0]["name"].removesuffix("0.mp4")


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory):
    """A LoRA whose effect shows in a video."""
    return make_lora(tiny_model, tmp_path_factory.mktemp("run"), size=0.5)


def line(model, output, **flags):
    """A command line: small and quick, with `flags` on top (True: a switch; False: --no-...; None: left out)."""
    words = []
    for name, value in (
        {"pretrained_model_name_or_path": model, "output_dir": output, "prompt": "a rabbit", "seed": 1} | SMALL | flags
    ).items():
        if value is not None:
            words.append(f"--no-{name}" if value is False else f"--{name}")
            words += [] if isinstance(value, bool) else map(str, value) if isinstance(value, list) else [str(value)]
    return words


@pytest.fixture
def frames(monkeypatch):
    """What was written as videos, name -> frames before they are compressed."""
    kept = {}

    def keep(path, video, fps):
        kept[path.name] = video
        write_video(path, video, fps)

    monkeypatch.setattr(generate, "write_video", keep)
    return kept


def stock_video(model, lora=None, scale=1.0, seed=1, prompt="a rabbit", **settings):
    """The same video from diffusers' own calls as the authors advise them for the family, uint8 [F, H, W, 3]."""
    pipeline, settings = DiffusionPipeline.from_pretrained(model), SMALL | settings
    if pipeline.transformer.config.use_rotary_positional_embeddings:
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        settings = {"use_dynamic_cfg": True} | settings
    if lora:
        pipeline.load_lora_weights(str(lora), weight_name=LORA_FILE, adapter_name="lora")
        pipeline.set_adapters("lora", scale)
    generator = torch.Generator().manual_seed(seed)
    asked = {"prompt": prompt, "negative_prompt": "", "guidance_scale": 6.0, "output_type": "np"}
    video = pipeline(generator=generator, **asked | settings).frames[0]
    return np.round(video * 255).astype(np.uint8)[-settings["num_frames"] :]


@pytest.mark.slow
def test_a_sweep_beside_the_base_leaves_videos_grids_and_the_settings(tiny_model, lora, tmp_path, monkeypatch):
    encoded, encode = [], lora_file.model.encode_captions
    monkeypatch.setattr(lora_file.model, "encode_captions", lambda *args: encoded.append(args[2]) or encode(*args))
    (tmp_path / "more.txt").write_text("a bird\n\n")
    flags = {"seed": [1, 2], "lora_scale": [0.5, 1], "compare_base": True, "prompts_file": tmp_path / "more.txt", "fps": 4}
    generate.main(line(tiny_model, tmp_path / "out", lora=lora, **flags))
    assert encoded == [["a rabbit"], ["a bird"], [""]]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{NAME}{seed}-{column}.mp4" for seed in (1, 2) for column in ("base", "scale0.5", "scale1")} < names
    assert len(names) == 2 * 2 * 3 + 2 + 2
    assert read_video(tmp_path / f"out/{NAME}1-scale1.mp4").shape == (5, 32, 48, 3)
    grid = read_video(next((tmp_path / "out").glob("00-*-grid.mp4")))
    assert grid.shape == (5, 2 * (32 + 18), 3 * 48, 3)
    assert Image.open(tmp_path / "out/contact_sheet.png").height > 12 * 32
    record = json.loads((tmp_path / "out/videos.json").read_text())
    assert {video["name"] for video in record["videos"]} == {name for name in names if "seed" in name}
    assert [video["made_with"] for video in record["videos"][:3]] == ["base model", "LoRA 0.5", "LoRA 1"]
    assert record["settings"]["num_frames"] == 5
    assert len(record["settings"]["sha256"]) == 64


def test_videos_are_those_of_the_stock_pipeline_at_each_strength(tiny_model, lora, tmp_path, frames):
    generate.main(line(tiny_model, tmp_path / "out", lora=lora / LORA_FILE, lora_scale=[0, 2, 1]))
    stock = {scale: stock_video(tiny_model, lora, scale).astype(int) for scale in (1, 2)} | {0: stock_video(tiny_model).astype(int)}
    # Scale 0 is the base to the last bit, though the LoRA is loaded, and nothing else is.
    assert np.array_equal(frames[f"{NAME}1-base.mp4"], stock[0])
    for scale in (1, 2):
        made = frames[f"{NAME}1-scale{scale}.mp4"]
        assert np.abs(made - stock[scale]).max() <= 1
        assert np.abs(made - stock[0]).max() > 3
    assert np.abs(stock[1] - stock[2]).max() > 3


@pytest.mark.slow
def test_a_seed_gives_the_same_video_whatever_is_made_with_it(tiny_model, lora, tmp_path, frames):
    generate.main(line(tiny_model, tmp_path / "alone", lora=lora))
    alone = dict(frames)
    frames.clear()
    generate.main(line(tiny_model, tmp_path / "together", lora=lora, prompt=["a rabbit", "a bird"], seed=[2, 1], lora_scale=[0.5, 1]))
    name = f"{NAME}1-scale1.mp4"
    assert list(alone) == [name]
    assert np.array_equal(alone[name], frames[name])
    bird = next(key for key in frames if "bird" in key and "seed1-scale1" in key)
    for other in (f"{NAME}2-scale1.mp4", f"{NAME}1-scale0.5.mp4", bird):
        assert not np.array_equal(frames[other], frames[name]), other


def test_a_fine_tuned_transformer_is_taken_by_its_run_or_itself(tiny_model, lora, tmp_path, frames, capsys):
    tuned = tmp_path / "tuned"
    merge.main([str(word) for word in ("--pretrained_model_name_or_path", tiny_model, "--lora", lora, "--output_dir", tuned)])
    generate.main(line(tiny_model, tmp_path / "a", transformer=tuned, compare_base=True))
    made, base = frames[f"{NAME}1-finetuned.mp4"].astype(int), frames[f"{NAME}1-base.mp4"]
    assert np.array_equal(base, stock_video(tiny_model))
    assert np.abs(made - stock_video(tiny_model, lora)).max() <= 1
    assert np.abs(made - base).max() > 3
    assert lora_file.find_transformer(tuned / "transformer", tiny_model) == lora_file.find_transformer(tuned, tiny_model) == tuned
    other = make_model(tmp_path / "other", vae_channels=8, layers=1, heads=2, head_width=16)
    assert "its num_layers is 1, the base model's 2" in refused(generate.main, capsys, *line(tiny_model, tmp_path / "c", transformer=other))
    assert "no transformer/config.json" in refused(generate.main, capsys, *line(tiny_model, tmp_path / "c", transformer=tmp_path / "a"))


def wide_picture(path, height, width, seed=0):
    """A picture twice as wide as the videos, as a file. Returns its middle, which is what they begin with: uint8 [height, width, 3]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, 2 * width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels[:, width // 2 : width // 2 + width]


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "2b"])
def test_each_familys_videos_are_its_pipelines_with_size_sampler_and_guidance_of_the_model(family, family_model, tmp_path, frames):
    model = family_model(family)
    facts = folder_of.read_facts(model)
    size = {"height": facts.sample_size[0], "width": facts.sample_size[1], "num_frames": facts.sample_frames}
    size |= {"num_inference_steps": 2, "guidance_scale": 60.0}  # random weights hardly look at the text
    folder, flags, given = make_lora(model, tmp_path / "run", size=0.5), {}, {}
    if facts.image_channels:
        given = {"image": Image.fromarray(wide_picture(tmp_path / "one.png", size["height"], size["width"]))}
        flags = {"image": tmp_path / "one.png"}
    asked = dict.fromkeys(("height", "width", "num_frames")) | {"guidance_scale": 60.0} | flags
    generate.main(line(model, tmp_path / "out", lora=folder, compare_base=True, **asked))
    made, base = (next(video.astype(int) for name, video in frames.items() if name.endswith(f"{kind}.mp4")) for kind in ("scale1", "base"))
    assert made.shape == (size["num_frames"], size["height"], size["width"], 3)
    assert np.abs(base - stock_video(model, **size, **given)).max() <= 1
    assert np.abs(made - stock_video(model, folder, **size, **given)).max() <= 1
    assert np.abs(made - base).max() > 3
    assert np.abs(base - stock_video(model, **size, **given, use_dynamic_cfg=False)).max() > 3
    settings = json.loads((tmp_path / "out/videos.json").read_text())["settings"]
    expected = {"scheduler": "dpm", "use_dynamic_cfg": True, "fps": 16.0 if facts.latents_per_patch > 1 else 8.0}
    assert {name: settings[name] for name in expected} == expected
    frames.clear()
    generate.main(line(model, tmp_path / "other", lora=folder, scheduler="stored", use_dynamic_cfg=False, lora_scale=0, **asked))
    assert np.abs(next(iter(frames.values())) - base).max() > 3


@pytest.mark.slow
def test_each_prompt_has_its_image_or_all_the_same_and_images_are_in_the_names_and_the_sheet(image_model, tmp_path, frames):
    folder = make_lora(image_model, tmp_path / "run", size=0.5)
    pictures = [wide_picture(tmp_path / f"{name}.png", 32, 48, seed) for seed, name in enumerate(("one", "two"))]
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    size = {"num_frames": 9, "num_inference_steps": 1}
    generate.main(line(image_model, tmp_path / "out", lora=folder, prompt=["a rabbit", "a rabbit"], image=files, **size))
    first, second = frames.values()
    assert len(frames) == 2  # the same prompt and seed, under two names
    for video, picture in ((first, pictures[0]), (second, pictures[1])):
        assert np.abs(video - stock_video(image_model, folder, image=Image.fromarray(picture), **size).astype(int)).max() <= 1
    assert np.abs(first.astype(int) - second).max() > 3
    record = json.loads((tmp_path / "out/videos.json").read_text())["videos"]
    assert [(video["prompt"], video["image"]) for video in record] == [("a rabbit", str(file)) for file in files]
    sheet = np.asarray(Image.open(tmp_path / "out/contact_sheet.png").convert("RGB"))
    for picture in pictures:
        assert any(np.array_equal(sheet[y : y + 32, 4:52], picture) for y in range(sheet.shape[0] - 32))
    frames.clear()
    generate.main(line(image_model, tmp_path / "one", lora=folder, prompt=["a rabbit", "a bird"], image=files[1], **size))
    assert np.array_equal(next(video for name, video in frames.items() if "bird" not in name), second)


def test_images_that_a_model_does_not_read_or_lacks_are_refused(tiny_model, image_model, tmp_path, capsys):
    def told(model, **flags):
        size = {"height": 32, "width": 48, "num_frames": 9}
        return refused(generate.main, capsys, *line(model, tmp_path / "out", lora=tmp_path / "none", **size | flags))

    Image.new("RGB", (48, 32)).save(tmp_path / "one.png")
    Image.new("RGB", (48, 32)).save(tmp_path / "two.webp", save_all=True, append_images=[Image.new("RGB", (48, 32), "red")])
    for name in ("text.png", "one.txt"):
        (tmp_path / name).write_text("no picture")
    assert "this model is text-to-video and reads no image; leave it out" in told(tiny_model, image=tmp_path / "one.png")
    assert "--image: this model is image-to-video; give what the videos begin with" in told(image_model)
    assert "--image: 2 images for 1 prompts" in told(image_model, image=[tmp_path / "one.png"] * 2)
    said = told(image_model, prompt=list("abcd"), image=[tmp_path / name for name in ("none.png", "text.png", "two.webp", "one.txt")])
    for words in ("none.png: no such file", "text.png: not a readable image", "an animation of 2 pictures", "not an image by its name"):
        assert words in said, words
    assert "one.png: given twice" in told(image_model, prompt=["a", "a"], image=[tmp_path / "one.png"] * 2)
    assert "--height 0" in told(image_model, height=0, image=tmp_path / "one.png")


@pytest.mark.slow
def test_sizes_that_the_model_was_not_made_for_are_told(tiny_model, temporal_patch_model, tmp_path, capsys):
    for model in (tiny_model, temporal_patch_model):
        folder, notes = make_lora(model, tmp_path / model.name, size=0.5), folder_of.geometry_notes(folder_of.read_facts(model), 32, 48, 9)
        generate.main(line(model, tmp_path / "out", lora=folder, num_inference_steps=1, num_frames=9))
        told = capsys.readouterr().err
        assert "32 x 48: this model was made for 64 x 96" in told
        assert all(note in told for note in notes)
        generate.main(line(model, tmp_path / "out", lora=folder, num_inference_steps=1, num_frames=9, height=None, width=None))
        assert "this model was made for 64 x 96" not in capsys.readouterr().err


def test_offloaded_models_make_the_same_video(tiny_model, lora, monkeypatch):
    device = torch.device("cpu")
    embeddings = [lora_file.encode_prompts(tiny_model, ["a rabbit", ""], device)[text] for text in ("a rabbit", "")]
    args = SimpleNamespace(lora=lora / LORA_FILE, variant=None, enable_slicing=True, enable_tiling=True)
    videos = {}
    for args.offload in ("none", "model"):
        pipeline = lora_file.load_pipeline(args, tiny_model, tiny_model, torch.float32, device)
        assert hasattr(pipeline.transformer, "_hf_hook") == (args.offload == "model")
        run = functools.partial(
            lora_file.make_video, pipeline, embeddings, 1, device=device, after_step=lambda: None, guidance_scale=6.0, **SMALL
        )
        videos[args.offload] = [run(scale) for scale in (0.0, 1.0, 0.0)]
    assert all(np.array_equal(a, b) for a, b in zip(*videos.values(), strict=True))
    assert np.array_equal(videos["none"][0], videos["none"][2])
    assert not np.array_equal(videos["none"][0], videos["none"][1])
    # Layer by layer needs a GPU: accelerate's hooks do not run with the CPU on both sides.
    asked = []
    monkeypatch.setattr(CogVideoXPipeline, "enable_sequential_cpu_offload", lambda self, device: asked.append(device))
    args.offload = "sequential"
    lora_file.load_pipeline(args, tiny_model, tiny_model, torch.float32, device)
    assert asked == [device]


def test_only_files_of_the_same_names_are_written_over(tiny_model, lora, tmp_path):
    out = tmp_path / "out"
    generate.main(line(tiny_model, out, lora=lora, num_inference_steps=1))
    (out / "mine.txt").write_text("mine")
    first = (out / f"{NAME}1-scale1.mp4").read_bytes()
    generate.main(line(tiny_model, out, lora=lora, num_inference_steps=1, seed=2))
    assert (out / f"{NAME}1-scale1.mp4").read_bytes() == first
    generate.main(line(tiny_model, out, lora=lora, num_inference_steps=3))
    assert (out / f"{NAME}1-scale1.mp4").read_bytes() != first
    assert (out / "mine.txt").read_text() == "mine"
    assert (out / f"{NAME}2-scale1.mp4").exists()


def test_a_grid_has_labels_and_a_size_that_players_take():
    video = np.full((2, 480, 720, 3), 128, np.uint8)
    made = generate.grid([[(f"LoRA {column}, seed {row}", video) for column in range(4)] for row in range(3)])
    assert made.shape == (2, 3 * (320 + 18), 4 * 480, 3)
    strip = made[0, 338 : 338 + 18, 480 : 480 + 100]
    assert (strip < 64).any()
    assert (strip > 192).any()
    assert not np.array_equal(strip, made[0, 338 : 338 + 18, 960 : 960 + 100])  # each its own label
    assert (made[:, 18 : 18 + 320] == 128).all()


# -----------------------------------------------------------------------------
# Mistakes


def test_all_mistakes_are_told_at_once_and_before_a_model_is_loaded(tiny_model, tmp_path, capsys, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(lora_file.model, "load_text_encoder", loaded)
    monkeypatch.setattr(lora_file.model, "load_transformer", loaded)
    flags = {"prompt": ["a rabbit", "a rabbit"], "seed": [1, -1, 1], "lora_scale": [1, "nan", 1.0], "height": 40, "num_frames": 6}
    flags |= {
        "num_inference_steps": 2000,
        "fps": 0,
        "guidance_scale": -1,
        "offload": "model",
        "dtype": "fp16",
        "prompts_file": tmp_path / "no",
    }
    said = refused(generate.main, capsys, *line(tiny_model, tmp_path / "out", lora=tmp_path / "none", **flags))
    for words in (
        "--prompt a rabbit: given twice",
        "--seed 1: given twice",
        "--seed -1: from 0",
        "--lora_scale 1: given twice",
        "--lora_scale nan: a number",
        "--height 40: this model needs multiples of 16",
        "--num_frames 6: this model needs 4k + 1 frames",
        "--num_inference_steps 2000",
        "--fps 0.0",
        "--guidance_scale -1.0",
        "--offload model: moves weights between a GPU and host memory, and here is no GPU",
        "--dtype fp16",
        "cannot be read (No such file or directory)",
        "no such file or folder",
    ):
        assert words in said, words
    assert said.count("ERROR[2]") == 14
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_model_and_other_wrong_files_are_refused(tiny_model, lora, tmp_path, capsys):
    def told(**flags):
        return refused(generate.main, capsys, *line(tiny_model, tmp_path / "out", **flags))

    wide = make_model(tmp_path / "wide", vae_channels=8, layers=3, heads=4, head_width=16)
    of_wide = make_lora(wide, tmp_path / "wide-run")
    assert "(num_attention_heads 4 and 2, num_layers 3 and 2); take the model that it was trained on" in told(lora=of_wide)
    said = told(lora=nameless(of_wide))
    assert "4 of its 12 layers are not in" in said
    assert "transformer_blocks.2." in said
    assert "64 to 64 values in the LoRA and 32 to 32 in the model" in said
    assert "not a LoRA's weight" in told(lora=tiny_model / "transformer/diffusion_pytorch_model.safetensors")
    assert "tools.generate takes it as --transformer" in told(lora=tiny_model)
    assert "give what was trained, one of them" in told()
    assert "give what was trained, one of them" in told(lora=lora, transformer=tiny_model)
    assert "--lora_scale: is the strength" in told(transformer=tiny_model, lora_scale=1)
    assert "give what the videos should show" in told(lora=lora, prompt=" ")
    assert "give what the videos should show" in told(lora=lora, prompt=None)
    assert "no such folder" in refused(generate.main, capsys, *line(tmp_path / "no-model", tmp_path / "out", lora=lora))
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(generate.main, capsys, *line(tiny_model, tmp_path / "file", lora=lora))
    generate.main(line(tiny_model, tmp_path / "out", lora=lora))


def test_too_little_memory_and_a_prompt_that_is_too_long_are_told(tiny_model, lora, tmp_path, capsys, monkeypatch):
    generate.main(line(tiny_model, tmp_path / "out", lora=lora, prompt="rabbit " * 300))
    assert "tokens, and the model reads 226: the last" in capsys.readouterr().err

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(lora_file, "make_video", full)
    with pytest.raises(SystemExit) as stop:
        generate.main(line(tiny_model, tmp_path / "out", lora=lora))
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "out of memory at 5 frames of 32 x 48: try --offload model" in said
    assert "this prompt has" not in said


@pytest.mark.slow
def test_what_the_trainer_wrote_is_taken_from_the_run_its_best_and_a_checkpoint(train, tiny_model, tmp_path, frames):
    run = train(eval_clips=1, eval_share=0.34, checkpointing_steps=1)
    for folder in (run, run / "best", run / "checkpoint-1"):
        assert lora_file.find_lora(folder) == folder / LORA_FILE
        assert lora_file.check_fit(folder / LORA_FILE, read_layers(folder / LORA_FILE), tiny_model) == []
    generate.main(line(tiny_model, tmp_path / "out", lora=run, compare_base=True, num_inference_steps=1, lora_scale=20))
    assert not np.array_equal(frames[f"{NAME}1-base.mp4"], frames[f"{NAME}1-scale20.mp4"])
