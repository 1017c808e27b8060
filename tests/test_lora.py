"""LoRA files of other trainers: every program here applies the strength that the file asks for, as diffusers does."""

import inspect
import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import train_cogvideox_lora as script
from cogvideox import lora
from cogvideox.lora import LORA_FILE, load_pairs, read_layers
from cogvideox.model import load_transformer
from tests.conftest import words
from tests.test_export_comfyui import make_lora
from tests.test_merge import base_and_lora, line, predicted
from tools import export_comfyui, lora_file, merge

LAYERS = [f"transformer_blocks.{block}.attn1.{part}" for block in (0, 1) for part in ("to_q", "to_k", "to_v", "to_out.0")]
ASKED = {  # what the metadata of a file of rank 4 asks for: peft's settings, and the factor of to_k's update and of the others'
    "alpha": ({"r": 4, "lora_alpha": 2}, 0.5, 0.5),
    "pattern": ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_k": 12}}, 3.0, 0.5),
    "rslora": ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0, 3.0),
    "equal": ({"r": 4, "lora_alpha": 4}, 1.0, 1.0),
    "ranks": ({"r": 8, "lora_alpha": 4, "rank_pattern": dict.fromkeys(LAYERS, 4)}, 1.0, 1.0),
    "defaults": ({"r": 4}, 2.0, 2.0),  # peft's alpha is 8
}


def foreign(folder, weights, asked=None, **more):
    """Write a LoRA as another trainer does."""
    folder.mkdir()
    usual = {"target_modules": LAYERS, "rank_pattern": {}, "alpha_pattern": {}}  # without the patterns diffusers 0.36 raises a KeyError
    settings = {f"transformer.{name}": value for name, value in (usual | (asked or {})).items()}
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if asked else {}
    save_file(weights | more, folder / LORA_FILE, {"format": "pt"} | metadata)
    return folder


def started_from(model, folder, alpha=32.0):
    """What the trainer's transformer computes after --init_lora. alpha: this run's own."""
    transformer = load_transformer(model, torch.float32)
    lora.add_lora(transformer, 4, alpha, 0.0, ["to_q", "to_k", "to_v", "to_out.0"], seed=5)
    assert lora.load_initial(transformer, folder) is None
    return predicted(transformer)


def generated_with(model, folder):
    """What the transformer of tools.generate computes."""
    args = SimpleNamespace(lora=folder / LORA_FILE, variant=None, enable_slicing=True, enable_tiling=True, offload="none")
    return predicted(lora_file.load_pipeline(args, model, model, torch.float32, torch.device("cpu")).transformer)


def merged_with(model, folder, output):
    """What the transformer of tools.merge computes."""
    merge.main(line(model, folder, output))
    return predicted(load_transformer(output, torch.float32))


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.numeric
@pytest.mark.parametrize("name", ASKED)
def test_every_program_applies_the_alpha_of_the_metadata_as_the_stock_loader_does(name, tiny_model, tmp_path):
    if name == "rslora" and "rslora" not in inspect.getsource(LoraLayer.set_scale):
        pytest.skip("this peft forgets rsLoRA's factor when the stock loader sets a strength")
    asked, at_to_k, elsewhere = ASKED[name]
    plain = make_lora(tiny_model, tmp_path / "plain", size=0.5)
    folder = foreign(tmp_path / "other", load_file(plain / LORA_FILE), asked)
    stock = base_and_lora(tiny_model, folder, 1.0)
    near(started_from(tiny_model, folder), stock)
    near(started_from(tiny_model, folder, alpha=1.0), stock)
    near(generated_with(tiny_model, folder), stock)
    near(merged_with(tiny_model, folder, tmp_path / "merged"), stock)
    for (layer, _, up), (_, _, before) in zip(load_pairs(folder / LORA_FILE), load_pairs(plain / LORA_FILE), strict=True):
        torch.testing.assert_close(up, before * (at_to_k if layer.endswith("to_k") else elsewhere))
    difference = (stock - base_and_lora(tiny_model, plain, 1.0)).abs().max()
    assert difference < 1e-5 if at_to_k == elsewhere == 1 else difference > 1e-2


@pytest.mark.numeric
@pytest.mark.parametrize("names", ["lora_A lora_B", "lora_down lora_up"])
def test_every_program_applies_the_alpha_tensors_of_kohyas_files(names, tiny_model, tmp_path):
    """diffusers' loader refuses them: the strength is that of the same weights with alpha / rank in lora_B."""
    down, up = names.split()
    plain = make_lora(tiny_model, tmp_path / "plain", size=0.5)
    weights = load_file(plain / LORA_FILE)
    expected = {name: tensor * 6 / 4 if ".lora_B." in name and "to_k" in name else tensor for name, tensor in weights.items()}
    stock = base_and_lora(tiny_model, foreign(tmp_path / "folded", expected), 1.0)
    alphas = {f"transformer.{layer}.alpha": torch.tensor(6.0) for layer in LAYERS if layer.endswith("to_k")}
    renamed = {name.replace("lora_A", down).replace("lora_B", up): tensor for name, tensor in weights.items()}
    folder = foreign(tmp_path / "kohya", renamed, **alphas)
    near(started_from(tiny_model, folder), stock)
    near(generated_with(tiny_model, folder), stock)
    near(merged_with(tiny_model, folder, tmp_path / "merged"), stock)
    written = export_comfyui.exported(folder / LORA_FILE)
    assert torch.equal(
        written["diffusion_model.blocks.0.k.lora_B.weight"], expected["transformer.transformer_blocks.0.attn1.to_k.lora_B.weight"]
    )
    assert (stock - base_and_lora(tiny_model, plain, 1.0)).abs().max() > 1e-3


def test_ranks_of_a_pattern_that_the_weights_do_not_have_are_refused(tiny_model, tmp_path):
    weights = load_file(make_lora(tiny_model, tmp_path / "plain") / LORA_FILE)
    folder = foreign(tmp_path / "other", weights, {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_v": 2}})
    with pytest.raises(ValueError, match=r"to_v a rank of 2, and its weights have 4"):
        read_layers(folder / LORA_FILE)
    unknown = foreign(tmp_path / "unknown", weights, {"r": 4, "of_another_version": 1})
    with pytest.raises(ValueError, match="what this version of peft does not know"):
        read_layers(unknown / LORA_FILE)
    assert {rank for rank, _, _ in read_layers(tmp_path / "plain" / LORA_FILE).values()} == {4}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"rank": 8}, "has (rank, inputs, outputs) (4, 32, 32) in it and (8, 32, 32) in this run; give --rank 4"),
        (
            {"target_modules": ["to_q", "to_k"]},
            "changes 8 layers and --target_modules names 4; transformer_blocks.0.attn1.to_out.0 is in only",
        ),
        ({"init_lora": "nowhere"}, "--init_lora nowhere: no such file"),
        ({}, None),
    ],
)
def test_a_first_lora_that_does_not_fit_is_told_before_anything_is_encoded(tiny_model, tmp_path, flags, sentence):
    folder = make_lora(tiny_model, tmp_path / "run")
    args = script.parse_args(words(tiny_model, "d", "o", "c", **({"init_lora": folder} | flags)))
    problems = lora.unfit_initial(args, tiny_model)
    assert problems == [] if sentence is None else sentence in problems[0]
    assert math.isclose(args.lora_alpha, args.rank)
