"""Each family of CogVideoX: its videos are those of its own stock pipeline, and its runs are trained, resumed, shown and used."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from cogvideox import folder as folder_of
from cogvideox import hub, model, validation
from cogvideox.files import LORA_FILE
from cogvideox.video import write_video
from tests.conftest import FAMILIES, IMAGE_TO_VIDEO, same
from tests.stand_ins import flags_of
from tests.test_export_comfyui import make_lora
from tests.test_report import run_of
from tools import generate, lora_file

CPU = torch.device("cpu")
SETTINGS = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 6.0}


def picture(seed=0):
    """A picture of the videos' size, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def advised(folder):
    """(--validation_scheduler, --use_dynamic_cfg) of a model, as a run without these flags has them."""
    args = flags_of("", validation_scheduler=None, use_dynamic_cfg=None)
    folder_of.fill_in_defaults(args, folder_of.read_facts(folder))
    return args.validation_scheduler, args.use_dynamic_cfg


def prompt_embeddings():
    """Of a prompt and of the negative one, [T, D] each."""
    return torch.randn(2, 226, 32, generator=torch.Generator().manual_seed(5))


def our_video(folder, monkeypatch, image=None, seed=1, **settings):
    """The frames of the only validation video, before they are compressed, uint8 [F, H, W, 3]."""
    kept, (sampler, dynamic) = [], advised(folder)
    scheduler = validation.sampler_of(model.load_scheduler(folder), sampler)
    prompt, negative = prompt_embeddings()
    with monkeypatch.context() as patch:
        patch.setattr(validation, "write_video", lambda path, frames, fps: kept.append(frames))
        failures = validation.validate(
            folder, validation.video_jobs(["a rabbit"], 1, seed), 0, 1, model.load_transformer(folder, torch.float32), scheduler,
            ([prompt], negative), lambda: model.load_vae(folder, CPU), CPU, 8.0, SETTINGS | {"use_dynamic_cfg": dynamic} | settings,
            [] if image is None else [image],
        )  # fmt: skip
    assert failures == []
    return kept[0].astype(int)


def stock_video(folder, image=None, seed=1, result=None, **settings):
    """The same video from diffusers' own calls, as the authors advise them for the family. result: the folder of a run's LoRA or
    transformer."""
    pipeline = DiffusionPipeline.from_pretrained(folder)  # its own class
    pipeline.set_progress_bar_config(disable=True)
    if result and (result / LORA_FILE).exists():
        pipeline.load_lora_weights(str(result), weight_name=LORA_FILE)
    elif result:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(result / "transformer")
    rotary = pipeline.transformer.config.use_rotary_positional_embeddings
    if rotary:
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    prompt, negative = prompt_embeddings()
    text = {} if "prompt" in settings else {"prompt_embeds": prompt[None], "negative_prompt_embeds": negative[None]}
    given = text | ({} if image is None else {"image": Image.fromarray(image)})
    generator = torch.Generator().manual_seed(seed)
    made = pipeline(generator=generator, use_dynamic_cfg=rotary, output_type="np", **SETTINGS | given | settings)
    return np.round(made.frames[0] * 255).astype(int)


def image_for(family, seed=0):
    return picture(seed) if family in IMAGE_TO_VIDEO else None


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_validation_video_is_the_stock_pipelines(family_model, family, monkeypatch):
    folder, image = family_model(family), image_for(family)
    ours = our_video(folder, monkeypatch, image)
    theirs = stock_video(folder, image)
    assert ours.shape == (9, 32, 48, 3)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(our_video(folder, monkeypatch, image, seed=2) - theirs).max() > 3
    if family in IMAGE_TO_VIDEO:
        assert np.abs(our_video(folder, monkeypatch, image_for(family, seed=1)) - theirs).max() > 3
    if folder_of.read_facts(folder).latents_per_patch > 1:
        with monkeypatch.context() as patch:
            patch.setattr(validation, "drop_padding", lambda latents, *rest: latents)
            kept = our_video(folder, patch, image)
        assert np.abs(kept[-9:] - theirs).max() > 3  # to drop frames after decoding is not enough


@pytest.fixture
def shown(monkeypatch):
    """What validations made: {(folder's name, file's name): frames before they are compressed}, and their arguments."""
    seen = {}, []
    validate = validation.validate

    def keep(path, frames, fps):
        seen[0][path.parent.name, path.name] = frames.astype(int)
        write_video(path, frames, fps)

    monkeypatch.setattr(validation, "write_video", keep)
    monkeypatch.setattr(validation, "validate", lambda *args: seen[1].append(args) or validate(*args))
    return seen


def weights_of(run):
    """The exported weights of a run."""
    file = run / LORA_FILE
    return load_file(file if file.exists() else run / "transformer/diffusion_pytorch_model.safetensors")


