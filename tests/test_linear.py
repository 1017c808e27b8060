"""Frozen layers: the same numbers as torch's in any blocks of rows, stored in fewer bits, kept where they were put."""

import shutil

import pytest
import torch

import train_cogvideox_lora as script
from cogvideox import linear, lora, model
from tests.conftest import lora_of, same

CPU = torch.device("cpu")


def pair(dtype, precision="stored", width=128):
    """A frozen layer and one that holds its weight."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(width, 192).to(dtype).requires_grad_(False)
    return plain, linear.FrozenLinear(plain, precision)


def product_and_gradient(layer, rows, dtype, seed=0):
    inputs = torch.randn(2, rows // 2, layer.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
    outputs = layer(inputs)
    outputs.float().square().sum().backward()
    return outputs.detach(), inputs.grad


@pytest.mark.parametrize("rows", [2, 334, 874, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_change_no_bit(rows, dtype, monkeypatch):
    plain, held = pair(dtype)
    parts = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kw: parts.append(1) or addmm(*args, **kw))
    expected, got = product_and_gradient(plain, rows, dtype), product_and_gradient(held, rows, dtype)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert len(parts) == (4 if rows > 512 and dtype == torch.bfloat16 else 1)
    other = product_and_gradient(held, rows, dtype, seed=1)
    assert not torch.equal(got[0], other[0])
    assert not torch.equal(got[1], other[1])


@pytest.mark.parametrize(("precision", "error", "bytes_a_number"), [("fp8", 0.04, 1.1), ("int8", 0.01, 1.1), ("nf4", 0.2, 0.6)])
def test_fewer_bits_are_near_and_small_and_the_gradient_is_that_of_the_weight_held(precision, error, bytes_a_number):
    plain, held = pair(torch.float32, precision)
    largest = plain.weight.abs().max()
    assert 0 < (plain.weight - held.weight).abs().max() < error * largest
    assert sum(t.numel() * t.element_size() for t in held.held) < bytes_a_number * plain.weight.numel()
    rounded = torch.nn.Linear(128, 192).requires_grad_(False)
    rounded.weight.data, rounded.bias.data = held.weight.clone(), plain.bias.data
    for a, b in zip(product_and_gradient(rounded, 40, torch.float32), product_and_gradient(held, 40, torch.float32), strict=True):
        assert torch.equal(a, b)


def test_a_row_of_zeros_and_a_large_one_survive():
    for precision in ("fp8", "int8"):
        plain, _ = pair(torch.bfloat16)
        plain.weight.data[0], plain.weight.data[1] = 0, 3e4
        held = linear.FrozenLinear(plain, precision).weight
        assert torch.equal(held[:2], plain.weight[:2])


def test_no_dense_weight_outlives_its_product():
    _, held = pair(torch.bfloat16, "int8")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        held(torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True))
    assert kept == []


def test_offloaded_weights_stay_when_the_model_moves():
    for resident in (True, False):
        layer = linear.FrozenLinear(pair(torch.float32)[0], "int8", resident=resident)
        layer.to("meta")
        assert {tensor.device.type for tensor in layer.held} == {"meta" if resident else "cpu"}
        assert layer.bias.device.type == "meta"


@pytest.mark.parametrize("precision", ["stored", "fp8", "int8", "nf4"])
def test_a_transformer_holds_all_frozen_weights_of_its_blocks_but_the_norms(tiny_model, precision):
    transformer = model.load_transformer(tiny_model, torch.bfloat16)
    parameters = lora.add_lora(transformer, 4, 4.0, 0.0, ["to_q", "ff.net.2"], seed=0)
    linear.hold_linears(transformer, precision)
    held = {name for name, module in transformer.transformer_blocks.named_modules() if isinstance(module, linear.FrozenLinear)}
    kinds = ("attn1.to_q.base_layer", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2.base_layer")
    assert held == {f"{block}.{kind}" for block in (0, 1) for kind in kinds}
    left = {name for name, p in transformer.named_parameters() if "transformer_blocks" in name and name.endswith("weight") and p.dim() == 2}
    assert all("lora_" in name or "norm" in name for name in left)
    assert {p.dtype for p in parameters} == {torch.float32}


def test_on_a_gpu_nothing_is_replaced_where_nothing_is_gained(tiny_model):
    transformer = model.load_transformer(tiny_model, torch.bfloat16)
    linear.hold_linears(transformer, device="cuda")
    assert not any(isinstance(module, linear.FrozenLinear) for module in transformer.modules())


@pytest.mark.parametrize("kept_out", [True, False])
def test_in_half_precision_the_base_computes_what_the_stock_pipeline_does(tiny_model, kept_out, monkeypatch):
    inputs = torch.randn(1, 2, 16, 4, 4).bfloat16(), torch.randn(1, 226, 32).bfloat16(), torch.tensor([10])
    stock = model.load_transformer(tiny_model, torch.bfloat16)(*inputs, return_dict=False)[0]
    transformer = model.load_transformer(tiny_model, torch.bfloat16)
    lora.add_lora(transformer, 4, 4.0, 0.0, ["to_q"], seed=0)
    lora.leave_casts_to_autocast(transformer)
    if kept_out:
        lora.keep_norms_out_of_autocast(transformer, torch.bfloat16)
    norm, seen = torch.nn.functional.layer_norm, []

    def layer_norm(inputs, *rest):
        seen.append((torch.is_autocast_enabled("cpu"), inputs.dtype))
        # As a GPU's autocast does it.
        return (
            norm(inputs.float(), rest[0], *[p if p is None else p.float() for p in rest[1:3]], rest[3])
            if seen[-1][0]
            else norm(inputs, *rest)
        )

    monkeypatch.setattr(torch.nn.functional, "layer_norm", layer_norm)
    with torch.autocast("cpu", torch.bfloat16):
        live = transformer(*inputs, return_dict=False)[0]
    assert len(seen) > 8
    assert set(seen) == {(False, torch.bfloat16)} if kept_out else (True, torch.bfloat16) in seen
    assert torch.equal(live, stock) == kept_out


@pytest.mark.slow
def test_held_layers_train_the_same_lora_bit_for_bit(train, monkeypatch):
    settings = {"mixed_precision": "bf16", "target_modules": ["to_q", "ff.net.0.proj"], "height": 96, "width": 144, "max_num_frames": 17}
    held = lora_of(train(**settings))
    monkeypatch.setattr(linear, "CPU_ROWS", 32)  # the tiny clips have few tokens
    in_parts = lora_of(train(**settings))
    monkeypatch.setattr(script, "hold_linears", lambda *args: None)
    plain = lora_of(train(**settings))
    assert same(held, plain)
    assert same(in_parts, plain)
    assert not same(plain, lora_of(train(**settings, seed=1)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
def test_a_lora_trains_on_a_base_of_fewer_bits_and_goes_on_with_the_same_bits(train, plain_run, tmp_path, precision):
    settings = {"base_precision": precision, "max_train_steps": 4, "checkpointing_steps": 2, "eval_clips": 1}
    folder = train(**settings)
    straight = lora_of(folder)
    assert not same(straight, lora_of(plain_run(**settings | {"base_precision": "stored"})))
    stopped = train(output=tmp_path / "two", **settings | {"max_train_steps": 2})
    train(output=stopped, resume_from_checkpoint="latest", **settings)
    assert same(straight, lora_of(stopped))


@pytest.mark.slow
def test_another_base_precision_is_another_run(train, plain_run, tmp_path, capsys):
    shutil.copytree(plain_run(), tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        train(output=tmp_path / "out", resume_from_checkpoint="latest", base_precision="int8", max_train_steps=4)
    assert stop.value.code == 4
    assert "--base_precision was 'stored' and is 'int8'" in capsys.readouterr().err


@pytest.mark.slow
def test_offloading_changes_no_bit(train, plain_run):
    assert same(lora_of(plain_run()), lora_of(train(offload=True)))
