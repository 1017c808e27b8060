"""Predicting a run's device memory, in bytes, from configs and flags, without loading weights.

The real model classes, LoRA, checkpointing and loss run on tensors with a shape but no data (FakeTensorMode), while a ledger
records every allocation and release of a storage. It does not see a kernel's internal workspace; the only large one, of
attention's backward pass on a GPU, is added explicitly.

For speed, a training step runs with only a few blocks of each kind, its record is cut at block boundaries, and the pieces of
the inner blocks are repeated: inner blocks of one kind are alike.
"""

import contextlib
import functools
import gc
import itertools
import math
import os
import weakref

import numpy as np
import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import T5Config, T5EncoderModel

from cogvideox import linear, lora, offload
from cogvideox.console import say
from cogvideox.engine import engine_of
from cogvideox.files import read_json
from cogvideox.folder import PRECISIONS, facts_of, largest_shape, latent_shape, shown_shape, stored_precision, weight_files
from cogvideox.model import blocks_to_recompute, checkpoint_blocks, constant_inputs, decode_latents, encode_frames, keep_position_tables
from cogvideox.rehearsal import free_bytes

# bitsandbytes keeps the states of smaller parameters in fp32.
SMALLEST_8BIT = 4096
# Blocks of each kind in the counted run: the first two and the last are special, the one before the last is repeated.
RUN_BLOCKS = 4
# What is added to the prediction where it decides: torch's allocator reserves more than the tensors take, 1.26 times on an H200.
MARGIN = 1.25
SHARDING = ("FSDP2", "ZeRO-2", "ZeRO-3")  # engines that divide gradients between processes
NAMES = {
    "base_weights": "base weights",
    "adapters": "trained weights (fp32)",
    "optimizer_state": "optimizer states",
    "batch": "batch",
    "gradients": "gradients at the peak",
    "activations": "activations at the peak",
    "working_set": "working set at the peak",
    "training": "TRAINING",
    "captions": "captions: T5",
    "clips": "clips: VAE, encode and decode",
    "validation": "validation: sampling, VAE",
    "run": "THE RUN: peak over all phases",
}
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
PARTS = ("transformer", "vae", "text_encoder")
# What the published configs say beside the defaults of the diffusers classes, which are the 2B's; and the stored dtypes.
FIVE_B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
FIVE_B_15 = FIVE_B | {"patch_size_t": 2, "patch_bias": False, "sample_frames": 81}
OF_IMAGE = {"in_channels": 32}
VAE_5B = {"scaling_factor": 0.7}
VAE_15 = VAE_5B | {"invert_scale_latents": True}


def preset(transformer, vae, dtype):
    """The configs of a published model, in the form of `read_configs`."""
    return {"transformer": transformer, "vae": vae, "text_encoder": T5_XXL, "dtypes": dict.fromkeys(PARTS, dtype)}


PRESETS = {
    "2b": preset({}, {}, "fp16"),
    "5b": preset(FIVE_B, VAE_5B, "bf16"),
    "5b-i2v": preset(FIVE_B | OF_IMAGE | {"use_learned_positional_embeddings": True}, VAE_5B, "bf16"),
    "1.5-5b": preset(FIVE_B_15 | {"sample_height": 96, "sample_width": 170}, VAE_15, "bf16"),
    "1.5-5b-i2v": preset(FIVE_B_15 | OF_IMAGE | {"ofs_embed_dim": 512, "sample_height": 300, "sample_width": 300}, VAE_15, "bf16"),
}
HUB = "THUDM/CogVideoX"
HUB_NAMES = {"2b": f"{HUB}-2b", "5b": f"{HUB}-5b", "5b-i2v": f"{HUB}-5b-I2V", "1.5-5b": f"{HUB}1.5-5B", "1.5-5b-i2v": f"{HUB}1.5-5B-I2V"}


def read_configs(folder, variant=None):
    """The configs of a model folder in the form of PRESETS: component -> config, and `dtypes`: component -> no, fp16 or bf16.

    T5 and the VAE count as stored like the transformer where their weights are missing: a run with full encodings needs none of them.
    ValueError, a sentence, if the transformer's are missing; OSError without a config.
    """
    configs = {part: read_json(folder / part / "config.json") for part in PARTS}
    if problem := weight_files(folder / "transformer", variant)[1]:
        raise ValueError(problem)
    known = {part: part if weight_files(folder / part, variant)[0] else "transformer" for part in PARTS}
    return configs | {"dtypes": {part: stored_precision(folder, found, variant) for part, found in known.items()}}


