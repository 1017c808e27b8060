"""The kernel of the transformer's attention: which kernels run here, how fast and how exact they are, and using one.

At 49 x 480 x 720 attention is six tenths of the forward pass. All kernels compute the same softmax(Q K^T / sqrt(d)) V, and differ in
their rounding and their speed.
"""

import importlib.util
import time
import warnings

import torch
import torch.nn.attention
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cogvideox.console import say
from cogvideox.folder import patches_of
from cogvideox.launch import problem_of_any_rank, synchronize

# --attention_backend's names, in the order of preference where time must not decide. "default", torch's own choice, is none of them.
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,  # torch replaces its own kernel by FlashAttention 3's
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
FAILED = (float("inf"), float("inf"))
ROWS = 256  # queries that are compared with the exact result: all of them would need tokens x tokens numbers


class KernelProcessor(CogVideoXAttnProcessor2_0):
    """diffusers' attention of a block, with one kernel. If that cannot run, it raises RuntimeError: torch does not take another."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        with sdpa_kernel(self.kernel):  # here, and not around the step: a recomputed block must take the same kernel in the backward pass
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def use(transformer, backend):
    """Have a transformer's blocks use a backend: a key of KERNELS, or "default". Returns the transformer."""
    processor = CogVideoXAttnProcessor2_0()
    if backend != "default":
        select_flash(backend)
        processor = KernelProcessor(KERNELS[backend])
    transformer.set_attn_processor(processor)
    return transformer


def select_flash(backend):
    """Have torch's flash attention be version 3 if that is the backend, otherwise torch's own. ImportError or RuntimeError without it."""
    if backend == "flash3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
    elif has_flash3() and torch.nn.attention.current_flash_attention_impl():
        torch.nn.attention.restore_flash_attention_impl()


def has_flash3():
    """Whether this torch can use FlashAttention 3, and it is installed."""
    known = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
    return "FA3" in known and importlib.util.find_spec("flash_attn_interface") is not None


# -----------------------------------------------------------------------------
# What runs here


