"""--offload: the blocks' frozen weights in host memory, one flat buffer a block, copied to the GPU while another block computes.

There are two device buffers, and block n has buffer n % 2. When a block begins, forward, recomputed or backward, the next one
in that direction is copied into the other buffer on a stream of its own: one copy a block, not one a weight.
"""

import functools
import mmap
import weakref

import torch

from cogvideox.console import BAD_FLAGS, fail
from cogvideox.linear import FrozenLinear

ALIGNMENT = 256  # bytes, as torch's own tensors on a GPU: kernels load 16 bytes at a time, and numbers of every size fit


def offload_blocks(transformer, device):
    """Move the weights of the blocks' FrozenLinear layers into host buffers, from which the blocks fetch them. Returns the BlockBuffers.

    Call it once, after `hold_linears` and after the transformer was moved to `device`.
    """
    buffers = BlockBuffers(transformer.transformer_blocks, device, TwoStreams(device) if device.type == "cuda" else InOrder())
    for number, block in enumerate(transformer.transformer_blocks):
        block.register_forward_pre_hook(functools.partial(before_block, buffers, number))
        block.register_forward_hook(functools.partial(after_block, buffers, number))
    return buffers


def before_block(buffers, number, block, inputs):
    """Fetch a block's weights before it runs or is recomputed."""
    buffers.fetch(number)


def after_block(buffers, number, block, inputs, outputs):
    """Have the block's weights fetched before its backward pass, which begins when the gradient of one of its outputs is known.

    Hooks, because a compiled block cannot fetch by itself: a graph has no effects.
    """
    for output in outputs:
        if output.requires_grad:
            output.register_hook(lambda gradient: buffers.fetch(number))


class BlockBuffers:
    """Owns the host buffers, the two device buffers, and what is in them.

    lane: TwoStreams or InOrder. host: the flat weights of each block, uint8. on_device: the two buffers, uint8.
    """

    def __init__(self, blocks, device, lane):
        self.lane, self.host, layers = lane, [], frozen_layers(blocks)
        for of_block in layers:
            self.host.append(host_buffer(places(of_block)[1]))
            move_into(self.host[-1], of_block)
        if device.type == "cuda":
            pin(self, device)
        self.on_device = share_device_buffers(layers, device, self.fetch)
        self.inside, self.copied, self.current = [None, None], [None, None], None

    def fetch(self, block):
        """Have a block's weights in its buffer for all work that is queued from now on, and begin to copy those of the next block.

        Nothing to do within a block. A block that is called out of order waits for its copy.
        """
        if block == self.current:
            return
        earlier, self.current = self.current, None  # None: an error below must not leave a buffer that is taken for filled
        finished = self.lane.computed()  # so far; nothing later reads the buffer of the block before this one
        self.begin_copy(block, finished)
        self.lane.wait(self.copied[block % 2])
        following = block - 1 if earlier == block + 1 else block + 1
        if following == len(self.host) and not torch.is_grad_enabled():
            following = 0  # no backward pass comes: the next is another forward pass
        if 0 <= following < len(self.host) and following % 2 != block % 2:
            self.begin_copy(following, finished)
        self.current = block

    def begin_copy(self, block, finished):
        """Copy a block's weights into its buffer after an event, unless they are there, or on their way."""
        place, flat = block % 2, self.host[block]
        if self.inside[place] != block:
            self.inside[place] = None
            self.copied[place] = self.lane.copy(flat, self.on_device[place][: len(flat)], finished)
            self.inside[place] = block


# -----------------------------------------------------------------------------
# Flat buffers


def frozen_layers(blocks):
    """The FrozenLinear layers of each block."""
    return [[module for module in block.modules() if isinstance(module, FrozenLinear)] for block in blocks]


def places(layers):
    """(first byte of each held tensor of a block's layers in a flat buffer, by layer; size of the buffer in bytes)."""
    starts, size = [], 0
    for layer in layers:
        starts.append([])
        for tensor in layer.held:
            starts[-1].append(size)
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return starts, size


def views(flat, layers):
    """The held tensors of a block's layers as views of a flat buffer, by layer."""

    def view(start, tensor):
        return flat[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)

    starts = places(layers)[0]
    return [[view(*pair) for pair in zip(of_layer, layer.held, strict=True)] for of_layer, layer in zip(starts, layers, strict=True)]


def move_into(flat, layers):
    """Move the held tensors of a block's layers into its flat buffer."""
    for layer, held in zip(layers, views(flat, layers), strict=True):
        for view, tensor in zip(held, layer.held, strict=True):
            view.copy_(tensor)
        layer.held = held


def share_device_buffers(layers, device, fetch):
    """Give the layers of each block their places in one of two device buffers. Returns the buffers. fetch: of a block's number."""
    size = max(places(of_block)[1] for of_block in layers)
    buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in layers[:2]]
    for number, of_block in enumerate(layers):
        for layer, copies in zip(of_block, views(buffers[number % 2], of_block), strict=True):
            # `data`: a compiled block saves them for its backward pass; autograd must not take the copies in between for changes.
            layer.copies, layer.fetch = [copy.data for copy in copies], functools.partial(fetch, number)
    return buffers


def host_buffer(size):
    """A flat uint8 tensor of `size` bytes that begins a page."""
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def pin(buffers, device):
    """Pin the host buffers until the BlockBuffers is deleted: copies from other memory wait for the CPU.

    cudaHostRegister pins what is there. torch's `pin_memory` would round each buffer up to a power of two.
    """
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()
        for flat in buffers.host:
            if error := int(runtime.cudaHostRegister(flat.data_ptr(), len(flat), 0)):
                size = sum(map(len, buffers.host)) / 2**30
                fail(
                    BAD_FLAGS,
                    f"--offload: {size:.1f} GiB of host memory cannot be pinned (CUDA error {error}); free host memory, raise the limit "
                    "of locked memory (ulimit -l), or omit --offload",
                )
            # Not at the end of the process, where the driver does it: a forked worker must not call CUDA when it ends.
            weakref.finalize(buffers, unpin, buffers.lane, runtime, flat).atexit = False


def unpin(lane, runtime, flat):
    """Release a host buffer when its last copy has ended."""
    lane.end()
    runtime.cudaHostUnregister(flat.data_ptr())


# -----------------------------------------------------------------------------
# Streams


class TwoStreams:
    """Copies on a stream of their own, beside the computations on the current stream of a GPU."""

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def computed(self):
        """An event after all computations that are queued so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, source, target, after):
        """Copy once an event has happened. Returns the event of the copy's end."""
        self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        target.record_stream(self.stream)  # if the buffer is deleted, its memory is not reused before the copy has ended
        return self.stream.record_event()

    def wait(self, copied):
        """Have all computations that are queued from now on wait for a copy."""
        torch.cuda.current_stream(self.device).wait_event(copied)

    def end(self):
        """Wait for all copies."""
        self.stream.synchronize()


class InOrder:
    """The same for a device without streams: a copy has ended when it returns, and nothing waits."""

    def computed(self):
        return None

    def copy(self, source, target, after):
        target.copy_(source)

    def wait(self, copied):
        return None
