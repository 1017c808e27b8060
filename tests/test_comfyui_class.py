"""Exported LoRAs in ComfyUI's own transformer class, where a checkout of ComfyUI is given: the numbers of docs/comfyui.md.

COMFYUI=~/ComfyUI .venv/bin/python -m pytest -q -s tests/test_comfyui_class.py
"""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogvideox import lora
from cogvideox.model import constant_inputs
from tests.conftest import ROOT
from tests.test_families_lora import TINY, TRANSFORMERS, each_family, kinds, written
from tools.export_comfyui import IN_BLOCKS, OUTSIDE, exported

COMFYUI = os.environ.get("COMFYUI")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="needs a checkout of ComfyUI, named by the variable COMFYUI")
SIZE = {"num_attention_heads": 3, "attention_head_dim": 64}  # ComfyUI takes heads of 64 numbers, and splits the width by 3
LAYERS = IN_BLOCKS | OUTSIDE | {"attn1.norm_q": "norm_q", "attn1.norm_k": "norm_k"}


def attention(query, key, value, heads, **_):
    """ComfyUI's optimized_attention: [B, T, heads x D] each."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@pytest.fixture
def comfyui(monkeypatch):
    """ComfyUI's module of the transformer, without the rest of ComfyUI, which needs packages of its own."""
    for name in (
        "comfy",
        "comfy.ldm",
        "comfy.ldm.modules",
        "comfy.ldm.modules.attention",
        "comfy.ldm.common_dit",
        "comfy.patcher_extension",
    ):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    sys.modules["comfy.ldm.modules.attention"].optimized_attention = attention
    sys.modules["comfy.ldm.common_dit"].pad_to_patch_size = lambda latents, patch: latents  # of sizes that need no padding
    path = Path(COMFYUI).expanduser() / "comfy/ldm/cogvideo/model.py"
    spec = importlib.util.spec_from_file_location("comfyui_cogvideo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def converted(transformer, comfyui, **more):
    """ComfyUI's model with the weights of diffusers' one and `more`, configured as ComfyUI does it: by what the checkpoint holds."""
    weights, config = {}, transformer.config
    for name, weight in (transformer.state_dict() | more).items():
        layer, kind = name.rsplit(".", 1)
        inner = re.sub(r"^transformer_blocks\.(\d+)\.", "", layer)
        block = re.match(r"transformer_blocks\.(\d+)\.", layer)
        weights[f"{f'blocks.{block[1]}.' if block else ''}{LAYERS.get(inner, inner)}.{kind}"] = weight
    learned = "patch_embed.pos_embedding" in weights
    shared = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "patch_size_t", "ofs_embed_dim", "time_embed_dim")
    shared += ("text_embed_dim", "sample_height", "sample_width", "sample_frames")
    own = comfyui.CogVideoXTransformer3DModel(
        **{name: config[name] for name in shared}, max_text_seq_length=config.max_text_seq_length, operations=torch.nn,
        use_rotary_positional_embeddings=not learned, use_learned_positional_embeddings=learned,
    )  # fmt: skip
    own.load_state_dict(weights)
    return own.eval()


@torch.no_grad()
def outputs(transformer, own, timestep=500):
    """What both make of the same inputs, [1, F', 16, H', W'] each."""
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    frames = (config.sample_frames - 1) // 4 + 1
    shape = 1, frames + frames % (config.patch_size_t or 1), config.in_channels, config.sample_height, config.sample_width
    latents = torch.randn(shape, generator=generator)
    text, timestep = torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator), torch.tensor([timestep])
    constant = constant_inputs(transformer, torch.device("cpu"))({"latents": latents})
    theirs = own._forward(latents.transpose(1, 2), timestep, text, ofs=constant["ofs"]).transpose(1, 2)
    return transformer(hidden_states=latents, encoder_hidden_states=text, timestep=timestep, **constant).sample, theirs


def off(ours, theirs):
    """The largest difference, in parts of the largest output."""
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


@each_family
def test_an_exported_lora_changes_every_layer_of_comfyuis_class_as_trained(family, comfyui, tmp_path):
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(**TINY | TRANSFORMERS[family] | SIZE).eval()
    own = converted(transformer, comfyui)
    base = outputs(transformer, own)
    lora.add_lora(transformer, 4, 8.0, 0.0, kinds(transformer), seed=0)
    for name, weight in transformer.named_parameters():
        weight.data += 0.05 * torch.randn_like(weight) * (".lora_B." in name)
    tensors, weights = exported(written(transformer, tmp_path)), dict(own.named_parameters())
    layers = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    for layer in layers:  # as comfy/lora.py applies them
        down, up, alpha = (tensors[f"{layer}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "alpha"))
        weights[f"{layer.removeprefix('diffusion_model.')}.weight"].data += alpha / len(down) * up @ down
    assert len(layers) == len(lora.lora_modules(transformer))
    trained = outputs(transformer, own)
    for words, (ours, theirs) in (("base", base), ("LoRA", trained)):
        print(f"{family} {words}: off by {off(ours, theirs):.1e} of the largest output")
    assert (trained[0] - base[0]).abs().max() > 0.1
    if family.startswith("1.5"):
        torch.testing.assert_close(trained[1], trained[0], rtol=1e-4, atol=1e-5)
    else:
        assert (base[1] - base[0]).abs().max() > 1e-3  # what the page says of the others, without a LoRA


def test_the_rotary_positions_of_the_5b_are_multiplied_by_1_875(comfyui):
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(num_layers=1, use_rotary_positional_embeddings=True)
    pipeline_tables = constant_inputs(transformer, torch.device("cpu"))({"latents": torch.empty(1, 13, 16, 60, 90)})["image_rotary_emb"]

    def difference(**scale):
        own = comfyui.CogVideoXTransformer3DModel(num_layers=1, use_rotary_positional_embeddings=True, operations=torch.nn, **scale)
        return max((a - b).abs().max() for a, b in zip(pipeline_tables, own._get_rotary_emb(30, 45, 13, "cpu"), strict=True))

    assert difference() > 1.9
    assert difference(spatial_interpolation_scale=1.0) == 0


def test_the_demos_2b_is_wrong_in_comfyuis_class_unless_the_checkpoint_carries_its_positions(comfyui):
    transformer = CogVideoXTransformer3DModel.from_pretrained(ROOT / "demo/model/transformer").eval()
    carried = {"patch_embed.pos_embedding": transformer.patch_embed.pos_embedding}
    without, with_table = (
        [off(*outputs(transformer, own, timestep)) for timestep in (10, 100, 300, 500, 700, 900, 990)]
        for own in (converted(transformer, comfyui), converted(transformer, comfyui, **carried))
    )
    print(f"the demo's model: off by {min(without):.0%} to {max(without):.0%}; with its positions {max(with_table):.1e}")
    assert min(without) > 0.2
    assert max(with_table) < 1e-5
