"""The memory model: its bytes against those that a real step allocates, and against arithmetic."""

import argparse
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

import train_cogvideox_lora as script
from cogvideox import folder, linear, lora, memory, model, offload
from cogvideox.engine import unfit_flags
from dataset import TrainingClips
from demo.make_model import TRANSFORMERS
from tests.conftest import FAMILIES
from tools import estimate
from tools.benchmark.counters import peak_above

MID = {"num_layers": 2}  # the 2B's blocks: all else is its default
TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "text_embed_dim": 32, "time_embed_dim": 64, "num_layers": 3}


def flags(**changed):
    """The trainer's flags with changes."""
    words = ["--pretrained_model_name_or_path", "none", "--mixed_precision", "bf16", "--rank", "16"]
    args = script.build_parser().parse_args(words)
    return argparse.Namespace(**vars(args) | changed)


def configs_of(**transformer):
    return {**memory.PRESETS["2b"], "transformer": transformer}


def real_transformer(config, args):
    """A model as the trainer prepares it on a CPU, with zeros for weights. Returns (model, LoRA parameters)."""
    dtype, everything = memory.PRECISIONS[args.mixed_precision], args.training_type == "sft"
    with memory.without_data(torch.float32 if everything else dtype):
        transformer = CogVideoXTransformer3DModel(**config)
    transformer = transformer.to_empty(device="cpu").requires_grad_(everything)
    for tensor in [*transformer.parameters(), *transformer.buffers()]:
        tensor.data.zero_()
    model.keep_position_tables(transformer.patch_embed)
    parameters = list(transformer.parameters())
    if not everything:
        parameters = lora.add_lora(transformer, args.rank, float(args.rank), 0.0, args.target_modules, seed=0)
    lora.fit_to_autocast(transformer, dtype)
    linear.hold_linears(transformer, args.base_precision, args.offload, torch.device("cpu"))
    if args.offload:
        offload.offload_blocks(transformer, torch.device("cpu"))
    layers = len(transformer.transformer_blocks)
    model.checkpoint_blocks(transformer, *model.blocks_to_recompute(args.gradient_checkpointing, layers))
    return Accelerator(cpu=True, mixed_precision=args.mixed_precision).prepare(transformer).train(), parameters


def measured_step(config, args, shape):
    """Bytes above the start at the highest point of a real forward and backward pass, the same with zeros for inputs."""
    transformer, _ = real_transformer(config, args)
    batch = memory.make_batch(configs_of(**config), args.train_batch_size, shape)
    batch = {name: torch.zeros_like(tensor) for name, tensor in batch.items()}
    constant = model.constant_inputs(transformer, torch.device("cpu"))(batch)
    dtype, scheduler = memory.PRECISIONS[args.mixed_precision], CogVideoXDDIMScheduler()
    return peak_above(lambda: script.velocity_loss(transformer, scheduler, batch, constant, dtype).mean().backward())


def predicted_step(config, args, shape, device="cpu"):
    recomputation = model.blocks_to_recompute(args.gradient_checkpointing, config["num_layers"])
    parts = memory.training_parts(configs_of(**config), args, script.velocity_loss, shape, *recomputation, device)
    return parts["gradients"] + parts["activations"] + parts["working_set"]


def agree(predicted, measured, within=0.03):
    """Whether two numbers of bytes agree, to a share of the measured one."""
    return abs(predicted - measured) <= within * measured


# -----------------------------------------------------------------------------
# A training step


@pytest.mark.parametrize("checkpointing", ["none", "attention", "all", "1"])
def test_a_step_of_a_small_model_takes_what_is_predicted(checkpointing):
    args = flags(mixed_precision="no", gradient_checkpointing=checkpointing)
    for shape in ((2, 16, 8, 8), (3, 16, 12, 20)):
        assert agree(predicted_step(TINY, args, shape), measured_step(TINY, args, shape))


