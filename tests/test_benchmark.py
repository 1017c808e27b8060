"""The benchmark measures what it says: FLOPs by hand, the baseline's loss against ours, every table. No timing is asserted."""

import functools
import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from cogvideox import lora
from demo.make_model import make_scheduler
from tools.benchmark import __main__ as command
from tools.benchmark import counters, harness, measurements, models, programs, reference, variants
from tools.benchmark.sizes import tokens_of
from train_cogvideox_lora import velocity_loss

SHAPE = [9, 64, 96]
STEP = {
    "job": "step",
    "size": "tiny",
    "precision": "no",
    "gradient_checkpointing": "none",
    "steps": 1,
    "warmup": 1,
    "clock": "wall",
    "rank": 4,
}


def in_this_process(job, threads):
    """As `run_worker`, without a process; what is passed and returned goes through JSON as there."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    job = json.loads(json.dumps(job))
    return json.loads(json.dumps(variants.JOBS[job["job"]](job)))


quick_peak = functools.partial(counters.matmul_peak, tries=1, budget=0)


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """Run a subcommand; returns the rows of its printed tables as lists of cells, and its JSON."""

    def run(*words, workers=in_this_process):
        if workers:
            monkeypatch.setattr(harness, "run_worker", workers)
            monkeypatch.setattr(variants, "matmul_peak", quick_peak)
        command.main([*words, "--repeats", "1", "--json", str(tmp_path / "out.json")])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [line.strip("| ").split(" | ") for line in lines], json.loads((tmp_path / "out.json").read_text())

    return run


def batch_of(seed):
    """Latents, noise, timesteps and prompts of two clips, at timesteps where neither form of the loss cancels digits."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 2, 3, 16, 8, 12, generator=generator)
    prompt = torch.randn(2, 226, 32, generator=generator)
    return {"latents": latents, "noise": noise, "timestep": torch.tensor([300, 900]), "prompt": prompt, "image": latents[:, :, :0]}


@pytest.mark.numeric
def test_the_baselines_loss_is_ours():
    transformer, scheduler = models.make_transformer("tiny", torch.float32), make_scheduler()
    for parameter in lora.add_lora(transformer, 4, 4, 0.0, reference.TARGETS, seed=0):
        torch.nn.init.normal_(parameter, std=0.1)

    def both(batch):
        ours = velocity_loss(transformer, scheduler, batch, {}, torch.float32).mean().item()
        names = "latents", "noise", "timestep", "prompt"
        return ours, reference.weighted_x0_loss(transformer, scheduler, *(batch[name] for name in names)).item()

    (ours, theirs), (others, _) = both(batch_of(0)), both(batch_of(1))
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert abs(others - ours) > 1e-3 * ours


@pytest.mark.numeric
@pytest.mark.parametrize("variant", ["ours", "ours, plain linears"])
def test_flops_are_those_counted_by_hand(variant, tmp_path):
    step, _ = variants.our_step(STEP | {"shape": SHAPE, "variant": variant}, tmp_path)
    counted = counters.count_flops(step)

    layers, width, rank, text = 2, 64, 4, 226
    video = 3 * 4 * 6  # latent frames x patches
    tokens = text + video
    assert tokens == tokens_of(SHAPE)
    frozen = 2 * tokens * 12 * width**2  # q, k, v, out: one square each; the feed-forward: two of four
    adapters = 4 * 2 * 2 * tokens * width * rank
    attention = 2 * 2 * tokens**2 * width
    # Backward: frozen layers have no gradient of their weights, adapters have; attention makes five products of two.
    blocks = layers * (2 * frozen + 3 * adapters + 3.5 * attention)
    # What enters the first block needs no gradient, so its q, k and v pass none on.
    blocks -= 3 * 2 * tokens * width * (width + rank)
    ends = 2 * width * (text * 32 + video * 64 + 2 * video * 64)
    assert counted == pytest.approx(blocks + ends, rel=0.03)


def test_attention_is_counted():
    """Without the mapping torch counts none of it on a CPU."""
    query = torch.randn(1, 2, 50, 32, requires_grad=True)

    def attend():
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()

    assert counters.count_flops(attend) == 3.5 * (2 * 2 * 2 * 50 * 50 * 32)


