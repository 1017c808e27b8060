"""A LoRA on every linear layer of every family: trained, loaded by the stock pipeline, named for ComfyUI, and kept apart from other families."""

import json
import re

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

import train_cogvideox_lora as script
from cogvideox import lora
from cogvideox.files import read_json
from cogvideox.folder import check_targets, is_target, linear_layers, meta_transformer
from cogvideox.lora import LORA_FILE
from cogvideox.memory import PRESETS
from cogvideox.model import bare_pipeline
from demo.make_model import TRANSFORMERS
from tests.conftest import FAMILIES, lora_of, words
from tests.test_merge import output_of, predicted
from tools import export_comfyui, lora_file

TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 64}
TINY |= {"sample_height": 4, "sample_width": 6, "sample_frames": 9, "max_text_seq_length": 8}
WIDE = [family for family in FAMILIES if family != "2b"]  # the layers of one have the shapes of the others'
each_family = pytest.mark.parametrize("family", FAMILIES)


def tiny(family):
    """A transformer with the family's layers, all small, and the same weights at each call."""
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**TINY | TRANSFORMERS[family]).eval()


def folder_of(family, folder):
    """A model folder with the tiny transformer's config."""
    tiny(family).save_config(folder / "transformer")
    return folder


def kinds(transformer):
    """The names of its linear layers, the blocks' without their block: what --target_modules takes for all of them."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    return sorted({re.sub(r"transformer_blocks\.\d+\.", "", name) for name in linear})


def with_lora(family, targets=None, rank=4, alpha=8.0):
    """A tiny transformer with a new LoRA, on every linear layer unless there are targets."""
    transformer = tiny(family)
    lora.add_lora(transformer, rank, alpha, 0.0, targets or kinds(transformer), seed=0)
    return transformer


def written(transformer, folder):
    """Write the LoRA of a transformer as a run does; returns its file."""
    args = script.parse_args(words("m", "d", "o", "c", rank=4, lora_alpha=8))
    lora.write(folder, lora.export(transformer, lora.live_state(transformer)), lora.facts(args, transformer))
    return folder / LORA_FILE


def loaded(family, file):
    """(output with a LoRA file that the stock pipeline has loaded, how many of its weights are used)."""
    transformer = tiny(family)
    pipeline = bare_pipeline(transformer)
    assert type(pipeline) is (CogVideoXImageToVideoPipeline if family.endswith("i2v") else CogVideoXPipeline)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="lora")
    return predicted(transformer), len(get_peft_model_state_dict(transformer, adapter_name="lora"))


# -----------------------------------------------------------------------------
# Every layer


@each_family
def test_a_lora_on_every_linear_layer_is_trained_and_the_stock_pipeline_loads_all_of_it(family, tmp_path):
    transformer = with_lora(family)
    output_of(transformer).square().mean().backward()
    still = [name for name, weight in transformer.named_parameters() if ".lora_B." in name and not weight.grad.any()]
    assert still == []
    generator = torch.Generator().manual_seed(1)
    for name, weight in transformer.named_parameters():
        if ".lora_B." in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    file = written(transformer, tmp_path)
    base, trained = predicted(tiny(family)), predicted(transformer)
    output, used = loaded(family, file)
    weights = load_file(file)
    layers = [name for name, module in tiny(family).named_modules() if isinstance(module, torch.nn.Linear)]
    assert used == len(weights) == 2 * len(layers)
    torch.testing.assert_close(output, trained, rtol=1e-4, atol=1e-5)
    assert (output - base).abs().max() > 0.05
    for name in ("patch_embed.text_proj", "proj_out"):  # one layer of all of them is seen
        save_file(weights | {f"transformer.{name}.lora_B.weight": 0 * weights[f"transformer.{name}.lora_B.weight"]}, tmp_path / "less")
        (tmp_path / "less").rename(tmp_path / "less.safetensors")
        assert (loaded(family, tmp_path / "less.safetensors")[0] - trained).abs().max() > 1e-3


@pytest.mark.slow
@each_family
def test_a_run_trains_every_linear_layer_and_its_file_names_the_family(family, family_model, train, capsys):
    model = family_model(family)
    folder = train(model=model, target_modules=kinds(meta_transformer(model)))
    assert "PASS" in capsys.readouterr().err
    layers = lora.read_layers(folder / LORA_FILE)
    assert {name: sizes for name, (_, *sizes) in layers.items()} == {name: [*sizes] for name, sizes in linear_layers(model).items()}
    assert all(weight.any() for weight in lora_of(folder).values())
    assert lora.trained_on(folder / LORA_FILE) == lora.base_facts(read_json(model / "transformer/config.json"))


# ComfyUI's names (0.33), found by loading exports in its own classes.
COMFYUI = {f"blocks.N.{part}" for part in ("q", "k", "v", "attn_out", "ff_proj", "ff_out", "norm1.linear", "norm2.linear")}
COMFYUI |= {"time_embedding_linear_1", "time_embedding_linear_2", "norm_out.linear", "proj_out", "patch_embed.text_proj"}
FOR_15 = {"patch_embed.proj"}
FOR_15_I2V = FOR_15 | {"ofs_embedding_linear_1", "ofs_embedding_linear_2"}


@each_family
def test_every_linear_layer_of_the_real_model_has_its_name_in_comfyui(family):
    with torch.device("meta"):
        real = CogVideoXTransformer3DModel.from_config(PRESETS[family]["transformer"])
    assert kinds(real) == kinds(tiny(family))
    names = [export_comfyui.comfyui_name(name) for name, module in real.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(set(names)) == len(names)
    expected = COMFYUI | {"1.5-5b": FOR_15, "1.5-5b-i2v": FOR_15_I2V}.get(family, set())
    assert {re.sub(r"\.\d+\.", ".N.", name.removeprefix("diffusion_model.")) for name in names} == expected


# -----------------------------------------------------------------------------
# Targets


@each_family
def test_a_target_that_also_means_a_convolution_is_refused_before_anything_loads(family, tmp_path):
    folder = folder_of(family, tmp_path)
    problems = check_targets(folder, ["to_q", "proj"])
    if family.startswith("1.5"):  # its patches go through a linear layer
        assert problems == []
        return
    assert len(problems) == 1
    assert problems[0].startswith("--target_modules proj: also matches patch_embed.proj (Conv2d)")
    assert problems[0].endswith("you probably want ff.net.0.proj")
    assert check_targets(folder, ["ff.net.0.proj"]) == []
    assert "no such linear layer" in check_targets(folder, ["patch_embed.proj"])[0]


@pytest.mark.parametrize(
    ("target", "other", "meant"),
    [("0", "transformer_blocks.0 (CogVideoXBlock)", "to_out.0"), ("2", "transformer_blocks.2 (CogVideoXBlock)", "ff.net.2")],
)
def test_a_target_that_also_means_a_module_without_a_matrix_is_refused(target, other, meant, tmp_path):
    CogVideoXTransformer3DModel(**TINY | {"num_layers": 3}).save_config(tmp_path / "transformer")
    [problem] = check_targets(tmp_path, [target, meant])
    assert f"--target_modules {target}: also matches {other}" in problem
    assert f"you probably want {meant}" in problem


@each_family
def test_every_linear_layer_is_a_legal_target_and_a_target_means_what_it_means_to_peft(family, tmp_path):
    folder = folder_of(family, tmp_path)
    modules = [name for name, _ in meta_transformer(folder).named_modules() if name]
    assert check_targets(folder, kinds(tiny(family))) == []
    for target in [*kinds(tiny(family)), "to_q", "linear", "linear_1", "proj", "0", "q", "transformer_blocks.0.attn1.to_q"]:
        config = LoraConfig(target_modules=[target])
        assert [is_target(name, target) for name in modules] == [bool(check_target_module_exists(config, name)) for name in modules]


# -----------------------------------------------------------------------------
# One family's LoRA and another's model


def problems_of(file, folder, targets=("to_q", "to_k")):
    """What tools.generate and tools.merge say of a LoRA, and what the trainer says of it as --init_lora."""
    args = script.parse_args(words("m", "d", "o", "c", rank=4, target_modules=targets, init_lora=file))
    return lora_file.check_fit(file, lora.read_layers(file), folder), lora.unfit_initial(args, folder)


@pytest.mark.parametrize(("made", "used"), [(made, used) for made in WIDE for used in WIDE])
def test_a_lora_of_another_family_of_the_same_width_is_refused_in_words(made, used, tmp_path):
    folder, file = folder_of(used, tmp_path), written(with_lora(made, ["to_q", "to_k"]), tmp_path)
    if made == used:
        assert problems_of(file, folder) == ([], [])
        return
    for problems, flag in zip(problems_of(file, folder), ("--lora", "--init_lora"), strict=True):
        assert len(problems) == 1
        assert problems[0].startswith(f"{flag} {file}: this LoRA was trained on {SAID[made]}, and {folder} is {SAID[used]} (")
        assert problems[0].endswith("take the model that it was trained on")
    nameless = tmp_path / "nameless.safetensors"  # as other trainers write it, and as this one did
    save_file(load_file(file), nameless, {"format": "pt"})
    assert problems_of(nameless, folder) == ([], [])


SAID = {
    "5b": "a text-to-video model of CogVideoX 1.0 with 16 input channels",
    "5b-i2v": "an image-to-video model of CogVideoX 1.0 with 32 input channels",
    "1.5-5b": "a text-to-video model of CogVideoX1.5 with 16 input channels",
    "1.5-5b-i2v": "an image-to-video model of CogVideoX1.5 with 32 input channels",
}


def test_the_real_configs_are_told_apart_by_the_facts_in_the_file():
    facts = [lora.base_facts(PRESETS[family]["transformer"]) for family in FAMILIES]
    assert [facts.index(one) for one in facts] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_first_lora_of_another_family_is_refused_before_anything_is_encoded(rotary_model, train, tmp_path, capsys):
    file = written(with_lora("5b-i2v", ["to_q", "to_k", "to_v", "to_out.0"]), tmp_path)
    with pytest.raises(SystemExit) as stop:
        train(model=rotary_model, init_lora=file, cache=tmp_path / "cache")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"this LoRA was trained on {SAID['5b-i2v']}, and {rotary_model} is {SAID['5b']}" in " ".join(said.split())
    assert not (tmp_path / "cache/clips").exists()
    assert train(model=rotary_model, init_lora=written(with_lora("5b"), tmp_path), target_modules=kinds(tiny("5b")), max_train_steps=1)


def test_what_tells_the_families_apart_is_told_and_the_shapes_judge_a_file_that_names_no_base(tmp_path):
    file, folder = written(with_lora("5b-i2v", ["to_q"]), tmp_path), folder_of("1.5-5b", tmp_path)
    [problem] = lora_file.check_fit(file, lora.read_layers(file), folder)
    for words_of_one in ("in_channels 32 and 16", "patch_size_t None and 2", "use_learned_positional_embeddings True and False"):
        assert words_of_one in problem
    assert "num_layers" not in problem
    nameless = tmp_path / "nameless.safetensors"
    for note in ("no JSON", "[1]", "{}", '{"another": 1}'):
        save_file(load_file(file), nameless, {"base": note})
        assert lora.other_family(nameless, folder) is None
    save_file(load_file(written(with_lora("1.5-5b-i2v"), tmp_path / "other")), nameless)
    said = "\n".join(lora_file.check_fit(nameless, lora.read_layers(nameless), folder))
    assert "2 of its 24 layers are not in" in said  # ofs_embedding
    assert "patch_embed.proj maps 256 to 64 values in the LoRA and 128 to 64 in the model" in said


def test_the_values_of_a_config_that_lacks_them_are_those_of_diffusers_class(tmp_path):
    folder, file = folder_of("2b", tmp_path), written(with_lora("2b", ["to_q"]), tmp_path)
    config = json.loads((folder / "transformer/config.json").read_text())
    for name in ("patch_size_t", "ofs_embed_dim", "use_learned_positional_embeddings", "in_channels", "out_channels"):
        del config[name]  # as the folders of older releases of diffusers have it
    (folder / "transformer/config.json").write_text(json.dumps(config))
    assert lora.other_family(file, folder) is None
    (folder / "transformer/config.json").write_text(json.dumps(config | {"in_channels": 32}))
    assert lora.other_family(file, folder)
