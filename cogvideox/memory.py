"""What a run will need of the device's memory, in bytes, from configs and flags alone: no weight is loaded.

The real model classes, the real LoRA, the real checkpointing and the real loss run on tensors that have a shape but no
data (FakeTensorMode), while every storage's birth and death is written down. What such a run cannot see is what a kernel
keeps to itself while it works; the one case that is large, attention's backward pass on a GPU, is added by hand.

To be quick, a training step is run with a few blocks of each kind only, its course is cut at the blocks' boundaries, and
the pieces of the inner blocks are repeated: inner blocks of a kind do the same.
"""

import argparse
import contextlib
import functools
import gc
import math
import weakref

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5Config, T5EncoderModel

from cogvideox import lora
from cogvideox.encode import CAPTIONS_PER_BATCH
from cogvideox.folder import read_json, stored_dtype
from cogvideox.linear import HeldLinear, hold_linears
from cogvideox.model import blocks_to_recompute, checkpoint_blocks, decode_latents, rotary_tables

GIB = 2**30
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Blocks of one kind in the run that is measured: the first and the last are special, and the one in the middle is repeated.
RUN_BLOCKS = 3
# What differs from the defaults of the diffusers classes, which are the 2B's; and the dtype that the weights are stored in.
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
FIVE_B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
PRESETS = {
    "2b": {"transformer": {}, "vae": {}, "text_encoder": T5_XXL, "dtypes": dict.fromkeys(("transformer", "vae", "text_encoder"), "fp16")},
    "5b": {"transformer": FIVE_B, "vae": {}, "text_encoder": T5_XXL, "dtypes": dict.fromkeys(("transformer", "vae", "text_encoder"), "bf16")},
}


def read_configs(folder, variant=None):
    """The configs of a model folder as PRESETS has them: component -> config, and `dtypes`: component -> no, fp16 or bf16."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    parts = ("transformer", "vae", "text_encoder")
    configs = {part: read_json(folder / part / "config.json") for part in parts}
    return configs | {"dtypes": {part: names.get(stored_dtype(folder, part, variant), "no") for part in parts}}


# -----------------------------------------------------------------------------
# Counting


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that live, and how many they were at most, in pieces that `mark` cuts.

    attention_extra: whether to add what the flash attention kernels of GPUs keep to themselves in their backward pass, an
    fp32 gradient of the queries and one number a row.
    """

    def __init__(self, attention_extra=False):
        super().__init__()
        self.sizes, self.pieces, self.attention_extra = {}, [], attention_extra
        self.live = self.high = self.start = 0
        self.name = "before"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        if self.attention_extra and "_scaled_dot_product" in str(function) and "backward" in str(function):
            query = args[1]
            self.high = max(self.high, self.live + 4 * query.numel() + 4 * query.numel() // query.shape[-1])
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes(), weakref.ref(storage, lambda _: self.remove(key))
            self.live += storage.nbytes()
            self.high = max(self.high, self.live)

    def remove(self, key):
        self.live -= self.sizes.pop(key)[0]

    def forget(self, tensor):
        """Leave a tensor out of the count: it is not on the device."""
        key = tensor.untyped_storage()._cdata
        if key in self.sizes:
            self.remove(key)

    def mark(self, name):
        """End the piece that is running and begin one of this name. A piece: its name, what it left, its highest point."""
        self.pieces.append({"name": self.name, "left": self.live - self.start, "high": self.high - self.start})
        self.name, self.start, self.high = name, self.live, self.live

    def peak(self):
        """The highest point since the last mark, in bytes of everything that lives."""
        return self.high


@contextlib.contextmanager
def counting(attention_extra=False):
    """A Ledger that counts what is made inside, where no tensor has data."""
    enabled = gc.isenabled()
    gc.collect()  # a cycle that is collected in the middle would be counted as freed there
    gc.disable()
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), Ledger(attention_extra) as ledger:
            yield ledger
    finally:
        if enabled:
            gc.enable()


# -----------------------------------------------------------------------------
# One training step


class HostTensor:
    """Stands for a weight in host memory: each copy to the device is a new one."""

    def __init__(self, tensor):
        self.tensor, self.device, self.dtype = tensor, tensor.device, tensor.dtype

    def to(self, *args, **kwargs):
        return self.tensor.clone()


