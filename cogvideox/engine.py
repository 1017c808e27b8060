"""DDP, FSDP2 and DeepSpeed behind a few functions: which rank holds which shard of a weight, and how to gather all of it.

The engine is chosen by accelerate's config file (`configs/`), not by a flag. A checkpoint has whole tensors whatever the
engine, so a run may be resumed under another one, on another number of processes. Every function here that takes a weight
is a collective: every rank calls it.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from cogvideox.launch import free

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of a weight


def engine_of(accelerator):
    """one process, DDP, FSDP2, ZeRO-2 or ZeRO-3 (or ZeRO-1)."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def splits_weights(accelerator):
    """Whether a rank holds only a shard of the weights, so that every rank must run the forward pass."""
    return engine_of(accelerator) in ("FSDP2", "ZeRO-3")


def uses_deepspeed(accelerator):
    """Whether DeepSpeed takes the step: within `accelerator.backward`, before the trainer knows the gradient's norm."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def unfit_flags(args, environment=os.environ):
    """A sentence for each flag that the launcher's engine does not support. Reads the launcher's environment only."""
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    fsdp = environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not (deepspeed or fsdp):
        return []
    name, problems = "DeepSpeed" if deepspeed else "FSDP2", []
    if fsdp and environment.get("FSDP_VERSION", "1") != "2":
        problems.append("the config file asks for FSDP 1, which is not supported: use configs/fsdp2.yaml")
    if deepspeed and environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") not in ("1", "2", "3"):
        problems.append("the config file asks for a DeepSpeed stage other than 1, 2 and 3: use configs/zero2.yaml or configs/zero3.yaml")
    if args.mixed_precision == "fp16":
        problems.append(f"--mixed_precision fp16: unsupported with {name}, which scales the loss in its own way; use bf16 or no")
    if args.optimizer not in ("adamw", "adam"):
        problems.append(f"--optimizer {args.optimizer}: unsupported with {name}, which gives it shards of the weights; use adamw or adam")
    for flag, supported in (("base_precision", "stored"), ("offload", False), ("compile", False)):
        if getattr(args, flag) != supported:
            way_out = "offload in the engine's own config file" if flag == "offload" else "leave it out, or use DDP"
            problems.append(f"--{flag}: unsupported with {name}; {way_out}")
    if deepspeed and args.ema_decay:
        problems.append(
            f"--ema_decay {args.ema_decay:g}: unsupported with DeepSpeed, which keeps the fp32 weights to itself between steps; use FSDP2"
        )
    return problems


def prepare(accelerator, transformer, optimizer, batch_size, max_grad_norm, dtype):
    """Hand a model and its optimizer to the engine. Returns (model, optimizer, the trained parameters as the engine keeps them)."""
    if uses_deepspeed(accelerator):
        # What accelerate would take from a data loader, and from clip_grad_norm_, which comes after DeepSpeed's step.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"], config["gradient_clipping"] = batch_size, max_grad_norm
        config["zero_optimization"].setdefault("reduce_bucket_size", 50_000_000)  # numbers; its own 500 M take up to 2 GB
        config["zero_force_ds_cpu_optimizer"] = False  # offloaded, torch's AdamW does as well
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    elif engine_of(accelerator) == "FSDP2":
        # Told of a model whose output is a view (of proj_out's), because of in-place changes that nobody makes here.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        if dtype != torch.float32:
            # accelerate would sum the gradients in bf16 as well.
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    model, optimizer = accelerator.prepare(transformer, optimizer)
    return model, optimizer, [parameter for parameter in transformer.parameters() if parameter.requires_grad]


# -----------------------------------------------------------------------------
# Whole weights


def whole(tensor):
    """A tensor, gathered from all ranks if FSDP2 sharded it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_zero3_shard(parameter):
    """Whether ZeRO-3 shards a weight: this process holds its shard in `ds_tensor`, and its whole shape in `ds_shape`."""
    return hasattr(parameter, "ds_id")


def is_zero_weight(parameter):
    """Whether DeepSpeed (any stage) trains a weight: it keeps the fp32 weight and the optimizer's state apart from the model."""
    return is_zero3_shard(parameter) or hasattr(parameter, "_hp_mapping")


