"""A transformer with the LoRA inside it: what it computes, what is left as it was, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from cogvideox.folder import linear_layers, stored_dtype
from cogvideox.lora import LORA_FILE
from cogvideox.model import bare_pipeline, constant_inputs
from demo.make_model import make_model
from tests.conftest import FAMILIES, same
from tests.test_export_comfyui import ATTENTION, make_lora, nameless, refused
from tools import merge

WEIGHTS = "diffusion_pytorch_model.safetensors"


def line(model, lora, output, *more):
    """A command line."""
    return [str(w) for w in ("--pretrained_model_name_or_path", model, "--lora", lora, "--output_dir", output, *more)]


def output_of(transformer):
    """What a transformer makes of a fixed input of 32 x 48 pixels, [1, F', 16, 4, 6]."""
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4 if config.patch_size_t else 3, config.in_channels, 4, 6, generator=generator)
    text = torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    constant = constant_inputs(transformer, torch.device("cpu"))({"latents": latents})
    return transformer(hidden_states=latents, encoder_hidden_states=text, timestep=torch.tensor([500]), **constant).sample


@torch.no_grad()
def predicted(transformer):
    """`output_of` in fp32 and without gradients."""
    return output_of(transformer.float().eval())


def base_and_lora(model, lora, scale=None, dtype=torch.float32):
    """The base's transformer with a LoRA from the stock loader (scale None: without), computing in fp32 on weights of `dtype`."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(model / "transformer", torch_dtype=dtype).float()
    pipeline = bare_pipeline(transformer)
    if scale is not None:
        pipeline.load_lora_weights(str(lora), weight_name=LORA_FILE, adapter_name="lora")
        pipeline.set_adapters("lora", scale)
    return predicted(transformer)


@pytest.mark.numeric
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_the_merged_model_computes_what_base_and_lora_do(tiny_model, tmp_path, scale, capsys):
    lora = make_lora(tiny_model, tmp_path / "run", [*ATTENTION, "ff.net.2", "norm1.linear", "proj_out", "text_proj"])
    merge.main(line(tiny_model, lora, tmp_path / "out", "--lora_scale", scale))
    said = capsys.readouterr().out
    assert "in 14 weights" in said
    weights = f'CogVideoXTransformer3DModel.from_pretrained("{tmp_path / "out"}/transformer", torch_dtype=torch.float32)'
    assert f'load it with CogVideoXPipeline.from_pretrained("{tiny_model}", transformer={weights}, torch_dtype=torch.float32)\n' in said
    merged = predicted(CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out/transformer"))
    torch.testing.assert_close(merged, base_and_lora(tiny_model, lora, scale), rtol=1e-4, atol=1e-5)
    assert (merged - base_and_lora(tiny_model, lora)).abs().max() > 1e-2
    assert (merged - base_and_lora(tiny_model, lora, 0.5)).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_every_family_is_merged_and_the_pipeline_that_is_named_loads_the_result(
    family, family_model, tmp_path, capsys
):
    model, kind = family_model(family), CogVideoXImageToVideoPipeline if "i2v" in family else CogVideoXPipeline
    lora = make_lora(model, tmp_path / "run", list(linear_layers(model)))
    merge.main(line(model, lora, tmp_path / "out", "--whole_pipeline"))
    said, output = capsys.readouterr().out, tmp_path / "out"
    assert f"in {len(linear_layers(model))} weights" in said
    assert f'load it with {kind.__name__}.from_pretrained("{output}", torch_dtype=torch.float32)' in said
    merged = predicted(kind.from_pretrained(output, text_encoder=None).transformer)
    torch.testing.assert_close(merged, base_and_lora(model, lora, 1.0), rtol=1e-4, atol=1e-5)
    assert (merged - base_and_lora(model, lora)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is_and_its_loss_is_told(tmp_path, dtype, capsys):
    model = make_model(tmp_path / "half", vae_channels=8, head_width=16, dtype=dtype)
    lora = make_lora(model, tmp_path / "run", size=0.5)
    merge.main(line(model, lora, tmp_path / "out"))
    said = capsys.readouterr().out
    assert said.count(f"torch_dtype={dtype})") == 2
    told = float(said.rsplit(" took ")[1].split("%")[0]) / 100
    merged = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out/transformer", torch_dtype=dtype)
    assert stored_dtype(tmp_path / "out", "transformer") == dtype
    written, base, trained = (
        load_file(tmp_path / "out/transformer" / WEIGHTS),
        load_file(model / "transformer" / WEIGHTS),
        load_file(lora / LORA_FILE),
    )
    updates = {n: trained[f"transformer.{n}.lora_B.weight"] @ trained[f"transformer.{n}.lora_A.weight"] for n in layers_of(trained)}
    errors = {n: written[f"{n}.weight"].float() - base[f"{n}.weight"].float() - update for n, update in updates.items()}
    lost = sum(e.square().sum() for e in errors.values()) / sum(u.square().sum() for u in updates.values())
    assert told == pytest.approx(lost.sqrt().item(), abs=1e-4)
    assert told > 1e-4
    with_lora, without = base_and_lora(model, lora, 1.0, dtype), base_and_lora(model, lora, None, dtype)
    error, effect = (predicted(merged) - with_lora).abs().max(), (with_lora - without).abs().max()
    assert error < 16 * torch.finfo(dtype).eps * effect
    assert effect > 0.1


def layers_of(trained):
    """The layers of a LoRA's weights."""
    return {name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in trained}


