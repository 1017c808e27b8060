"""Every engine trains what one process trains, LoRA and all weights, and goes on from what any other one saved."""

import functools
import itertools
import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as distributed
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import train_cogvideox_lora as script
from cogvideox import checkpoint, engine
from cogvideox.video import read_video, write_video
from tests.conftest import ROOT, STEADY_ADAM, STEADY_BOUND, words
from tests.cpu_kinds import needs_bf16_attention
from tests.forked import free_port
from tests.stand_ins import make_trained, train_one_step
from tests.test_compile import compiles

TWO_STEPS_AND_TWO = {"max_train_steps": 4, "checkpointing_steps": 2} | STEADY_ADAM
LEARNING_RATE = {"lora": 1e-2, "sft": 1e-3}
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed compiles its CPU collectives")


def engines_and_kinds(chosen):
    """All (engine, training type) as cases; those that are not chosen are long. Chosen so that `make test` has every pair of an
    engine, a training type and a direction (from two processes to one, or back), and `make test-long` has all three of each."""
    cases = []
    for name, kind in itertools.product(NAMES, LEARNING_RATE):
        marks = [needs_compiler] if name.startswith("zero") else []
        cases.append(pytest.param(name, kind, marks=[*marks, pytest.mark.slow if (name, kind) in chosen else pytest.mark.long]))
    return cases


@functools.cache
def config_of(name, folder):
    """The config file of an engine. ZeRO-3's is changed to split the smallest weight too: a tiny model has no others."""
    if name == "ddp":
        return ROOT / "accelerate_config_machine_multi.yaml"
    shipped = ROOT / f"configs/{name}.yaml"
    if name != "zero3":
        return shipped
    settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "gradient_accumulation_steps": "auto"}
    (folder / "zero3.json").write_text(json.dumps(settings | {"train_micro_batch_size_per_gpu": "auto"}))
    dropped = ("zero_stage", "offload_", "zero3_save_16bit", "mixed_precision")  # what a DeepSpeed file of its own has to say
    lines = [line for line in shipped.read_text().splitlines() if not line.strip().startswith(dropped)]
    place = lines.index("deepspeed_config:") + 1
    lines.insert(place, f"  deepspeed_config_file: {folder / 'zero3.json'}")
    (folder / "zero3.yaml").write_text("\n".join(lines) + "\n")
    return folder / "zero3.yaml"


def accelerate(name, folder):
    """The command that starts two processes under an engine."""
    command = ["accelerate", "launch", "--config_file", config_of(name, folder), "--num_processes", "2"]
    return [*map(str, command), "--main_process_port", str(free_port())]


@pytest.fixture(scope="module")
def settings_of(tmp_path_factory, fork_server):
    """engine -> what accelerate tells its processes about it: the variables that it adds to the environment.

    DeepSpeed keeps what it has compiled. A run that is killed while it compiles leaves a lock that all later ones wait for, so
    the tests have a folder of their own for it, without that lock.
    """
    extensions = ROOT / ".pytest_cache/torch_extensions"
    for lock in extensions.glob("*/lock"):
        lock.unlink()

    @functools.cache
    def ask(name):
        folder = tmp_path_factory.mktemp(name)
        line = [*accelerate(name, folder), "--no_python", "bash", "-c", 'env -0 > "$0-$RANK"', str(folder / "told")]
        command = f"import sys; from accelerate.commands.accelerate_cli import main; sys.argv = {line}; sys.exit(main())"
        [launcher] = fork_server.start([], before=command)
        assert launcher.wait(300) == 0, launcher.output()[-3000:]
        told = [dict(line.split("=", 1) for line in (folder / f"told-{rank}").read_text().split("\0")[:-1]) for rank in (0, 1)]
        settings = {key: value for key, value in told[0].items() if key.startswith(("ACCELERATE_", "FSDP_")) and told[1].get(key) == value}
        return settings | ({"TORCH_EXTENSIONS_DIR": extensions} if name.startswith("zero") else {})

    return ask