def read_weight(parameter):
    """A whole weight as it is trained (DeepSpeed keeps it in fp32 beside the model's), on its device."""
    if is_zero_weight(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return whole(parameter.detach())


@torch.no_grad()
def write_weight(parameter, value):
    """Put a whole tensor into a weight, of which this process may hold a shard."""
    value = value.to(parameter.device, torch.float32)
    if isinstance(parameter, DTensor):
        parameter.copy_(like(parameter, value))
    elif is_zero3_shard(parameter):  # fp32 in one place, the compute dtype in another
        from deepspeed.utils import safe_set_local_fp32_param

        local = zero3_shard(parameter, value)
        safe_set_local_fp32_param(parameter, local)
        parameter.ds_tensor.data.copy_(local.view_as(parameter.ds_tensor))
        if parameter.numel():  # a small one, which DeepSpeed leaves whole between its turns
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
    """name -> whole fp32 CPU tensor of every trained weight; {} where `keep` is false, at the cost of one tensor at a time."""
    state = {}
    for name, parameter in trained_weights(transformer):
        tensor = read_weight(parameter)
        if keep:
            state[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    return state


def write_trained(weights, state, complaint):
    """Put whole tensors into weights, both by name. ValueError with the first name that is missing, unknown or of another shape."""
    shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}
    wrong = sorted(set(shapes) ^ set(state)) + [name for name in shapes if name in state and tuple(state[name].shape) != shapes[name]]
    if wrong:
        raise ValueError(f"{len(wrong)} {complaint}, the first is {wrong[0]}")
    for name, weight in weights.items():
        write_weight(weight, state[name])


def like(parameter, value):
    """A whole tensor, which every rank has, sharded as a parameter is."""
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def zero3_shard(parameter, value):
    """This rank's shard of a whole tensor, padded as ZeRO-3 does."""
    import torch.distributed as distributed

    size, rank = parameter.ds_tensor.numel(), distributed.get_rank()
    flat = torch.nn.functional.pad(value.flatten(), (0, max(0, size * (rank + 1) - value.numel())))
    return flat[size * rank : size * (rank + 1)]


# -----------------------------------------------------------------------------
# Whole optimizer states


def inner_optimizer(optimizer):
    """The optimizer that accelerate has wrapped (under DeepSpeed: DeepSpeed's own, with another one in it)."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizer_state(optimizer, parameters, keep):
    """What `optimizer.state_dict()` would be on one process, with whole tensors on the CPU; None where `keep` is false.

    Tensors are gathered one at a time, so a rank that keeps nothing needs room for one.
    """

    def to_host(tensor):
        gathered = whole(tensor)  # a collective, also where nothing is kept
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
    """Put back what `optimizer_state` gave. Under DeepSpeed a step must have been taken before: its states come with it."""
    if is_zero_weight(parameters[0]):
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        inner = optimizer.optimizer
        for number, parameter in enumerate(parameters):
            values = stored["state"].get(number)  # a run that was never stepped has none
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
    """Whether a state's value has to be sharded as its parameter is."""
    return isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape


def zero_steps(zero_optimizer):
    """How many steps the optimizer below ZeRO has taken."""
    return next((float(state["step"]) for state in zero_optimizer.optimizer.state.values() if "step" in state), 0.0)


# -----------------------------------------------------------------------------
# A whole model


@contextlib.contextmanager
def whole_model(accelerator, transformer, build, dtype):
    """A context with the model that has all its weights on this process: the live one or, where that is sharded, a copy.

    build: () -> the model as it was before training, on the CPU. A process that works with the copy waits for no other, so
    processes may have different amounts of work, and a failure on one does not stop the others.
    """
    if not splits_weights(accelerator):
        yield transformer
        return
    copy = build()
    gather_into(copy, transformer)
    yield cast(copy, dtype).to(accelerator.device).eval()
    del copy
    free(accelerator.device)


@torch.no_grad()
def gather_into(copy, transformer):
    """Put the trained weights of a model into a copy of it that is whole."""
    live = dict(transformer.named_parameters())
    for name, parameter in copy.named_parameters():
        if live[name].requires_grad:
            parameter.copy_(read_weight(live[name]))


def cast(model, dtype):
    """A model in another dtype, in place. (diffusers' `to` warns of modules to be kept in fp32, of which CogVideoX has none.)"""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


# -----------------------------------------------------------------------------
# The average of the weights


def make_average(parameters, decay):
    """diffusers' EMAModel: the decay of the first steps is (1 + n) / (10 + n)."""
    return EMAModel(parameters, decay=decay)


@contextlib.contextmanager
def averaged(average, parameters):
    """Put the averaged weights in place of the trained ones for the block; without an average do nothing.

    The trained ones wait in host memory. Blocks must not be nested: the inner one would store the averaged weights as trained.
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
# What is trained


@dataclass
class Trained:
    """The model in training and everything that changes with it.

    transformer: the diffusers model. model: the same, wrapped by the engine; training steps call it. parameters: the trained
    ones. schedule: of the learning rate, in optimizer steps. average: diffusers' EMAModel or None. build: () -> the
    transformer as training began, on the CPU. dtype: the compute dtype. barrier: () -> waits for all ranks, without a deadline.
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
    sharing: contextlib.ExitStack | None = field(default=None, repr=False)  # of `one_full_model`: holds the copy open
    shared_model: torch.nn.Module | None = field(default=None, repr=False)

    @property
    def device(self):
        return self.accelerator.device

    @property
    def is_main(self):
        return self.accelerator.is_main_process

    @contextlib.contextmanager
    def full_model(self):
        """A context with the model that has all its weights on this rank, see `whole_model`."""
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
        """For the block, every `full_model` gives the same copy, which is made when the first one asks for it.

        The copy has the weights of that moment: all who ask for it in one block ask for the same (averaged or not).
        """
        with contextlib.ExitStack() as self.sharing:
            try:
                yield
            finally:
                self.sharing = self.shared_model = None  # the copy goes before its memory is given back

    def averaged(self):
        """A context in which the averaged weights, if there are any, stand in place of the trained ones."""
        return averaged(self.average, self.parameters)

    def update_average(self):
        """Take the weights of this step into the average, if there is one."""
        if self.average:
            self.average.step(self.parameters)
