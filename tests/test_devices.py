"""Two devices: the weights that compute, the batch and a loaded adapter are on one of them, the meta device stands in for a GPU."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from peft.tuners import tuners_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_cogvideox_lora as script
from cogvideox import linear, lora, model, scoring, validation
from tests.conftest import words

GPU = torch.device("meta")
COPIES = ("aten._to_copy.default", "aten.copy_.default")


class OneDevice(TorchDispatchMode):
    """Fails where an operation that is no copy takes tensors of two devices; a CPU tensor without dimensions is a number.

    Numbers on the meta device are read as 0.
    """

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
        assert len(devices) < 2 or str(operation) in COPIES, f"{operation} takes tensors on {devices}"
        self.seen |= devices
        if str(operation) == "aten._local_scalar_dense.default" and tensors[0].is_meta:
            return torch.zeros((), dtype=tensors[0].dtype).item()
        return operation(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    """The meta device has no autocast, and peft moves nothing to it."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))

    class Torch:
        device = staticmethod(lambda name: torch.device("xpu" if name == "meta" else name))

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(tuners_utils, "torch", Torch())


def flags(model_folder, **changed):
    arguments = words(model_folder, "data", "out", "cache", gradient_checkpointing="none", mixed_precision="no")
    args = script.build_parser().parse_args(arguments)
    return argparse.Namespace(**vars(args) | {"lora_alpha": 4.0} | changed)


def on_gpu(args, quantized="stored"):
    """The transformer as the trainer prepares it for a GPU, in fp32: the meta device has no autocast. quantized: the precision of the held weights, made on the CPU."""
    transformer = lora.build(args, Path(args.pretrained_model_name_or_path), torch.float32)
    if quantized != "stored":
        linear.hold_linears(transformer, quantized, args.offload)
    accelerator = SimpleNamespace(device=GPU, distributed_type=DistributedType.NO, num_processes=1)
    script.prepare_transformer(transformer, args, accelerator, torch.float32)
    return transformer


def batch_on_gpu(frames=2):
    latents = torch.zeros(1, frames, 16, 4, 6, device=GPU)
    prompt, timestep = torch.zeros(1, 226, 32, dtype=torch.float32, device=GPU), torch.zeros(1, dtype=torch.int64, device=GPU)
    return {"latents": latents, "noise": latents, "prompt": prompt, "timestep": timestep, "image": latents[:, :, :0]}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "all", "attention"])
def test_a_step_mixes_no_devices(tiny_model, rotary_model, offload, checkpointing):
    for folder in (tiny_model, rotary_model):
        args = flags(folder, offload=offload, gradient_checkpointing=checkpointing, lora_dropout=0.1, snr_gamma=5.0)
        transformer = on_gpu(args)
        frozen = [tensor for module in transformer.modules() if isinstance(module, linear.FrozenLinear) for tensor in module.held]
        assert {tensor.device.type for tensor in frozen} == ({"cpu"} if offload else set())
        layers = [module for module in transformer.modules() if isinstance(module, linear.FrozenLinear)]
        assert {copy.device for layer in layers for copy in layer.copies} == ({GPU} if offload else set())
        with OneDevice() as watch:
            compute_loss, clip_losses = script.make_losses(args, transformer, CogVideoXDDIMScheduler(), torch.float32, GPU)
            compute_loss(transformer, batch_on_gpu()).backward()
            with torch.no_grad():
                assert clip_losses(transformer, batch_on_gpu(3)).device == GPU
        assert watch.seen >= {"meta"}
        trained = [p for p in transformer.parameters() if p.requires_grad]
        assert {p.grad.device for p in trained} == {GPU}


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_step_with_fewer_bits_mixes_no_devices(tiny_model, precision, offload):
    args = flags(tiny_model, offload=offload)
    transformer = on_gpu(args, precision)
    with OneDevice():
        compute_loss, _ = script.make_losses(args, transformer, CogVideoXDDIMScheduler(), torch.float32, GPU)
        compute_loss(transformer, batch_on_gpu()).backward()


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_a_video_after_a_step_mixes_no_devices(rotary_model, kind):
    args = flags(rotary_model, offload=True)
    transformer, scheduler, prompt = on_gpu(args), kind(prediction_type="v_prediction"), torch.zeros(226, 32)
    settings = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 6.0, "use_dynamic_cfg": True}
    with OneDevice():
        script.make_losses(args, transformer, scheduler, torch.float32, GPU)[0](transformer, batch_on_gpu())
        with validation.undisturbed(transformer):
            latents = validation.sample_latents(transformer, scheduler, prompt, prompt, 0, GPU, **settings)
    assert latents.device == GPU


@pytest.mark.parametrize("offload", [False, True])
def test_the_adapter_that_the_export_check_loads_is_where_the_live_one_is(tiny_model, offload, tmp_path, monkeypatch):
    args = flags(tiny_model, offload=offload)
    transformer = lora.build(args, tiny_model, torch.float32)
    live = lora.live_state(transformer)
    lora.write(tmp_path, lora.export(transformer, live), lora.facts(args, transformer))
    transformer, places, state_of = on_gpu(args), set(), lora.get_peft_model_state_dict

    def remember(transformer, adapter_name):
        state = state_of(transformer, adapter_name=adapter_name)
        places.update(tensor.device for tensor in state.values())
        return state

    monkeypatch.setattr(lora, "get_peft_model_state_dict", remember)
    with OneDevice():
        lora.load_live(transformer, live)
        lora.check_export(tmp_path, transformer)
    assert places == {GPU}
    with torch.no_grad(), OneDevice():
        assert scoring.base_score(transformer, lambda base: base.device) == GPU
        scoring.update_share(transformer)


def test_a_layer_that_stays_in_host_memory_says_where_it_computes():
    plain = torch.nn.Linear(128, 192).requires_grad_(False)
    for resident in (True, False):
        layer = linear.FrozenLinear(plain, "int8", resident=resident)
        assert layer.weight.device.type == "cpu"
        layer.to(GPU)
        assert layer.weight.device == GPU
        assert layer.weight.shape == plain.weight.shape


def test_the_watch_finds_two_devices():
    with OneDevice(), pytest.raises(AssertionError, match="takes tensors on"):
        torch.ones(3)[torch.zeros(2, dtype=torch.int64, device=GPU)]
    with OneDevice():
        torch.ones(3, device=GPU) * torch.tensor(2.0)
        torch.ones(3).to(GPU)


def test_rotary_tables_follow_the_batch(rotary_model):
    transformer = model.load_transformer(rotary_model, torch.float32)
    assert {table.device for table in model.constant_inputs(transformer, GPU)(batch_on_gpu())["image_rotary_emb"]} == {GPU}