def test_random_models_are_tied_finite_and_frozen():
    model = models.make_text_encoder("tiny", torch.bfloat16)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert all(not p.requires_grad and p.device.type == "cpu" and torch.isfinite(p).all() for p in model.parameters())
    output = model(torch.arange(10)[None])[0]
    assert torch.isfinite(output).all()
    assert output.float().std() > 0.1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["step", "--shape", "9x96"], "FRAMESxHEIGHTxWIDTH"),
        (["step", "--shape", "8x96x96"], "4k + 1"),
        (["step", "--repeats", "0"], "at least 1"),
        (["growth", "--frames", "8"], "4k + 1"),
        (["growth", "--sides", "100"], "multiples of 16"),
        (["start", "--model", "/no/such/folder"], "no such folder"),
        (["decode", "--json", "/no/such/folder/out.json"], "is not there"),
        (["decode", "--shape", "9x64x48"], "decord"),
        (["walk"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert sentence in message
    assert len(message.strip().splitlines()) == 1


@pytest.mark.slow
def test_step_prints_its_table(report):
    rows, written = report("step", "--size", "tiny", "--precision", "bf16", "--shape", "9x32x48", "--steps", "2", "--plain_linears")
    assert rows[0] == "shape tokens variant seconds least most ratio,useful GFLOP,GFLOP/s,peak GFLOP/s,of peak,others".replace(
        " ", ",", 6
    ).split(",")
    assert [row[2] for row in rows[2:]] == ["reference", "ours", "ours, plain linears"]
    assert rows[2][6] == "1.0"
    assert [row["variant"] for row in written["rows"]] == [row[2] for row in rows[2:]]
    assert all(len(sample["seconds"]) == 2 and sample["matmul_peak"] > 0 for sample in written["samples"])
    ours, plain = [sample for sample in written["samples"] if sample["flops"]]
    assert ours["flops"] == plain["flops"]
    assert written["machine"]


@pytest.mark.numeric
def test_checkpointed_steps_count_no_recomputation(report):
    words = "step", "--size", "tiny", "--precision", "no", "--shape", "9x32x48", "--steps", "1", "--gradient_checkpointing"
    (_, none), (_, every) = report(*words, "none"), report(*words, "all")
    assert none["rows"][0]["useful_GFLOP"] == every["rows"][0]["useful_GFLOP"] > 0
    assert none["samples"][1]["flops"] == every["samples"][1]["flops"]
    assert none["samples"][1]["losses"] == pytest.approx(every["samples"][1]["losses"], rel=1e-4)


def test_an_exponent_is_fitted_and_a_point_off_the_curve_is_told():
    values = [2, 3, 7]
    assert harness.fit_exponent(values, [5 * value**1.7 for value in values]) == pytest.approx((1.7, 0), abs=1e-9)
    exponent, off = harness.fit_exponent([1, 2, 4], [1, 2, 8])
    assert exponent == pytest.approx(1.5)
    assert 0.1 < off < 0.3


@pytest.mark.slow
def test_growth_changes_one_quantity_at_a_time(report):
    words = "--shape", "9x32x32", "--frames", "9", "17", "--sides", "32", "64", "--ranks", "4", "8", "--batches", "1", "3"
    rows, written = report("growth", "--size", "tiny", "--precision", "no", "--steps", "1", *words)
    assert rows[0] == ["axis", "value", "tokens", "seconds", "useful GFLOP", "others"]
    assert rows[10] == ["axis", "seconds by value", "worst point", "seconds by tokens", "GFLOP by value"]
    assert [(row["axis"], row["value"], row["tokens"] - 226) for row in written["rows"]] == [
        *(("frames", 9, 12), ("frames", 17, 20), ("height = width", 32, 12), ("height = width", 64, 48)),
        *(("rank", 4, 12), ("rank", 8, 12), ("batch", 1, 12), ("batch", 3, 12)),
    ]
    base, *others = written["samples"]  # the base point is measured once
    assert (base["shape"], base["rank"], base["batch"]) == ([9, 32, 32], 4, 1)
    assert [[name for name in ("shape", "rank", "batch") if other[name] != base[name]] for other in others] == [
        ["shape"],
        ["shape"],
        ["rank"],
        ["batch"],
    ]
    assert all(other["flops"] > base["flops"] for other in others)
    assert others[-1]["flops"] == 3 * base["flops"]
    assert [fit["axis"] for fit in written["fits"] if fit["seconds_by_tokens"]] == ["frames", "height = width"]
    assert written["fits"][-1]["GFLOP_by_value"] == 1


def test_encode_prints_its_table(report):
    words = "--source", "17x96x160", "--clips", "1", "--steps", "1"
    rows, written = report("encode", "--size", "tiny", "--precision", "no", "--shape", "9x32x96", *words)
    assert rows[0] == ["part", "clips a second", "GFLOP a clip", "limit", "of limit", "others"]
    assert [row[0] for row in rows[2:]] == ["decode (1 process)", "VAE encode", "T5"]
    assert all(row["clips_a_second"] > 0 for row in written["rows"])
    assert all(sample["flops"] > 0 for sample in written["samples"] if sample["job"] == "encode")


@pytest.mark.slow
def test_decode_prints_its_table(report):
    words = "--source", "17x96x160", "--clips", "2", "--steps", "1"
    rows, written = report("decode", "--shape", "9x64x96", *words)
    assert rows[0] == ["variant", "clips a second", "ratio", "mib a clip", "others"]
    assert [row[0] for row in rows[2:]] == ["full size", "reference", "ours", "ours, in reader processes", "decoder alone"]
    taken = {sample["variant"]: sample["bytes"] for sample in written["samples"]}
    assert taken["ours"] == taken["ours, in reader processes"] == 9 * 64 * 96 * 3
    assert taken["reference"] == taken["full size"] == 4 * taken["ours"]


def seen_from_outside(monkeypatch):
    """Replace runs of whole programs; returns the list of their command lines."""
    lines = []

    def run(line, output, threads):
        lines.append(line)
        theirs = "tools.benchmark.reference" in line
        seconds, peak, helpers = (40.0, 4000.0, 0.0) if theirs else (8.0, 1500.0, 100.0)
        return {"seconds_to_first_step": seconds, "wall_seconds": 50.0, "peak_mib": peak, "helpers_mib": helpers, "others": 0.2}

    monkeypatch.setattr(programs, "run_program", run)
    return lines


def test_memory_compares_runs_and_sizes(report, monkeypatch, tiny_model):
    lines = seen_from_outside(monkeypatch)
    rows, written = report("memory", "--model", str(tiny_model), "--clips", "2", "3", "--precision", "bf16")
    assert rows[0] == ["variant", "clips", "peak mib", "helpers mib", "share", "share with helpers", "seconds", "others"]
    assert rows[3] == ["ours", "2", "1500", "100", "38 %", "40 %", "50.0", "20 % (disturbed)"]
    assert rows[4] == ["processes", "clips", "peak mib of a process", "ratio", "others"]
    assert [(row["processes"], row["clips"]) for row in written["growth"]] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    for line in lines[:2]:
        assert line[line.index("--mixed_precision") + 1] == "bf16"
        assert line[line.index("--num_inference_steps") + 1] == "2"
    assert "torch.distributed.run" in lines[-1]
    assert "--gradient_checkpointing" not in lines[0]


def test_start_reuses_the_cache_of_its_turn_only(monkeypatch, capsys, tiny_model):
    lines = seen_from_outside(monkeypatch)
    command.main(["start", "--model", str(tiny_model), "--clips", "2", "--repeats", "2"])
    caches = [line[line.index("--encoding_cache_dir") + 1] for line in lines if "--encoding_cache_dir" in line]
    assert len(lines) == 6
    assert caches[0] == caches[1] != caches[2] == caches[3]
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == ["clips", "variant", "seconds to first step", "least", "most", "ratio", "others"]
    assert [row[5] for row in rows[2:]] == ["1.0", "5.0", "5.0"]


@pytest.mark.slow
def test_whole_programs_are_seen_from_outside(tiny_model, tmp_path):
    """The baseline and ours, each to its end, in the smallest run there is."""
    options = command.build_parser().parse_args(["start", "--size", "tiny", "--precision", "no"])
    flags = programs.run_flags(options, SHAPE, 1)
    seen = [
        programs.run_variant(tmp_path, tiny_model, options, flags, {"variant": variant, "clips": 2, "cache": "cache"}, 1)
        for variant in ("reference", "ours")
    ]
    assert all(0 < run["seconds_to_first_step"] < run["wall_seconds"] for run in seen)
    assert all(run["peak_mib"] > 100 for run in seen)
    assert seen[1]["helpers_mib"] > 0  # the readers
    assert list((tmp_path / "cache/clips").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_failing_program_says_why(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        programs.run_program([sys.executable, "-c", "raise SystemExit('no such folder')"], tmp_path, 1)
    assert ended.value.code == 1
    assert "ERROR[1]: a run ended with code 1:\nno such folder" in capsys.readouterr().err


def test_what_a_ring_sends_follows_from_the_payload():
    payload = {"all_reduce": 100, "all_gather": 40, "reduce_scatter": 20, "calls": 3}
    assert measurements.sent_on_a_ring(payload, 1) == 0
    assert measurements.sent_on_a_ring(payload, 4) == pytest.approx(0.75 * (2 * 100 + 40 + 20))


@pytest.mark.slow
def test_scale_counts_one_reduction_of_the_gradients_and_nothing_else(tmp_path):
    flags = ["--size", "tiny", "--processes", "1", "2", "--steps", "1", "--engines", "ddp", "fsdp2", "--json", str(tmp_path / "scale.json")]
    command.main(["scale", *flags])
    found = json.loads((tmp_path / "scale.json").read_text())
    payload = {sample["variant"]: sample["payload"] for sample in found["samples"]}
    rank, width, blocks, targets = 4, 64, 2, 4
    gradients = 4 * blocks * targets * 2 * rank * width
    # Beside the gradients the logged loss and the main process's port probe: a few numbers.
    assert gradients <= payload["ddp x 2"]["all_reduce"] <= gradients + 64
    assert set(payload["ddp x 2"]) <= {"all_reduce", "calls", "broadcast"}
    assert payload["ddp x 2"].get("broadcast", 0) < 1000  # the order of DDP's buckets, once in a run
    assert payload["fsdp2 x 2"]["all_gather"] > gradients  # the weights, which DDP does not send
    assert payload["fsdp2 x 2"]["reduce_scatter"] >= gradients
    held = {sample["variant"]: max(sample["held_mib"]) for sample in found["samples"]}
    assert held["fsdp2 x 2"] < held["ddp x 2"]
    assert len(found["computed"]) == 4
