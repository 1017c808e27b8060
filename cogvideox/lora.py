"""The LoRA: injected with peft, always fp32, written so that any loader applies it at the strength it was trained at."""

import functools
import warnings
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cogvideox.engine import trained_state, trained_weights, write_trained
from cogvideox.files import LORA_FILE, write_durably
from cogvideox.model import load_transformer

# What this module and sft.py both have: how the result is called, and the file of the weights as they are trained.
RESULT, FILES, WEIGHTS = LORA_FILE, [LORA_FILE], "adapter.safetensors"
LOADER = "the stock pipeline at weight 1.0"  # what `check_export` loads it with
EFFECT = "largest change of the output by the LoRA"  # the second number that it gives


def build(args, folder, dtype):
    """The transformer of a model folder as training starts with it: frozen, in `dtype`, with a LoRA in fp32; on the CPU."""
    transformer = load_transformer(folder, dtype, args.variant)
    add_lora(transformer, args.rank, args.lora_alpha, args.lora_dropout, args.target_modules, args.seed)
    return transformer


def facts(args, transformer):
    """What the result's metadata says of how it was made."""
    return {"rank": str(args.rank), "alpha_folded_in": f"{args.lora_alpha:g}"}


def add_lora(transformer, rank, alpha, dropout, target_modules, seed):
    """Inject a LoRA into a frozen transformer and return its parameters, in fp32.

    fp32 whatever the base is stored in: near 0.05 a bf16 weight cannot move by less than 2e-4, more than a usual step.
    The initialisation depends on the seed alone: it is drawn on the CPU, from a generator state that is put back.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, init_lora_weights=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    cast_training_params(transformer, torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def lora_modules(transformer):
    """The (name, layer) pairs that carry a LoRA."""
    return [(name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]


def fit_to_autocast(transformer, dtype):
    """Leave to autocast what it does best, and keep from it what it does worse. In fp32 there is no autocast."""
    if dtype != torch.float32:
        leave_casts_to_autocast(transformer)
        keep_norms_out_of_autocast(transformer, dtype)


def leave_casts_to_autocast(transformer):
    """Stop peft from casting activations to fp32 before its products: under autocast they would be cast straight back."""
    for _, layer in lora_modules(transformer):
        layer.cast_input_dtype_enabled = False


def keep_norms_out_of_autocast(transformer, dtype):
    """Run the layer norms in `dtype`, as the stock pipeline does, which has no autocast.

    On a GPU autocast runs them in fp32 and keeps fp32 copies for the backward pass: three tenths of all activations. The
    kernel sums in fp32 whatever it is given, so only its output is rounded. (Weights in fp32 are those of full fine-tuning.)
    """

    def run(norm, inputs):
        weights = [None if weight is None else weight.to(dtype) for weight in (norm.weight, norm.bias)]
        with torch.autocast(inputs.device.type, enabled=False):
            return torch.nn.functional.layer_norm(inputs.to(dtype), norm.normalized_shape, *weights, norm.eps)

    for module in transformer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = functools.partial(run, module)


def peft_name(name):
    """The name that peft's files have for a parameter."""
    return name.replace(".default.", ".")


def live_state(transformer, keep=True):
    """The trained weights as they are (not folded), name -> fp32 CPU tensor; {} where `keep` is false. A collective."""
    return {peft_name(name): tensor for name, tensor in trained_state(transformer, keep).items()}


def load_live(transformer, state):
    """Put weights back that `live_state` gave. ValueError if any is missing, unknown or of another shape."""
    weights = {peft_name(name): weight for name, weight in trained_weights(transformer)}
    write_trained(weights, state, "LoRA weights do not fit this model and rank")


def load_exported(transformer, path):
    """Start from a LoRA file as `save_lora` writes it (or its folder): the factor alpha / rank is taken out again.

    Raises ValueError where it is not there, or made for another model, rank or other targets.
    """
    path = Path(path).expanduser()
    path = path / LORA_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    scaling = {name: layer.scaling["default"] for name, layer in lora_modules(transformer)}
    state = {}
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    for name, tensor in stored.items():
        name = name.removeprefix("transformer.")
        layer = name.rsplit(".lora_", 1)[0]
        state[name] = tensor / scaling.get(layer, 1) if ".lora_B." in name else tensor
    load_live(transformer, state)


def load_initial(transformer, path):
    """Start from the LoRA of another run (--init_lora). Returns what is wrong with it as a sentence, or None."""
    try:
        load_exported(transformer, path)
    except ValueError as error:
        return f"--init_lora {path}: {error}"
    return None