@pytest.mark.parametrize(("precision", "within"), [("no", 0.03), ("bf16", 0.14)])
def test_a_step_of_full_fine_tuning_takes_what_is_predicted(precision, within):
    args, shape = flags(mixed_precision=precision, gradient_checkpointing="all", training_type="sft"), (3, 16, 12, 20)
    assert agree(predicted_step(TINY, args, shape), measured_step(TINY, args, shape), within)
    parts = memory.training_parts(configs_of(**TINY), args, script.velocity_loss, shape, 2, False, "cpu")
    weights = sum(parameter.numel() for parameter in CogVideoXTransformer3DModel(**TINY).parameters())
    assert parts["adapters"] == 4 * weights  # in fp32, whatever is computed in
    assert parts["optimizer_state"] > 1.9 * parts["adapters"]
    averaged = memory.training_parts(
        configs_of(**TINY), flags(**vars(args) | {"ema_decay": 0.9}), script.velocity_loss, shape, 2, False, "cpu"
    )
    assert averaged["training"] == parts["training"] + parts["adapters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"base_precision": "fp8"}, {"base_precision": "int8"}, {"base_precision": "nf4"}, {"train_batch_size": 3}]
)
def test_fewer_bits_and_more_clips_are_predicted(changed):
    args = flags(mixed_precision="no", gradient_checkpointing="all", **changed)
    assert agree(predicted_step(TINY, args, (3, 16, 12, 20)), measured_step(TINY, args, (3, 16, 12, 20)))


@pytest.mark.parametrize("precision", ["stored", pytest.param("int8", marks=pytest.mark.slow), pytest.param("nf4", marks=pytest.mark.slow)])
def test_offloaded_blocks_take_two_buffers_and_no_copy_of_a_layer(precision, monkeypatch):
    args, shape = flags(mixed_precision="no", gradient_checkpointing="all", offload=True, base_precision=precision), (3, 16, 12, 20)
    transformer, _ = real_transformer(TINY, args)
    frozen = [*transformer.parameters(), *transformer.buffers()]
    buffers = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for layer in held(transformer) for copy in layer.copies}
    assert len(buffers) == 2
    parts = memory.training_parts(configs_of(**TINY), args, script.velocity_loss, shape, 3, False)
    assert parts["base_weights"] == sum(memory.size_of(t) for t in frozen if not t.requires_grad) + sum(buffers.values())
    monkeypatch.setattr(memory, "counting", lambda attention_extra, counting=memory.counting: counting())  # of a GPU's kernel
    assert agree(predicted_step(TINY, args, shape, "cuda"), measured_step(TINY, args, shape))


def held(transformer):
    return [module for module in transformer.modules() if isinstance(module, linear.FrozenLinear)]


FAMILY_SHAPE = (4, 16, 12, 20)
OF_THAT_SHAPE = {"sample_height": 12, "sample_width": 20, "sample_frames": 13}  # a learned table has one size


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_predicted(family, checkpointing):
    config, args = TINY | OF_THAT_SHAPE | TRANSFORMERS[family], flags(mixed_precision="no", gradient_checkpointing=checkpointing)
    predicted = predicted_step(config, args, FAMILY_SHAPE)
    assert agree(predicted, measured_step(config, args, FAMILY_SHAPE))
    plain = predicted_step(TINY | OF_THAT_SHAPE, args, FAMILY_SHAPE)
    assert agree(predicted, plain, within=0.1) != family.startswith("1.5")  # half the tokens
    if family == "5b-i2v":
        frames, _, height, width = FAMILY_SHAPE
        assert predicted - plain == (4 * frames * 16 * height * width if checkpointing == "none" else 0)  # at the peak of "all" it is gone


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_is_that_of_the_loader(family_model, family):
    configs, facts = memory.read_configs(family_model(family)), folder.read_facts(family_model(family))

    class Encodings:
        def moments(self, clip, flipped):
            frames, channels, *size = folder.latent_shape(facts, 9, 32, 48)
            return torch.zeros(2 * channels, frames, *size)

        def image(self, clip, flipped):
            return torch.zeros(8, 2 * facts.latent_channels, 4, 6)

        def prompt(self, clip):
            return torch.zeros(facts.max_text_seq_length, configs["transformer"]["text_embed_dim"])

    clips = TrainingClips(Encodings(), lambda position: 0, 1, facts, 1000)
    loaded = next(iter(torch.utils.data.DataLoader(clips, batch_sampler=[[0, 1, 2]])))
    predicted = memory.make_batch(configs, 3, memory.latents_of(configs, 9, 32, 48))

    def described(batch):
        return {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()}

    assert described(predicted) == described(loaded)
    assert predicted["image"].shape[2] == (16 if "i2v" in family else 0)
    assert predicted["latents"].shape[1] == (4 if family.startswith("1.5") else 3)


