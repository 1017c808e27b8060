"""Reading, checking and loading models; encoding as the stock pipeline encodes."""

import gc
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5EncoderModel

import train_cogvideox_lora as script
from cogvideox import engine as engines
from cogvideox import folder as folder_of
from cogvideox import launch, model, rehearsal
from cogvideox.optimizer import make_optimizer
from demo.make_model import make_model
from tests import shortcuts
from tests.conftest import lora_of, same
from tests.stand_ins import flags_of, make_trained, train_one_step


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return CogVideoXPipeline.from_pretrained(tiny_model)


@pytest.mark.numeric
def test_captions_are_encoded_as_the_pipeline_encodes_prompts(tiny_model, pipeline):
    tokenizer, encoder = folder_of.load_tokenizer(tiny_model), model.load_text_encoder(tiny_model, torch.device("cpu"))
    captions = ["a rabbit", "", "a very long story " * 200]
    ours = model.encode_captions(tokenizer, encoder, captions, 226)
    theirs, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    assert ours.shape == (3, 226, 32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours[0] - ours[1]).abs().max() > 0.1


@pytest.mark.numeric
def test_sampled_latents_are_the_posteriors_sample_times_the_scale(tiny_model):
    vae = model.load_vae(tiny_model, torch.device("cpu"))
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    moments = model.encode_frames(vae, frames)
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist
    theirs = posterior.sample(generator=torch.Generator().manual_seed(3))[0].transpose(0, 1) * vae.config.scaling_factor
    ours = model.sample_latents(moments, vae.config.scaling_factor, torch.Generator().manual_seed(3))
    assert ours.shape == (3, 16, 4, 6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    other = model.sample_latents(moments, vae.config.scaling_factor, torch.Generator().manual_seed(4))
    assert not torch.allclose(ours, other)


@pytest.mark.numeric
def test_latents_are_decoded_as_the_pipeline_decodes_them(tiny_model, pipeline):
    latents = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    vae = model.load_vae(tiny_model, torch.device("cpu"))
    ours = model.decode_latents(vae, latents)
    with torch.no_grad():
        theirs = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents[None]), output_type="np")[0]
    assert ours.shape == (9, 32, 48, 3)
    np.testing.assert_allclose(ours / 255, theirs, atol=0.51 / 255)
    assert ours.std() > 5
    assert [len(model.decode_latents(vae, latents[:n])) for n in (1, 2, 3)] == [1, 5, 9]


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "no")])
def test_the_stored_dtype_decides_whatever_the_folder_is_called(tmp_path, dtype, name):
    for folder in ("cogvideox-5b-2b", "model"):
        path = make_model(tmp_path / folder, dtype=dtype, vae_channels=8, head_width=16)
        assert folder_of.stored_dtype(path, "transformer") == dtype
    loaded = model.load_transformer(path, dtype)
    assert loaded.dtype == dtype
    expected = "no" if name == "fp16" else name  # a CPU has no fast fp16
    assert folder_of.choose_precision(None, path, None) == (expected, None)


@pytest.mark.parametrize("engine", folder_of.SHARDING_ENGINES)
def test_an_engine_without_a_scaler_computes_a_base_stored_in_fp16_in_bf16(tiny_model, monkeypatch, capsys, engine):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)
    monkeypatch.setattr(folder_of, "stored_precision", lambda *of: "fp16")
    assert folder_of.choose_precision(None, tiny_model, None) == ("fp16", None)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(engine, "true")
    assert folder_of.choose_precision(None, tiny_model, None) == ("bf16", None)
    assert "computing in bf16, not in the stored fp16" in capsys.readouterr().err
    assert folder_of.choose_precision("fp16", tiny_model, None) == ("fp16", None)  # engine.unfit_flags refuses it
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: False)
    assert folder_of.choose_precision(None, tiny_model, None) == ("no", None)


def test_t5_keeps_its_wo_in_fp32_when_it_is_stored_in_fp16(tmp_path):
    class Gpu:
        type = "cuda"

    assert model.usable_dtype(torch.float16, Gpu()) == torch.float16
    assert model.usable_dtype(torch.float16, torch.device("cpu")) == torch.float32
    path = make_model(tmp_path / "half", dtype=torch.float16, vae_channels=8, head_width=16)
    encoder = model.T5EncoderModel.from_pretrained(path / "text_encoder", dtype=torch.float16)
    kept = {name.split(".")[-2] for name, p in encoder.named_parameters() if p.dtype == torch.float32}
    assert kept == {"wo"}


