"""The LoRA: injected with peft, trained in fp32, exported so that any loader applies the trained strength at weight 1.0."""

import inspect
import json
import math
import re
import warnings
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save

from cogvideox.engine import trained_state, trained_weights, write_trained
from cogvideox.files import LORA_FILE, lora_path, read_json, write_durably
from cogvideox.folder import is_target, linear_layers, safetensors_header
from cogvideox.launch import problem_of_any_rank
from cogvideox.model import bare_pipeline, constant_inputs, load_transformer

# Shared interface with sft.py: the result's name and files, and the file of the trained weights.
RESULT, FILES, WEIGHTS = LORA_FILE, [LORA_FILE], "adapter.safetensors"
LOADER = "the stock pipeline at weight 1.0"  # used by `check_export`
EFFECT = "largest change of the output by the LoRA"  # its second return value

# The config values that tell the families apart. Those of one width have layers of the same shapes, so the shapes do not.
BASE_FACTS = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "out_channels", "patch_size", "patch_size_t")
BASE_FACTS += ("use_rotary_positional_embeddings", "use_learned_positional_embeddings", "ofs_embed_dim")


def build(args, folder, dtype, device="cpu"):
    """The transformer before training: frozen in `dtype`, with a LoRA in fp32. device: as in `load_transformer`."""
    transformer = load_transformer(folder, dtype, args.variant, device)
    add_lora(transformer, args.rank, args.lora_alpha, args.lora_dropout, args.target_modules, args.seed)
    return transformer


def facts(args, transformer):
    """The metadata of the exported file."""
    base = json.dumps(base_facts(transformer.config))
    return {"rank": str(args.rank), "alpha_folded_in": f"{args.lora_alpha:g}", "base": base}


def base_facts(config):
    """name -> value of BASE_FACTS. config: a transformer's; a name that it lacks has the default of diffusers' class."""
    defaults = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters
    return {name: config.get(name, defaults[name].default) for name in BASE_FACTS}


def trained_on(file):
    """The `base_facts` in a LoRA file's metadata; {} in a file of another trainer, or of an older release of this one."""
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("base", "{}")
    try:
        found = json.loads(text)
    except ValueError:  # another program's note of the same name
        return {}
    return {name: found[name] for name in BASE_FACTS if name in found} if isinstance(found, dict) else {}


def other_family(file, folder, flag="--lora"):
    """A sentence if the metadata of a LoRA file says that it was trained on another family than the model in `folder`, or None.

    flag: named in it. The files that name no base are judged by the shapes of their layers alone.
    """
    made, here = trained_on(file), base_facts(read_json(Path(folder) / "transformer/config.json"))
    if not (other := [name for name in made if made[name] != here[name]]):
        return None
    values = ", ".join(f"{name} {made[name]} and {here[name]}" for name in other)
    return (
        f"{flag} {file}: this LoRA was trained on {family(here | made)}, and {folder} is {family(here)} ({values}); "
        "take the model that it was trained on"
    )


def family(facts):
    """A family in words, from its `base_facts`."""
    kind = "a text-to-video" if facts["in_channels"] == facts["out_channels"] else "an image-to-video"
    release = "CogVideoX1.5" if facts["patch_size_t"] else "CogVideoX 1.0"
    return f"{kind} model of {release} with {facts['in_channels']} input channels"


def add_lora(transformer, rank, alpha, dropout, target_modules, seed):
    """Inject a LoRA into a frozen transformer and return its parameters, in fp32.

    fp32 with every base dtype: near 0.05 a bf16 weight cannot change by less than 2e-4, more than a usual step. The
    initialisation depends only on the seed: it is drawn on the CPU, and the generator's state is restored.
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
    """Adjust peft's casts and the layer norms to autocast. In fp32 there is no autocast."""
    if dtype != torch.float32:
        leave_casts_to_autocast(transformer)
        keep_norms_out_of_autocast(transformer, dtype)


def leave_casts_to_autocast(transformer):
    """Stop peft from casting activations to fp32 before its matmuls: autocast would cast them back."""
    for _, layer in lora_modules(transformer):
        layer.cast_input_dtype_enabled = False


