"""--compile: all blocks share their graphs, two a shape, in half precision too."""

import functools
import re
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder

import train_cogvideox_lora as script
from cogvideox import linear, lora, model, offload, versions
from demo.make_model import make_model
from tests.conftest import ROOT, environment, lora_of, same, words
from tests.cpu_kinds import needs_bf16_attention

compiles = pytestmark = pytest.mark.skipif(versions.misfit(script.COMPILER) is not None, reason="--compile is refused with this torch")
BLOCKS = 12  # torch stops compiling a function after eight graphs


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "deep", layers=BLOCKS, vae_channels=8, heads=2, head_width=16)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_backend(monkeypatch):
    """Graphs are captured and guarded as always, but run as they are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")


def prepared(folder, precision="stored", recomputed=5, keep_attention=True, dropout=0.1, compiled=True, offloaded=False):
    """A transformer as the trainer prepares it in bf16."""
    transformer = model.load_transformer(folder, torch.bfloat16)
    lora.add_lora(transformer, 4, 4.0, dropout, ["to_q", "ff.net.2"], seed=0)
    lora.fit_to_autocast(transformer, torch.bfloat16)
    linear.hold_linears(transformer, precision, offloaded)
    if offloaded:
        offload.offload_blocks(transformer, torch.device("cpu"))
    model.checkpoint_blocks(transformer, recomputed, keep_attention)
    if compiled:
        model.compile_blocks(transformer, torch.device("cpu"))
    return transformer.train()


def gradients(transformer, shape=(2, 4, 6), seed=0):
    """The gradients of a step at (frames, height, width) of the latents."""
    torch.manual_seed(seed)
    frames, height, width = shape
    batch = {"latents": torch.randn(1, frames, 16, height, width).bfloat16()}
    prompt, timestep = torch.randn(1, 226, 32).bfloat16(), torch.tensor([10])
    transformer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        constant = model.constant_inputs(transformer, torch.device("cpu"))(batch)
        outputs = transformer(batch["latents"], prompt, timestep, return_dict=False, **constant)[0]
    outputs.float().square().sum().backward()
    return [p.grad for p in transformer.parameters() if p.requires_grad]


def graphs():
    """How many graphs there are, after a check that every function that was to be compiled was."""
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    return counters["stats"]["unique_graphs"]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_bf16_attention
def test_twelve_blocks_in_half_precision_share_two_graphs(deep_model, without_backend):
    compiled, straight = prepared(deep_model), gradients(prepared(deep_model, compiled=False))
    assert equal(gradients(compiled), straight)
    assert not equal(gradients(compiled, seed=1), straight)
    assert graphs() == 2  # the first block's input needs no gradient


@pytest.mark.slow
def test_other_shapes_add_at_most_two_graphs_each(deep_model, without_backend):
    compiled, plain = prepared(deep_model), prepared(deep_model, compiled=False)
    for number, shape in enumerate([(2, 4, 6), (3, 4, 6), (2, 6, 4), (4, 6, 8), (3, 8, 8), (1, 4, 4)], start=1):
        assert equal(gradients(compiled, shape), gradients(plain, shape))
        assert graphs() <= 2 * number


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["stored", "fp8", "nf4"])
@pytest.mark.parametrize("recomputed", [0, 5])
def test_offloaded_blocks_share_two_graphs_and_find_their_own_weights(deep_model, without_backend, precision, recomputed, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile.func, backend="aot_eager"))  # saves for the backward pass
    straight = gradients(prepared(deep_model, precision, recomputed, compiled=False))
    compiled = prepared(deep_model, precision, recomputed, offloaded=True)
    assert equal(gradients(compiled), straight)
    assert not equal(gradients(compiled, seed=1), straight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.compiler.set_stance("force_eager"):  # a score between two steps
        compiled(torch.zeros(1, 2, 16, 4, 6).bfloat16(), torch.zeros(1, 226, 32).bfloat16(), torch.tensor([10]))
    assert equal(gradients(compiled), straight)
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"precision": "fp8"}, {"precision": "int8"}, {"precision": "nf4"}, {"recomputed": 0}, {"recomputed": BLOCKS, "keep_attention": False}],
)
def test_no_precision_and_no_checkpointing_adds_graphs(deep_model, without_backend, settings):
    compiled, plain = prepared(deep_model, **settings), prepared(deep_model, compiled=False, **settings)
    assert equal(gradients(compiled), gradients(plain))
    assert graphs() == 2


@pytest.mark.slow
def test_a_function_of_each_module_would_be_found_by_these_counts(deep_model, without_backend):
    transformer = prepared(deep_model)
    for block in transformer.transformer_blocks:
        block.norm1.norm.forward = functools.partial(type(block.norm1.norm).forward, block.norm1.norm)
    gradients(transformer)
    assert counters["stats"]["unique_graphs"] == 8
    assert counters["frames"]["total"] == 9


def test_norms_keep_their_names_and_weights_when_they_change_their_class(deep_model):
    stock, fitted = model.load_transformer(deep_model, torch.bfloat16), model.load_transformer(deep_model, torch.bfloat16)
    lora.fit_to_autocast(fitted, torch.bfloat16)
    norms = [module for module in fitted.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == BLOCKS * 4 + 2  # norm1, norm2, norm_q, norm_k; norm_final and that of norm_out
    assert {type(norm) for norm in norms} == {lora.UncastLayerNorm}
    assert all("forward" not in vars(module) for module in fitted.modules())
    assert fitted.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(fitted.state_dict().values(), stock.state_dict().values(), strict=True))


@pytest.mark.slow
def test_a_run_of_the_program_recompiles_for_the_first_block_alone(deep_model, six_clips, encodings, tmp_path):
    settings = {"mixed_precision": "bf16", "max_train_steps": 4, "checkpointing_steps": 2, "eval_clips": 1, "validation_prompt": "a mouse"}
    line = words(deep_model, six_clips, tmp_path / "out", encodings, compile=True, gradient_checkpointing="auto", **settings)
    program = [sys.executable, ROOT / "train_cogvideox_lora.py", *map(str, line)]
    variables = environment() | {"TORCH_LOGS": "recompiles"}
    done = subprocess.run(program, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"Recompiling function (\w+)", done.stderr) == ["forward"], done.stderr[-3000:]  # two graphs
    assert "recompile_limit" not in done.stderr


@pytest.mark.slow
def test_compiled_blocks_train_the_same_to_rounding(train):
    settings = {"max_train_steps": 4, "eval_clips": 1, "checkpointing_steps": 2, "learning_rate": 1e-3}
    plain = lora_of(train(**settings))
    compiled = lora_of(train(compile=True, **settings))
    assert graphs() == 2
    assert max((plain[name] - compiled[name]).abs().max() for name in plain) < 1e-4


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("compiled", [False, True])
def test_a_dynamo_backend_of_a_saved_config_compiles_nothing_and_the_flag_decides(train, plain_run, monkeypatch, capsys, compiled):
    """accelerate would compile the whole model, around the blocks that --compile compiled."""
    plain = lora_of(plain_run(max_train_steps=1))
    asked = []

    def compile_nothing(model=None, **settings):
        asked.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    trained = lora_of(train(max_train_steps=1, **({"compile": True} if compiled else {})))
    assert [getattr(one, "__name__", type(one).__name__) for one in asked] == ["forward"] * (2 if compiled else 0)  # of two blocks
    assert same(trained, plain)
    assert "note: the launcher's dynamo backend INDUCTOR is not used; --compile decides" in capsys.readouterr().err
