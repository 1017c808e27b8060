"""Each family of CogVideoX: what training gives the transformer is what the family's own pipeline gives it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from cogvideox import folder as folder_of
from cogvideox import model
from cogvideox.order import seeded_generator
from dataset import TrainingClips
from demo.make_model import SMALL_CLIP, make_model
from tests.conftest import FAMILIES, IMAGE_TO_VIDEO
from train_cogvideox_lora import velocity_loss

OWN, VERTICAL, SMALL = (32, 48), (48, 32), (32, 32)  # pixels
LENGTHS = {"2b": (9, 13), "5b": (9, 13), "5b-i2v": (9, 5), "1.5-5b": (9, 17), "1.5-5b-i2v": (9, 17)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a tiny model whose own clips are 9 frames of 32 x 48; 1.5's image-to-video one has a larger grid, as the real one."""
    found = {}
    for family in FAMILIES:
        size = SMALL_CLIP | ({"sample_height": 8, "sample_width": 8} if family == "1.5-5b-i2v" else {})
        found[family] = make_model(tmp_path_factory.mktemp("models") / family, vae_channels=8, head_width=32, family=family, **size)
    return found


class OneClip:
    """Encodings of one clip and its image, with posteriors of no width: a sample is the mean."""

    def __init__(self, latents, image):
        self.latents, self.means = latents, image

    def moments(self, clip, flipped=False):
        return with_variance(self.latents)

    def image(self, clip, flipped=False):
        return with_variance(self.means)[None, :, 0]

    def prompt(self, clip):
        return torch.randn(226, 32, generator=torch.Generator().manual_seed(1))


def with_variance(mean):
    """Moments [2C, ...] of a mean [C, ...]."""
    return torch.cat([mean, torch.full_like(mean, -30.0)])


class GivenNoise:
    """Stands for the scheduler: the noisy latents are the latents."""

    def add_noise(self, latents, noise, timestep):
        return latents

    def get_velocity(self, latents, noise, timestep):
        return torch.zeros_like(latents)


def watched(transformer):
    """The transformer, and the list of (inputs, output) of its calls."""
    seen, forward = [], transformer.forward

    def keep(**inputs):
        with torch.no_grad():
            seen.append((inputs, forward(**inputs)[0]))
        return (seen[-1][1],)

    transformer.forward = keep
    return transformer, seen


def one_step(folder, size, frames, latents, prompt, picture):
    """(inputs and output of the transformer, latents that are left) of the stock pipeline's only denoising step, which changes nothing."""
    config = model.CogVideoXTransformer3DModel.load_config(folder / "transformer")
    kind = CogVideoXImageToVideoPipeline if config["in_channels"] == 32 else CogVideoXPipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    _, seen = watched(pipeline.transformer)
    pipeline.scheduler.step = lambda predicted, timestep, latents, **rest: (latents,)
    more, decoded = {"image": picture} if kind is CogVideoXImageToVideoPipeline else {}, []

    def decode(latents):  # with output_type="latent" the pipeline throws nothing away
        decoded.append(latents[0])
        return torch.zeros(1, 3, 1, 8, 8)

    pipeline.decode_latents = decode
    encode = pipeline.vae.encode
    pipeline.vae.encode = lambda pixels: of_no_width(encode(pixels))
    pipeline(
        prompt_embeds=prompt[None], height=size[0], width=size[1], num_frames=frames, latents=latents[None], num_inference_steps=1,
        guidance_scale=1, output_type="pt", **more,
    )  # fmt: skip
    return seen[0], decoded[0]


def of_no_width(encoded):
    """An encoding whose samples are the mean."""
    encoded.latent_dist.std = torch.zeros_like(encoded.latent_dist.std)
    return encoded