class UncastLayerNorm(torch.nn.LayerNorm):
    """A layer norm that runs in `compute_dtype`, also under autocast."""

    compute_dtype: torch.dtype

    def forward(self, inputs):
        weights = [None if weight is None else weight.to(self.compute_dtype) for weight in (self.weight, self.bias)]
        with torch.autocast(inputs.device.type, enabled=False):
            return torch.nn.functional.layer_norm(inputs.to(self.compute_dtype), self.normalized_shape, *weights, self.eps)


def keep_norms_out_of_autocast(transformer, dtype):
    """Run the layer norms in `dtype`, like the stock pipeline, which has no autocast.

    On a GPU autocast runs them in fp32 and keeps fp32 copies for the backward pass: three tenths of all activations. The kernel
    accumulates in fp32 with any input dtype, so only its output is rounded. (With full fine-tuning the weights are fp32.)
    The modules change their class, not their `forward`: a function of each module would give each block a graph of its own
    with --compile, and torch stops compiling after eight.
    """
    for module in transformer.modules():
        if type(module) is torch.nn.LayerNorm:
            module.__class__, module.compute_dtype = UncastLayerNorm, dtype


def peft_name(name):
    """A parameter's name in peft's files."""
    return name.replace(".default.", ".")


def live_state(transformer, keep=True):
    """The trained weights (alpha / rank not folded in), name -> fp32 CPU tensor; {} if `keep` is false. A collective."""
    return {peft_name(name): tensor for name, tensor in trained_state(transformer, keep).items()}


def load_live(transformer, state):
    """Restore the weights that `live_state` returned. ValueError if any is missing, unknown or of another shape."""
    weights = {peft_name(name): weight for name, weight in trained_weights(transformer)}
    write_trained(weights, state, "LoRA weights do not fit this model and rank")


def read_layers(file, flag="--lora"):
    """Which layers a LoRA file changes: layer -> (rank, inputs, outputs), from its header and its alphas alone.

    Takes diffusers' names, as this trainer and others write them. ValueError with a sentence for any other file. flag: named in it.
    """
    return {layer: layout[:3] for layer, layout in read_layout(file, flag).items()}


def read_layout(file, flag="--lora"):
    """layer -> (rank, inputs, outputs, factor of the update B A, name of lora_A, name of lora_B). ValueError as `read_layers`."""
    if not Path(file).is_file():
        raise ValueError(f"{flag} {file}: no such file")
    try:
        header = safetensors_header(Path(file))
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            alphas = {name.removesuffix(".alpha"): opened.get_tensor(name).float() for name in header if name.endswith(".alpha")}
    except Exception as error:  # safetensors raises its own kinds, OSError and ValueError for a damaged file
        raise ValueError(f"{flag} {file}: cannot be read ({(str(error).splitlines() or ['no reason given'])[0][:100]})") from None
    pairs = {}
    for name, entry in header.items():
        if name.endswith(".alpha") and name.startswith("transformer."):
            continue
        found = re.fullmatch(r"transformer\.(.+)\.lora_(A|B|down|up)\.weight", name)
        if not found or len(entry["shape"]) != 2:
            hint = " (ComfyUI's names: give the file that this one was exported from)" if name.startswith("diffusion_model.") else ""
            raise ValueError(f"{flag} {file}: {name} is not a LoRA's weight in diffusers' names, transformer.LAYER.lora_A.weight{hint}")
        side = {"down": "A", "up": "B"}.get(found[2], found[2])
        pairs.setdefault(found[1], {})[side] = name, entry["shape"]
    if not pairs:
        raise ValueError(f"{flag} {file}: holds no weights")
    for layer, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"][1][0] != pair["B"][1][1]:
            shapes = {side: shape for side, (_, shape) in pair.items()}
            raise ValueError(f"{flag} {file}: {layer} needs lora_A [rank, in] and lora_B [out, rank], and has {shapes}")
    ranks = {layer: pair["A"][1][0] for layer, pair in pairs.items()}
    try:
        factors = alpha_factors(ranks, {name.removeprefix("transformer."): alpha for name, alpha in alphas.items()}, metadata)
    except ValueError as error:
        raise ValueError(f"{flag} {file}: {error}") from None
    return {
        layer: (ranks[layer], pair["A"][1][1], pair["B"][1][0], factors[layer], pair["A"][0], pair["B"][0]) for layer, pair in pairs.items()
    }