def on_device(configs, device):
    """The configs with the dtypes in which a device runs T5 and the VAE: on a CPU, fp16 weights run in fp32 (`usable_dtype`)."""
    if device != "cpu":
        return configs
    return configs | {"dtypes": {part: "no" if dtype == "fp16" else dtype for part, dtype in configs["dtypes"].items()}}


# -----------------------------------------------------------------------------
# Counting


class Ledger(TorchDispatchMode):
    """Counts the bytes of the live storages and their peak, in pieces separated by `mark`.

    In half precision cuDNN copies a convolution's input and output to channels-last, so both are counted twice (measured on an H200).
    attention_extra: whether to add the workspace of the GPUs' flash attention backward kernels: an fp32 gradient of the queries
    and one number per row.
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
        if function is torch.ops.aten.convolution.default and args[0].dtype in (torch.float16, torch.bfloat16):
            self.high = max(self.high, self.live + args[0].nbytes + result.nbytes)
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

    def mark(self, name):
        """End the current piece and begin one of this name. A piece: its name, the bytes it leaves, its peak."""
        self.pieces.append({"name": self.name, "left": self.live - self.start, "high": self.high - self.start})
        self.name, self.start, self.high = name, self.live, self.live

    def height_of(self, work):
        """(peak of a call `work()` above its start, in bytes; its return value)."""
        before, start = self.high, self.live
        self.high = start
        result = work()
        height, self.high = self.high - start, max(before, self.high)
        return height, result


@contextlib.contextmanager
def counting(attention_extra=False):
    """A Ledger that counts the tensors created inside, none of which has data."""
    enabled, rows = gc.isenabled(), linear.CPU_ROWS
    gc.disable()  # collecting a cycle inside would count as a release
    linear.CPU_ROWS = 2**60  # all rows in one piece: the same bytes in fewer calls
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), Ledger(attention_extra) as ledger:
            yield ledger
    finally:
        linear.CPU_ROWS = rows
        if enabled:
            gc.enable()


# -----------------------------------------------------------------------------
# One training step


@contextlib.contextmanager
def without_data(dtype):
    """Inside, modules are created on the meta device, with parameters of this dtype, like those of from_pretrained."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def bring_to_device(model, in_host=False):
    """Replace a model's meta tensors by fake ones, which are counted.

    in_host: except the weights of FrozenLinear, which stay in host memory; instead, two blocks' buffers are counted.
    """
    replaced = {}  # a parameter shared by two modules stays shared
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in replaced:
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype)
                replaced[parameter] = torch.nn.Parameter(fresh, requires_grad=parameter.requires_grad)
            module._parameters[name] = replaced.get(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if isinstance(module, linear.FrozenLinear) and not in_host:
            module.held = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in module.held]
    if in_host:
        offload.share_device_buffers(offload.frozen_layers(model.transformer_blocks), "cpu", fetch=lambda block: None)


def define_transformer(configs, args, device, layers):
    """A transformer of `layers` blocks, with a LoRA or all trained, on the meta device, with the trainer's frozen layers."""
    config = {name: value for name, value in configs["transformer"].items() if not name.startswith("_")}
    dtype = PRECISIONS[args.mixed_precision]
    everything = args.training_type == "sft"
    with without_data(torch.float32 if everything else dtype):
        transformer = CogVideoXTransformer3DModel(**(config | {"num_layers": layers})).requires_grad_(everything)
        if not everything:
            alpha = args.lora_alpha or float(args.rank)
            lora.add_lora(transformer, args.rank, alpha, args.lora_dropout, args.target_modules, args.seed)
    lora.fit_to_autocast(transformer, dtype)
    if everything:
        return transformer
    if device == "cpu" or args.offload or args.base_precision != "stored":
        # hold_linears treats the meta device like a GPU, where it does not replace layers in stored precision.
        target = "cpu" if args.base_precision == "stored" else "meta"
        linear.hold_linears(transformer, args.base_precision, device=torch.device(target))
    return transformer