def image_mean(folder, picture):
    """The mean of the posterior [C, 1, H', W'] of a picture, as the pipeline prepares it."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        return model.load_vae(folder, torch.device("cpu")).encode(pixels.float()).latent_dist.mean[0]


def training_inputs(folder, size, frames, facts=None):
    """(inputs and output of the transformer in a training step at t = 999, the clip's latents, the item, the picture)."""
    own = folder_of.read_facts(folder)
    generator = torch.Generator().manual_seed(0)
    count, _, height, width = folder_of.latent_shape(own, frames, *size)
    latents = torch.randn(16, count, height, width, generator=generator)
    picture = Image.fromarray(torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())
    mean = image_mean(folder, picture) if own.image_channels else None
    item = TrainingClips(OneClip(latents, mean), None, 7, facts or own, 1000).item(0, 0) | {"timestep": torch.tensor(999)}
    batch = {name: torch.as_tensor(value)[None] for name, value in item.items()}
    transformer, seen = watched(model.load_transformer(folder, torch.float32))
    velocity_loss(transformer, GivenNoise(), batch, model.constant_inputs(transformer, "cpu")(batch), torch.float32)
    return seen[0], latents.transpose(0, 1) * own.scaling_factor, item, picture


def alike(ours, theirs):
    """Whether both calls of a transformer had the same inputs, and the same output."""
    for name in ("hidden_states", "encoder_hidden_states", "timestep", "image_rotary_emb", "ofs"):
        for a, b in zip(tensors(ours[0].get(name)), tensors(theirs[0].get(name)), strict=True):
            if a.shape != b.shape or not torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4):
                return False
    return torch.allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-3)


def tensors(value):
    return [] if value is None else list(value) if isinstance(value, tuple) else [value]


def legal_cases():
    for family in FAMILIES:
        for size in (OWN, VERTICAL, SMALL):
            for frames in LENGTHS[family]:
                refused = size != OWN and family == "5b-i2v" or size == VERTICAL and family == "1.5-5b"
                if not refused:
                    yield family, size, frames


@pytest.mark.parametrize(("family", "size", "frames"), list(legal_cases()))
def test_a_training_step_gives_the_transformer_what_the_pipeline_gives_it(folders, family, size, frames):
    folder = folders[family]
    facts = folder_of.read_facts(folder)
    assert not folder_of.check_geometry(facts, *size, frames)
    ours, latents, item, picture = training_inputs(folder, size, frames)
    theirs, left = one_step(folder, size, frames, item["latents"], item["prompt"], picture)
    shorter = family == "5b-i2v" and frames < 9  # the pipeline replaces the learned table: see the test of it
    assert alike(ours, theirs) != shorter
    assert alike((ours[0], theirs[1]), theirs)
    # What was put in front is what the pipeline throws away.
    assert torch.equal(left, item["latents"][-len(latents) :])
    torch.testing.assert_close(left, latents)
    assert len(item["latents"]) == len(latents) + family.startswith("1.5")
    assert len(item["latents"]) % facts.latents_per_patch == 0
    assert ours[1].std() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_other_inputs_are_not_the_pipelines(folders, family):
    """The padding at the other end, the other scaling of the image, no image, the other grid, another timestep."""
    folder, facts = folders[family], folder_of.read_facts(folders[family])
    ours, latents, item, picture = training_inputs(folder, OWN, 9)
    theirs, _ = one_step(folder, OWN, 9, item["latents"], item["prompt"], picture)
    assert alike(ours, theirs)
    if facts.latents_per_patch > 1:
        other = torch.cat([latents, latents[-1:]])
        _, left = one_step(folder, OWN, 9, other, item["prompt"], picture)
        assert not torch.allclose(left, latents)
    if facts.image_channels:
        for factor in (1.0, facts.scaling_factor, 1 / facts.scaling_factor):
            changed, *_ = training_inputs(folder, OWN, 9, replace(facts, image_scaling_factor=factor))
            assert alike(changed, theirs) == (factor == facts.image_scaling_factor)
        blank = ours[0] | {"hidden_states": ours[0]["hidden_states"].clone().index_fill_(2, torch.arange(16, 32), 0)}
        assert not alike((blank, ours[1]), theirs)
    if facts.positions != "sincos":
        tables = ours[0]["image_rotary_emb"]
        assert not alike((ours[0] | {"image_rotary_emb": tuple(table.flip(0) for table in tables)}, ours[1]), theirs)
    assert not alike((ours[0] | {"timestep": torch.tensor([998])}, ours[1]), theirs)


def test_the_grid_of_15_is_a_slice_and_that_of_10_is_stretched(folders):
    starts_alike = {}
    for family in ("5b", "1.5-5b"):
        transformer = model.load_transformer(folders[family], torch.float32)
        transformer.register_to_config(sample_height=8, sample_width=12)
        constant = model.constant_inputs(transformer, "cpu")
        large, small = (constant({"latents": torch.zeros(1, 4, 16, h, w)})["image_rotary_emb"][0] for h, w in ((8, 12), (4, 6)))
        rows = large.view(-1, 4, 6, large.shape[-1])[:, :2, :3].reshape(-1, large.shape[-1])
        starts_alike[family] = torch.equal(rows, small)
    assert starts_alike == {"5b": False, "1.5-5b": True}


