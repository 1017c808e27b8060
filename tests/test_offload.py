"""--offload: one flat buffer a block, two device buffers, copies that begin before they are needed and overwrite nothing in use."""

import contextlib
import gc
import mmap
from types import SimpleNamespace

import pytest
import torch

import train_cogvideox_lora as script
from cogvideox import linear, lora, model, offload
from demo.make_model import make_model
from tests.conftest import lora_of, same

CPU = torch.device("cpu")
BLOCKS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "five", layers=BLOCKS, vae_channels=8, heads=2, head_width=16)


class Late:
    """Every copy happens as late as it may: when a computation waits for it. Without that, a block would compute with old weights."""

    def __init__(self):
        self.waiting = []

    def computed(self):
        return None

    def copy(self, source, target, after):
        self.waiting.append(lambda: target.copy_(source))
        return self.waiting[-1]

    def wait(self, copied):
        if copied in self.waiting:
            self.waiting.remove(copied)
            copied()


class Recorded(offload.InOrder):
    """Writes down what is queued: ("computed", event), ("copy", block, event it waits for), ("wait", block); tests add ("use", block)."""

    def __init__(self):
        self.log, self.buffers = [], None

    def computed(self):
        self.log.append(("computed", len(self.log)))
        return self.log[-1][1]

    def copy(self, source, target, after):
        block = next(number for number, flat in enumerate(self.buffers.host) if flat is source)
        self.log.append(("copy", block, after))
        super().copy(source, target, after)
        return block

    def wait(self, copied):
        self.log.append(("wait", copied))


def prepared(folder, lane=None, precision="stored", checkpointing="none", dropout=0.0):
    """A transformer in fp32, with its weights offloaded to CPU tensors through a lane, or resident. Returns (transformer, buffers)."""
    transformer = model.load_transformer(folder, torch.float32)
    lora.add_lora(transformer, 4, 4.0, dropout, ["to_q", "ff.net.2"], seed=0)
    linear.hold_linears(transformer, precision, offload=lane is not None)
    model.checkpoint_blocks(transformer, *model.blocks_to_recompute(checkpointing, BLOCKS))
    buffers = None
    if lane:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offload, "InOrder", lambda: lane)
            buffers = offload.offload_blocks(transformer, CPU)
        lane.buffers = buffers
    return transformer.train(), buffers


def forward(transformer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1, 2, 16, 4, 6, generator=generator), torch.randn(1, 226, 32, generator=generator), torch.tensor([10])
    torch.manual_seed(seed)
    return transformer(*inputs, return_dict=False)[0]


def gradients(transformer):
    return [p.grad.clone() for p in transformer.parameters() if p.requires_grad]