@pytest.fixture
def launch(forked, settings_of):
    """Train on two processes under an engine; returns (exit codes, output). The first under DeepSpeed waits for a compiler."""

    def run_engine(name, line, before="", **variables):
        return forked.run(line, processes=2, timeout=700, before=before, **(settings_of(name) | variables))

    return run_engine


def result_of(folder):
    """The shipped weights of a run."""
    lora = folder / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else folder / "transformer/diffusion_pytorch_model.safetensors")


def losses_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("eval_train_loss")) for line in lines if "motion" not in line]  # of steps and scores, not of videos


def worst_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model, six_clips, encodings):
    """training type -> folder of a run on one process, with batches of two."""
    from accelerate.state import AcceleratorState, GradientState

    folders = {}
    for kind in ("lora", "sft", "other seed"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        folders[kind] = tmp_path_factory.mktemp("alone") / "run"
        flags = {"training_type": kind if kind != "other seed" else "lora", "seed": 43 if kind == "other seed" else 42}
        flags |= {"train_batch_size": 2, "eval_clips": 2, "learning_rate": LEARNING_RATE[flags["training_type"]]} | TWO_STEPS_AND_TWO
        script.main(script.parse_args(words(tiny_model, six_clips, folders[kind], encodings, **flags)))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folders


def unfinished(folder, target):
    """A copy of a run as it was after its second step."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "checkpoint-4")
    return target


@pytest.mark.numeric
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), pytest.param("sft", marks=pytest.mark.long)])
def test_two_processes_of_fsdp2_train_an_image_to_video_model_with_learned_positions_as_one_does(
    kind, image_model, six_clips, tmp_path, encodings, train, launch
):
    flags = {"max_train_steps": 2, "training_type": kind, "learning_rate": LEARNING_RATE[kind], "eval_clips": 2} | STEADY_ADAM
    one = train(model=image_model, train_batch_size=2, **flags)
    line = words(image_model, six_clips, tmp_path / "two", encodings, validation_prompt="a rabbit:::a bird", **flags)
    # What `accelerate config` proposes; accelerate then takes the table of positions for a shard.
    codes, output = launch("fsdp2", line, FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    assert codes == [0, 0], output[-3000:]
    assert "fsdp_cpu_ram_efficient_loading is switched off" in output
    assert "PASS" in output
    assert worst_difference(result_of(tmp_path / "two"), result_of(one)) < 1e-4
    if kind == "sft":
        table = "patch_embed.pos_embedding"  # a buffer, which no step changes and the base's file has
        base = load_file(image_model / "transformer/diffusion_pytorch_model.safetensors")
        assert torch.equal(result_of(tmp_path / "two")[table], base[table])
        assert worst_difference(result_of(one), base) > 1e-3  # it does move
    assert len(list((tmp_path / "two/validation/step-000002").glob("*.mp4"))) == 2


@pytest.mark.numeric
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "kind"), engines_and_kinds({("ddp", "sft"), ("fsdp2", "lora"), ("zero2", "lora"), ("zero3", "sft")}))
def test_two_processes_train_what_one_does_and_one_goes_on_from_theirs(name, kind, tiny_model, six_clips, tmp_path, alone, train, launch):
    flags = TWO_STEPS_AND_TWO | {"training_type": kind, "learning_rate": LEARNING_RATE[kind], "eval_clips": 2}
    flags |= {"validation_prompt": "a rabbit:::a bird:::a frog"}
    codes, output = launch(name, words(tiny_model, six_clips, tmp_path / "two", tmp_path / "cache", **flags))
    assert codes == [0, 0], output[-3000:]
    assert "process 1 of 2" in output
    assert f"engine: {NAMES[name]}\n" in output
    assert "PASS" in output
    two, one = result_of(tmp_path / "two"), result_of(alone[kind])
    assert worst_difference(two, one) < 1e-4
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(alone[kind]), rel=1e-4)
    assert worst_difference(one, result_of(alone[kind] / "checkpoint-2")) > 1e-3  # it does move
    if kind == "lora":
        assert worst_difference(two, result_of(alone["other seed"])) > 1e-3
    assert len(list((tmp_path / "two/validation/step-000004").glob("*.mp4"))) == 3
    # Ranks made different numbers of videos; now one process resumes what two have saved.
    begun = unfinished(tmp_path / "two", tmp_path / "begun")
    train(output=begun, resume_from_checkpoint="latest", train_batch_size=2, **flags)
    assert worst_difference(result_of(begun), one) < 1e-4
    assert losses_of(begun) == pytest.approx(losses_of(alone[kind]), rel=1e-4)


@pytest.mark.numeric
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "kind"), engines_and_kinds({("fsdp2", "sft"), ("zero2", "sft"), ("zero3", "lora")})[2:])
def test_two_processes_go_on_from_what_one_has_saved(name, kind, tiny_model, six_clips, tmp_path, alone, encodings, launch):
    begun = unfinished(alone[kind], tmp_path / "begun")
    flags = TWO_STEPS_AND_TWO | {"training_type": kind, "learning_rate": LEARNING_RATE[kind], "eval_clips": 2}
    line = words(tiny_model, six_clips, begun, encodings, resume_from_checkpoint="latest", **flags)
    codes, output = launch(name, line)
    assert codes == [0, 0], output[-3000:]
    assert "resuming from" in output
    assert f"engine: {NAMES[name]}\n" in output
    assert worst_difference(result_of(begun), result_of(alone[kind])) < 1e-4
    assert losses_of(begun) == pytest.approx(losses_of(alone[kind]), rel=1e-4)


# Tells of each transformer that is read from disk before training has ended, and compares each full copy with one that is.
COPIES = """
import contextlib
import torch
import cogvideox.engine as engine
from diffusers import CogVideoXTransformer3DModel
load, whole_model = CogVideoXTransformer3DModel.from_pretrained, engine.whole_model

def told(folder, **settings):
    if 'checkpoint' not in str(folder) and 'rehearsal' not in str(folder):
        print(f'process {rank} reads a transformer', flush=True)
    return load(folder, **settings)

@contextlib.contextmanager
def compared(accelerator, transformer, build, dtype):
    with whole_model(accelerator, transformer, build, dtype) as copy:
        CogVideoXTransformer3DModel.from_pretrained = load
        reference, trained = build(device='cpu'), dict(transformer.named_parameters())
        CogVideoXTransformer3DModel.from_pretrained = told
        stored = dict([*engine.cast(reference, dtype).named_parameters(), *reference.named_buffers()])
        same = {name: torch.equal(value, stored[name]) for name, value in [*copy.named_parameters(), *copy.named_buffers()]}
        frozen = [value for name, value in same.items() if name not in trained or not trained[name].requires_grad]
        moved = [not value for name, value in same.items() if name in trained and trained[name].requires_grad]
        print(f'process {rank}: frozen {all(frozen)}, moved {any(moved)}, {len(frozen)} and {len(moved)}', flush=True)
        yield copy

CogVideoXTransformer3DModel.from_pretrained, engine.whole_model = told, compared
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["fsdp2", pytest.param("zero3", marks=needs_compiler)])
def test_the_copies_of_a_sharded_model_come_from_its_shards_and_each_process_reads_the_base_once(
    name, tiny_model, six_clips, tmp_path, encodings, launch
):
    flags = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_prompt": "a rabbit", "validation_steps": 1, "eval_clips": 2}
    line = words(tiny_model, six_clips, tmp_path / "run", encodings, **flags)
    codes, output = launch(name, line, before=COPIES)
    assert codes == [0, 0], output[-3000:]
    for rank in (0, 1):
        assert output.count(f"process {rank} reads a transformer") == 1
        copies = re.findall(f"process {rank}: frozen (.*), moved (.*), (\\d+) and 16", output)
        assert len(copies) > 2
        assert {frozen for frozen, _, count in copies if int(count) > 50} == {"True"}
        assert copies[-1][1] == "True"  # the last one is of the trained weights