@pytest.mark.slow
def test_a_prediction_for_other_flags_would_have_been_found_wrong():
    args = flags(mixed_precision="no", gradient_checkpointing="none")
    right = predicted_step(TINY, args, (3, 16, 12, 20))
    for other in ({"mixed_precision": "bf16"}, {"gradient_checkpointing": "all"}, {"train_batch_size": 2}, {"rank": 128}):
        assert not agree(predicted_step(TINY, flags(**{**vars(args), **other}), (3, 16, 12, 20)), right, within=0.1)
    assert not agree(predicted_step(TINY, args, (3, 16, 16, 20)), right, within=0.1)


@pytest.mark.parametrize(
    "plan", [(7, True), *(pytest.param(plan, marks=pytest.mark.slow) for plan in [(0, True), (7, False), (1, True), (4, True), (6, True)])]
)
def test_a_few_blocks_tell_of_all(plan, monkeypatch):
    config, args = configs_of(**TINY | {"num_layers": 7}), flags()
    few = memory.training_parts(config, args, script.velocity_loss, (3, 16, 12, 20), *plan)
    monkeypatch.setattr(memory, "RUN_BLOCKS", 99)
    assert few == memory.training_parts(config, args, script.velocity_loss, (3, 16, 12, 20), *plan)


def test_gradients_of_earlier_batches_are_there_from_the_start():
    config, plan = configs_of(**TINY), (0, True)
    one = memory.training_parts(config, flags(), script.velocity_loss, (3, 16, 12, 20), *plan)
    two = memory.training_parts(config, flags(gradient_accumulation_steps=2), script.velocity_loss, (3, 16, 12, 20), *plan)
    assert two["training"] == one["training"] + one["adapters"]
    assert one["batch"] == two["batch"]


@pytest.mark.slow
def test_where_gradients_are_sharded_the_peak_is_where_the_activations_are(monkeypatch):
    config, shape, args = configs_of(**TINY | {"num_layers": 8}), (3, 16, 12, 20), flags(training_type="sft")
    alone, eight = (memory.training_parts(config, args, script.velocity_loss, shape, 8, False, shards=shards) for shards in (1, 8))
    assert alone["gradients"] > 0.8 * alone["adapters"]  # at the end of the backward pass
    assert eight["gradients"] < 0.1 * alone["adapters"]
    with_attention = memory.training_parts(config, args, script.velocity_loss, shape, 8, True, shards=8)
    assert with_attention["training"] > eight["training"]
    # Such an engine gathers weights in the compute dtype, of which autocast would keep copies until the forward pass ends.
    monkeypatch.setattr(memory, "without_casts", lambda pieces, *inputs: pieces)
    with_casts = memory.training_parts(config, args, script.velocity_loss, shape, 8, False, shards=8)
    assert with_casts["activations"] > eight["activations"] + 0.8 * eight["adapters"] / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_loaded_model(family_model, family):
    args, configs = flags(mixed_precision="bf16", rank=4), memory.read_configs(family_model(family))
    shape = memory.latents_of(configs, 9, 32, 48)
    parts = memory.training_parts(configs, args, script.velocity_loss, shape, 0, True, "cpu")
    transformer = model.load_transformer(family_model(family), torch.bfloat16)
    tensors = [*transformer.parameters(), *transformer.buffers()]
    assert parts["base_weights"] == sum(memory.size_of(t) for t in tensors)
    learned = [t.shape[1] for name, t in transformer.named_buffers() if name.endswith("pos_embedding")]
    assert learned == {"2b": [226 + 5 * 4 * 6], "5b-i2v": [226 + 3 * 2 * 3]}.get(family, [])
    parameters = lora.add_lora(transformer, 4, 4.0, 0.0, args.target_modules, seed=0)
    assert parts["adapters"] == sum(memory.size_of(p) for p in parameters)