def test_geometry_offers_the_nearest_legal_values(tiny_model, temporal_patch_model):
    facts = folder_of.read_facts(tiny_model)
    assert folder_of.check_geometry(facts, 480, 720, 49) == []
    assert folder_of.check_geometry(facts, 480, 721, 49) == ["--width 721: this model needs multiples of 16; the nearest are 720 or 736"]
    assert folder_of.check_geometry(facts, 36, 720, 50) == [
        "--height 36: this model needs multiples of 16; the nearest are 32 or 48",
        "--max_num_frames 50: this model needs 4k + 1 frames; the nearest are 49 or 53",
    ]
    facts = folder_of.read_facts(temporal_patch_model)
    assert folder_of.check_geometry(facts, 64, 96, 49) == []
    assert folder_of.check_geometry(facts, 64, 96, 53) == ["--max_num_frames 53: this model needs 8k + 1 frames; the nearest are 49 or 57"]


def edited(folder, target, part, **changes):
    """A copy of a model folder with some config values changed."""
    shutil.copytree(folder, target)
    path = target / part
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer/config.json", {"in_channels": 33}, "maps 33 channels to 16"),
        ("transformer/config.json", {"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_a_family_that_is_not_trained_here_is_refused_in_one_sentence(tiny_model, tmp_path, part, changes, words):
    problems = folder_of.check_model_folder(edited(tiny_model, tmp_path / "other", part, **changes))
    assert len(problems) == 1
    assert words in problems[0]


def test_a_broken_model_folder_names_the_file(tiny_model, tmp_path):
    assert folder_of.check_model_folder(tiny_model) == []
    folder = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
    problems = folder_of.check_model_folder(folder)
    assert any("transformer/diffusion_pytorch_model.safetensors: truncated" in problem for problem in problems)
    assert any("pickled weights are unsupported" in problem for problem in problems)
    for name in ("scheduler/scheduler_config.json", "vae/config.json"):
        cut = shutil.copytree(tiny_model, tmp_path / name.replace("/", "_"))
        (cut / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name}: not JSON, perhaps truncated"):
            folder_of.check_model_folder(cut) or folder_of.read_facts(cut)
    shutil.rmtree(folder / "text_encoder")
    assert any("no text_encoder/config.json" in problem for problem in folder_of.check_model_folder(folder))


def safetensors_bytes(header, data=b"\0" * 48):
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04 a zip archive", "not a safetensors file"),
        (safetensors_bytes([1]), "not a safetensors file"),
        (safetensors_bytes({"a": {"dtype": "F32"}}), "not a safetensors file"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [12], "data_offsets": "x" * 2}}), "not a safetensors file"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]}}, b"\0" * 40), r"truncated: \d+ bytes of \d+"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [13], "data_offsets": [0, 48]}}), "invalid shape"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 48]}}), "overflow"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]}}), None),
    ],
)
def test_a_weight_file_that_is_broken_says_how(content, words, tmp_path):
    (tmp_path / "file.safetensors").write_bytes(content)
    reason = folder_of.broken_safetensors(tmp_path / "file.safetensors")
    assert reason is None if words is None else re.search(words, reason)


