"""The ComfyUI file of a LoRA: its names, its strength, and what is refused."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox import lora
from cogvideox.lora import LORA_FILE, read_layers
from cogvideox.model import load_transformer
from tools import export_comfyui
from tools.lora_file import find_lora

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def make_lora(model, folder, targets=ATTENTION, rank=4, alpha=8.0, size=0.05, seed=1):
    """Write a LoRA as a run does, with random weights in lora_B. Returns its folder."""
    transformer = load_transformer(model, torch.float32)
    lora.add_lora(transformer, rank, alpha, 0.0, targets, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    facts = lora.facts(SimpleNamespace(rank=rank, lora_alpha=alpha), transformer)
    lora.write(folder, lora.export(transformer, lora.live_state(transformer)), facts)
    return folder


def nameless(folder):
    """Make a LoRA's file one that names no base, as other trainers write it. Returns its folder."""
    save_file(load_file(folder / LORA_FILE), folder / LORA_FILE, {"format": "pt"})
    return folder


def refused(main, capsys, *line):
    """The sentences that a command line ends with, which are told with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in line])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_each_weight_gets_its_name_and_the_trained_strength(tiny_model, tmp_path, capsys):
    folder = make_lora(tiny_model, tmp_path / "run", [*ATTENTION, "ff.net.0.proj", "ff.net.2", "linear_1", "linear_2"])
    output = tmp_path / "loras/mine.safetensors"
    export_comfyui.main(["--lora", str(folder), "--output", str(output)])
    said = capsys.readouterr().out
    assert "14 weights are changed as trained" in said
    assert "strength 1.0" in said
    written, trained = load_file(output), load_file(folder / LORA_FILE)
    kinds = {re.sub(r"\d+", "N", name.rsplit(".lora_", 1)[0]) for name in written if ".lora_" in name}
    assert kinds == {f"diffusion_model.blocks.N.{part}" for part in ("q", "k", "v", "attn_out", "ff_proj", "ff_out")} | {
        "diffusion_model.time_embedding_linear_N"
    }
    assert len(written) == 3 * 14
    assert all(written[name] == 4 for name in written if name.endswith(".alpha"))
    name, layer = "diffusion_model.blocks.1.attn_out", "transformer.transformer_blocks.1.attn1.to_out.0"
    update = written[f"{name}.alpha"] / 4 * written[f"{name}.lora_B.weight"] @ written[f"{name}.lora_A.weight"]
    assert torch.equal(update, trained[f"{layer}.lora_B.weight"] @ trained[f"{layer}.lora_A.weight"])
    other = trained[f"{layer.replace('to_out.0', 'to_q')}.lora_B.weight"] @ trained[f"{layer.replace('to_out.0', 'to_q')}.lora_A.weight"]
    assert not torch.equal(update, other)


def test_a_wrong_file_does_not_pass_the_check(tiny_model, tmp_path):
    file = make_lora(tiny_model, tmp_path / "run") / LORA_FILE
    good = export_comfyui.exported(file)
    save_file(good, tmp_path / "good.safetensors")
    assert export_comfyui.check(file, tmp_path / "good.safetensors")[:2] == (8, 0.0)
    key = "diffusion_model.blocks.0.q.alpha"
    save_file(good | {key: torch.tensor(8.0)}, tmp_path / "strong.safetensors")
    assert export_comfyui.check(file, tmp_path / "strong.safetensors")[1] > 1e-3
    save_file({name: tensor for name, tensor in good.items() if name != key}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        export_comfyui.check(file, tmp_path / "less.safetensors")
    save_file(good | {"diffusion_model.blocks.7.q.alpha": torch.tensor(4.0)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.7"):
        export_comfyui.check(file, tmp_path / "more.safetensors")


def test_of_each_model_it_is_said_what_comfyuis_nodes_do_wrongly(tiny_model, rotary_model, temporal_patch_model, tmp_path, capsys):
    def told(file):
        export_comfyui.main(["--lora", str(file), "--output", str(tmp_path / "out/one.safetensors")])
        said = " ".join(capsys.readouterr().err.split())
        return [word for word in ("off by 62 to 128 % of its largest value", "other positions than diffusers") if word in said]

    models = {"2B": tiny_model, "5B": rotary_model, "1.5": temporal_patch_model}
    files = [make_lora(model, tmp_path / name) / LORA_FILE for name, model in models.items()]
    assert [told(file) for file in files] == [["off by 62 to 128 % of its largest value"], ["other positions than diffusers"], []]
    assert told(nameless(files[0].parent) / LORA_FILE) == []
    for layer, inputs, outputs, expected in (
        ("attn1.to_q", 1920, 1920, True),
        ("norm1.linear", 512, 11520, True),
        ("ff.net.2", 7680, 1920, True),
        ("attn1.to_q", 3072, 3072, False),
        ("norm1.linear", 512, 18432, False),
        ("ff.net.2", 12288, 3072, False),
    ):
        name = f"transformer.transformer_blocks.0.{layer}"
        save_file({f"{name}.lora_A.weight": torch.ones(2, inputs), f"{name}.lora_B.weight": torch.ones(outputs, 2)}, files[0])
        assert bool(told(files[0])) is expected, layer


def test_a_layer_that_no_transformer_has_is_refused(tmp_path, capsys):
    name, file = "transformer.transformer_blocks.0.norm1.norm", tmp_path / "other.safetensors"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}, file)
    said = refused(export_comfyui.main, capsys, "--lora", file, "--output", tmp_path / "out.safetensors")
    assert "transformer_blocks.0.norm1.norm: is no linear layer of a CogVideoX transformer" in said
    assert said.count("ERROR") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_all_mistakes_are_told_at_once_and_the_lora_is_not_written_over(tiny_model, tmp_path, capsys):
    folder = make_lora(tiny_model, tmp_path / "run")
    before = (folder / LORA_FILE).read_bytes()
    said = refused(export_comfyui.main, capsys, "--lora", tmp_path / "none", "--output", tmp_path)
    assert "no such file or folder" in said
    assert "ending in .safetensors" in said
    said = refused(export_comfyui.main, capsys, "--lora", folder, "--output", folder / LORA_FILE)
    assert "is the LoRA itself" in said
    assert (folder / LORA_FILE).read_bytes() == before
    export_comfyui.main(["--lora", str(folder / LORA_FILE), "--output", str(tmp_path / "a.safetensors")])
    said = refused(export_comfyui.main, capsys, "--lora", tmp_path / "a.safetensors", "--output", tmp_path / "b.safetensors")
    assert "ComfyUI's names" in said


def test_files_that_are_no_lora_of_this_trainer_are_refused(tiny_model, tmp_path):
    good = load_file(make_lora(tiny_model, tmp_path / "run") / LORA_FILE)
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    assert len(read_layers(tmp_path / "run" / LORA_FILE)) == 8
    (tmp_path / "cut").write_bytes((tmp_path / "run" / LORA_FILE).read_bytes()[:-9])
    (tmp_path / "words").write_bytes(b"these are words and no weights at all")
    save_file({}, tmp_path / "empty")
    save_file({name: tensor for name, tensor in good.items() if name != f"{layer}.lora_B.weight"}, tmp_path / "half")
    save_file(good | {f"{layer}.lora_magnitude_vector": torch.ones(32)}, tmp_path / "dora")
    save_file(good, tmp_path / "rank", {"lora_adapter_metadata": '{"transformer.r": 8, "transformer.lora_alpha": 8}'})
    save_file(good, tmp_path / "asks", {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.use_dora": true}'})
    save_file(good | {"transformer.elsewhere.alpha": torch.tensor(1.0)}, tmp_path / "stray")
    both = {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 4}'}
    save_file(good | {f"{layer}.alpha": torch.tensor(1.0)}, tmp_path / "both", both)
    save_file(good | {f"{layer}.alpha": torch.tensor(float("nan"))}, tmp_path / "nan")
    reasons = {"cut": "truncated", "words": "cannot be read", "empty": "no weights", "half": "needs lora_A", "dora": "magnitude"}
    reasons |= {"rank": "a rank of 8, and its weights have 4", "asks": "use_dora", "stray": "belongs to no layer"}
    for name, reason in (reasons | {"both": "in its metadata and as tensors", "nan": "not finite"}).items():
        with pytest.raises(ValueError, match=reason):
            read_layers(tmp_path / name)
    save_file(good, tmp_path / "same", {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 4}'})
    assert len(read_layers(tmp_path / "same")) == 8


def test_a_lora_is_found_by_its_folder_or_its_file(tiny_model, tmp_path):
    file = make_lora(tiny_model, tmp_path / "run/best") / LORA_FILE
    assert find_lora(tmp_path / "run/best") == find_lora(file) == file
    with pytest.raises(ValueError, match="give the folder of a run"):
        find_lora(tmp_path / "run")
    with pytest.raises(ValueError, match="--transformer"):
        find_lora(tiny_model)
