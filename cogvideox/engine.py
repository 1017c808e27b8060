"""DDP, FSDP2 and DeepSpeed behind the same functions: sharding and gathering weights and optimizer states.

accelerate's config file (`configs/`) chooses the engine, not a flag. Checkpoints hold full tensors with every engine, so a run
can resume with another engine and another number of ranks. Every function here that takes a weight is a collective: every rank
must call it.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig  # accelerate.utils itself has it only beside an installed deepspeed
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from cogvideox.launch import free

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state of a weight
OTHER_STAGE = "selects a DeepSpeed stage other than 1, 2 and 3: use configs/zero2.yaml or configs/zero3.yaml"
# accelerate reads none of these from its own config file where that names a DeepSpeed file, and raises an error.
DEEPSPEED_FIELDS = {"gradient_accumulation_steps", "gradient_clipping", "zero_stage", "mixed_precision", "zero3_save_16bit_model"}
DEEPSPEED_FIELDS |= {f"offload_{part}_{place}" for part in ("optimizer", "param") for place in ("device", "nvme_path")}


def engine_of(accelerator):
    """The engine's name: one process, DDP, FSDP2, ZeRO-1, ZeRO-2 or ZeRO-3."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def splits_weights(accelerator):
    """Whether the engine shards the weights, so that every rank must run the forward pass."""
    return engine_of(accelerator) in ("FSDP2", "ZeRO-3")


def uses_deepspeed(accelerator):
    """Whether DeepSpeed steps the optimizer: inside `accelerator.backward`, before the trainer knows the gradient norm."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def unfit_flags(args, environment=os.environ):
    """A sentence for each flag that the launcher's engine does not support. Reads the launcher's environment only."""
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    fsdp = environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not (deepspeed or fsdp):
        return []
    name, problems = "DeepSpeed" if deepspeed else "FSDP2", []
    if fsdp and environment.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        problems.append(
            "the config file's fsdp_activation_checkpointing would recompute each block twice: --gradient_checkpointing decides"
        )
    if fsdp and environment.get("FSDP_VERSION", "1") != "2":
        problems.append("the config file selects FSDP 1, which is unsupported: use configs/fsdp2.yaml")
    if deepspeed and not deepspeed_file(environment) and environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") not in ("1", "2", "3"):
        problems.append(f"the config file {OTHER_STAGE}")
    if args.mixed_precision == "fp16":
        problems.append(f"--mixed_precision fp16: unsupported with {name}, which scales the loss itself; use bf16 or no")
    if args.optimizer not in ("adamw", "adam"):
        problems.append(f"--optimizer {args.optimizer}: unsupported with {name}, which gives it shards of the weights; use adamw or adam")
    for flag, supported in (("base_precision", "stored"), ("offload", False), ("compile", False)):
        if getattr(args, flag) != supported:
            way_out = "offload in the engine's config file" if flag == "offload" else "omit it, or use DDP"
            problems.append(f"--{flag}: unsupported with {name}; {way_out}")
    if deepspeed and args.ema_decay:
        problems.append(
            f"--ema_decay {args.ema_decay:g}: unsupported with DeepSpeed, which does not expose the fp32 weights between steps; use FSDP2"
        )
    return problems


def deepspeed_file(environment):
    """The path of DeepSpeed's own config file, or None."""
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if path.lower() == "none" else path