def prepare_transformer(transformer, args, device):
    """Prepare a transformer on the fake device like the trainer for `device`, "cuda" or "cpu"."""
    dtype = PRECISIONS[args.mixed_precision]
    bring_to_device(transformer, in_host=args.offload and device == "cuda")
    keep_position_tables(transformer.patch_embed)
    if dtype != torch.float32:
        # Like accelerate's `prepare`.
        transformer.forward = ConvertOutputsToFp32(torch.autocast("cpu", dtype)(transformer.forward))
    transformer.train()


def latents_of(configs, frames, height, width):
    """[F', C, H', W'] of a clip's latents in a batch, with those in front that fill the temporal patch."""
    facts = facts_of(configs["transformer"], configs["vae"])
    latent_frames, *rest = latent_shape(facts, frames, height, width)
    return latent_frames + -latent_frames % facts.latents_per_patch, *rest


def layers_of(configs):
    """The number of transformer blocks."""
    return configs["transformer"].get("num_layers", 30)


def image_channels(configs):
    """Channels of the image's latent beside the noisy ones; 0 for text-to-video."""
    return facts_of(configs["transformer"], configs["vae"]).image_channels


def make_batch(configs, clips, shape):
    """The loader's batch of clips with latents of `shape` [F', C, H', W'], without data."""
    transformer, text_dtype = configs["transformer"], PRECISIONS[configs["dtypes"]["text_encoder"]]
    tokens, width = transformer.get("max_text_seq_length", 226), transformer.get("text_embed_dim", 4096)
    return {
        "latents": torch.empty(clips, *shape),
        "noise": torch.empty(clips, *shape),
        "timestep": torch.zeros(clips, dtype=torch.int64),
        "prompt": torch.empty(clips, tokens, width, dtype=text_dtype),
        "image": torch.empty(clips, shape[0], image_channels(configs), *shape[2:]),
        "position": torch.zeros(clips, dtype=torch.int64),
    }


def step_pieces(configs, args, compute_loss, shape, recomputed, keep_attention, device="cuda", layers=None):
    """The memory of a forward and backward pass, as pieces {name, left, high, gradients} in bytes relative to their start.

    recomputed, keep_attention: as in `checkpoint_blocks`. layers: how many blocks to run (default: all). Returns (pieces, bytes
    at the start: base, adapters, states (of the optimizer), batch; the first three also of one block).
    """
    layers = layers or layers_of(configs)
    transformer = define_transformer(configs, args, device, layers)
    with counting(attention_extra=device == "cuda") as ledger:
        prepare_transformer(transformer, args, device)
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        adapters = sum(p.numel() * p.element_size() for p in parameters)
        base = ledger.live - adapters
        checkpoint_blocks(transformer, recomputed, keep_attention)
        batch = make_batch(configs, args.train_batch_size, shape)
        constant = constant_inputs(transformer, torch.device("cpu"))(batch)
        gradients = [0]
        for parameter in parameters:
            if args.gradient_accumulation_steps > 1:
                parameter.grad = torch.zeros_like(parameter)  # of the previous batch, counted from the start
            else:
                parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(gradients[-1] + p.numel() * p.element_size()))
        in_backward, at_mark = [], []

        def mark(name):
            ledger.mark(name)
            at_mark.append(gradients[-1])

        def before_block(module, inputs, number):
            if not in_backward:  # recomputing a block calls this again
                mark(f"forward {number}")

        def after_block(module, inputs, outputs, number):
            if not in_backward:
                if number == layers - 1:
                    mark("loss")
                outputs[0].register_hook(lambda gradient: mark(f"backward {number}"))

        for number, block in enumerate(transformer.transformer_blocks):
            block.register_forward_pre_hook(functools.partial(before_block, number=number))
            block.register_forward_hook(functools.partial(after_block, number=number))
        start = {"base": base, "adapters": adapters, "batch": ledger.live - base - adapters}
        inner = transformer.transformer_blocks[min(1, layers - 1)]
        start["adapters_of_block"] = sum(size_of(p) for p in inner.parameters() if p.requires_grad)
        start["base_of_block"] = sum(size_of(t) for t in frozen_tensors(inner))
        start["states"] = optimizer_bytes(args, parameters)
        start["states_of_block"] = optimizer_bytes(args, [p for p in inner.parameters() if p.requires_grad])
        if args.gradient_accumulation_steps > 1:
            start["batch"] -= adapters
        mark("inputs")
        loss = compute_loss(transformer, CogVideoXDDIMScheduler(), batch, constant, PRECISIONS[args.mixed_precision]).mean()
        in_backward.append(True)
        loss.backward()
        del loss
        mark("end")
        pieces = ledger.pieces[1:]
        for piece, (before, after) in zip(pieces, itertools.pairwise(at_mark), strict=True):
            piece["gradients"] = after - before
        return pieces, start


