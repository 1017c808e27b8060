"""The published models, by their configs alone: shapes on the meta device, sizes, positions and defaults."""

import argparse
import functools
import re
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_sincos_pos_embed

import train_cogvideox_lora as script
from cogvideox import decode, folder, lora, memory, model
from tests.conftest import FAMILIES

# Numbers of the transformer, of a LoRA of rank 128 on the default targets, and of the VAE.
PARAMETERS = {"2b": 1693783872, "5b": 5570283072, "5b-i2v": 5570479680, "1.5-5b": 5570676352, "1.5-5b-i2v": 5571594880}
LORA = {"2b": 30 * 4 * 2 * 1920 * 128} | dict.fromkeys(FAMILIES[1:], 42 * 4 * 2 * 3072 * 128)
VAE = 215583907
WIDTH = {"2b": 1920} | dict.fromkeys(FAMILIES[1:], 3072)
OWN = {family: (768, 1360, 81) if family.startswith("1.5") else (480, 720, 49) for family in FAMILIES}
# What else each family takes: a vertical size, and a small one.
OTHERS = {
    "2b": [(720, 480, 49), (256, 384, 13)],
    "5b": [(720, 480, 49), (256, 384, 13)],
    "5b-i2v": [(480, 720, 9)],
    "1.5-5b": [(768, 768, 17), (256, 384, 9)],
    "1.5-5b-i2v": [(1360, 768, 81), (256, 384, 9)],
}


@functools.cache
def facts_of(family):
    return folder.facts_of(memory.PRESETS[family]["transformer"], memory.PRESETS[family]["vae"])


def on_meta(family, **changed):
    """The whole transformer, without data."""
    with torch.device("meta"):
        return CogVideoXTransformer3DModel(**memory.PRESETS[family]["transformer"] | changed).requires_grad_(False)


def numbers(parameters):
    return sum(parameter.numel() for parameter in parameters)


# -----------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_transformer_has_the_published_shapes(family):
    transformer = on_meta(family)
    embed, width, facts = transformer.patch_embed, WIDTH[family], facts_of(family)
    channels = 16 + facts.image_channels
    assert numbers(transformer.parameters()) == PARAMETERS[family]
    is_15 = family.startswith("1.5")
    assert embed.proj.weight.shape == ((width, channels * 8) if is_15 else (width, channels, 2, 2))
    assert embed.proj.bias.shape == (width,)  # also where patch_bias is false: diffusers reads it for convolutions only
    assert transformer.proj_out.weight.shape == (16 * (8 if is_15 else 4), width)
    assert embed.text_proj.weight.shape == (width, 4096)
    ofs = getattr(transformer, "ofs_embedding", None)
    assert (ofs and ofs.linear_1.weight.shape) == ((512, 512) if family == "1.5-5b-i2v" else None)
    tables = {"2b": (1, 17776, 1920), "5b-i2v": (1, 226 + 17550, 3072)}
    assert getattr(embed, "pos_embedding", torch.empty(0)).shape == tables.get(family, (0,))
    assert ("patch_embed.pos_embedding" in transformer.state_dict()) == (family == "5b-i2v")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_takes_a_lora_and_the_default_targets_give_its_size(family):
    transformer = on_meta(family)
    args = script.build_parser().parse_args(["--pretrained_model_name_or_path", family])
    with torch.device("meta"):
        parameters = lora.add_lora(transformer, args.rank, float(args.rank), 0.0, args.target_modules, seed=0)
    assert numbers(parameters) == LORA[family]
    every = on_meta(family, num_layers=2)
    names = [name for name, layer in every.named_modules() if isinstance(layer, torch.nn.Linear)]
    with torch.device("meta"):
        pairs = lora.add_lora(every, 4, 4.0, 0.0, names, seed=0)
    assert len(pairs) == 2 * len(names) > 2 * 2 * 9


def test_the_vae_has_the_published_size():
    for family in ("2b", "1.5-5b"):
        with torch.device("meta"):
            vae = AutoencoderKLCogVideoX(**memory.PRESETS[family]["vae"])
        assert numbers(vae.parameters()) == VAE


def shapes():
    for family in FAMILIES:
        yield family, OWN[family]
        yield from (pytest.param(family, shape, marks=pytest.mark.slow) for shape in OTHERS[family])