@pytest.mark.slow
def test_the_vae_that_encodes_an_image_stays_while_videos_are_sampled(image_model, rotary_model):
    args = flags(height=32, width=48, max_num_frames=9, rank=4, validation_prompt="a dog", mixed_precision="bf16")
    configs = memory.read_configs(image_model)
    plain = configs | {"transformer": memory.read_configs(rotary_model)["transformer"]}
    weights, working = memory.vae_bytes(configs, "encode", (1, 32, 48))
    vae = model.load_vae(image_model, torch.device("cpu"))
    assert weights == sum(memory.size_of(t) for t in [*vae.parameters(), *vae.buffers()])
    sampling = memory.sampling_bytes(configs, args, (9, 32, 48))
    assert memory.phase_parts(configs, args)["sampling"] == weights + max(sampling, working)
    assert memory.phase_parts(plain, args)["sampling"] == memory.sampling_bytes(plain, args, (9, 32, 48)) < sampling
    # At a real size the images of clips take less than the clips.
    args = flags(height=480, width=720, max_num_frames=49)
    assert sum(memory.vae_bytes(memory.PRESETS["5b-i2v"], "encode", (1, 480, 720))) < memory.encoding_bytes(memory.PRESETS["5b-i2v"], args)


@pytest.mark.parametrize("name", script.OPTIMIZER_NAMES)
def test_optimizer_states_are_counted(name):
    args = flags(optimizer=name)
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 100), (16, 8), (1000, 9))]
    optimizer = script.make_optimizer(args, parameters, 1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if torch.is_tensor(value) and "qmap" not in key]
    assert memory.optimizer_bytes(args, parameters) == sum(map(memory.size_of, states))


@pytest.mark.slow
def test_what_a_gpu_does_otherwise():
    """Weights are left in host memory, and nothing else."""
    config, shape, plan = configs_of(**TINY), (3, 16, 12, 20), (0, True)

    def parts(device, **changed):
        return memory.training_parts(config, flags(**changed), script.velocity_loss, shape, *plan, device)

    assert parts("cuda")["activations"] == parts("cpu")["activations"]
    stored, offloaded = parts("cuda")["base_weights"], parts("cuda", offload=True)["base_weights"]
    inside = TINY["num_layers"] * 12 * 64 * 64 * 2  # to_q, to_k, to_v, to_out, ff.net.0, ff.net.2 of width 64, in bf16
    assert offloaded == stored - inside + 2 * inside // TINY["num_layers"]  # two blocks' buffers
    assert parts("cpu", offload=True)["base_weights"] == parts("cpu")["base_weights"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "checkpointing"),
    [((2, 16, 8, 8), "none"), ((2, 16, 8, 8), "attention"), ((3, 16, 12, 12), "all"), ((3, 16, 24, 24), "none"), ((3, 16, 24, 24), "all")],
)
def test_blocks_of_the_2b_take_what_is_predicted(shape, checkpointing):
    args = flags(mixed_precision="no", gradient_checkpointing=checkpointing)
    assert agree(predicted_step(MID, args, shape), measured_step(MID, args, shape), within=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["stored", "fp8", "int8", "nf4"])
def test_blocks_of_the_2b_with_fewer_bits_take_what_is_predicted(precision, monkeypatch):
    """In bf16, whose products take minutes on a CPU without instructions for it: they are left out, and their results made."""
    args = flags(base_precision=precision, gradient_checkpointing="all")
    monkeypatch.setattr(linear, "product", lambda rows, matrix, bias: rows.new_empty(*rows.shape[:-1], matrix.shape[1]))
    assert agree(predicted_step(MID, args, (2, 16, 8, 8)), measured_step(MID, args, (2, 16, 8, 8)), within=0.02)


# -----------------------------------------------------------------------------
# The other phases, and the tool