def size_of(tensor):
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def frozen_tensors(module):
    """The frozen tensors of a module on the device, without the buffers that blocks share."""
    for part in module.modules():
        yield from (p for p in [*part.parameters(recurse=False), *part.buffers(recurse=False)] if not p.requires_grad)
        if isinstance(part, linear.FrozenLinear) and part.copies is None:
            yield from part.held


def training_pieces(configs, args, compute_loss, shape, recomputed, keep_attention, device="cuda"):
    """`step_pieces` of all blocks, extrapolated from a run with a few of each kind. Returns (pieces, start)."""
    layers = layers_of(configs)
    kinds = [(0, min(recomputed, layers)), (min(recomputed, RUN_BLOCKS), layers - min(recomputed, layers))]
    run = [min(blocks, RUN_BLOCKS) for _, blocks in kinds]
    times = {first + RUN_BLOCKS - 2: 1 + blocks - RUN_BLOCKS for first, blocks in kinds if blocks > RUN_BLOCKS}
    pieces, start = step_pieces(configs, args, compute_loss, shape, run[0], keep_attention, device, sum(run))
    for name in ("base", "adapters", "states"):
        start[name] += (layers - sum(run)) * start[f"{name}_of_block"]
    # autocast keeps its casts of the LoRA until the forward pass ends; blocks that are not recomputed keep them longer.
    casts = 0 if args.mixed_precision == "no" else start["adapters_of_block"] // 2
    next(piece for piece in pieces if piece["name"] == "loss")["left"] -= (kinds[0][1] - run[0]) * casts
    names = [piece["name"].split() for piece in pieces]
    repeats = [times.get(int(name[1]), 1) if len(name) == 2 else 1 for name in names]
    return [piece for piece, repeat in zip(pieces, repeats, strict=True) for _ in range(repeat)], start


def without_casts(pieces, casts, recomputed):
    """The pieces without autocast's copies of trained weights, of `casts` bytes a block: an engine that shards weights gathers them
    in the compute dtype, block by block. Autocast drops those of recomputed blocks after the forward pass, others block by block."""
    run, forward, result = min(recomputed, RUN_BLOCKS), 0, []
    for piece in pieces:
        kind, _, number = piece["name"].partition(" ")
        is_recomputed = number and int(number) < run
        forward += kind == "forward" and bool(is_recomputed)
        change = {"forward": -casts, "loss": forward * casts, "backward": 0 if is_recomputed else casts}.get(kind, 0)
        result.append(piece | {"left": piece["left"] + change})
    return result


def optimizer_bytes(args, parameters):
    """Bytes of the optimizer states of parameters (fp32 tensors, on any device), and of their average."""
    name, total = args.optimizer, sum(4 * parameter.numel() for parameter in parameters) if args.ema_decay else 0
    for parameter in parameters:
        numbers = parameter.numel()
        if name == "prodigy":  # two moments, the initial weights, and the sum for the step estimate
            total += (4 if args.adam_beta1 > 0 else 3) * 4 * numbers
        elif name.endswith("8bit") and numbers >= SMALLEST_8BIT:
            total += 2 * (numbers + 4 * math.ceil(numbers / 256))  # bytes, and one scale per block of 256
        else:
            total += 8 * numbers + (0 if name.endswith("8bit") else 4)  # two moments; torch keeps the step as a tensor
    return total