FLAGS = {"validation_prompt": "a rabbit:::a bird", "max_train_steps": 2, "checkpointing_steps": 1, "num_inference_steps": 3}
FLAGS |= {"eval_clips": 1, "eval_share": 0.34, "eval_steps": 1}


def runs():
    """All (family, training type) as cases. Long are the 2B, whose parts have tests of their own, and the full fine-tuning of two."""
    for family in FAMILIES:
        for training_type in ("lora", "sft"):
            is_long = family == "2b" or (training_type == "sft" and family not in IMAGE_TO_VIDEO)
            yield pytest.param(family, training_type, marks=pytest.mark.long if is_long else pytest.mark.slow)


@pytest.mark.parametrize(("family", "training_type"), list(runs()))
def test_a_run_is_shown_resumed_and_used_as_its_stock_pipeline_has_it(
    family_model, family, training_type, train, shown, tmp_path, monkeypatch
):
    folder, (videos, calls) = family_model(family), shown
    facts = folder_of.read_facts(folder)
    flags = {"model": folder, "training_type": training_type, "learning_rate": 0.2 if training_type == "lora" else 1e-2}
    run = train(**FLAGS | flags)
    first, last = (next(frames for (step, name), frames in videos.items() if step == f"step-00000{n}" and "bird" in name) for n in (0, 2))

    # The images are those of the held-out clips, and sampler and guidance the model's.
    scheduler, settings, images = calls[-1][5], calls[-1][-2], calls[-1][-1]
    assert len(images) == (2 if facts.image_channels else 0)
    assert len(list((run / "validation").rglob("image-*.png"))) == 2 * len(images)
    assert isinstance(scheduler, CogVideoXDDIMScheduler if family == "2b" else CogVideoXDPMScheduler)
    stored = model.load_scheduler(folder)
    assert (scheduler.config.timestep_spacing, scheduler.config.snr_shift_scale) == ("trailing", stored.config.snr_shift_scale)
    assert settings["use_dynamic_cfg"] is (family != "2b")

    # The base model's videos and the last ones are the stock pipeline's, from the text and with what was exported.
    given = {"image": images[1]} if images else {}
    asked = given | {"seed": 42, "prompt": "a bird"}
    assert np.abs(first - stock_video(folder, **asked)).max() <= 1
    assert np.abs(last - stock_video(folder, result=run, **asked)).max() <= 1
    assert np.abs(last - first).max() > 3
    made = []
    monkeypatch.setattr(generate, "write_video", lambda path, frames, fps: made.append(frames) or write_video(path, frames, fps))
    words = ["--pretrained_model_name_or_path", folder, "--prompt", "a bird", "--num_inference_steps", 3, "--output_dir", tmp_path / "made"]
    words += ["--height", 32, "--width", 48, "--num_frames", 9, "--lora" if training_type == "lora" else "--transformer", run]
    if images:
        Image.fromarray(images[1]).save(tmp_path / "bird.png")
        words += ["--image", tmp_path / "bird.png"]
    generate.main(list(map(str, words)))
    assert np.abs(made[0] - last).max() <= 1

    # Scores were taken, and a run that is resumed ends with the same bits.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_held_out_loss" in line] == [0, 1, 2]
    broken = shutil.copytree(run, tmp_path / "broken")
    shutil.rmtree(broken / "checkpoint-2")
    train(output=broken, resume_from_checkpoint="latest", **FLAGS | flags)
    assert same(weights_of(run), weights_of(broken))
    assert not same(weights_of(run), weights_of(train(max_train_steps=2, seed=7, **flags)))