def result_only(self, inputs, weight, bias):
    """A convolution that only makes its result. The kernels of a CPU reorder inputs and outputs into scratch of the same size."""
    settings = zip(inputs.shape[2:], self.padding, self.kernel_size, self.stride, strict=True)
    return inputs.new_zeros(
        len(inputs), self.out_channels, *[(size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in settings]
    )


@pytest.mark.slow
@pytest.mark.parametrize("tiling", [False, True])
def test_the_vae_takes_what_is_predicted_beside_its_convolutions(tiny_model, tiling, monkeypatch):
    configs, shape = memory.read_configs(tiny_model), (17, 288, 432)
    vae = model.load_vae(tiny_model, torch.device("cpu"), tiling=tiling)
    frames = np.zeros((*shape, 3), np.uint8)
    latents = torch.zeros(memory.latents_of(configs, *shape))
    weights, encode = memory.vae_bytes(configs, "encode", shape, tiling=tiling)
    _, decode = memory.vae_bytes(configs, "decode", shape, tiling=tiling)
    assert weights == sum(memory.size_of(t) for t in [*vae.parameters(), *vae.buffers()])
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", result_only)
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", result_only)
    assert agree(encode, peak_above(lambda: model.encode_frames(vae, frames)), within=0.1)
    assert agree(decode, peak_above(lambda: model.decode_latents(vae, latents)), within=0.1)


@pytest.mark.slow
def test_encoding_is_predicted_whole_where_it_fits_and_in_tiles_elsewhere():
    configs = memory.PRESETS["2b"]
    args = SimpleNamespace(enable_slicing=True, enable_tiling=True, height=480, width=720, max_num_frames=49)
    whole, tiles = (sum(memory.vae_bytes(configs, "encode", (49, 480, 720), tiling=tiled)) for tiled in (False, True))
    room = memory.untiled_encoding_bytes(configs, (49, 480, 720))
    assert tiles < whole < room < 1.3 * whole
    assert memory.encoding_bytes(configs, args) == memory.encoding_bytes(configs, args, room) == whole
    assert memory.encoding_bytes(configs, args, room - 1) == tiles
    args.enable_tiling = False
    assert memory.encoding_bytes(configs, args, 0) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "tiling", "measured"), [("encode", True, 2.47), ("encode", False, 8.18), ("decode", True, 4.19)])
def test_the_vae_takes_what_an_h200_measured(direction, tiling, measured):
    """GiB allocated in fp16, torch 2.11, cuDNN 9.19: `python -m tools.gpu_check --only encode`. Without cuDNN's copies 2.08 and 6.68."""
    bytes_taken = sum(memory.vae_bytes(memory.PRESETS["2b"], direction, (49, 480, 720), tiling=tiling))
    assert bytes_taken / 2**30 == pytest.approx(measured, rel=0.02)


def test_t5_takes_what_is_predicted(tiny_model):
    encoder = model.load_text_encoder(tiny_model, torch.device("cpu"))
    weights, height = memory.captions_bytes(memory.read_configs(tiny_model))
    ids = torch.zeros(1, 226, dtype=torch.int64)
    with torch.no_grad():
        assert agree(height, peak_above(lambda: encoder(ids)), within=0.1)
    assert weights == sum(memory.size_of(p) for p in encoder.parameters())


def test_a_cpu_runs_fp16_weights_in_fp32():
    configs = memory.PRESETS["2b"]
    assert memory.on_device(configs, "cuda") == configs
    assert set(memory.on_device(configs, "cpu")["dtypes"].values()) == {"no"}
    assert memory.on_device(memory.PRESETS["5b"], "cpu") == memory.PRESETS["5b"]


def test_the_highest_phase_is_the_run(tiny_model):
    args = flags(height=64, width=96, max_num_frames=9, rank=4, validation_prompt="a dog")
    parts = memory.predict(memory.read_configs(tiny_model), args, script.velocity_loss)
    assert parts["run"] == max(parts[phase] for phase in ("captions", "clips", "training", "validation"))
    assert parts["training"] == sum(
        parts[part] for part in ("base_weights", "adapters", "optimizer_state", "batch", "gradients", "activations", "working_set")
    )
    silent = memory.predict(memory.read_configs(tiny_model), flags(**{**vars(args), "validation_prompt": None}), script.velocity_loss)
    assert silent["validation"] == 0