def shard(model, variant=""):
    """Cut a transformer's weights into two files with an index, named for a variant if one is given."""
    folder = model / "transformer"
    state = load_file(folder / WEIGHTS)
    names, suffix = sorted(state), f".{variant}" if variant else ""
    files = {f"diffusion_pytorch_model{suffix}-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / f"diffusion_pytorch_model.safetensors.index{suffix}.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()
    return model


def test_sharded_weights_and_a_variant_give_the_same_weights(tiny_model, tmp_path):
    lora = make_lora(tiny_model, tmp_path / "run")
    merge.main(line(tiny_model, lora, tmp_path / "out"))
    whole = load_file(tmp_path / "out/transformer" / WEIGHTS)
    base = load_file(tiny_model / "transformer" / WEIGHTS)
    assert {name.removesuffix(".weight") for name in base if not torch.equal(base[name], whole[name])} == layers_of(
        load_file(lora / LORA_FILE)
    )
    for variant in ("", "fp16"):
        model, output = shard(shutil.copytree(tiny_model, tmp_path / f"sharded{variant}"), variant), tmp_path / f"out{variant}-sharded"
        merge.main(line(model, lora, output, *(["--variant", variant] if variant else [])))
        assert len(list((output / "transformer").glob("*-of-00002.safetensors"))) == 2
        assert not list(output.rglob("*fp16*"))
        assert same(dict(CogVideoXTransformer3DModel.from_pretrained(output / "transformer").state_dict()), whole)


@pytest.mark.numeric
def test_a_whole_pipeline_loads_and_the_base_is_left_alone(tiny_model, tmp_path):
    lora, model = make_lora(tiny_model, tmp_path / "run"), shutil.copytree(tiny_model, tmp_path / "base")
    # A hub cache holds links to files beside it.
    file = model / "text_encoder/model.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to(Path("../../blob"))
    before = {path: path.read_bytes() for path in sorted(model.rglob("*")) if path.is_file()}
    output = tmp_path / "deep/out"
    merge.main(line(model, lora, output, "--whole_pipeline"))
    pipeline = CogVideoXPipeline.from_pretrained(output)
    torch.testing.assert_close(predicted(pipeline.transformer), base_and_lora(tiny_model, lora, 1.0), rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in model.iterdir())
    merge.main(line(model, lora, output, "--whole_pipeline", "--overwrite", "--lora_scale", 2))
    assert {path: path.read_bytes() for path in sorted(model.rglob("*")) if path.is_file()} == before
    merged = predicted(CogVideoXTransformer3DModel.from_pretrained(output / "transformer"))
    assert (merged - predicted(pipeline.transformer)).abs().max() > 1e-2


def test_the_check_finds_what_is_wrong(tiny_model, tmp_path):
    lora = make_lora(tiny_model, tmp_path / "run") / LORA_FILE
    merge.main(line(tiny_model, lora, tmp_path / "out"))
    base, target = merge.find_weights(tiny_model / "transformer"), tmp_path / "out/transformer"
    good = load_file(target / WEIGHTS)

    def checked(scale=1.0, **changes):
        save_file(good | changes, target / WEIGHTS)
        with merge.progress(disable=True) as bar:
            return merge.check(base, target, lora, scale, bar)

    assert checked() < 1e-4
    name, other = "transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.norm1.linear.weight"
    for changes in (
        {"scale": 1.01},
        {name: good[name] + 1e-4},
        {other: good[other] * (1 + 2**-20)},
        {name: load_file(base[name][0])[name]},
    ):
        with pytest.raises(ValueError, match=r"weight"):
            checked(**changes)


def test_a_weight_that_its_dtype_cannot_hold_writes_nothing(tmp_path, capsys):
    model = make_model(tmp_path / "half", vae_channels=8, head_width=16, dtype=torch.float16)
    lora = make_lora(model, tmp_path / "run", size=1e5)
    with pytest.raises(SystemExit) as stop:
        merge.main(line(model, lora, tmp_path / "out"))
    assert stop.value.code == 1
    assert "smaller --lora_scale" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_ends_in_a_sentence_and_leaves_what_was_there(tiny_model, tmp_path, monkeypatch, capsys):
    lora = make_lora(tiny_model, tmp_path / "run")
    merge.main(line(tiny_model, lora, tmp_path / "out"))
    before = (tmp_path / "out/transformer" / WEIGHTS).read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge.shutil, "copyfile", full)
    with pytest.raises(SystemExit) as stop:
        merge.main(line(tiny_model, lora, tmp_path / "out", "--overwrite", "--lora_scale", 2))
    assert stop.value.code == 4
    assert "given up: No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["transformer"]
    assert (tmp_path / "out/transformer" / WEIGHTS).read_bytes() == before


def test_all_mistakes_are_told_at_once(tiny_model, tmp_path, capsys):
    lora = make_lora(tiny_model, tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    said = refused(merge.main, capsys, *line(tmp_path / "none", tmp_path / "nothing", tmp_path / "full", "--lora_scale", 0))
    for words in ("no such file or folder", "no such folder", "not empty", "--lora_scale 0"):
        assert words in said
    assert "base model itself" in refused(merge.main, capsys, *line(tiny_model, lora, tiny_model, "--overwrite"))
    other = make_model(tmp_path / "wide", vae_channels=8, head_width=16, layers=1, heads=4)
    assert "this LoRA was trained on" in refused(merge.main, capsys, *line(other, lora, tmp_path / "out"))
    nameless(lora)
    said = refused(merge.main, capsys, *line(other, lora, tmp_path / "out"))
    assert "4 of its 8 layers are not in" in said
    assert "32 to 32 values in the LoRA and 64 to 64" in said
    assert not (tmp_path / "out").exists()
    merge.main(line(tiny_model, lora, tmp_path / "full", "--overwrite"))
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["mine.txt", "transformer"]