def training_parts(configs, args, compute_loss, shape, recomputed, keep_attention, device="cuda", shards=1):
    """The parts of a training step's peak, in bytes; their sum is `training`.

    base_weights, adapters, optimizer_state, batch: constant. gradients, activations, working_set: at the peak; activations are
    kept from the forward pass for the backward one, working_set is one block's further memory. shards: of the gradients, which
    decide where the peak is: of all weights at the end of the backward pass, of an eighth of them rather at its begin.
    """
    pieces, start = training_pieces(configs, args, compute_loss, shape, recomputed, keep_attention, device)
    if shards > 1 and args.training_type == "sft" and args.mixed_precision != "no":
        pieces = without_casts(pieces, start["adapters_of_block"] // 2, recomputed)
    accumulated = start["adapters"] if args.gradient_accumulation_steps > 1 else 0
    above, gradients, best = accumulated, accumulated, None
    for piece in [*pieces, {"name": "optimizer step", "left": 0, "high": 0, "gradients": 0}]:
        height = above - gradients + gradients // shards + piece["high"]
        if best is None or height > best["height"]:
            best = {
                "height": height,
                "gradients": gradients,
                "kept": above - gradients,
                "working": piece["high"],
                "at": piece["name"].split()[0],
            }
        above, gradients = above + piece["left"], gradients + piece["gradients"]
    parts = {
        "base_weights": start["base"],
        "adapters": start["adapters"],
        "optimizer_state": start["states"],
        "batch": start["batch"],
        "gradients": best["gradients"],
        "activations": best["kept"],
        "working_set": best["working"],
    }
    return parts | {"training": sum(parts.values()), "training_peak_at": best["at"]}


def block_bytes(configs, args, compute_loss, shape, device="cuda"):
    """The activations that one inner block keeps for the backward pass, in bytes: {"kept", "attention", "full"}, by checkpointing."""
    sizes = {}
    for name, recomputed, keep_attention in (("kept", 0, True), ("attention", 3, True), ("full", 3, False)):
        pieces, _ = step_pieces(configs, args, compute_loss, shape, recomputed, keep_attention, device, layers=3)
        sizes[name] = next(piece["left"] for piece in pieces if piece["name"] == "forward 1")
    return sizes


# -----------------------------------------------------------------------------
# The other phases


def captions_bytes(configs):
    """(weights, working set) of T5 on one caption, in bytes."""
    dtype = PRECISIONS[configs["dtypes"]["text_encoder"]]
    config = T5Config(**{name: value for name, value in configs["text_encoder"].items() if name not in ("dtype", "torch_dtype")})
    with without_data(dtype):
        encoder = T5EncoderModel(config)
    if dtype == torch.float16:
        for name, module in encoder.named_modules():
            if name.endswith(".wo"):
                module.to(torch.float32)  # transformers keeps these in fp32 when it loads fp16
    tokens = configs["transformer"].get("max_text_seq_length", 226)
    with counting() as ledger, torch.no_grad():
        bring_to_device(encoder.requires_grad_(False).eval())
        weights = ledger.live
        return weights, ledger.height_of(lambda: encoder(torch.zeros(1, tokens, dtype=torch.int64)))[0]


def vae_bytes(configs, direction, shape, slicing=True, tiling=True):
    """(weights, working set) of encoding or decoding one clip with the VAE, in bytes. direction: "encode" or "decode".

    shape: (frames, height, width) of the clip.
    """
    config = {name: value for name, value in configs["vae"].items() if not name.startswith("_")}
    with without_data(PRECISIONS[configs["dtypes"]["vae"]]):
        vae = AutoencoderKLCogVideoX(**config)
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    vae.blend_v = vae.blend_h = lambda before, tile, extent: tile  # in place, row by row: thousands of calls that allocate nothing

    def work(ledger):
        remember_runs(vae.encoder, ledger)
        remember_runs(vae.decoder, ledger)
        if direction == "encode":
            return encode_frames(vae, np.zeros((*shape, 3), np.uint8))
        try:
            return decode_latents(vae, torch.empty(latents_of(configs, *shape), device="meta"))
        except NotImplementedError:  # its last step, a copy to the host, needs data
            return None

    # The meta device is enough, and faster: a VAE has no attention, whose kernel depends on the device.
    vae.requires_grad_(False)
    with Ledger() as ledger:
        for tensor in [*vae.parameters(), *vae.buffers()]:
            ledger.add(tensor)
        return ledger.live, ledger.height_of(lambda: work(ledger))[0]


def remember_runs(module, ledger):
    """Run a module once per shape of its inputs; for a repeated shape, only create its result and record its peak."""
    seen, forward = {}, module.forward

    def run(*inputs, **settings):
        leaves, layout = tree_flatten((inputs, settings))
        key = (str(layout), *(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))
        if key not in seen:
            height, result = ledger.height_of(lambda: forward(*inputs, **settings))
            tensors, layout = tree_flatten(result)
            seen[key] = height, [(tuple(t.shape), t.dtype) for t in tensors], layout
            return result
        height, outputs, layout = seen[key]
        ledger.high = max(ledger.high, ledger.live + height)
        return tree_unflatten([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in outputs], layout)

    module.forward = run


def sampling_bytes(configs, args, shape, device="cuda"):
    """The working set of one denoising step of validation, in bytes, without weights and optimizer. shape: (frames, height, width)."""
    clips = 2 if args.guidance_scale > 1 else 1
    transformer = define_transformer(configs, args, device, layers=2)
    with counting() as ledger, torch.no_grad():
        prepare_transformer(transformer, args, device)
        transformer.eval()
        before = ledger.live
        batch = make_batch(configs, clips, latents_of(configs, *shape))
        constant = constant_inputs(transformer, torch.device("cpu"))(batch)
        dtype = PRECISIONS[args.mixed_precision]
        ledger.mark("sampling")
        transformer(
            hidden_states=torch.cat([batch["latents"].to(dtype), batch["image"].to(dtype)], dim=2),
            encoder_hidden_states=batch["prompt"].to(dtype),
            timestep=batch["timestep"],
            return_dict=False,
            **constant,
        )
        return ledger.high - before


# -----------------------------------------------------------------------------
# The run


def memory_for_encoding(device):
    """Free bytes for encoding on this rank. The processes of a machine share a CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes(device) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def untiled_encoding_bytes(configs, shape, slicing=True):
    """The free device memory, in bytes, at which a run encodes its clips whole. shape: (frames, height, width) of the largest."""
    return int(MARGIN * sum(vae_bytes(configs, "encode", shape, slicing, tiling=False)))


def encoding_bytes(configs, args, room=None):
    """The peak of encoding clips, in bytes: whole, or in tiles with --enable_tiling where `room` bytes are too few (None: enough).

    An image-to-video model's images are encoded whole, which takes more than a clip in tiles does, and less than a clip whole.
    """
    clip, slicing = largest_shape(args), args.enable_slicing
    tiled = args.enable_tiling and room is not None and untiled_encoding_bytes(configs, clip, slicing) > room
    peak = sum(vae_bytes(configs, "encode", clip, slicing, tiled))
    if tiled and image_channels(configs):
        peak = max(peak, sum(vae_bytes(configs, "encode", (1, *clip[1:]), slicing, tiling=False)))
    return peak


def phase_parts(configs, args, device="cuda", room=None):
    """The peaks of the other phases, in bytes, without the transformer and the optimizer: captions, clips, sampling, decoding
    (the last two are 0 without validation prompts). room: as in `encoding_bytes`.

    The VAE that encodes the images of validation, whole, stays while an image-to-video model samples.
    """
    clip = largest_shape(args)
    settings = {"slicing": args.enable_slicing, "tiling": args.enable_tiling}
    phases = {
        "captions": sum(captions_bytes(configs)),
        "clips_encode": encoding_bytes(configs, args, room),
        "clips_decode": sum(vae_bytes(configs, "decode", clip, **settings)),  # the first clips are decoded again for the preview
    }
    if not args.validation_prompt:
        return phases | {"sampling": 0, "decoding": 0}
    shown = shown_shape(args)
    decoding = phases["clips_decode"] if shown == clip else sum(vae_bytes(configs, "decode", shown, **settings))
    sampling = sampling_bytes(configs, args, shown, device)
    if image_channels(configs):
        weights, working = vae_bytes(configs, "encode", (1, *shown[1:]), args.enable_slicing, tiling=False)
        sampling = weights + max(sampling, working)
    return phases | {"sampling": sampling, "decoding": decoding}


def split_over(parts, configs, args, engine, processes):
    """The result of `training_parts`, with so many shards, per rank of several. engine: DDP or of SHARDING. Computed, not measured.

    FSDP2 and ZeRO-3 gather two blocks at a time (one is prefetched), in the compute dtype, and hold a block's full gradients
    before sharding them. ZeRO-2 keeps all weights in the compute dtype, and shards the fp32 ones.
    """
    if engine not in SHARDING or processes == 1:
        return parts
    block = next(iter(define_transformer(configs, args, "cuda", layers=1).transformer_blocks))
    size = 4 if args.mixed_precision == "no" else 2
    numbers, trained = (sum(p.numel() for p in block.parameters() if p.requires_grad or not only) for only in (False, True))
    parts = parts | {name: parts[name] // processes for name in ("optimizer_state", "gradients")}
    if engine == "ZeRO-2":
        whole = parts["adapters"] * size // 4
        parts["adapters"], extra = whole + parts["adapters"] // processes, 2 * trained * size
    else:
        parts |= {name: parts[name] // processes for name in ("base_weights", "adapters")}
        extra = 2 * numbers * size + trained * 4
    parts["working_set"] += extra
    names = ("base_weights", "adapters", "optimizer_state", "batch", "gradients", "activations", "working_set")
    return parts | {"training": sum(parts[name] for name in names)}


def predict(configs, args, compute_loss, device="cuda", recomputation=None, phases=None, engine="DDP", processes=1):
    """The peak of each phase of a run and the parts of training's, a flat dict of bytes (and `training_peak_at`, a piece's name).

    configs: from `read_configs` or PRESETS. args: the trainer's flags, with mixed_precision chosen. compute_loss: the trainer's
    velocity_loss. device: "cuda" or "cpu", which differ in autocast and frozen layers. recomputation: (blocks, keep_attention),
    default: from --gradient_checkpointing. phases: a known result of `phase_parts`. engine, processes: as in `split_over`; an
    engine that shards weights validates with a full copy of the model in the compute dtype.
    """
    layers = layers_of(configs)
    recomputation = recomputation or blocks_to_recompute(args.gradient_checkpointing, layers)
    shape = latents_of(configs, *largest_shape(args))
    shards = processes if engine in SHARDING else 1
    parts = training_parts(configs, args, compute_loss, shape, *recomputation, device, shards)
    phases = phases or phase_parts(configs, args, device)
    weights = parts["base_weights"] + parts["adapters"] * (1 if args.training_type == "lora" or args.mixed_precision == "no" else 0.5)
    parts = split_over(parts, configs, args, engine, processes)
    copy = int(weights) if processes > 1 and engine in ("FSDP2", "ZeRO-3") else 0
    resident = parts["base_weights"] + parts["adapters"] + parts["optimizer_state"] + copy
    working = max(phases["sampling"], phases["decoding"])
    peaks = {
        "captions": phases["captions"],
        "clips": max(phases["clips_encode"], phases["clips_decode"]),
        "training": parts["training"],
        "validation": resident + working if working else 0,
    }
    return parts | peaks | {"run": max(peaks.values())}


def table(parts):
    """The result of `predict` as the lines of a table, in GiB, or in MiB below one GiB."""
    unit, symbol = (2**30, "GiB") if parts["run"] >= 2**30 else (2**20, "MiB")
    return [f"| part | {symbol} |", "| --- | ---: |", *(f"| {label} | {parts[name] / unit:.2f} |" for name, label in NAMES.items())]


def say_predicted(args, folder, accelerator, compute_loss):
    """Print the predicted device memory of the run."""
    device = accelerator.device.type
    configs = on_device(read_configs(folder, args.variant), device)
    engines = {"engine": engine_of(accelerator), "processes": accelerator.num_processes}
    say("\npredicted memory (--gradient_checkpointing auto counts as all):")
    phases = phase_parts(configs, args, device, memory_for_encoding(accelerator.device))
    say("\n".join(table(predict(configs, args, compute_loss, device, phases=phases, **engines))))