@pytest.mark.numeric
@pytest.mark.slow
@needs_bf16_attention
def test_fsdp2_in_bf16_with_accumulation_checkpointing_and_an_average(tiny_model, six_clips, tmp_path, encodings, train, launch):
    flags = {"training_type": "sft", "learning_rate": 1e-3, "mixed_precision": "bf16", "gradient_checkpointing": "attention"}
    flags |= {"max_train_steps": 3, "ema_decay": 0.9, "eval_clips": 2}
    codes, output = launch("fsdp2", words(tiny_model, six_clips, tmp_path / "two", encodings, **flags, gradient_accumulation_steps=2))
    assert codes == [0, 0], output[-3000:]
    one = train(**flags, train_batch_size=4)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), rel=2e-3)
    assert worst_difference(result_of(tmp_path / "two"), result_of(one)) < 1e-2


@pytest.mark.slow
def test_a_signal_to_one_process_of_fsdp2_saves_what_one_process_goes_on_from(
    forked, settings_of, tiny_model, six_clips, tmp_path, encodings, train
):
    flags = {"training_type": "sft", "learning_rate": 1e-3, "max_train_steps": 400, "checkpointing_steps": 400}
    line = words(tiny_model, six_clips, tmp_path / "out", encodings, **flags)
    two = forked.start(line, processes=2, **settings_of("fsdp2"))
    metrics, deadline = tmp_path / "out/metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    two[1].send_signal(signal.SIGTERM)
    assert [process.wait(100) for process in two] == [128 + signal.SIGTERM] * 2, two[0].output()[-2000:]
    assert "engine: FSDP2" in two[0].output()
    assert json.loads((tmp_path / "out/status.json").read_text())["code"] == 128 + signal.SIGTERM
    stopped = checkpoint.list_checkpoints(tmp_path / "out")[-1][0]
    assert 3 <= stopped < 400
    train(output=tmp_path / "out", resume_from_checkpoint="latest", train_batch_size=2, **flags | {"max_train_steps": stopped + 1})
    assert len(losses_of(tmp_path / "out")) == stopped + 1