@pytest.mark.parametrize(("family", "shape"), list(shapes()))
def test_a_training_step_has_the_shape_of_its_target(family, shape):
    """Of two blocks: the others are alike."""
    height, width, frames = shape
    assert not folder.check_geometry(facts_of(family), height, width, frames)
    transformer = on_meta(family, num_layers=2)
    model.keep_position_tables(transformer.patch_embed)
    with torch.device("meta"):
        batch = memory.make_batch(memory.PRESETS[family], 1, memory.latents_of(memory.PRESETS[family], frames, height, width))
    constant = model.constant_inputs(transformer, torch.device("meta"))(batch)
    seen = []
    transformer.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1] - 226))
    transformer.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape))
    loss = script.velocity_loss(transformer, MetaScheduler(), batch, constant, torch.float32)
    tokens, predicted = seen
    latent_frames = (frames - 1) // 4 + 1
    patch = facts_of(family).latents_per_patch
    assert predicted == (1, latent_frames + latent_frames % patch, 16, height // 8, width // 8) == batch["latents"].shape
    assert loss.shape == (1,)
    assert tokens == -(-latent_frames // patch) * (height // 16) * (width // 16)
    rotary = constant["image_rotary_emb"]
    assert (rotary is None) == (family == "2b")
    assert rotary is None or all(table.shape == (tokens, 64) for table in rotary)
    assert (constant["ofs"] is not None) == (family == "1.5-5b-i2v")


class MetaScheduler:
    """Stands for the scheduler, whose own table of noise has data."""

    def add_noise(self, latents, noise, timestep):
        return latents + noise

    def get_velocity(self, latents, noise, timestep):
        return latents - noise


def test_the_meta_device_finds_a_wrong_shape():
    """The latents of a text-to-video batch do not fit an image-to-video transformer, nor do more latents its learned positions."""
    configs, transformer = memory.PRESETS["5b-i2v"], on_meta("5b-i2v", num_layers=1)
    for batch_of, frames in (("5b", 49), ("5b-i2v", 53)):
        with torch.device("meta"):
            batch = memory.make_batch(memory.PRESETS[batch_of], 1, memory.latents_of(configs, frames, 480, 720))
        constant = model.constant_inputs(transformer, torch.device("meta"))(batch)
        model.keep_position_tables(transformer.patch_embed)
        with pytest.raises(RuntimeError):
            script.velocity_loss(transformer, MetaScheduler(), batch, constant, torch.float32)


# -----------------------------------------------------------------------------
# Facts and defaults


def filled(family, *words):
    args = script.build_parser().parse_args(["--pretrained_model_name_or_path", family, *words])
    args.bucket_sizes, args.bucket_lengths = [], []
    folder.fill_in_defaults(args, facts_of(family))
    return args


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_come_from_the_family(family):
    args = filled(family)
    assert (args.height, args.width, args.max_num_frames) == OWN[family]
    assert args.fps == (16 if family.startswith("1.5") else 8)
    assert (args.validation_scheduler, args.use_dynamic_cfg) == (("stored", False) if family == "2b" else ("dpm", True))
    assert folder.check_sizes(args, facts_of(family)) == ([], [])
    given = filled(
        family, "--height", "64", "--width", "96", "--max_num_frames", "9", "--fps", "4", "--validation_scheduler", "ddim",
        "--use_dynamic_cfg" if family == "2b" else "--no-use_dynamic_cfg",
    )  # fmt: skip
    assert (given.height, given.width, given.max_num_frames, given.fps, given.validation_scheduler) == (64, 96, 9, 4, "ddim")
    assert given.use_dynamic_cfg == (family == "2b")


def test_facts_are_those_of_the_configs():
    assert facts_of("2b") == folder.COGVIDEOX_2B
    assert {family: facts_of(family).positions for family in FAMILIES} == {
        "2b": "sincos", "5b": "rotary", "5b-i2v": "learned", "1.5-5b": "slice", "1.5-5b-i2v": "slice",
    }  # fmt: skip
    assert [facts_of(family).image_channels for family in FAMILIES] == [16 if "i2v" in family else 0 for family in FAMILIES]
    assert facts_of("5b-i2v").image_scaling_factor == 0.7
    assert facts_of("1.5-5b-i2v").image_scaling_factor == 1 / 0.7
    assert {facts_of(family).scaling_factor for family in FAMILIES[1:]} == {0.7}
    assert facts_of("1.5-5b-i2v").grid_size == (2400, 2400)
    # Configs of 1.5 exist that name 300 x 300 latents for text-to-video too, and 85 frames, which are not legal.
    older = memory.PRESETS["1.5-5b"]["transformer"] | {"sample_height": 300, "sample_width": 300, "sample_frames": 85}
    older = folder.facts_of(older, memory.PRESETS["1.5-5b"]["vae"])
    assert replace(older, grid_size=(768, 1360)) == facts_of("1.5-5b")


# -----------------------------------------------------------------------------
# Sizes that a model was not made for

NOTES = [
    ("2b", (480, 720, 49), None),
    ("2b", (256, 384, 49), "256 x 384: .* made for 480 x 720.*counted from the top left corner: those that the clip leaves out"),
    ("2b", (480, 1008, 49), "480 x 1008: .* counted from the top left corner: those beyond that size are new"),
    ("2b", (720, 480, 49), "leaves out.*, and those beyond that size are new"),
    ("2b", (480, 720, 53), "53 frames: this model was made for 49 at most"),
    ("2b", (480, 720, 13), None),
    ("5b", (480, 720, 49), None),
    ("5b", (256, 384, 49), "256 x 384: .* made for 480 x 720, and its positions are stretched"),
    ("5b", (720, 480, 49), "720 x 480: .* stretched"),
    ("5b", (480, 720, 81), "81 frames: .* made for 49"),
    ("5b-i2v", (480, 720, 49), None),
    ("5b-i2v", (480, 720, 33), "33 frames: they get the first of this model's learned positions.*make videos of 49 frames"),
    ("1.5-5b", (768, 1360, 81), None),
    ("1.5-5b", (768, 1360, 161), None),
    ("1.5-5b", (768, 1360, 177), "177 frames: .* made for 161 at most"),
    ("1.5-5b", (768, 1360, 49), None),
    ("1.5-5b", (768, 1360, 57), "57 frames: .* 16N \\+ 1 frames, such as 81"),
    ("1.5-5b", (480, 720, 81), "480 x 720: .* made for 768 x 1360, and its positions are counted from the top left corner: .* not trained"),
    ("1.5-5b", (768, 768, 81), "768 x 768: .* made for 768 x 1360, and"),
    ("1.5-5b-i2v", (768, 1360, 81), None),
    ("1.5-5b-i2v", (1360, 768, 81), None),
    ("1.5-5b-i2v", (768, 768, 81), None),
    ("1.5-5b-i2v", (1024, 768, 81), None),
    ("1.5-5b-i2v", (480, 720, 81), "480 x 720: .* a short side of 768 and a long side of 768 to 1360, .* leaves out"),
    ("1.5-5b-i2v", (768, 1600, 81), "those beyond that size are new"),
    ("1.5-5b-i2v", (752, 1360, 81), "752 x 1360: "),
]


@pytest.mark.parametrize(("family", "shape", "pattern"), NOTES)
def test_what_a_model_was_not_made_for_is_said(family, shape, pattern):
    assert not folder.check_geometry(facts_of(family), *shape)
    notes = folder.geometry_notes(facts_of(family), *shape)
    assert len(notes) == (pattern is not None)
    assert not notes or re.search(pattern, notes[0])


@pytest.mark.parametrize(
    ("family", "shape", "problem"),
    [
        ("5b-i2v", (480, 720, 53), "--max_num_frames 53: this model has learned positions, for 49 frames at most; use no more"),
        ("5b-i2v", (480, 704, 49), "--height 480, --width 704: this model has learned positions, for 480 x 720 only; use that size"),
        (
            "1.5-5b",
            (1360, 768, 81),
            "--height 1360, --width 768: this model has positions for a height of 768 and a width of 1360 at most; use a smaller size",
        ),
        ("1.5-5b", (768, 1360, 77), "--max_num_frames 77: this model needs 8k + 1 frames; the nearest are 73 or 81"),
        ("1.5-5b", (768, 1360, 85), "--max_num_frames 85: this model needs 8k + 1 frames; the nearest are 81 or 89"),
        ("1.5-5b-i2v", (2416, 768, 81), "--height 2416, --width 768: this model has positions for a height of 2400 and a width of 2400"),
        ("5b", (480, 720, 50), "--max_num_frames 50: this model needs 4k + 1 frames; the nearest are 49 or 53"),
        ("5b-i2v", (480, 720, 50), "--max_num_frames 50: this model has learned positions, for 49 frames at most; use no more"),
        ("5b-i2v", (480, 720, 47), "--max_num_frames 47: this model needs 4k + 1 frames; the nearest are 45 or 49"),
        ("5b-i2v", (470, 720, 49), "--height 470, --width 720: this model has learned positions, for 480 x 720 only; use that size"),
    ],
)
def test_what_a_model_has_no_positions_for_is_refused(family, shape, problem):
    (found,) = folder.check_geometry(facts_of(family), *shape)
    assert found.startswith(problem)


def test_all_sizes_of_buckets_and_of_videos_are_looked_at():
    args = argparse.Namespace(
        height=480, width=720, max_num_frames=49, bucket_sizes=[(480, 720), (720, 480)], bucket_lengths=[49, 53],
        validation_frames=None, validation_height=None, validation_width=None,
    )  # fmt: skip
    problems, notes = folder.check_sizes(args, facts_of("5b-i2v"))
    assert problems == [
        "--bucket 53: this model has learned positions, for 49 frames at most; use no more",
        "--bucket 720x480: this model has learned positions, for 480 x 720 only; use that size",
    ]
    problems, notes = folder.check_sizes(args, facts_of("5b"))
    assert not problems
    assert [note.split(":")[0] for note in notes] == ["53 frames", "720 x 480"]
    args.bucket_sizes, args.bucket_lengths, args.validation_height, args.validation_frames = [], [], 250, 33
    problems, _ = folder.check_sizes(args, facts_of("5b"))
    assert problems == ["--validation_height 250: this model needs multiples of 16; the nearest are 240 or 256"]
    args.validation_height, args.height = None, 496
    assert folder.check_sizes(args, facts_of("5b-i2v"))[0] == [  # told once, with the flag that was given
        "--height 496, --width 720: this model has learned positions, for 480 x 720 only; use that size"
    ]
    args.height = 480
    assert folder.check_sizes(args, facts_of("5b")) == ([], [])
    _, (note,) = folder.check_sizes(args, facts_of("5b-i2v"))
    assert note.startswith("33 frames")


def test_videos_of_a_model_with_learned_positions_have_its_one_length_whatever_the_clips_have():
    """A stock pipeline computes other positions at another length: the card's snippet would make other videos than the run showed."""
    for family in FAMILIES:
        unset, given = argparse.Namespace(validation_frames=None), argparse.Namespace(validation_frames=33)
        for args in (unset, given):
            folder.fill_in_defaults(args, facts_of(family))
        assert (unset.validation_frames, given.validation_frames) == (49 if family == "5b-i2v" else None, 33)
        told = list(folder.short_clip_remarks(facts_of(family), [{"frames": frames} for frames in (49, 33, 45)]))
        assert len(told) == (family == "5b-i2v")
    (told,) = folder.short_clip_remarks(facts_of("5b-i2v"), [{"frames": frames} for frames in (49, 33, 45)])
    assert told.startswith("2 clips have fewer frames than the 49 for which this model has learned positions (the shortest 33)")
    assert not list(folder.short_clip_remarks(facts_of("5b-i2v"), [{"frames": 49}]))


def test_positions_of_the_2b_are_counted_from_the_corner_and_not_stretched():
    """What `size_notes` says of it; tests/test_families.py compares the rotary ones."""
    large, small = (get_3d_sincos_pos_embed(96, (w, h), 2, 1.875, 1.0, output_type="pt") for h, w in ((6, 9), (4, 5)))
    assert torch.equal(large.view(2, 6, 9, 96)[:, :4, :5], small.view(2, 4, 5, 96))
    assert not torch.equal(large.view(2, 6, 9, 96)[:, 2:, :5], small.view(2, 4, 5, 96))


def test_the_lengths_of_15_are_those_with_one_more_latent_in_front():
    assert [n for n in range(1, 100) if decode.longest_legal_length(n, 4, 2) == n] == [1 + 8 * k for k in range(13)]
    for frames in (9, 17, 81):
        assert memory.latents_of(memory.PRESETS["1.5-5b"], frames, 768, 1360)[0] == (frames - 1) // 4 + 2


@pytest.mark.parametrize(("family", "seen"), [(None, "49 frames"), ("1.5-5b", "17 frames")])
def test_tools_that_look_at_data_take_the_models_sizes(family_model, family, seen):
    args = argparse.Namespace(height=None, width=None, fps=None, max_num_frames=None, pretrained_model_name_or_path=None)
    args.pretrained_model_name_or_path = family and str(family_model(family))
    facts, problems = folder.facts_for_data(args)
    assert not problems
    assert facts == (folder.read_facts(family_model(family)) if family else folder.COGVIDEOX_2B)
    assert (args.height, args.width, f"{args.max_num_frames} frames", args.fps) == ((64, 96, seen, 16) if family else (480, 720, seen, 8))


def test_a_hub_model_for_a_tool_that_looks_at_data_costs_two_configs(family_model, monkeypatch):
    asked = []

    def download(name, allow_patterns, **settings):
        asked.append((name, tuple(allow_patterns)))
        return family_model("1.5-5b")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    args = argparse.Namespace(max_num_frames=None, pretrained_model_name_or_path="owner/name")
    facts, problems = folder.facts_for_data(args)
    assert (problems, args.max_num_frames, facts.positions) == ([], 17, "slice")
    assert asked == [("owner/name", ("transformer/config.json", "vae/config.json"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_another_frame_rate_than_the_models_is_told(family):
    facts = folder.facts_of(memory.PRESETS[family]["transformer"], memory.PRESETS[family]["vae"])
    own, other = (16, 8) if family.startswith("1.5") else (8, 16)
    assert folder.rate_notes(SimpleNamespace(fps=float(own)), facts) == []
    (note,) = folder.rate_notes(SimpleNamespace(fps=float(other)), facts)
    assert note.startswith(f"--fps {other}: this model was made for {own} frames a second")