def export(transformer, live, stored_dtype=None):
    """The weights as they are shipped, from what `live_state` gave: alpha / rank folded into lora_B, diffusers' names, fp32.

    Loaders differ in what they take for alpha: some read it from the metadata, some from `.alpha`, most assume that it
    equals the rank. With the factor in the weights and alpha nowhere in the file, all of them apply the trained strength.
    """
    scaling = {name: layer.scaling["default"] for name, layer in lora_modules(transformer)}
    state = {}
    for name, tensor in live.items():
        layer = name.rsplit(".lora_", 1)[0]
        state[f"transformer.{name}"] = tensor * scaling[layer] if ".lora_B." in name else tensor
    return state


def write(folder, exported, facts):
    """Write what `export` gave as `pytorch_lora_weights.safetensors`, whole or not at all. facts: strings for its metadata.

    ValueError, and nothing written, if a weight is not finite.
    """
    check_finite(exported, "LoRA weights")
    write_durably(Path(folder) / LORA_FILE, save(exported, metadata={"format": "pt"} | facts))


def publish(checkpoint, output_dir):
    """Put a checkpoint's LoRA beside it, as the run's result so far."""
    if (checkpoint / LORA_FILE).exists():
        write_durably(Path(output_dir) / LORA_FILE, (checkpoint / LORA_FILE).read_bytes())


def check_finite(tensors, kind):
    """ValueError that names the first tensor with a value that is not finite."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} {kind} are not finite (the first is {broken[0]}); nothing was written")


def export_tolerance(transformer):
    """The largest error that `check_export` may find: the rounding of the dtype that the loader keeps."""
    return 1e-5 if next(transformer.parameters()).dtype == torch.float32 else 2e-2


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # other adapters and shapes than in training: they would be compiled for one use
def check_export(folder, transformer):
    """Load the written file with the stock pipeline's loader, at weight 1, and compare it with the live model.

    Returns (relative error of the weight updates, largest effect of the LoRA on the outputs). The updates are compared
    layer by layer, B A x on the same random x, so that a wrong strength shows however little the LoRA has learned yet. The
    file is loaded as a second adapter beside the live one, which costs a LoRA's memory, not a model's. Raises ValueError if
    weights are left over.
    """
    config, parameter = transformer.config, next(transformer.parameters())
    generator = torch.Generator().manual_seed(0)
    patch, frames = 2 * config.patch_size, config.patch_size_t or 1
    inputs = {
        "hidden_states": torch.randn(1, frames, config.in_channels, patch, patch, generator=generator).to(parameter),
        "encoder_hidden_states": torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator).to(parameter),
        "timestep": torch.tensor([500], device=parameter.device),
        "return_dict": False,
    }
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)
    if config.use_rotary_positional_embeddings:
        pixels = patch * pipeline.vae_scale_factor_spatial
        inputs["image_rotary_emb"] = pipeline._prepare_rotary_positional_embeddings(pixels, pixels, frames, parameter.device)
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    was_training = transformer.training
    transformer.eval()
    try:
        live = transformer(**inputs)[0].float()
        transformer.disable_adapters()
        base = transformer(**inputs)[0].float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is an adapter already is the point
            pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name="exported", local_files_only=True)
        transformer.enable_adapters()
        error, size = 0.0, 0.0
        for _, layer in lora_modules(transformer):
            probe = torch.randn(layer.lora_A["default"].weight.shape[1], 8, generator=generator).to(parameter.device)
            updates = [
                layer.scaling[name] * (layer.lora_B[name].weight.float() @ (layer.lora_A[name].weight.float() @ probe))
                for name in ("default", "exported")
            ]
            error, size = max(error, (updates[0] - updates[1]).abs().max().item()), max(size, updates[0].abs().max().item())
        loaded = get_peft_model_state_dict(transformer, adapter_name="exported")
        if len(loaded) != len(load_file(Path(folder) / LORA_FILE)):
            raise ValueError(f"{LORA_FILE}: the stock loader used {len(loaded)} of its weights")
    finally:
        transformer.enable_adapters()
        transformer.set_adapter("default")
        if "exported" in transformer.peft_config:
            transformer.delete_adapters("exported")
        for p in trainable:
            p.requires_grad_(True)
        transformer.train(was_training)
    return (error / size if size else float(error > 0)), (live - base).abs().max().item()