@pytest.mark.parametrize(
    ("name", "words"), [("./nowhere", "no such folder"), ("a/b/c", "no such folder"), ("someone/nothing", "HF_HUB_OFFLINE")]
)
def test_a_model_that_cannot_be_found_is_told_in_one_sentence(name, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        folder_of.find_model(name, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def cached_model(source, cache):
    """A model as the hub client stores it in a folder of downloads. Returns its snapshot."""
    snapshot = cache / "models--someone--tiny/snapshots/abc"
    shutil.copytree(source, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("abc")
    return snapshot


def test_a_model_in_the_hubs_cache_is_found_without_a_network(tiny_model, tmp_path):
    snapshot = cached_model(tiny_model, tmp_path)
    assert folder_of.find_model("someone/tiny", cache_dir=tmp_path) == snapshot


@pytest.mark.parametrize("place", ["home/.cache/huggingface/hub", "elsewhere"])
def test_the_guides_cache_dir_does_not_download_what_the_hub_client_has(tiny_model, tmp_path, monkeypatch, capsys, place):
    """~/.cache/huggingface/hub, or wherever HF_HOME puts it. What is incomplete there is downloaded as before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / place))
    snapshot, cache_dir = cached_model(tiny_model, tmp_path / place), str(tmp_path / "home/.cache")
    assert folder_of.find_model("someone/tiny", cache_dir=cache_dir) == snapshot
    assert f"someone/tiny lies in {tmp_path / place}: it is not downloaded again" in capsys.readouterr().err
    own = cached_model(tiny_model, tmp_path / "home/.cache")
    assert folder_of.find_model("someone/tiny", cache_dir=cache_dir) == own
    (own / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert folder_of.find_model("someone/tiny", cache_dir=cache_dir) == snapshot
    (snapshot / "transformer/config.json").unlink()
    assert folder_of.find_model("someone/tiny", cache_dir=cache_dir) == own  # offline here: it would be completed there
    assert folder_of.holding_cache("someone/tiny", None, None, None) is None  # the hub client's own choice


@pytest.mark.parametrize(("wanted", "count"), [("all", 2), ("none", 0), ("1", 1), ("9", 2), ("attention", 2)])
def test_gradient_checkpointing_recomputes_as_many_blocks_as_asked_and_changes_no_gradient(tiny_model, wanted, count):
    gradients, calls = [], []
    for setting in ("none", wanted):
        transformer = model.load_transformer(tiny_model, torch.float32)
        parameters = script.lora.add_lora(transformer, 4, 4.0, 0.0, ["to_q"], seed=0)
        model.checkpoint_blocks(transformer, *model.blocks_to_recompute(setting, 2))
        runs = []
        for block in transformer.transformer_blocks:
            block.register_forward_pre_hook(lambda *args, runs=runs: runs.append(1))  # recomputing stops before the end
        inputs = torch.randn(1, 2, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(1, 226, 32), torch.tensor([10])
        transformer.train()(*inputs, return_dict=False)[0].square().sum().backward()
        gradients.append([p.grad for p in parameters])
        calls.append(len(runs))
    assert calls == [2, 2 + count]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert max(g.abs().max() for g in gradients[0]) > 0


@pytest.mark.parametrize(("wanted", "attentions"), [("none", 2), ("all", 4), ("attention", 2), ("1", 2)])
def test_attention_is_done_twice_only_where_everything_is(tiny_model, wanted, attentions):
    transformer = model.load_transformer(tiny_model, torch.float32)
    script.lora.add_lora(transformer, 4, 4.0, 0.0, ["to_q"], seed=0)
    model.checkpoint_blocks(transformer, *model.blocks_to_recompute(wanted, 2))
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            seen.append(str(operation))
            return operation(*args, **(kwargs or {}))

    with Count():
        inputs = torch.randn(1, 2, 16, 4, 4), torch.ones(1, 226, 32), torch.tensor([10])
        transformer.train()(*inputs, return_dict=False)[0].square().sum().backward()
    assert sum("scaled_dot_product" in name and "backward" not in name for name in seen) == attentions


def test_blocks_are_compiled_only_where_there_is_a_compiler(tiny_model, monkeypatch, capsys):
    transformer = model.load_transformer(tiny_model, torch.float32)
    from torch._inductor import cpp_builder

    def none_found():
        raise RuntimeError("no g++, clang or icx")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    model.compile_blocks(transformer, torch.device("cpu"))
    assert "no compiler found (no g++" in capsys.readouterr().err
    assert not any("forward" in vars(block) for block in transformer.transformer_blocks)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    model.compile_blocks(transformer, torch.device("cpu"))
    assert all(hasattr(block.forward, "_torchdynamo_orig_callable") for block in transformer.transformer_blocks)


def test_the_fewest_blocks_that_fit_are_recomputed_and_attention_is_given_up_last():
    plans = [rehearsal.fewest_recomputed(4, 100, 10, room) for room in (1000, 400, 399, 310, 309, 40, 39, -5)]
    assert plans == [(0, True), (0, True), (1, True), (1, True), (2, True), (4, True), (4, False), (4, False)]


@pytest.mark.numeric
def test_what_a_block_keeps_is_measured(tiny_model):
    transformer = model.load_transformer(tiny_model, torch.float32)
    script.lora.add_lora(transformer, 4, 4.0, 0.0, ["to_q"], seed=0)
    sizes = []
    for tokens in (24, 48):
        inputs = torch.randn(1, tokens, 32), torch.randn(1, 226, 32), torch.randn(1, 64)
        sizes.append(rehearsal.kept_bytes(transformer.transformer_blocks[0], inputs, {}))
    (kept, attention), (longer_kept, longer_attention) = sizes
    bytes_a_token = (longer_kept - kept) / 24
    assert longer_attention - attention == 24 * (32 + 2) * 4  # its output, and one logarithm a head
    assert 10 * 32 * 4 < bytes_a_token < 40 * 32 * 4  # some multiples of the width: norms, q, k, v, attention, 4 x width twice
    assert 250 * bytes_a_token == pytest.approx(kept, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "words"),
    [
        (1e12, "0 of 2 blocks"),
        (370, "1 of 2 blocks are recomputed, except attention"),
        (0, "2 of 2 blocks are recomputed, including attention"),
    ],
)
def test_auto_takes_what_fits_and_trains_the_same_bits(train, plain_run, monkeypatch, capsys, room, words):
    straight = lora_of(plain_run())
    capsys.readouterr()
    monkeypatch.setattr(rehearsal, "free_bytes", lambda device: room)
    monkeypatch.setattr(rehearsal, "kept_bytes", lambda block, args, kwargs: (100, 10))
    fitted = lora_of(train(gradient_checkpointing="auto"))
    assert f"gradient checkpointing: {words}" in capsys.readouterr().err
    assert same(straight, fitted)


@pytest.mark.parametrize(("room", "passes"), [(1e12, 2), (50_000, 3)])
def test_auto_takes_a_step_of_its_own_only_where_memory_is_short(train, monkeypatch, room, passes):
    """The rehearsal's step and the run's one, and a measured one before them; 50 kB hold all blocks, but not twice."""
    backward, real = [], torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda *given, **settings: backward.append(1) or real(*given, **settings))
    monkeypatch.setattr(rehearsal, "free_bytes", lambda device: room)
    monkeypatch.setattr(rehearsal, "kept_bytes", lambda block, args, kwargs: (10_000, 10))
    train(gradient_checkpointing="auto", max_train_steps=1)
    assert len(backward) == passes


def test_what_a_block_keeps_is_measured_with_the_inputs_of_the_run(tiny_model):
    transformer = model.load_transformer(tiny_model, torch.float32)
    script.lora.add_lora(transformer, 4, 4.0, 0.0, ["to_q"], seed=0)
    model.checkpoint_blocks(transformer, 2, False)
    inputs, later = (torch.randn(1, 2, 16, 4, 4), torch.ones(1, 226, 32), torch.tensor([10])), []
    transformer.transformer_blocks[1].register_forward_hook(lambda *given: later.append(1))
    args, kwargs = rehearsal.first_inputs(transformer.transformer_blocks[0], lambda: transformer.train()(*inputs))
    assert not later
    assert kwargs["hidden_states"].shape == (1, 2 * 2 * 2, 32)
    named = rehearsal.kept_bytes(transformer.transformer_blocks[0], args, kwargs)
    assert named == rehearsal.kept_bytes(transformer.transformer_blocks[0], list(kwargs.values()), {})
    assert named[0] > 10 * kwargs["hidden_states"].nbytes
    transformer(*inputs)  # no hook is left
    assert later


@pytest.mark.parametrize(("room", "recomputed"), [(1.1, 0), (0.9, 2)])
def test_auto_measures_beside_the_optimizers_states(train, monkeypatch, capsys, room, recomputed):
    """A card with room for weights, states and all activations, and one that the states fill."""
    optimizers = []
    monkeypatch.setattr(script, "make_optimizer", lambda *given: optimizers.append(real(*given)) or optimizers[-1])
    real, activations = make_optimizer, 10

    def bytes_of_states():
        return sum(tensor.nbytes for state in optimizers[-1].state.values() for tensor in state.values())

    def free(device):  # of a card with room for a share of the two moments of all weights
        moments = sum(2 * weight.nbytes for weight in optimizers[-1].param_groups[0]["params"])
        return room * moments + 10 * activations - bytes_of_states()

    monkeypatch.setattr(rehearsal, "free_bytes", free)
    monkeypatch.setattr(rehearsal, "kept_bytes", lambda block, args, kwargs: (activations, activations))
    train(gradient_checkpointing="auto", max_train_steps=1)
    assert f"{recomputed} of 2 blocks are recomputed" in capsys.readouterr().err
    assert bytes_of_states() > 0


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "prodigy", "adamw8bit"])
def test_the_states_that_the_rehearsal_creates_are_all_that_a_step_needs(tmp_path, optimizer):
    pytest.importorskip({"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}.get(optimizer, "torch"))
    trained = make_trained()
    trained.transformer.trained.data = torch.randn(64, 80)
    args = script.build_parser().parse_args(["--pretrained_model_name_or_path", "none", "--optimizer", optimizer])
    trained.optimizer = script.make_optimizer(args, trained.parameters, 1.0)
    before = trained.transformer.trained.detach().clone()

    def sizes():
        return {name: value.nbytes for name, value in trained.optimizer.state[trained.parameters[0]].items() if torch.is_tensor(value)}

    args.learning_rate, args.gradient_accumulation_steps = 1.0, 1
    with rehearsal.undone(args, trained):
        rehearsal.create_optimizer_states(trained)
        created = sizes()
        train_one_step(trained)
        assert sizes() == created
        assert sum(created.values()) > 2 * trained.parameters[0].numel()
        assert not torch.equal(trained.transformer.trained, before)
    assert torch.equal(trained.transformer.trained, before)
    assert not trained.optimizer.state
    assert trained.parameters[0].grad is None


def test_the_rehearsal_keeps_its_copy_of_the_weights_in_host_memory():
    trained, copies = make_trained(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if str(operation) in ("aten.clone.default", "aten._to_copy.default"):
                copies.append(((kwargs or {}).get("device") or args[0].device).type)
            return operation(*args, **(kwargs or {}))

    with FakeTensorMode():
        trained.parameters = [torch.nn.Parameter(torch.empty(2, 2, device="cuda"))]
        with Watch():
            rehearsal.undone(flags_of("unused", learning_rate=1e-4, gradient_accumulation_steps=1), trained).__enter__()
    assert copies == ["cpu"]


GIB = 2**30


class Card:
    """A stand-in for torch.cuda on a card of 24 GiB: 4 are another program's, 18 are reserved, and tensors took 15 at the peak."""

    def __init__(self, gaps=0):
        self.gaps = gaps

    def mem_get_info(self, device):
        return 2 * GIB, 24 * GIB

    def memory_reserved(self, device):
        return 18 * GIB

    def max_memory_allocated(self, device):
        return 15 * GIB

    def max_memory_reserved(self, device):
        return 19 * GIB

    def memory_stats(self, device):
        return {"inactive_split_bytes.all.peak": self.gaps * GIB}

    def get_device_properties(self, device):
        return SimpleNamespace(total_memory=24 * GIB)


@pytest.mark.parametrize(("gaps", "free"), [(0, 5), (2, 3)])
def test_memory_between_the_tensors_of_a_segment_is_not_free(monkeypatch, gaps, free):
    monkeypatch.setattr(torch, "cuda", Card(gaps))
    assert rehearsal.free_bytes(torch.device("cuda")) == free * GIB


def test_the_peak_is_told_with_what_torch_reserved(monkeypatch):
    assert re.fullmatch(r"\d+\.\d\d GiB", launch.peak_memory_text(torch.device("cpu")))
    monkeypatch.setattr(torch, "cuda", Card())
    assert launch.peak_memory_text(torch.device("cuda")) == "15.00 GiB in tensors, 19.00 reserved, of 24.0"
    assert launch.peak_memory_text(torch.device("cuda"), 12.5) == "12.50 GiB in tensors, 19.00 reserved, of 24.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_tables_are_made_once_a_size_and_change_no_bit(tiny_model, dtype):
    ours = model.load_transformer(tiny_model, dtype)
    stock = CogVideoXTransformer3DModel.from_pretrained(tiny_model / "transformer", torch_dtype=dtype)
    for height in (4, 6, 4, 4):
        inputs = torch.randn(1, 2, 16, height, 4).to(dtype), torch.ones(1, 226, 32, dtype=dtype), torch.tensor([10])
        assert torch.equal(ours(*inputs, return_dict=False)[0], stock(*inputs, return_dict=False)[0])
    assert ours.patch_embed._get_positional_embeddings.cache_info()[:2] == (2, 2)  # found, made


def test_weights_are_loaded_onto_the_gpu_without_a_copy_in_host_memory(tiny_model, monkeypatch):
    asked = {}

    def keep(kind):
        def from_pretrained(folder, **settings):
            asked[kind] = settings["device_map"]
            raise InterruptedError

        monkeypatch.setattr(getattr(model, kind), "from_pretrained", from_pretrained)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    gpu = torch.device("cuda", 3)
    loaders = {
        "T5EncoderModel": lambda: model.load_text_encoder(tiny_model, gpu),
        "AutoencoderKLCogVideoX": lambda: model.load_vae(tiny_model, gpu),
        "CogVideoXTransformer3DModel": lambda: model.load_transformer(tiny_model, torch.bfloat16, device=gpu),
    }
    for kind, load in loaders.items():
        keep(kind)
        with pytest.raises(InterruptedError):
            load()
    assert asked == dict.fromkeys(loaders, {"": gpu})


@pytest.mark.parametrize(
    ("flags", "engine", "where"),
    [
        ({}, DistributedType.NO, "cuda"),
        ({}, DistributedType.MULTI_GPU, "cuda"),
        ({"offload": True}, DistributedType.NO, "cpu"),
        ({"base_precision": "nf4"}, DistributedType.NO, "cpu"),
        ({}, DistributedType.FSDP, "cpu"),
    ],
)
def test_the_transformer_is_loaded_where_all_of_its_weights_may_be(flags, engine, where):
    accelerator = SimpleNamespace(device=torch.device("cuda", 1), distributed_type=engine, num_processes=2)
    args = SimpleNamespace(**{"offload": False, "base_precision": "stored"} | flags)
    assert engines.loading_device(args, accelerator).type == where


def test_a_transformer_on_the_meta_device_reads_no_weights_and_has_their_shapes(tiny_model, tmp_path):
    bare = shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    empty, full = model.load_transformer(bare, torch.float32, device="meta"), model.load_transformer(tiny_model, torch.float32)
    assert {t.device.type for t in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    assert {n: t.shape for n, t in empty.named_parameters()} == {n: t.shape for n, t in full.named_parameters()}
    assert {n: t.shape for n, t in empty.named_buffers()} == {n: t.shape for n, t in full.named_buffers()}


def test_a_t5_that_does_not_fit_is_split_between_gpu_and_host(tiny_model, monkeypatch, capsys):
    gib = 2**30
    gpu = torch.device("cuda", 1)
    assert model.placement(10 * gib, 24 * gib, gpu) == {"device_map": {"": gpu}}
    assert capsys.readouterr().err == ""
    placed = model.placement(12 * gib, 10 * gib, gpu)
    assert placed["device_map"] == "auto"
    assert placed["max_memory"] == {1: int(9 * gib), "cpu": 2**50}
    assert "T5 does not fit" in capsys.readouterr().err
    # accelerate's split itself, where this machine can have one: all of it in host memory.
    whole = model.load_text_encoder(tiny_model, torch.device("cpu"))
    split = T5EncoderModel.from_pretrained(tiny_model / "text_encoder", device_map="auto", max_memory={"cpu": 2**50})
    with torch.no_grad():
        assert torch.equal(whole(torch.arange(226)[None])[0], split(torch.arange(226)[None])[0])


def test_the_fp32_pixels_of_a_clip_are_gone_while_it_is_encoded():
    frames, found = np.zeros((5, 8, 16, 3), np.uint8), []

    def encode(video):
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape[-2:] == (8, 16)]
        found.append({one.dtype for one in tensors})
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.zeros(1, 2, 2, 1, 2)))

    config = SimpleNamespace(block_out_channels=range(4))
    vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, config=config, encode=encode)
    model.encode_frames(vae, frames)
    held = torch.zeros(3, 5, 8, 16)
    model.encode_pixels(vae, held)
    assert [torch.float32 in dtypes for dtypes in found] == [False, True]
    assert torch.bfloat16 in found[0]


def test_a_tokenizer_that_cannot_be_loaded_names_packages_only_where_they_are_missing(tiny_model, tmp_path, monkeypatch):
    shutil.copytree(tiny_model / "tokenizer", tmp_path / "tokenizer")
    shortcuts.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer/tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer: cannot be loaded .*; download this folder of the model again$"):
        shortcuts.load_tokenizer(tmp_path)
    monkeypatch.setattr(folder_of.versions, "installed", lambda name: None if name == "protobuf" else "1")
    with pytest.raises(ValueError, match="; it needs: pip install protobuf$"):
        shortcuts.load_tokenizer(tmp_path)
