"""Each family of CogVideoX: its videos are those of its own stock pipeline, and its runs are trained, resumed, shown and used."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DiffusionPipeline
from PIL import Image

from cogvideox import folder as folder_of
from cogvideox import model, validation
from tests.conftest import FAMILIES
from tests.stand_ins import flags_of

IMAGE_TO_VIDEO = [family for family in FAMILIES if "i2v" in family]
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


def stock_video(folder, image=None, seed=1, **settings):
    """The same video from diffusers' own calls, as the authors advise them for the family."""
    pipeline = DiffusionPipeline.from_pretrained(folder)  # its own class
    pipeline.set_progress_bar_config(disable=True)
    rotary = pipeline.transformer.config.use_rotary_positional_embeddings
    if rotary:
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    prompt, negative = prompt_embeddings()
    given = {} if image is None else {"image": Image.fromarray(image)}
    made = pipeline(
        prompt_embeds=prompt[None], negative_prompt_embeds=negative[None], generator=torch.Generator().manual_seed(seed),
        use_dynamic_cfg=rotary, output_type="np", **SETTINGS | given | settings,
    )  # fmt: skip
    return np.round(made.frames[0] * 255).astype(int)


def image_for(family, seed=0):
    return picture(seed) if family in IMAGE_TO_VIDEO else None


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_validation_video_is_the_stock_pipelines(family_model, family, monkeypatch):
    folder, image = family_model(family), image_for(family)
    ours = our_video(folder, monkeypatch, image)
    theirs = stock_video(folder, image)
    print(family, ours.shape, np.abs(ours - theirs).max(), ours.std())
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