@contextlib.contextmanager
def made_in(dtype):
    """Parameters are made in this dtype inside, as from_pretrained makes them (tables that a model computes have their own)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_transformer(ledger, configs, args, device, layers):
    """A transformer of `layers` blocks without data, with its LoRA, as the trainer makes it. Returns (model, LoRA parameters)."""
    dtype = DTYPES[args.mixed_precision]
    config = {name: value for name, value in configs["transformer"].items() if not name.startswith("_")}
    with made_in(dtype):
        transformer = CogVideoXTransformer3DModel(**(config | {"num_layers": layers})).requires_grad_(False)
    parameters = lora.add_lora(transformer, args.rank, args.lora_alpha or float(args.rank), args.lora_dropout, args.target_modules, args.seed)
    if dtype != torch.float32:
        lora.leave_casts_to_autocast(transformer)
    offload = args.offload and device == "cuda"
    if device == "cpu" or offload or args.base_precision != "stored":
        hold_linears(transformer, args.base_precision, args.offload, torch.device("cpu"))
    if offload:
        for module in transformer.modules():
            if isinstance(module, HeldLinear) and not module.resident:
                for tensor in module.held:
                    ledger.forget(tensor)
                module.held = [HostTensor(tensor) for tensor in module.held]
    if dtype != torch.float32:
        if device == "cuda":
            normalise_in_fp32(transformer)
        # As accelerate's `prepare` does it.
        transformer.forward = ConvertOutputsToFp32(torch.autocast("cpu", dtype)(transformer.forward))
    return transformer.train(), parameters


def normalise_in_fp32(transformer):
    """On a GPU autocast runs layer norms in fp32, from an fp32 copy of their input, which stays for the backward pass; on a
    CPU it does not."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = functools.partial(fp32_layer_norm, module)


def fp32_layer_norm(module, inputs):
    weight, bias = (None if p is None else p.float() for p in (module.weight, module.bias))
    return torch.nn.functional.layer_norm(inputs.float(), module.normalized_shape, weight, bias, module.eps)


def latent_shape(configs, frames, height, width):
    """[F', C, H', W'] of a clip's latents."""
    vae, transformer = configs["vae"], configs["transformer"]
    compression = 2 ** (len(vae.get("block_out_channels", (128, 256, 256, 512))) - 1)
    latents = (frames - 1) // vae.get("temporal_compression_ratio", 4) + 1
    return latents, transformer.get("in_channels", 16), height // compression, width // compression


def make_batch(configs, args, shape):
    """A batch of clips of latents [F', C, H', W'] without data, as the loader gives it."""
    transformer, text_dtype = configs["transformer"], DTYPES[configs["dtypes"]["text_encoder"]]
    tokens, width = transformer.get("max_text_seq_length", 226), transformer.get("text_embed_dim", 4096)
    clips = args.train_batch_size
    return {
        "latents": torch.empty(clips, *shape),
        "noise": torch.empty(clips, *shape),
        "timestep": torch.zeros(clips, dtype=torch.int64),
        "prompt": torch.empty(clips, tokens, width, dtype=text_dtype),
        "position": torch.zeros(clips, dtype=torch.int64),
    }


def step_pieces(configs, args, loss_of, shape, recomputed, keep_attention, device="cuda", layers=None):
    """The course of a forward and backward pass, as pieces {name, left, high, gradients} in bytes relative to their start.

    recomputed, keep_attention: as `checkpoint_blocks` takes them. layers: run so many blocks (default: all of them).
    Returns (pieces, bytes at the start: {"base", "adapters", "other"}).
    """
    layers = layers or configs["transformer"].get("num_layers", 30)
    with counting(attention_extra=device == "cuda") as ledger:
        transformer, parameters = build_transformer(ledger, configs, args, device, layers)
        adapters = sum(p.numel() * p.element_size() for p in parameters)
        gc.collect()
        base = ledger.live - adapters
        checkpoint_blocks(transformer, recomputed, keep_attention)
        batch = make_batch(configs, args, shape)
        rotary = rotary_tables(transformer, torch.device("cpu"))(batch)
        gradients = [0]
        for parameter in parameters:
            if args.gradient_accumulation_steps > 1:
                parameter.grad = torch.zeros_like(parameter)  # of the batch before; the bytes are counted from the start
            else:
                parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(gradients[-1] + p.numel() * p.element_size()))
        in_backward, at_mark = [], []

        def mark(name):
            ledger.mark(name)
            at_mark.append(gradients[-1])

        def before_block(module, inputs, number):
            if not in_backward:  # a block that is recomputed comes here again
                mark(f"forward {number}")

        def after_block(module, inputs, outputs, number):
            if not in_backward:
                if number == layers - 1:
                    mark("loss")
                outputs[0].register_hook(lambda gradient: mark(f"backward {number}"))

        for number, block in enumerate(transformer.transformer_blocks):
            block.register_forward_pre_hook(functools.partial(before_block, number=number))
            block.register_forward_hook(functools.partial(after_block, number=number))
        inputs = ledger.live - base - adapters
        mark("inputs")
        loss = loss_of(transformer, CogVideoXDDIMScheduler(), batch, rotary, DTYPES[args.mixed_precision]).mean()
        in_backward.append(True)
        loss.backward()
        del loss
        mark("end")
        pieces = ledger.pieces[1:]
        for piece, before, after in zip(pieces, at_mark, at_mark[1:], strict=True):
            piece["gradients"] = after - before
        return pieces, {"base": base, "adapters": adapters, "other": inputs}