@pytest.mark.slow
@needs_compiler
def test_a_gradient_that_is_not_finite_ends_a_run_under_deepspeed_at_once(tiny_model, six_clips, tmp_path, encodings, launch):
    flags = {"learning_rate": 1e30, "max_train_steps": 6, "checkpointing_steps": 1, "max_grad_norm": 0}
    line = words(tiny_model, six_clips, tmp_path / "out", encodings, **flags)
    codes, output = launch("zero2", line)
    assert codes == [5, 5], output[-2000:]
    assert "ERROR[5]: 1 step had a non-finite gradient" in output or "were not finite" in output, output[-2000:]
    assert "Traceback" not in output.split("ERROR[5]")[0]


# -----------------------------------------------------------------------------
# Full fine-tuning on one process


def test_full_fine_tuning_moves_every_weight_and_ships_a_folder_that_diffusers_loads(train, tiny_model):
    before = CogVideoXTransformer3DModel.from_pretrained(tiny_model / "transformer").state_dict()
    output = train(training_type="sft", learning_rate=1e-3, ema_decay=0.0)
    after = CogVideoXTransformer3DModel.from_pretrained(output / "transformer").state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert not (output / "pytorch_lora_weights.safetensors").exists()
    card = (output / "README.md").read_text()
    assert "transformer=" in card
    assert "load_lora_weights" not in card


@pytest.mark.slow
def test_the_shipped_transformer_makes_the_live_models_video(train, tiny_model, tmp_path):
    output = train(training_type="sft", learning_rate=1e-2, validation_prompt="a rabbit", max_train_steps=4)
    made = read_video(next((output / "validation/step-000004").glob("*.mp4")))
    for transformer, is_same in ((output / "transformer", True), (tiny_model / "transformer", False)):
        pipeline = CogVideoXPipeline.from_pretrained(tiny_model, transformer=CogVideoXTransformer3DModel.from_pretrained(transformer))
        settings = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 6.0}
        frames = pipeline("a rabbit", generator=torch.Generator().manual_seed(42), output_type="np", **settings).frames[0]
        write_video(tmp_path / "again.mp4", [(frame * 255).round().astype(np.uint8) for frame in frames], 8)
        difference = np.abs(read_video(tmp_path / "again.mp4").astype(int) - made).mean()
        assert bool(difference < 1) is is_same, difference