def attend(backend, query, key, value, gradient):
    """One forward and backward pass: (output, gradients of query, key and value), each [B, heads, tokens, width].

    gradient: of the output. Raises RuntimeError if the backend does not run on this device, dtype or shape.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with sdpa_kernel(KERNELS[backend]), torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
        output = scaled_dot_product_attention(*inputs)
        return output.detach(), *torch.autograd.grad(output, inputs, gradient)


def usable(device, dtype, width):
    """The keys of KERNELS that run forward and backward on a device, by trying. width: of a head.

    With torch's deterministic algorithms on, torch itself refuses the kernels without a deterministic backward pass.
    """
    found, tensors = [], [torch.zeros(1, 1, 64, width, device=device, dtype=dtype) for _ in range(4)]
    for backend in KERNELS:
        if backend == "flash3" and not has_flash3():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's reasons
            try:
                select_flash(backend)
                attend(backend, *tensors)
            except (RuntimeError, ImportError, ValueError):  # ValueError: a torch that does not know FlashAttention 3
                continue
            found.append(backend)
    select_flash("flash")
    return found


def unfit_backend(backend, device, dtype, width):
    """The problem of an --attention_backend that does not run here, as a list of at most one sentence. A collective."""
    if backend in ("auto", "default"):
        return []
    found = usable(device, dtype, width)
    problem = None
    if backend not in found:
        kind = f"{str(dtype).removeprefix('torch.')} and heads of {width} on {device.type}"
        problem = f"--attention_backend {backend}: does not run with {kind} here; use auto, default, {', '.join(found)}"
    problem = problem_of_any_rank(problem)
    return [problem] if problem else []


# -----------------------------------------------------------------------------
# How fast, and how exact


def measure(backends, device, dtype, shape, repeats=3):
    """{backend: (seconds of a forward and a backward pass, difference from the exact result)}; a backend that fails has infinite ones.

    shape: [B, heads, tokens, width]. The difference is the largest of the output and the three gradients, in the Euclidean norm,
    relative to the exact one, over the first and the last head and a few queries, computed in float64. Only these queries have a gradient,
    so that the exact gradients need no other. With torch's deterministic algorithms on, other bits in another pass are a failure.
    """
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, gradient = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4))
    rows = torch.linspace(0, shape[2] - 1, min(ROWS, shape[2]), device=device).long()
    heads = torch.tensor([0, shape[1] - 1], device=device)
    chosen = torch.zeros_like(gradient)
    chosen[:, :, rows] = gradient[:, :, rows]
    few = [tensor[:, heads].double() for tensor in (query, key, value, chosen)]
    exact = attend("math", few[0][:, :, rows], few[1], few[2], few[3][:, :, rows])

    def difference(found):
        found = [tensor[:, heads] for tensor in found]
        found[:2] = [tensor[:, :, rows] for tensor in found[:2]]  # the output, and the gradient of the queries
        errors = [(ours.double() - true).norm() / true.norm() for ours, true in zip(found, exact, strict=True)]
        return torch.stack(errors).max().item()  # not a number if one is not

    measured = {}
    for backend in backends:
        try:
            select_flash(backend)
            first, seconds = attend(backend, query, key, value, chosen), []
            for _ in range(repeats):
                synchronize(device)
                started = time.perf_counter()
                again = attend(backend, query, key, value, chosen)
                synchronize(device)
                seconds.append(time.perf_counter() - started)
            repeatable = not torch.are_deterministic_algorithms_enabled() or all(map(torch.equal, first, again))
            measured[backend] = (min(seconds), difference(first)) if repeatable else FAILED
        except RuntimeError:  # out of memory, or a shape that the kernel cannot do
            measured[backend] = FAILED
    select_flash("flash")
    return measured


def tolerance(dtype):
    """The difference up to which a kernel is exact: four roundings of its dtype, or 1e-5 in fp32.

    Flash kernels round the probabilities, their gradients and the results to half precisions, which adds up to one such rounding on a
    CPU. In fp32 only sums are rounded (5e-7 there), and products in TF32 (5e-4) are not accepted. `tests/test_attention.py` measures both.
    """
    return max(2 * torch.finfo(dtype).eps, 1e-5)


def pick(measured, dtype, by_time=True):
    """(backend, a sentence) from the result of `measure`: the fastest backend that is exact, or "default" if none is.

    by_time: otherwise the first of KERNELS, which a resumed run takes again.
    """
    exact = {name: seconds for name, (seconds, difference) in measured.items() if difference <= tolerance(dtype)}
    best = min(exact, key=exact.get if by_time else list(KERNELS).index, default="default")

    def describe(name):
        if measured[name] == FAILED:
            return f"{name} failed"
        seconds, difference = measured[name]
        note = "" if name in exact else f" (differs by {100 * difference:.2g} %, not used)"
        return f"{name} {1000 * seconds:.1f}{note}"

    others = "; ".join(describe(name) for name in measured if name != best)
    chosen = f"{best}, {1000 * exact[best]:.1f} ms forward and backward" if exact else "torch's default"
    return best, f"attention: {chosen}" + (f"; {others}" if others else "")


def choose(args, trained, batch):
    """The run's backend: --attention_backend, or with auto on a GPU the fastest exact one at the shape of a batch. A collective.

    Rank 0 measures, and all ranks use its choice. With --deterministic the first of KERNELS that is exact: two fast ones may change
    places from one start to the next. A CPU has one kernel beside math, torch's default.
    """
    accelerator, config, dtype = trained.accelerator, trained.transformer.config, trained.dtype
    if args.attention_backend != "auto":
        return args.attention_backend
    if accelerator.device.type != "cuda":
        return "default"
    clips, *latent_shape = batch["latents"].shape
    tokens = batch["prompt"].shape[1] + patches_of(config, latent_shape)
    shape = (clips, config.num_attention_heads, tokens, config.attention_head_dim)
    found = gather_object([usable(accelerator.device, dtype, shape[-1])])  # the ranks' GPUs may differ
    common = [name for name in found[0] if name != "math" and all(name in one for one in found)]  # math keeps tokens x tokens numbers
    decision = [None]
    if accelerator.is_main_process:
        decision = [pick(measure(common, accelerator.device, dtype, shape), dtype, by_time=not args.deterministic)]
        torch.cuda.empty_cache()  # the slower kernels' workspaces
    backend, sentence = broadcast_object_list(decision)[0]
    say(sentence)
    return backend


def settle(args, trained, batch):
    """Choose the run's backend and use it in the transformer, and in the full copies that a sharding engine builds. A collective."""
    backend, build = choose(args, trained, batch), trained.build
    use(trained.transformer, backend)
    trained.build = lambda device: use(build(device=device), backend)