def test_a_shorter_clip_gets_the_first_learned_positions(folders):
    transformer = model.load_transformer(folders["5b-i2v"], torch.float32)
    embed = transformer.patch_embed
    table, text = embed.pos_embedding, torch.zeros(1, 226, 32)
    for frames, latent_frames in ((9, 3), (5, 2), (1, 1)):
        latents = torch.zeros(1, latent_frames, 32, 4, 6)
        with torch.no_grad():
            added = embed(text, latents) - torch.cat([embed.text_proj(text), embed.proj.bias.expand(1, latent_frames * 6, -1)], dim=1)
        torch.testing.assert_close(added, table[:, : 226 + latent_frames * 6], rtol=0, atol=1e-6)
        assert frames == (latent_frames - 1) * 4 + 1
    assert table[:, 226:].std() > 0.3


def test_sizes_that_a_family_has_no_positions_for_are_refused_and_its_pipeline_fails_there(folders):
    for family, size, frames in (("5b-i2v", VERTICAL, 9), ("5b-i2v", SMALL, 9), ("5b-i2v", OWN, 13), ("1.5-5b", VERTICAL, 9)):
        facts = folder_of.read_facts(folders[family])
        (problem,) = folder_of.check_geometry(facts, *size, frames)
        assert "this model has" in problem
        assert ("for 9 frames at most" if frames > 9 else "32") in problem
        assert not folder_of.check_geometry(facts, *OWN, 9)
    latents, prompt = torch.zeros(4, 16, 6, 4), torch.zeros(226, 32)
    picture = Image.new("RGB", VERTICAL[::-1])
    with pytest.raises(ValueError, match="different resolution"):
        one_step(folders["5b-i2v"], VERTICAL, 9, latents[:3], prompt, picture)
    with pytest.raises(RuntimeError):
        one_step(folders["1.5-5b"], VERTICAL, 9, latents, prompt, picture)


@pytest.mark.parametrize("family", IMAGE_TO_VIDEO)
def test_the_image_is_dropped_apart_from_the_caption_and_drawn_anew_at_each_position(folders, family):
    facts = folder_of.read_facts(folders[family])

    class Draws(OneClip):
        def image(self, clip, flipped=False):
            return torch.stack([with_variance(torch.full((16, 4, 6), float(draw + 1))) for draw in range(8)])

        def prompt(self, clip):
            return torch.zeros(1) if clip is None else torch.ones(1)

    clips = {
        seed: TrainingClips(Draws(torch.zeros(16, 3, 4, 6), None), lambda position: 0, seed, facts, 1000, 0.25, image_dropout=0.25)
        for seed in (1, 2)
    }
    items = {seed: [clips[seed][position] for position in range(400)] for seed in clips}
    values = {seed: [round(item["image"][0, 0, 0, 0].item() / facts.image_scaling_factor) for item in items[seed]] for seed in clips}
    assert set(values[1]) == set(range(9))  # all draws, and none
    assert values[1] != values[2]
    assert values[1] == [round(clips[1][p]["image"][0].mean().item() / facts.image_scaling_factor) for p in range(400)]
    no_image = torch.tensor([value == 0 for value in values[1]])
    no_text = torch.tensor([item["prompt"].item() == 0 for item in items[1]])
    assert 0.18 < no_image.float().mean() < 0.32
    assert 0.18 < no_text.float().mean() < 0.32
    assert 0.02 < (no_image & no_text).float().mean() < 0.12  # 1 in 16 if they are drawn apart
    assert all(item["image"][1:].count_nonzero() == 0 for item in items[1])
    # The same noise as without an image.
    plain = TrainingClips(Draws(torch.zeros(16, 3, 4, 6), None), lambda position: 0, 1, replace(facts, image_channels=0), 1000, 0.25)
    assert torch.equal(plain[3]["noise"], items[1][3]["noise"])
    assert plain[3]["image"].shape[1] == 0
    assert seeded_generator(1, "image", 3).initial_seed() != seeded_generator(1, "noise", 3).initial_seed()