def alpha_factors(ranks, alphas, metadata):
    """layer -> the factor of its update B A: 1 in this trainer's files, and in those that ask for nothing, as diffusers takes them.

    ranks: layer -> rank. alphas: layer -> a tensor (kohya's `.alpha`): alpha / rank. metadata: of the file; diffusers' and
    peft's settings there ask for alpha / r, or alpha / sqrt(r) with rsLoRA, each per layer if there is a pattern. ValueError for
    settings that ask for more than a factor, and for alphas in both places, of which loaders apply one or the other.
    """
    if lost := sorted(set(alphas) - set(ranks)):
        raise ValueError(f"{lost[0]}.alpha belongs to no layer of the file")
    if any(alpha.numel() != 1 for alpha in alphas.values()):
        raise ValueError("an alpha in it is not one number")
    factors = {layer: float(alphas[layer]) / rank if layer in alphas else 1.0 for layer, rank in ranks.items()}
    try:
        asked = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        asked = {name.removeprefix("transformer."): value for name, value in asked.items() if name.startswith("transformer.")}
        config = LoraConfig(**asked)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its metadata asks for what this version of peft does not know ({error})") from None
    if config.use_dora:
        raise ValueError("its metadata asks for use_dora; only files whose update is B A times a factor are taken")
    if asked and alphas:
        raise ValueError("has an alpha in its metadata and as tensors; remove one of them")
    for layer, rank in ranks.items() if asked else ():
        said = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
        if said != rank:
            raise ValueError(f"its metadata gives {layer} a rank of {said}, and its weights have {rank}")
        factors[layer] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if broken := [layer for layer, factor in factors.items() if not math.isfinite(factor)]:
        raise ValueError(f"the alpha of {broken[0]} is not finite")
    return factors


def load_pairs(file, flag="--lora"):
    """Yield (layer, lora_A [rank, in], lora_B [out, rank]) in fp32, one layer at a time. The update of its weight is B A.

    The factor that the file asks for is in lora_B. ValueError as `read_layers`, and for weights that are not finite.
    """
    layout = read_layout(file, flag)
    with safe_open(file, framework="pt") as opened:
        for layer, (*_, factor, name_down, name_up) in sorted(layout.items()):
            down, up = opened.get_tensor(name_down).float(), opened.get_tensor(name_up).float() * factor
            if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
                raise ValueError(f"{flag} {file}: the weights of {layer} are not finite")
            yield layer, down, up


def unfit_initial(args, folder):
    """A sentence if the header of the --init_lora file does not fit --rank, --target_modules and the transformer in `folder`, in a list."""
    if not args.init_lora:
        return []
    try:
        layers = read_layers(lora_path(args.init_lora), "--init_lora")
    except ValueError as error:
        return [str(error)]
    if problem := other_family(lora_path(args.init_lora), folder, "--init_lora"):
        return [problem]
    targets, known = args.target_modules, linear_layers(folder)
    chosen = {name: sizes for name, sizes in known.items() if any(is_target(name, target) for target in targets)}
    if other := sorted(set(layers) ^ set(chosen)):
        return [
            f"--init_lora {args.init_lora}: changes {len(layers)} layers and --target_modules names {len(chosen)}; "
            f"{other[0]} is in only one of them"
        ]
    here = {layer: (args.rank, *sizes) for layer, sizes in chosen.items()}
    return [
        f"--init_lora {args.init_lora}: {layer} has (rank, inputs, outputs) {layers[layer]} in it and {here[layer]} in this run"
        + (f"; give --rank {layers[layer][0]}" if layers[layer][1:] == here[layer][1:] else "")
        for layer in layers
        if layers[layer] != here[layer]
    ][:1]


