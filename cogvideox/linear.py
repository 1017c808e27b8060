"""The frozen linear layers of the base model: quantized or offloaded weights, and fast bf16 matmuls on CPUs.

A frozen weight is used twice per step, in x W^T forward and in g W backward, and has no gradient. Only the stored weight stays
in memory in between: it is cast to the compute dtype for each product, and cast again for the backward one. (diffusers' layerwise
casting and group offloading restore a module's weights only for its forward pass: both are made for inference.)
"""

import torch

# oneDNN's bf16 matmul is a fifth slower at row counts such as 874 or 2146, and fastest at this many.
CPU_ROWS = 256


class FrozenLinear(torch.nn.Module):
    """A frozen linear layer [in] -> [out] that stores its weight in `precision`.

    stored: the original dtype. fp8: float8_e4m3fn, int8: 8-bit integers, both with one fp32 scale per output (absmax of the row).
    nf4: bitsandbytes' 4-bit normal floats (Dettmers et al., 2023, "QLoRA") in blocks of 64. resident: whether the weight moves
    to the GPU with the model, or stays in host memory; then `offload_blocks` sets `copies`, the held tensors' places in its
    block's device buffer, and `fetch`, a function that fills it. The held tensors are not parameters, so DDP does not broadcast
    them and an optimizer does not see them.
    """

    def __init__(self, linear, precision="stored", resident=True):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.resident, self.bias = linear.weight.dtype, resident, linear.bias
        self.precision, self.held = precision, held_tensors(linear.weight.detach(), precision)
        self.device = linear.weight.device  # where the layer computes; it follows `to`
        self.copies = self.fetch = None

    def _apply(self, function, recurse=True):
        self.device = function(torch.empty(0, device=self.device)).device
        if self.resident:
            self.held = [function(tensor) for tensor in self.held]
        return super()._apply(function, recurse)

    @property
    def weight(self):
        """The weight [out, in] in its original dtype, on the layer's device. peft reads both, and puts a loaded adapter there."""
        return self.unpacked([tensor.to(self.device) for tensor in self.held], self.dtype)

    def dense(self, device, dtype):
        """The weight [out, in] for one product."""
        if self.copies is None:
            return self.unpacked([tensor.to(device) for tensor in self.held], dtype)
        if not torch.compiler.is_compiling():  # a compiled block's weights are fetched by its hooks
            self.fetch()
        return self.unpacked(self.copies, dtype)

    def unpacked(self, held, dtype):
        """The weight [out, in] in `dtype`, from its held tensors or copies of them."""
        if self.precision == "stored":
            return held[0].to(dtype)
        if self.precision == "nf4":
            return dequantize_nf4(held, (self.out_features, self.in_features), dtype)
        numbers, scale = held
        return (numbers.float() * scale).to(dtype)

    def forward(self, inputs):
        """[..., in] -> [..., out], in the autocast dtype under autocast, like torch.nn.Linear."""
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        return HeldProduct.apply(inputs.to(dtype), self)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, precision={self.precision}, resident={self.resident}"


class HeldProduct(torch.autograd.Function):
    """x W^T + b and its gradient g W. Saves the layer for the backward pass, not a dense weight."""

    @staticmethod
    def forward(ctx, inputs, layer):
        ctx.layer = layer
        weight = layer.dense(inputs.device, inputs.dtype)
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        return product(inputs, weight.t(), bias)

    @staticmethod
    def backward(ctx, gradient):
        return product(gradient, ctx.layer.dense(gradient.device, gradient.dtype), None), None


def product(rows, matrix, bias):
    """rows [..., K] times matrix [K, N], plus bias [N]; in bf16 on a CPU, one block of rows at a time."""
    flat = rows.reshape(-1, rows.shape[-1])
    if rows.device.type != "cpu" or rows.dtype != torch.bfloat16 or len(flat) <= 2 * CPU_ROWS or torch.compiler.is_compiling():
        result = torch.mm(flat, matrix) if bias is None else torch.addmm(bias, flat, matrix)
        return result.reshape(*rows.shape[:-1], -1)
    result = flat.new_empty(len(flat), matrix.shape[1])
    for part, out in zip(flat.split(CPU_ROWS), result.split(CPU_ROWS), strict=True):
        if bias is None:
            torch.mm(part, matrix, out=out)
        else:
            torch.addmm(bias, part, matrix, out=out)
    return result.reshape(*rows.shape[:-1], -1)


def held_tensors(weight, precision):
    """The tensors that store a weight [out, in] in a precision."""
    if precision == "stored":
        return [weight]
    if precision == "nf4":
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
        return [packed, state.absmax, state.code]
    largest = {"fp8": 448.0, "int8": 127.0}[precision]
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / largest
    numbers = weight.float() / scale
    return [numbers.to(torch.float8_e4m3fn) if precision == "fp8" else numbers.round().to(torch.int8), scale]


def dequantize_nf4(held, shape, dtype):
    """The dense weight of `held_tensors(..., "nf4")`."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed, absmax, code = held
    state = QuantState(absmax=absmax, shape=torch.Size(shape), code=code, blocksize=64, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(packed, state)


def hold_linears(transformer, base_precision="stored", offload=False, device=None):
    """Replace the frozen linear layers of the blocks, also those inside LoRA layers, by FrozenLinear. Call it after `add_lora`.

    The norms' layers stay: they are a fifth of the weights, process one row per clip, and are sensitive to quantization. On a
    GPU with stored precision and no offload, all layers stay. device: where to quantize (faster on a GPU); the result moves with
    the model.
    """
    device = torch.device(device or "cpu")
    if base_precision == "stored" and not offload and device.type != "cpu":
        return
    for name, module in list(transformer.transformer_blocks.named_modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and not child.weight.requires_grad and "norm" not in f"{name}.{child_name}":
                if base_precision != "stored":
                    child.to(device)
                layer = FrozenLinear(child, base_precision, resident=not offload).requires_grad_(False)
                if offload:
                    layer.held = [tensor.cpu() for tensor in layer.held]
                setattr(module, child_name, layer)