@pytest.mark.numeric
@pytest.mark.slow
def test_full_fine_tuning_resumes_bit_for_bit_and_another_seed_does_not(train):
    flags = {"training_type": "sft", "learning_rate": 1e-3, "checkpointing_steps": 2, "max_train_steps": 4, "ema_decay": 0.9}
    whole, other = train(**flags), train(**flags, seed=7)
    begun = unfinished(whole, whole.parent / "begun")
    train(output=begun, resume_from_checkpoint="latest", **flags)
    assert worst_difference(result_of(begun), result_of(whole)) == 0
    for name in ("weights.safetensors", "optimizer.safetensors"):
        files = [load_file(folder / "checkpoint-4" / name) for folder in (whole, begun)]
        assert worst_difference(*files) == 0
    assert worst_difference(result_of(other), result_of(whole)) > 1e-4


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "sft"])
def test_an_average_is_what_is_shipped_and_training_does_not_feel_it(kind, train):
    flags = {"training_type": kind, "learning_rate": 1e-2, "max_train_steps": 4, "checkpointing_steps": 1}
    flags |= {"validation_prompt": "a rabbit", "validation_steps": 2}
    plain, averaged = train(**flags), train(**flags, ema_decay=0.9)
    assert losses_of(plain) == losses_of(averaged)
    live = checkpoint.RESULTS[kind].WEIGHTS
    assert worst_difference(*(load_file(folder / "checkpoint-4" / live) for folder in (plain, averaged))) == 0
    assert worst_difference(result_of(plain), result_of(averaged)) > 1e-4
    # diffusers' EMAModel: a decay of (1 + n) / (10 + n) while that is below the one asked for, after a first copy.
    trained = [load_file(plain / f"checkpoint-{step}" / live) for step in (1, 2, 3, 4)]
    expected = trained[0]
    for number, weights in enumerate(trained[1:], start=1):
        decay = min(0.9, (1 + number) / (10 + number))
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
    shipped = result_of(averaged)
    for name, tensor in expected.items():
        torch.testing.assert_close(shipped.get(name, shipped.get(f"transformer.{name}")), tensor, rtol=1e-4, atol=1e-6)


def test_an_average_stands_in_for_a_sharded_weight_and_leaves_its_bits(tmp_path):
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = torch.nn.Parameter(distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)]))
        average = engine.make_average([weight], 0.5)
        for _ in range(2):
            engine.write_weight(weight, torch.randn(6, 4))
            average.step([weight])
        live, mean = engine.whole(weight.detach()).clone(), engine.whole(average.shadow_params[0]).clone()
        assert not torch.equal(live, mean)
        with engine.averaged(average, [weight]):
            assert torch.equal(engine.read_weight(weight), mean)
        assert torch.equal(engine.read_weight(weight), live)
        assert isinstance(weight, DTensor)
        assert weight.requires_grad
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("keep", [True, False])
def test_a_rank_that_keeps_nothing_gathers_every_optimizer_state_all_the_same(keep, monkeypatch):
    trained, gathered = make_trained(), []
    train_one_step(trained)
    monkeypatch.setattr(engine, "whole", lambda tensor: gathered.append(tensor) or tensor)
    state = engine.optimizer_state(trained.optimizer, trained.parameters, keep)
    assert len(gathered) == len(trained.optimizer.state[trained.parameters[0]])
    assert (state is not None) is keep
    if keep:
        assert all(torch.is_tensor(value) for value in state["state"][0].values())
        assert all(torch.equal(value, trained.optimizer.state[trained.parameters[0]][name]) for name, value in state["state"][0].items())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"optimizer": "prodigy"}, "--optimizer prodigy: unsupported with FSDP2"),
        ({"base_precision": "int8"}, "--base_precision: unsupported with FSDP2"),
        ({"offload": True}, "--offload: unsupported with FSDP2; offload in the engine's config file"),
        pytest.param({"compile": True}, "--compile: unsupported with FSDP2", marks=compiles),
    ],
)
def test_flags_that_an_engine_cannot_serve_are_refused(flags, sentence, tiny_model, six_clips, tmp_path, encodings):
    args = script.parse_args(words(tiny_model, six_clips, tmp_path, encodings, mixed_precision="no", **flags))
    problems = engine.unfit_flags(args, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert [problem for problem in problems if problem.startswith(sentence)]
    assert engine.unfit_flags(args, {}) == []


def test_what_the_config_file_asks_for_is_refused_where_it_is_not_supported(tiny_model, six_clips, tmp_path, encodings):
    args = script.parse_args(words(tiny_model, six_clips, tmp_path, encodings, mixed_precision="no", ema_decay=0.9))
    assert "FSDP 1" in engine.unfit_flags(args, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})[0]
    twice = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    assert "fsdp_activation_checkpointing" in engine.unfit_flags(args, twice)[0]
    assert "--ema_decay 0.9: unsupported with DeepSpeed" in engine.unfit_flags(args, {"ACCELERATE_USE_DEEPSPEED": "true"})[0]