def load_exported(transformer, path, flag="--init_lora"):
    """Load a LoRA file (or a run's folder) at the strength that it has at weight 1.0: divides this run's factor alpha / rank out.

    Raises ValueError if the file is missing, or for another model, rank or other targets.
    """
    scaling = {name: layer.scaling["default"] for name, layer in lora_modules(transformer)}
    state = {}
    for layer, down, up in load_pairs(lora_path(path), flag):
        state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up / scaling.get(layer, 1)}
    try:
        load_live(transformer, state)
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from None


def load_initial(transformer, path):
    """Load the LoRA of another run (--init_lora). Returns the first problem of any rank as a sentence, or None. A collective."""
    problem = None
    try:
        load_exported(transformer, path)
    except ValueError as error:
        problem = str(error)
    return problem_of_any_rank(problem)


def export(transformer, live, stored_dtype=None):
    """The exported weights, from those of `live_state`: alpha / rank folded into lora_B, diffusers' names, fp32.

    Some loaders read alpha from the metadata, some from `.alpha`, and most assume that it equals the rank. With the factor in
    the weights and no alpha in the file, all of them apply the trained strength.
    """
    scaling = {name: layer.scaling["default"] for name, layer in lora_modules(transformer)}
    state = {}
    for name, tensor in live.items():
        layer = name.rsplit(".lora_", 1)[0]
        state[f"transformer.{name}"] = tensor * scaling[layer] if ".lora_B." in name else tensor
    return state


def write(folder, exported, facts):
    """Write the weights of `export` as `pytorch_lora_weights.safetensors`, atomically. facts: strings for its metadata.

    ValueError, and no file, if a weight is not finite.
    """
    check_finite(exported, "LoRA weights")
    write_durably(Path(folder) / LORA_FILE, save(exported, metadata={"format": "pt"} | facts))


def publish(checkpoint, output_dir):
    """Copy a checkpoint's LoRA to the output folder, as the current result."""
    if (checkpoint / LORA_FILE).exists():
        write_durably(Path(output_dir) / LORA_FILE, (checkpoint / LORA_FILE).read_bytes())


def check_finite(tensors, kind):
    """Raise ValueError with the name of the first tensor that is not finite."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} {kind} are not finite, such as {broken[0]}; no file was written")


def export_tolerance(transformer):
    """The tolerance of `check_export`'s error: the rounding of the dtype after loading."""
    return 1e-5 if next(transformer.parameters()).dtype == torch.float32 else 2e-2


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # other adapters and shapes than in training: compiling them would not pay
def check_export(folder, transformer):
    """Load the exported file with the stock pipeline's loader, at weight 1, and compare it with the live model.

    Returns (relative error of the weight updates, largest effect of the LoRA on the outputs). The updates are compared layer by
    layer, B A x on the same random x, so that a wrong strength is detected even early in training. The file is loaded as a second
    adapter beside the live one, which needs a LoRA's memory, not a model's. Raises ValueError if the loader ignores weights.
    """
    config, parameter = transformer.config, next(transformer.parameters())
    generator = torch.Generator().manual_seed(0)
    patch, frames = 2 * config.patch_size, config.patch_size_t or 1
    size = (config.sample_height, config.sample_width) if config.use_learned_positional_embeddings else (patch, patch)
    inputs = {
        "hidden_states": torch.randn(1, frames, config.in_channels, *size, generator=generator).to(parameter),
        "encoder_hidden_states": torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator).to(parameter),
        "timestep": torch.tensor([500], device=parameter.device),
        "return_dict": False,
    }
    pipeline = bare_pipeline(transformer)
    inputs |= constant_inputs(transformer, parameter.device)({"latents": inputs["hidden_states"]})
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    was_training = transformer.training
    transformer.eval()
    try:
        live = transformer(**inputs)[0].float()
        transformer.disable_adapters()
        base = transformer(**inputs)[0].float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a second adapter, which is intended
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
            raise ValueError(f"{LORA_FILE}: the stock loader used only {len(loaded)} of its weights")
    finally:
        transformer.enable_adapters()
        transformer.set_adapter("default")
        if "exported" in transformer.peft_config:
            transformer.delete_adapters("exported")
        for p in trainable:
            p.requires_grad_(True)
        transformer.train(was_training)
    return (error / size if size else float(error > 0)), (live - base).abs().max().item()