def test_the_tool_prints_the_parts_and_fits_a_card(tiny_model, tmp_path, capsys):
    words = ["--model", str(tiny_model), "--height", "64", "--width", "96", "--max_num_frames", "9", "--rank", "4"]
    estimate.main([*words, "--card", "2", "--json", str(tmp_path / "bytes.json")])
    text, found = capsys.readouterr().out, json.loads((tmp_path / "bytes.json").read_text())
    assert "blocks recomputed: none" in text
    assert "does not fit" not in text
    assert f"| TRAINING | {found['training'] / 2**20:.2f} |" in text
    assert found["training"] > 2**17
    with pytest.raises(SystemExit) as stop:
        estimate.main([*words, "--width", "90", "--rank", "0"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "--width 90" in told
    assert "--rank 0" in told


def test_a_folder_that_is_no_model_is_told_and_t5_and_the_vae_may_be_gone(tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model, whole := tmp_path / "whole")
    for part in ("text_encoder", "vae"):
        next((whole / part).glob("*.safetensors")).unlink()
    assert memory.read_configs(whole) == memory.read_configs(tiny_model)
    next((whole / "transformer").glob("*.safetensors")).unlink()
    for name, told in ((whole, "no safetensors weights"), ("THUDM/CogVideoX-2b", "No such file"), (tiny_model / "vae", "No such file")):
        with pytest.raises(SystemExit) as stop:
            estimate.parse(["--model", str(name)])
        assert stop.value.code == 2
        sentence = capsys.readouterr().err
        assert sentence.startswith(f"ERROR[2]: --model {name}: ")
        assert told in sentence


@pytest.mark.slow
def test_the_tool_has_a_row_for_each_card_and_model(tiny_model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(estimate, "CARDS", (1.0001, 2))
    monkeypatch.setattr(estimate, "SAVINGS", ({}, {"offload": True}))
    monkeypatch.setattr(
        memory, "phase_parts", lambda *inputs: {"captions": 1, "clips_encode": 2, "clips_decode": 3, "sampling": 4, "decoding": 5}
    )
    monkeypatch.setattr(memory, "encoding_bytes", lambda *inputs: 2)
    words = ["--presets", "--height", "64", "--width", "96", "--max_num_frames", "9", "--rank", "4", "--json", str(tmp_path / "rows.json")]
    estimate.main([*words, "--model", str(tiny_model)])
    text, rows = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    assert [row["card_gb"] for row in rows] == [1.0001, 2]
    assert {row["clip"] for row in rows} == {"9x64x96"}
    assert [row["flags"] for row in rows] == ["--offload", ""]  # next to nothing is left of 1 GiB
    assert f"| {tiny_model} | 9x64x96 | 2 | - | none |" in text
    assert "no: training" in text
    assert f"--pretrained_model_name_or_path {tiny_model} --instance_data_root DATA" in text


def test_the_tool_takes_each_familys_own_defaults(capsys):
    options, models = estimate.parse(["--presets"])
    shapes = {name: (*memory.largest_shape(args), args.mixed_precision) for name, _, args in models}
    own = {family: (81, 768, 1360, "bf16") if family.startswith("1.5") else (49, 480, 720, "bf16") for family in FAMILIES}
    assert shapes == own | {"2b": (49, 480, 720, "fp16")}
    assert set(memory.PRESETS) == set(FAMILIES) == set(estimate.FAMILIES) == set(memory.HUB_NAMES)
    _, ((name, _, args),) = estimate.parse(["--preset", "2b", "--engine", "FSDP2", "--processes", "8"])
    assert (name, args.mixed_precision) == ("2b", "bf16")  # the engine does not scale an fp16 loss
    _, ((name, configs, args),) = estimate.parse(["--preset", "1.5-5b-i2v", "--height", "768", "--width", "768"])
    assert memory.largest_shape(args) == (81, 768, 768)
    assert configs == memory.PRESETS["1.5-5b-i2v"]
    with pytest.raises(SystemExit):
        estimate.parse(["--preset", "5b-i2v", "--max_num_frames", "53", "--width", "704"])
    told = capsys.readouterr().err
    assert "--max_num_frames 53: this model has learned positions" in told
    assert "--height 480, --width 704: " in told


@pytest.mark.parametrize(
    ("changed", "engine", "tried"),
    [({}, "DDP", estimate.SAVINGS), ({"training_type": "sft"}, "DDP", estimate.SAVINGS_SFT), ({"training_type": "sft"}, "FSDP2", ({},))],
)
def test_the_flags_for_a_card_are_those_that_the_run_would_take(monkeypatch, changed, engine, tried):
    seen = []

    def chosen(memory, configs, args, compute_loss, room, device, phases, engine, processes):
        seen.append((args.offload, args.base_precision, args.optimizer))
        return (0, True), {"training": room + 1, "validation": 0, "clips": 0}

    monkeypatch.setattr(estimate, "chosen_recomputation", chosen)
    monkeypatch.setattr(memory, "encoding_bytes", lambda *inputs: 0)
    args = flags(**changed)
    saving, *_ = estimate.flags_for(24, memory, {}, args, None, "cuda", {}, engine, 8)
    assert saving == tried[-1]
    assert seen == [(s.get("offload", False), s.get("base_precision", "stored"), s.get("optimizer", "adamw")) for s in tried]
    # None of them is refused.
    for saving in tried:
        problems = script.check_flags(argparse.Namespace(**vars(args) | saving | {"instance_data_root": "."}))
        assert not [problem for problem in problems if "bitsandbytes" not in problem]
        sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if engine == "FSDP2" else {}
        assert not unfit_flags(argparse.Namespace(**vars(args) | saving), sharded)


@pytest.mark.slow
def test_auto_of_the_tool_recomputes_no_more_than_has_to_be():
    configs, args = configs_of(**TINY | {"num_layers": 6}), flags(height=96, width=160, max_num_frames=9)
    phases = dict.fromkeys(("captions", "clips_encode", "clips_decode", "sampling", "decoding"), 0)
    peaks = [memory.predict(configs, args, script.velocity_loss, "cuda", (n, True), phases)["training"] for n in (0, 2, 3)]
    for room, wanted in ((peaks[0], (0, True)), (peaks[1] - 1, (3, True)), (1, (6, False))):
        plan, parts = estimate.chosen_recomputation(memory, configs, args, script.velocity_loss, room, "cuda", phases)
        assert plan == wanted
        assert room == 1 or parts["training"] <= room


@pytest.mark.long
def test_a_step_of_the_whole_2b_runs_and_takes_what_is_predicted():
    """All 30 blocks in fp32, random weights, few latents: most of the time goes into the 226 text tokens."""
    config, shape = {"num_layers": 30}, (2, 16, 8, 8)
    args = flags(mixed_precision="no", gradient_checkpointing="all", rank=128)
    transformer, parameters = real_transformer(config, args)
    assert sum(p.numel() for p in parameters) == 30 * 4 * 2 * 1920 * 128  # 59.0 M, as the guide's rank has it
    generator = torch.Generator().manual_seed(0)
    for module in transformer.modules():
        if isinstance(module, linear.FrozenLinear):
            module.held[0].uniform_(-0.03, 0.03, generator=generator)
    for name, tensor in transformer.named_parameters():
        if "lora_" not in name:
            tensor.data.uniform_(-0.03, 0.03, generator=generator)
    batch = {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else torch.full_like(tensor, 500)
        for name, tensor in memory.make_batch(configs_of(**config), args.train_batch_size, shape).items()
    }
    losses, scheduler = [], CogVideoXDDIMScheduler()

    def step():
        loss = script.velocity_loss(transformer, scheduler, batch, {}, torch.float32).mean()
        losses.append(loss.item())
        loss.backward()

    assert agree(predicted_step(config, args, shape), peak_above(step))
    assert 0.5 < losses[0] < 10
    ups = [p for name, p in transformer.named_parameters() if "lora_B" in name]
    assert len(ups) == 120
    assert all(p.grad.abs().max() > 0 for p in ups)
    assert not any(p.grad.any() for name, p in transformer.named_parameters() if "lora_A" in name)  # B is still zero