def result_of_random_weights(folder, training_type, place):
    """A LoRA, or a transformer, that differs from the base. Returns its folder."""
    if training_type == "lora":
        return make_lora(folder, place, size=0.5)
    transformer = model.load_transformer(folder, torch.float32)
    transformer.proj_out.weight.data *= 2
    transformer.save_pretrained(place / "transformer")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("training_type", ["lora", "sft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_on_the_model_card_makes_the_familys_video(family_model, family, training_type, tmp_path, monkeypatch):
    folder, image = family_model(family), image_for(family)
    facts = {"num_frames": 9, "height": 32, "width": 48, "base_model": str(folder), "example_prompt": "a rabbit"}
    run = run_of(**facts, pipeline=model.pipeline_class(model.CogVideoXTransformer3DModel.load_config(folder / "transformer")).__name__)
    sampler, dynamic = advised(folder)
    run["flags"] |= {"training_type": training_type, "mixed_precision": "no", "validation_scheduler": sampler, "use_dynamic_cfg": dynamic}
    result = result_of_random_weights(folder, training_type, tmp_path / "result")
    code = hub.write_model_card(tmp_path, run).read_text().split("```python\n")[1].split("```")[0]
    Image.fromarray(picture()).save(tmp_path / "one.png")
    changes = {'.to("cuda")': "", "path/to/this/folder": str(result), "path/to/an/image.png": str(tmp_path / "one.png")}
    changes[").frames[0]"] = ", generator=torch.Generator().manual_seed(1), num_inference_steps=3).frames[0]"
    for theirs, ours in changes.items():
        assert code.count(theirs) == (theirs != "path/to/an/image.png" or family in IMAGE_TO_VIDEO), theirs
        code = code.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    made = np.stack([np.asarray(frame) for frame in names["video"]]).astype(int)
    expected = stock_video(folder, image, result=result, prompt="a rabbit", negative_prompt="")
    assert np.abs(made - expected).max() <= 1
    assert np.abs(stock_video(folder, image, prompt="a rabbit", negative_prompt="") - expected).max() > 3
    assert (tmp_path / "video.mp4").exists()
    header, task = ModelCard((tmp_path / "README.md").read_text()).data, "image-to-video" if family in IMAGE_TO_VIDEO else "text-to-video"
    assert header.pipeline_tag == task
    assert header.tags == [task, "cogvideox", *(["lora"] if training_type == "lora" else []), "diffusers"]
    assert ("CogVideoXDPMScheduler" in code, "use_dynamic_cfg=True" in code) == (family != "2b", family != "2b")


def test_the_card_of_a_run_of_an_earlier_version_is_what_it_was():
    run = run_of(base_model="THUDM/CogVideoX-2b")
    assert run["facts"].pop("pipeline") == "CogVideoXPipeline"
    assert not {"validation_scheduler", "use_dynamic_cfg"} & run["flags"].keys()
    lines = hub.snippet(run).splitlines()
    assert lines[:3] == ["import torch", "from diffusers import CogVideoXPipeline", "from diffusers.utils import export_to_video"]
    assert lines[-2].endswith("num_frames=0, height=0, width=0).frames[0]")
    assert len(lines) == 8


@pytest.mark.slow
def test_the_vae_encodes_the_image_in_its_own_precision(image_model, monkeypatch):
    whole = our_video(image_model, monkeypatch, picture())
    load = model.load_vae
    monkeypatch.setattr(model, "load_vae", lambda *args: load(*args).to(torch.bfloat16))
    halved = our_video(image_model, monkeypatch, picture())
    assert 0 < np.abs(halved - whole).mean() < 3


def in_small_tiles(vae):
    """A VAE with tiles that are smaller than the videos of these tests."""
    vae.tile_sample_min_height = vae.tile_sample_min_width = 16
    vae.tile_latent_min_height = vae.tile_latent_min_width = 2
    vae.tile_overlap_factor_height = vae.tile_overlap_factor_width = 0.5
    return vae


@pytest.mark.slow
def test_the_image_of_a_video_is_encoded_whole_where_videos_are_decoded_in_tiles(image_model, tmp_path, monkeypatch):
    scheduler, texts = model.load_scheduler(image_model), prompt_embeddings()
    given = SETTINGS | {"num_inference_steps": 1, "image": Image.fromarray(picture())}

    def latents(tiling):
        vae, transformer = (
            in_small_tiles(model.load_vae(image_model, CPU, tiling=tiling)),
            model.load_transformer(image_model, torch.float32),
        )
        made = validation.sample_latents(transformer, scheduler, *texts, 1, CPU, vae=vae, **given)
        assert vae.use_tiling == tiling
        return made

    def frames():
        args = flags_of("", lora=None, offload="none", enable_slicing=True, enable_tiling=True, variant=None)
        pipeline = lora_file.load_pipeline(args, image_model, image_model, torch.float32, CPU)
        in_small_tiles(pipeline.vae)
        return lora_file.make_video(pipeline, texts, 1, None, CPU, lambda: None, **given).astype(int)

    whole, tiled, video = latents(False), latents(True), frames()
    assert torch.equal(whole, tiled)
    monkeypatch.setattr(validation, "whole_frames", contextlib.nullcontext)
    monkeypatch.setattr(model, "whole_frames", contextlib.nullcontext)
    assert not torch.allclose(latents(True), whole, atol=1e-2)
    assert np.abs(frames() - video).max() > 3


@pytest.mark.slow
@pytest.mark.parametrize("training_type", ["lora", "sft"])
def test_a_run_in_bf16_makes_the_videos_of_an_image_to_video_model(family_model, training_type, train, capsys):
    run = train(model=family_model("1.5-5b-i2v"), training_type=training_type, mixed_precision="bf16", validation_prompt="a rabbit")
    assert "failed, training continues" not in capsys.readouterr().err
    assert len(list((run / "validation").rglob("*.mp4"))) == 2