def step(transformer, seed=0):
    """(outputs, gradients) of a step."""
    transformer.zero_grad()
    outputs = forward(transformer, seed)
    outputs.square().sum().backward()
    return [outputs.detach(), *gradients(transformer)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def layers_of(block):
    return [module for module in block.modules() if isinstance(module, linear.FrozenLinear)]


# -----------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("lane", [offload.InOrder, Late])
@pytest.mark.parametrize("checkpointing", ["none", "all", "attention", "2"])
def test_offloaded_blocks_compute_and_train_the_same_bits(folder, lane, checkpointing):
    plain, (offloaded, _) = (
        prepared(folder, dropout=0.1, checkpointing=checkpointing)[0],
        prepared(folder, lane(), "stored", checkpointing, 0.1),
    )
    for seed in (0, 1):
        expected = step(plain, seed)
        assert equal(step(offloaded, seed), expected)
    assert not equal(step(offloaded, 0), expected)
    assert min(gradient.abs().max() for gradient in expected[1:]) >= 0 < max(gradient.abs().max() for gradient in expected[1:])


@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
def test_weights_of_fewer_bits_share_a_buffer_and_compute_the_same_bits(folder, precision):
    plain, (offloaded, _) = prepared(folder, None, precision, "2")[0], prepared(folder, Late(), precision, "2")
    expected = step(plain)
    assert equal(step(offloaded), expected)
    assert not equal(step(offloaded, seed=1), expected)
    pairs = [
        zip(layers_of(a), layers_of(b), strict=True) for a, b in zip(plain.transformer_blocks, offloaded.transformer_blocks, strict=True)
    ]
    assert all(torch.equal(a.weight, b.weight) for pair in pairs for a, b in pair)


def odd_use(transformer, buffers):
    """Use the model as a run does between steps, and as an error does. Returns what it computed."""
    seen = []
    with torch.no_grad():  # scores and videos: forward passes alone
        seen += [forward(transformer, 3), forward(transformer, 4)]
    transformer.eval()
    seen.append(forward(transformer, 5).detach())  # of which no backward pass comes
    transformer.train()
    handle = transformer.transformer_blocks[2].register_forward_hook(fail)
    with contextlib.suppress(InterruptedError):
        forward(transformer)
    handle.remove()
    outputs = forward(transformer, 6)
    handle = transformer.transformer_blocks[3].attn1.to_out[0].register_full_backward_hook(fail)
    with contextlib.suppress(InterruptedError):
        forward(transformer).sum().backward()
    handle.remove()
    hidden, text, time = torch.ones(1, 12, 32), torch.ones(1, 226, 32), torch.ones(1, 64)
    with torch.no_grad():
        for number in (4, 1, 3, 0, 2):  # out of order
            seen += transformer.transformer_blocks[number](hidden, text, time)
            seen.append(transformer.transformer_blocks[4 - number].attn1.to_k(hidden))  # a layer alone
    transformer.zero_grad()
    (outputs.sum() + forward(transformer, 7).sum()).backward()  # two forward passes, then both backward passes
    forward(transformer, 8).sum().backward()  # accumulated
    return [*seen, *gradients(transformer)]


def fail(*args):
    raise InterruptedError


@pytest.mark.parametrize("lane", [offload.InOrder, Late])
@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_scores_errors_and_any_order_leave_the_right_weights(folder, lane, checkpointing):
    plain, (offloaded, buffers) = prepared(folder, checkpointing=checkpointing)[0], prepared(folder, lane(), "stored", checkpointing)
    assert equal(odd_use(offloaded, buffers), odd_use(plain, None))
    assert equal(step(offloaded), step(plain))


@pytest.mark.slow
def test_a_whole_run_through_the_buffers_trains_the_same_bits(train, plain_run, monkeypatch):
    settings = {"gradient_checkpointing": "auto", "eval_clips": 1, "validation_prompt": "a mouse", "checkpointing_steps": 2}
    settings |= {"max_train_steps": 3, "gradient_accumulation_steps": 2, "lora_dropout": 0.1, "ema_decay": 0.9}
    plain, other = lora_of(plain_run(**settings)), lora_of(plain_run(**settings, seed=43))
    hold, lanes = linear.hold_linears, []

    def hold_and_offload(transformer, *rest):
        hold(transformer, *rest)
        lanes.append(Late())
        monkeypatch.setattr(offload, "InOrder", lambda: lanes[-1])
        offload.offload_blocks(transformer, CPU)

    monkeypatch.setattr(script, "hold_linears", hold_and_offload)
    assert same(lora_of(train(**settings, offload=True)), plain)
    assert len(lanes) == 1
    assert not same(plain, other)


def test_a_computation_that_did_not_wait_would_be_found(folder):
    class NeverWaits(Late):
        def wait(self, copied):
            return None

    assert not equal(step(prepared(folder, NeverWaits())[0]), step(prepared(folder)[0]))


# -----------------------------------------------------------------------------
# Order


def recorded(folder, monkeypatch, checkpointing="none"):
    """(transformer, log), with each product's use of a block's weights in the log too."""
    transformer, buffers = prepared(folder, lane := Recorded(), "stored", checkpointing)
    numbers = {id(layer): number for number, block in enumerate(transformer.transformer_blocks) for layer in layers_of(block)}
    dense = linear.FrozenLinear.dense

    def noted(layer, *args):
        weight = dense(layer, *args)
        if lane.log[-1:] != [entry := ("use", numbers[id(layer)])]:
            lane.log.append(entry)
        return weight

    monkeypatch.setattr(linear.FrozenLinear, "dense", noted)
    return transformer, lane.log


def check_order(log):
    """Each use follows a wait for its block's copy; each copy waits for an event after all uses of what it overwrites."""
    copied, waited, last_use = {}, {}, {0: -1, 1: -1}
    for index, entry in enumerate(log):
        kind, place = entry[0], entry[1] % 2
        if kind == "copy":
            assert entry[2] > last_use[place], f"{entry} at {index} does not wait for the last use of its buffer"
            copied[place], waited[place] = entry[1], False
        elif kind == "wait":
            assert copied[place] == entry[1]
            waited[place] = True
        elif kind == "use":
            assert copied[place] == entry[1], f"{entry} at {index} has the weights of block {copied[place]}"
            assert waited[place], f"{entry} at {index} did not wait"
            last_use[place] = index


def of(log, *kinds):
    return [entry[:2] for entry in log if entry[0] in kinds]


def test_each_copy_begins_before_the_block_before_it_computes_forward_and_backward(folder, monkeypatch):
    transformer, log = recorded(folder, monkeypatch)
    outputs = forward(transformer)
    first = [("copy", 0), ("copy", 1), ("use", 0), ("copy", 2), ("use", 1), ("copy", 3), ("use", 2), ("copy", 4), ("use", 3), ("use", 4)]
    assert of(log, "copy", "use") == first
    log.append(("pass", -1))
    outputs.sum().backward()
    log.append(("pass", -1))
    # Blocks 4 and 3 are still there.
    second = [("use", 4), ("copy", 2), ("use", 3), ("copy", 1), ("use", 2), ("copy", 0), ("use", 1), ("use", 0)]
    assert of(log, "copy", "use")[len(first) :] == second
    forward(transformer)
    third = [("use", 0), ("copy", 2), ("use", 1), ("copy", 3), ("use", 2), ("copy", 4), ("use", 3), ("use", 4)]  # blocks 0 and 1 are there
    assert of(log, "copy", "use")[len(first + second) :] == third
    check_order(log)


@pytest.mark.parametrize("checkpointing", ["all", "attention", "2"])
def test_recomputing_copies_no_block_twice(folder, monkeypatch, checkpointing):
    transformer, log = recorded(folder, monkeypatch, checkpointing)
    for _ in range(2):
        forward(transformer).sum().backward()
    passes = [("copy", 2), ("copy", 3), ("copy", 4), ("copy", 2), ("copy", 1), ("copy", 0)]
    assert of(log, "copy") == [("copy", 0), ("copy", 1), *passes, *passes]
    check_order(log)


def test_a_forward_pass_that_follows_another_finds_its_first_block(tmp_path, monkeypatch):
    """With an even number of blocks, as in all CogVideoX models; of an odd number the first and the last block have the same buffer."""
    even = make_model(tmp_path / "four", layers=4, vae_channels=8, heads=2, head_width=16)
    transformer, log = recorded(even, monkeypatch)
    with torch.no_grad():
        forward(transformer)
        assert of(log, "copy", "use")[-3:] == [("use", 2), ("copy", 0), ("use", 3)]
        forward(transformer)
    assert len(of(log, "copy")) == 2 * 4 + 1
    check_order(log)


def test_the_order_is_right_whatever_a_run_does(folder, monkeypatch):
    for checkpointing in ("none", "all"):
        transformer, log = recorded(folder, monkeypatch, checkpointing)
        odd_use(transformer, None)
        assert {entry[0] for entry in log} == {"computed", "copy", "wait", "use"}
        check_order(log)
        monkeypatch.undo()


@pytest.mark.parametrize("left_out", ["wait", "computed"])
def test_an_order_with_a_step_left_out_would_be_found(folder, monkeypatch, left_out):
    transformer, log = recorded(folder, monkeypatch)
    forward(transformer).sum().backward()
    broken = [entry for entry in log if entry[0] != "wait"] if left_out == "wait" else [(*entry[:2], 0) for entry in log]
    with pytest.raises(AssertionError):
        check_order(broken)


# -----------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("precision", ["stored", "fp8", "int8", "nf4"])
def test_a_block_has_one_flat_buffer_and_all_blocks_have_two_on_the_device(precision):
    blocks, plain = [], []
    for _ in range(BLOCKS):
        linears = [torch.nn.Linear(512, 512), torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 512)]
        blocks.append(torch.nn.Sequential(*(linear.FrozenLinear(one.bfloat16(), precision, resident=False) for one in linears)))
        plain.append([tensor.clone() for layer in blocks[-1] for tensor in layer.held])
    buffers = offload.BlockBuffers(blocks, CPU, offload.InOrder())
    for number, (block, flat, tensors) in enumerate(zip(blocks, buffers.host, plain, strict=True)):
        held = [tensor for layer in block for tensor in layer.held]
        assert {tensor.untyped_storage().data_ptr() for tensor in held} == {flat.data_ptr()}
        assert flat.data_ptr() % mmap.PAGESIZE == 0
        assert all(tensor.data_ptr() % offload.ALIGNMENT == 0 for tensor in held)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert needed <= len(flat) <= 1.01 * needed
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(held, tensors, strict=True))
        buffers.fetch(number)
        copies = [tensor for layer in block for tensor in layer.copies]
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(copies, tensors, strict=True))
    on_device = {tensor.untyped_storage().data_ptr() for block in blocks for layer in block for tensor in layer.copies}
    assert on_device == {buffer.data_ptr() for buffer in buffers.on_device}
    assert {tensor._version for block in blocks for layer in block for tensor in layer.copies} == {0}  # copying is no change to autograd
    assert [len(buffer) for buffer in buffers.on_device] == [len(flat)] * 2


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in for torch.cuda that writes down the calls. cudaHostRegister returns its `error`."""
    stand_in = SimpleNamespace(calls=[], error=0)

    def note(*call):
        stand_in.calls.append(call)
        return call

    class Stream:
        def __init__(self, device, name="copies"):
            self.name = name

        def wait_event(self, event):
            note("wait", self.name, event)

        def record_event(self):
            return note("event", self.name, len(stand_in.calls))

        def synchronize(self):
            note("synchronize", self.name)

    runtime = SimpleNamespace(
        cudaHostRegister=lambda *call: note("register", *call) and stand_in.error,
        cudaHostUnregister=lambda *call: note("unregister", *call),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "computes"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(note("on", stream.name)))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: note("lives for", stream.name), raising=False)
    return stand_in


def test_host_buffers_are_pinned_once_as_they_are_and_released_after_the_last_copy(cuda):
    owner = SimpleNamespace(host=[offload.host_buffer(size) for size in (5000, 4096, 12345)], lane=offload.TwoStreams("cuda"))
    owner = type("Owner", (), vars(owner))()
    sizes = [(flat.data_ptr(), len(flat)) for flat in owner.host]
    offload.pin(owner, "cuda")
    assert cuda.calls == [("register", *size, 0) for size in sizes]
    cuda.calls.clear()
    del owner
    gc.collect()
    assert sorted(call for call in cuda.calls if call[0] == "unregister") == sorted(("unregister", pointer) for pointer, _ in sizes)
    assert cuda.calls[0] == ("synchronize", "copies")


def test_host_memory_that_cannot_be_pinned_ends_in_a_sentence(cuda, capsys):
    cuda.error = 2
    with pytest.raises(SystemExit) as stop:
        offload.pin(SimpleNamespace(host=[offload.host_buffer(2**20)], lane=None), "cuda")
    assert stop.value.code == 2
    assert "--offload: 0.0 GiB of host memory cannot be pinned (CUDA error 2)" in capsys.readouterr().err


def test_on_a_gpu_copies_have_a_stream_of_their_own_and_wait_both_ways(cuda):
    lane, source, target = offload.TwoStreams("cuda"), torch.arange(4), torch.zeros(4, dtype=torch.int64)
    finished = lane.computed()
    copied = lane.copy(source, target, finished)
    lane.wait(copied)
    assert torch.equal(source, target)
    assert cuda.calls == [
        finished,
        ("wait", "copies", finished),
        ("on", "copies"),
        ("lives for", "copies"),
        copied,
        ("wait", "computes", copied),
    ]
    assert finished[:2] == ("event", "computes")
    assert copied[:2] == ("event", "copies")