def contradicted_flags(args, environment=os.environ):
    """A sentence with both values for each flag that has another one in the launcher's environment or in DeepSpeed's own config file.

    accelerate and DeepSpeed would take theirs, without a word, and the trainer would log and save the flags'. args.mixed_precision:
    filled in.
    """
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    names = {"gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "max_grad_norm": "ACCELERATE_GRADIENT_CLIPPING"}
    found = [(flag, f"the launcher ({name})", environment.get(name)) for flag, name in names.items()]
    for name in ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if environment.get(name, "false").lower() == "true":
            return [f"the launcher ({name}): this trainer has DDP, FSDP2 and DeepSpeed only; launch with a yaml file of this project"]
    if not deepspeed:  # only DeepSpeed's plugin reads the clipping
        return unequal(args, found[:1])
    if not (file := deepspeed_file(environment)):
        return unequal(args, found)
    try:
        config = HfDeepSpeedConfig(file).config
        stage = config.get("zero_optimization", {}).get("stage")
        fp16, bf16 = (str(config[name].get("enabled", False)).lower() if name in config else "auto" for name in ("fp16", "bf16"))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return [f"deepspeed_config_file {file}: cannot be read as DeepSpeed's settings ({error})"]
    problems = [f"deepspeed_config_file {file}: {OTHER_STAGE}"] if stage not in (1, 2, 3) else []
    if fields := DEEPSPEED_FIELDS.intersection(environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")):
        problems.append(f"deepspeed_config_file {file}: remove {', '.join(sorted(fields))} from accelerate's own config file beside it")
    for name in ("optimizer", "scheduler"):
        if name in config:
            problems.append(f"deepspeed_config_file {file}: has a block {name!r}; remove it, the trainer makes its own from the flags")
    for name, enabled in (("fp16", fp16), ("bf16", bf16)):
        if enabled != "auto" and (enabled == "true") != (args.mixed_precision == name):
            problems.append(
                f"--mixed_precision {args.mixed_precision}: deepspeed_config_file {file} has {name}.enabled {enabled}; "
                "make them agree, or set it to auto there"
            )
    keys = {"gradient_accumulation_steps": "gradient_accumulation_steps", "max_grad_norm": "gradient_clipping"}
    keys |= {"train_batch_size": "train_micro_batch_size_per_gpu"}
    found += [(flag, f"{key} of deepspeed_config_file {file}", config.get(key)) for flag, key in keys.items()]
    problems += unequal(args, found)
    clips = args.train_batch_size * args.gradient_accumulation_steps * int(environment.get("WORLD_SIZE", "1"))
    if different(config.get("train_batch_size"), clips):
        problems.append(
            f"--train_batch_size x --gradient_accumulation_steps x processes is {clips}: train_batch_size of deepspeed_config_file "
            f"{file} is {config['train_batch_size']}; make them equal, or set it to auto there"
        )
    return problems


def unequal(args, found):
    """A sentence for each (flag, source, value) whose value is not the flag's."""
    return [
        f"--{flag} {getattr(args, flag):g}: {source} has {value}; make them equal, or leave it out there"
        for flag, source, value in found
        if different(value, getattr(args, flag))
    ]


def different(value, number):
    """Whether a setting is something else than `number`; None, "none" and "auto" leave it to the trainer."""
    if value is None or str(value).lower() in ("", "none", "auto"):
        return False
    try:
        return not math.isclose(float(value), number, rel_tol=1e-9)
    except (TypeError, ValueError):
        return True


def loading_device(args, accelerator):
    """Where the transformer's weights are loaded: on the run's device, so that no rank has a copy in host memory.

    On the CPU where the device must not hold all of them: sharding engines, --offload, and --base_precision, which quantizes
    layer by layer.
    """
    on_host = splits_weights(accelerator) or args.offload or args.base_precision != "stored"
    return torch.device("cpu") if on_host else accelerator.device


def prepare(accelerator, transformer, optimizer, batch_size, max_grad_norm, dtype):
    """Hand a model and its optimizer to the engine. Returns (model, optimizer, the trained parameters after wrapping)."""
    if uses_deepspeed(accelerator):
        # accelerate takes the batch size from a data loader; clip_grad_norm_ would come after DeepSpeed's step.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"], config["gradient_clipping"] = batch_size, max_grad_norm
        config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps  # accelerate takes 1 where the file has none
        config["zero_optimization"].setdefault("reduce_bucket_size", 50_000_000)  # elements; the default 500 M take up to 2 GB
        config["zero_force_ds_cpu_optimizer"] = False  # with offload, torch's AdamW works too
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    elif engine_of(accelerator) == "FSDP2":
        # A warning about in-place changes of an output that is a view (of proj_out's); there are none here.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        if dtype != torch.float32:
            # accelerate would reduce the gradients in bf16 too.
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    else:
        # launch.start_processes gives it for a reason; the flag of the new name would broadcast the buffers once more.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    return model, optimizer, [parameter for parameter in transformer.parameters() if parameter.requires_grad]


# -----------------------------------------------------------------------------
# Full weights


def whole(tensor):
    """The full tensor, gathered from all ranks if FSDP2 sharded it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This rank's part of a tensor, if FSDP2 sharded it; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_zero3_shard(parameter):
    """Whether ZeRO-3 shards a weight: `ds_tensor` is this rank's shard, `ds_shape` the full shape."""
    return hasattr(parameter, "ds_id")


def is_zero_weight(parameter):
    """Whether DeepSpeed (any stage) trains a weight: it keeps the fp32 weight and the optimizer state outside the model."""
    return is_zero3_shard(parameter) or hasattr(parameter, "_hp_mapping")


def read_weight(parameter):
    """The full trained weight, on its device (with DeepSpeed, the fp32 copy outside the model)."""
    if is_zero_weight(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return whole(parameter.detach())


@torch.no_grad()
def write_weight(parameter, value):
    """Write a full tensor into a weight, which may be sharded."""
    value = value.to(parameter.device, torch.float32)
    if isinstance(parameter, DTensor):
        parameter.copy_(like(parameter, value))
    elif is_zero3_shard(parameter):  # DeepSpeed keeps two copies, in fp32 and in the compute dtype
        from deepspeed.utils import safe_set_local_fp32_param

        local = zero3_shard(parameter, value)
        safe_set_local_fp32_param(parameter, local)
        parameter.ds_tensor.data.copy_(local.view_as(parameter.ds_tensor))
        if parameter.numel():  # DeepSpeed keeps small weights gathered
            parameter.data.copy_(value)
    else:
        parameter.copy_(value)
        if is_zero_weight(parameter):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)


def trained_weights(transformer):
    """The (name, parameter) pairs that are trained."""
    return [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]


def count_parameters(transformer):
    """(trained, all) parameters, before an engine shards them."""
    return sum(p.numel() for _, p in trained_weights(transformer)), sum(p.numel() for p in transformer.parameters())


def trained_state(transformer, keep=True):
    """name -> full fp32 CPU tensor of every trained weight; {} if `keep` is false, gathering one tensor at a time."""
    state = {}
    for name, parameter in trained_weights(transformer):
        tensor = read_weight(parameter)
        if keep:
            state[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    return state


def write_trained(weights, state, complaint):
    """Write full tensors into weights, both by name. ValueError with the first name that is missing, unknown or of another shape."""
    shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}
    wrong = sorted(set(shapes) ^ set(state)) + [name for name in shapes if name in state and tuple(state[name].shape) != shapes[name]]
    if wrong:
        raise ValueError(f"{len(wrong)} {complaint}, such as {wrong[0]}")
    for name, weight in weights.items():
        write_weight(weight, state[name])


def like(parameter, value):
    """A full tensor, present on every rank, sharded like a parameter."""
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def zero3_shard(parameter, value):
    """This rank's shard of a full tensor, padded as ZeRO-3 does."""
    import torch.distributed as distributed

    size, rank = parameter.ds_tensor.numel(), distributed.get_rank()
    flat = torch.nn.functional.pad(value.flatten(), (0, max(0, size * (rank + 1) - value.numel())))
    return flat[size * rank : size * (rank + 1)]


# -----------------------------------------------------------------------------
# Full optimizer states


def inner_optimizer(optimizer):
    """The optimizer that accelerate wraps (with DeepSpeed: DeepSpeed's, which wraps another one)."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizer_state(optimizer, parameters, keep):
    """The `optimizer.state_dict()` of a run on one process, with full tensors on the CPU; None if `keep` is false.

    Tensors are gathered one at a time, so a rank without `keep` needs memory for one.
    """

    def to_host(tensor):
        gathered = whole(tensor)  # a collective, also without `keep`
        return gathered.detach().cpu().clone() if keep else None

    inner = inner_optimizer(optimizer)
    if is_zero_weight(parameters[0]):
        from deepspeed.utils import safe_get_full_optimizer_state

        steps, base = zero_steps(inner), inner.optimizer
        state = {
            number: {"step": steps} | {name: to_host(safe_get_full_optimizer_state(parameter, name)) for name in MOMENTS}
            for number, parameter in enumerate(parameters)
        }
        groups = [{**base.param_groups[0], "params": list(range(len(parameters)))}]
    else:
        packed = optimizer.state_dict()
        state = {
            number: {name: to_host(value) if torch.is_tensor(value) else value for name, value in values.items()}
            for number, values in packed["state"].items()
        }
        groups = packed["param_groups"]
    return {"state": state, "param_groups": groups} if keep else None


def load_optimizer_state(optimizer, parameters, stored):
    """Restore the states that `optimizer_state` returned. DeepSpeed creates its states in a first step, which must come before."""
    if is_zero_weight(parameters[0]):
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        inner = optimizer.optimizer
        for number, parameter in enumerate(parameters):
            values = stored["state"].get(number)  # none before the first step
            for name in MOMENTS:
                value = values[name] if values else torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
                value = value.to(parameter.device, torch.float32)
                if is_zero3_shard(parameter):
                    safe_set_local_optimizer_state(parameter, zero3_shard(parameter, value), name)
                else:
                    safe_set_full_optimizer_state(parameter, value, name)
        steps = next((values["step"] for values in stored["state"].values()), 0)
        for state in inner.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(float(steps), device=getattr(state["step"], "device", None))
        for group in inner.optimizer.param_groups:
            group.update({name: value for name, value in stored["param_groups"][0].items() if name != "params"})
        return
    state = {
        number: {
            name: like(parameters[number], value.to(parameters[number].device)) if is_sharded_like(parameters[number], value) else value
            for name, value in values.items()
        }
        for number, values in stored["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": stored["param_groups"]})


def is_sharded_like(parameter, value):
    """Whether a state's value must be sharded like its parameter."""
    return isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape


def zero_steps(zero_optimizer):
    """The step count of the optimizer inside ZeRO's."""
    return next((float(state["step"]) for state in zero_optimizer.optimizer.state.values() if "step" in state), 0.0)


# -----------------------------------------------------------------------------
# A full model


@contextlib.contextmanager
def whole_model(accelerator, transformer, build, dtype):
    """A context with a model that has all its weights on this rank: the live one or, if that is sharded, a copy.

    build: (device) -> the model before training. The copy reads no file: its weights are gathered from the shards of all ranks, once
    for each block, and freed after it. It needs no collectives: ranks may do different amounts of work, and a failure on one
    rank does not block the others.
    """
    if not splits_weights(accelerator):
        yield transformer
        return
    copy = cast(build(device="meta"), dtype).to_empty(device=accelerator.device)
    gather_into(copy, transformer)
    yield copy.eval()
    del copy
    free(accelerator.device)


@torch.no_grad()
def gather_into(copy, transformer):
    """Write all weights and buffers of a sharded model into a full copy of it. A collective."""
    live, buffers = dict(transformer.named_parameters()), dict(transformer.named_buffers())
    for name, parameter in copy.named_parameters():
        parameter.copy_(read_weight(live[name]) if live[name].requires_grad else read_frozen(live[name]))
    for name, buffer in copy.named_buffers():  # engines do not shard them
        buffer.copy_(buffers[name])


def read_frozen(parameter):
    """The full frozen weight, on its device."""
    if not is_zero3_shard(parameter):
        return whole(parameter.detach())
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def cast(model, dtype):
    """Cast a model in place. (diffusers' `to` warns about modules to keep in fp32; CogVideoX has none.)"""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


# -----------------------------------------------------------------------------
# The average (EMA) of the weights


def make_average(parameters, decay):
    """diffusers' EMAModel; in the first steps its decay is (1 + n) / (10 + n)."""
    return EMAModel(parameters, decay=decay)


@contextlib.contextmanager
def averaged(average, parameters):
    """Replace the trained weights by the averaged ones for the block; a no-op without an average.

    The trained weights are kept in host memory. Do not nest: the inner block would store the averaged weights as trained ones.
    """
    if average is None:
        yield
        return
    assert average.temp_stored_params is None
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)


# -----------------------------------------------------------------------------
# The model in training


@dataclass
class Trained:
    """The model in training and its state.

    transformer: the diffusers model. model: the same, wrapped by the engine; training steps call it. parameters: the trained
    ones. schedule: of the learning rate, in optimizer steps. average: diffusers' EMAModel or None. build: (device) -> the
    transformer before training. dtype: the compute dtype. barrier: () -> waits for all ranks, without a timeout.
    kind: lora.py or sft.py. stored_dtype: of the base model's transformer on disk.
    """

    accelerator: Any
    transformer: torch.nn.Module
    model: torch.nn.Module
    parameters: list
    optimizer: Any
    schedule: Any
    average: Any = None
    build: Callable | None = None
    dtype: torch.dtype = torch.float32
    barrier: Callable = lambda: None
    kind: Any = None
    stored_dtype: torch.dtype | None = None
    sharing: contextlib.ExitStack | None = field(default=None, repr=False)  # of `one_full_model`: keeps the copy's context open
    shared_model: torch.nn.Module | None = field(default=None, repr=False)

    @property
    def device(self):
        return self.accelerator.device

    def state(self):
        """The full trained weights, named by `kind`, on the CPU of rank 0; {} on the other ranks. A collective."""
        return self.kind.live_state(self.transformer, keep=self.is_main)

    def export(self, transformer, state):
        """The exported weights of a `state`."""
        return self.kind.export(transformer, state, stored_dtype=self.stored_dtype)

    @property
    def is_main(self):
        return self.accelerator.is_main_process

    @contextlib.contextmanager
    def full_model(self):
        """A context with a model that has all its weights on this rank, see `whole_model`."""
        if self.sharing is None:
            with whole_model(self.accelerator, self.transformer, self.build, self.dtype) as model:
                yield model
            return
        if self.shared_model is None:
            context = whole_model(self.accelerator, self.transformer, self.build, self.dtype)
            self.shared_model = self.sharing.enter_context(context)
        yield self.shared_model

    @contextlib.contextmanager
    def one_full_model(self):
        """Within the block, every `full_model` yields the same copy, created on first use.

        The copy has the weights of that moment, so every use in one block must need the same weights (averaged or not).
        """
        with contextlib.ExitStack() as self.sharing:
            try:
                yield
            finally:
                self.sharing = self.shared_model = None  # drops the copy before its memory is freed

    def averaged(self):
        """A context in which the averaged weights, if any, replace the trained ones."""
        return averaged(self.average, self.parameters)

    def update_average(self):
        """Update the average, if there is one, with the weights of this step."""
        if self.average:
            self.average.step(self.parameters)