STEPS, DEEPSPEED = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", {"ACCELERATE_USE_DEEPSPEED": "true"}
CONTRADICTIONS = [  # flags, the launcher's environment, DeepSpeed's own file or None, how the sentence begins
    ({"gradient_accumulation_steps": 4}, {STEPS: "1"}, None, f"--gradient_accumulation_steps 4: the launcher ({STEPS}) has 1;"),
    ({}, {STEPS: "4"}, None, f"--gradient_accumulation_steps 1: the launcher ({STEPS}) has 4;"),
    ({}, {STEPS: "four"}, None, f"--gradient_accumulation_steps 1: the launcher ({STEPS}) has four;"),
    ({"gradient_accumulation_steps": 4}, DEEPSPEED | {STEPS: "1"}, None, f"--gradient_accumulation_steps 4: the launcher ({STEPS}) has 1;"),
    ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, None, "the launcher (ACCELERATE_USE_PARALLELISM_CONFIG): this trainer has DDP"),
    ({}, DEEPSPEED, {"gradient_accumulation_steps": 4}, "--gradient_accumulation_steps 1: gradient_accumulation_steps of FILE has 4;"),
    (
        {},
        DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
        None,
        "--max_grad_norm 1: the launcher (ACCELERATE_GRADIENT_CLIPPING) has 0.5;",
    ),
    ({}, DEEPSPEED, {"gradient_clipping": 0.5}, "--max_grad_norm 1: gradient_clipping of FILE has 0.5;"),
    ({}, DEEPSPEED, {"train_micro_batch_size_per_gpu": 2}, "--train_batch_size 1: train_micro_batch_size_per_gpu of FILE has 2;"),
    (
        {"train_batch_size": 3, "gradient_accumulation_steps": 2},
        DEEPSPEED | {"WORLD_SIZE": "2"},
        {"train_batch_size": 6},
        "--train_batch_size x --gradient_accumulation_steps x processes is 12: train_batch_size of FILE is 6;",
    ),
    ({"mixed_precision": "no"}, DEEPSPEED, {"bf16": {"enabled": True}}, "--mixed_precision no: FILE has bf16.enabled true;"),
    ({"mixed_precision": "no"}, DEEPSPEED, {"fp16": {"enabled": True}}, "--mixed_precision no: FILE has fp16.enabled true;"),
    ({"mixed_precision": "bf16"}, DEEPSPEED, {"bf16": {"enabled": False}}, "--mixed_precision bf16: FILE has bf16.enabled false;"),
    ({"mixed_precision": "bf16"}, DEEPSPEED, {"bf16": {}}, "--mixed_precision bf16: FILE has bf16.enabled false;"),
    ({}, DEEPSPEED, {"optimizer": {"type": "Adam"}}, "FILE: has a block 'optimizer';"),
    ({}, DEEPSPEED, {"zero_optimization": {"stage": 0}}, "FILE: selects a DeepSpeed stage other than 1, 2 and 3"),
    ({}, DEEPSPEED, "not JSON", "FILE: cannot be read as DeepSpeed's settings"),
    ({}, DEEPSPEED | {"ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,x"}, {}, "FILE: remove zero_stage from accelerate's own config file"),
]


@pytest.mark.parametrize(("flags", "told", "own", "sentence"), CONTRADICTIONS, ids=[case[-1] for case in CONTRADICTIONS])
def test_another_value_than_a_flags_in_the_launchers_settings_is_refused_with_both(flags, told, own, sentence, tmp_path):
    args, file = script.parse_args(words("m", "d", "o", "c", **({"mixed_precision": "no"} | flags))), tmp_path / "deepspeed.json"
    if own is not None:
        content = {"zero_optimization": {"stage": 2}} | own if isinstance(own, dict) else own
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        told = told | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    [problem] = engine.contradicted_flags(args, told)
    assert problem.replace(f"deepspeed_config_file {file}", "FILE").startswith(sentence)


def test_the_same_values_in_the_launchers_settings_are_taken(tmp_path):
    flags = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "train_batch_size": 3, "mixed_precision": "bf16"}
    args, file = script.parse_args(words("m", "d", "o", "c", **flags)), tmp_path / "deepspeed.json"
    told = DEEPSPEED | {STEPS: "2", "ACCELERATE_GRADIENT_CLIPPING": "0.5", "WORLD_SIZE": "2"}
    assert engine.contradicted_flags(args, told) == engine.contradicted_flags(args, DEEPSPEED | {STEPS: "auto"}) == []
    equal = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 3, "train_batch_size": 12}
    equal |= {"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}
    for own in (equal, dict.fromkeys(equal, "auto") | {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, {}):
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | own))
        assert engine.contradicted_flags(args, told | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}) == []


@pytest.mark.slow
@pytest.mark.parametrize("engine_settings", [{}, DEEPSPEED], ids=["DDP", "DeepSpeed"])
def test_two_accumulation_counts_end_the_run_before_any_encoding(forked, tiny_model, six_clips, tmp_path, engine_settings):
    line = words(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache", gradient_accumulation_steps=2, mixed_precision="no")
    codes, output = forked.run(line, processes=2, **engine_settings | {STEPS: 1})
    assert codes == [2, 2]
    assert f"--gradient_accumulation_steps 2: the launcher ({STEPS}) has 1" in output
    assert not (tmp_path / "cache/clips").exists()


@pytest.mark.slow
@needs_compiler
def test_deepspeed_takes_the_flags_count_and_clipping_where_its_file_has_none(
    tiny_model, six_clips, tmp_path, encodings, forked, settings_of
):
    """accelerate puts a count of 1 into a file without one."""
    flags = {"mixed_precision": "no", "max_train_steps": 3, "max_grad_norm": 0.01, **STEADY_ADAM}
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    told = settings_of("zero2") | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": tmp_path / "deepspeed.json"}
    told["ACCELERATE_CONFIG_DS_FIELDS"] = ""  # those that the yaml file has beside it
    results = {}
    for name, settings in (("ddp", {}), ("zero2", told)):
        for count in (2, 1):
            line = words(tiny_model, six_clips, tmp_path / f"{name}-{count}", encodings, **flags, gradient_accumulation_steps=count)
            codes, output = forked.run(line, processes=2, timeout=700, **settings)
            assert codes == [0, 0], output[-3000:]
            results[name, count] = result_of(tmp_path / f"{name}-{count}")
    assert worst_difference(results["ddp", 2], results["zero2", 2]) < STEADY_BOUND
    assert worst_difference(results["ddp", 1], results["zero2", 2]) > 10 * STEADY_BOUND


@pytest.mark.parametrize("flags", [{"lora_dropout": 0.1}, {"offload": True}, {"base_precision": "int8"}, {"init_lora": "x"}])
def test_flags_of_a_lora_are_refused_with_full_fine_tuning(flags, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(words("m", "d", "o", "c", training_type="sft", **flags))
    assert f"--{next(iter(flags))}: unsupported with --training_type sft" in capsys.readouterr().err


def test_a_lora_run_is_not_resumed_as_full_fine_tuning(train, capfd):
    output = train(max_train_steps=1)
    with pytest.raises(SystemExit):
        train(output=output, training_type="sft", resume_from_checkpoint="latest", max_train_steps=2)
    assert "--training_type was 'lora' and is 'sft'" in capfd.readouterr().err
