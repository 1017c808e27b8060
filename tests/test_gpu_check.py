"""The GPU check: every case runs on a CPU with tiny models, a wrong prediction fails, an error in a case does not end the others."""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from cogvideox import model
from tests.conftest import ROOT, words
from tools import estimate
from tools.benchmark import counters, harness, variants
from tools.benchmark.programs import trainer_command
from tools.gpu_check import __main__ as command
from tools.gpu_check import exactness, phases, rows, steps, worker
from tools.gpu_check.cases import CASES

JOB = {"device": "cpu", "size": "tiny", "precision": "no", "threads": 1}
ON_CPU = ["--device", "cpu", "--size", "tiny"]
GIB = 2**30


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """Run the command with its cases in this process; returns (exit code, the JSON, what was printed)."""

    def in_this_process(job, seconds, tick):
        tick(1.0)
        worker.main(json.loads(json.dumps(job)))
        return 0, "the log"

    def run(*flags):
        monkeypatch.setattr(command, "run_worker", in_this_process)
        monkeypatch.setattr(variants, "matmul_peak", functools.partial(counters.matmul_peak, tries=1, budget=0))
        code = 0
        try:
            command.main([*ON_CPU, *flags, "--json", str(tmp_path / "check.json")])
        except SystemExit as ended:
            code = ended.code
        return code, json.loads((tmp_path / "check.json").read_text()), capsys.readouterr().out

    return run


@pytest.fixture
def quick_trainings(monkeypatch, forked):
    """Fork the trainings of the check instead of starting them."""

    def run_trainers(lines, threads, **variables):
        started = [forked.start(line[2:], **variables)[0] for line in lines]
        assert [run.wait(120) for run in started] == [0] * len(lines), started[0].output()[-2000:]

    monkeypatch.setattr(exactness, "run_trainers", run_trainers)


@pytest.fixture
def one_process(monkeypatch):
    """Let one process stand in for two under an engine, with what DDP would have reduced. tests/test_benchmark.py starts real ones.

    DDP alone: the four engines are four times the same here.
    """

    def run_workers(job, threads):
        worker.start_afresh()
        variants.time_scale(job | {"batch": steps.PROCESSES})
        measured = json.loads(Path(job["result"]).read_text())
        return measured | {"payload": {"all_reduce": steps.adapters_bytes(JOB)} if job["processes"] > 1 else {}}

    monkeypatch.setattr(harness, "run_workers", run_workers)
    monkeypatch.setattr(steps, "CONFIGS", {"ddp": steps.CONFIGS["ddp"]})


@pytest.fixture
def quick_compiler(monkeypatch):
    """Compile without generating code, which takes a minute on a CPU."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def rows_of(found, case):
    return [row for row in found["rows"] if row["case"] == case]


def collect(generator):
    """The rows of a case, as a worker writes them."""
    return list(worker.attempt("the claim", generator))


# -----------------------------------------------------------------------------
# The whole check


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_case_measures_something_on_a_cpu(check, quick_trainings, one_process, quick_compiler):
    code, found, printed = check("--minutes", "60")
    failures = [(row["claim"], row["remark"]) for row in found["rows"] if row["verdict"] == "fails"]
    assert (code, failures) == (0, [])
    for case in CASES:
        measured = [row["measured"] for row in rows_of(found, case) if row["measured"] is not None]
        assert measured, case
        assert found["seconds"][case] > 0
    assert {row["verdict"] for row in found["rows"]} == {"passes", "not run", "noted"}
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert table[0] == "| case | claim | predicted | measured | verdict | remark |"
    assert len(table) == 2 + len(found["rows"])
    costs = {row["claim"].split(":")[0]: row for row in rows_of(found, "flags")}
    # The variants are other steps than the plain one: that the losses agree says something.
    assert costs["--gradient_checkpointing all"]["allocated"] < costs["the plain step"]["allocated"]
    assert costs["--base_precision nf4"]["losses"] != costs["the plain step"]["losses"]
    losses = costs["the plain step"]["losses"]
    assert abs(losses[1] / losses[0] - 1) > 5 * steps.ROUNDING
    golden = rows_of(found, "golden")[1]
    assert golden["losses"] != golden["golden"]  # those on record are rounded


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_command_runs_all_cases_in_processes_of_their_own(tmp_path):
    line = [sys.executable, "-m", "tools.gpu_check", *ON_CPU, "--json", str(tmp_path / "check.json")]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "check.json").read_text())
    assert {row["case"] for row in found["rows"] if row["measured"] is not None} == set(CASES)
    assert "ddp" in str(rows_of(found, "engines"))


@pytest.mark.slow
def test_one_case_in_a_process_of_its_own(tmp_path, capsys):
    command.main([*ON_CPU, "--only", "attention", "--json", str(tmp_path / "check.json")])
    found = json.loads((tmp_path / "check.json").read_text())
    assert {row["case"] for row in found["rows"]} == {"attention"}
    assert found["facts"]["card"] == "none"
    pasted = (tmp_path / "check.md").read_text()
    assert pasted.startswith("`python -m tools.gpu_check --device cpu --size tiny --precision no`\n")
    assert f"torch {torch.__version__}" in pasted
    assert "| attention | flash attention, 244 tokens" in pasted


# -----------------------------------------------------------------------------
# Verdicts


@pytest.mark.slow
def test_a_prediction_that_is_ten_times_off_fails_and_the_exit_code_is_1(check, monkeypatch):
    flags_for = estimate.flags_for

    def ten_times(*inputs):
        saving, changed, plan, parts = flags_for(*inputs)
        return saving, changed, plan, parts | {"training": 10 * parts["training"]}

    monkeypatch.setattr(estimate, "flags_for", ten_times)
    code, found, printed = check("--only", "memory")
    assert code == 1
    assert [row["verdict"] for row in found["rows"]] == ["fails", "noted", "passes"]
    assert "| **fails** |" in printed
    assert found["rows"][0]["log"] == "the log"


def test_out_of_memory_in_a_case_is_its_verdict_and_later_cases_run(check, monkeypatch):
    def exhausted(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(phases.variants, "our_run", exhausted)
    code, found, _ = check("--only", "looking", "attention")
    (looking,), attention = rows_of(found, "looking"), rows_of(found, "attention")
    assert code == 1
    assert (looking["verdict"], looking["remark"]) == ("fails", "out of memory: CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert attention[0]["verdict"] == "passes"


@pytest.mark.slow
def test_an_error_under_one_flag_leaves_the_others_their_rows(monkeypatch, tmp_path):
    our_run = variants.our_run

    def broken(job, folder):
        if "--offload" in job.get("flags", ()):
            raise ValueError("no such layer")
        return our_run(job, folder)

    monkeypatch.setattr(variants, "our_run", broken)
    monkeypatch.setattr(steps, "VARIANTS", {name: steps.VARIANTS[name] for name in ("--offload", "--base_precision int8")})
    found = collect(steps.check_flags(JOB | {"folder": str(tmp_path)}))
    assert [row["verdict"] for row in found] == ["noted", "fails", "passes"]
    assert found[1]["remark"] == "ValueError: no such layer"


@pytest.mark.parametrize(("gigabytes", "promised", "verdict"), [(16, False, "not run"), (24, False, "fails"), (16, True, "fails")])
def test_a_small_card_need_not_hold_what_was_not_predicted_to_fit(monkeypatch, gigabytes, promised, verdict):
    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory.")
        yield

    Card(monkeypatch, gigabytes=gigabytes)
    (row,) = worker.attempt("the claim", exhausted(), promised)
    assert row["verdict"] == verdict
    assert "out of memory: CUDA out of memory." in row["remark"]


def test_a_gpu_librarys_failed_allocation_is_out_of_memory():
    assert worker.reason_of(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")).startswith("out of memory")
    assert worker.reason_of(RuntimeError("shapes do not match")) == "RuntimeError: shapes do not match"


@pytest.mark.parametrize(("code", "verdict", "reason"), [(None, "not run", "ended after"), (-9, "fails", "killed"), (3, "fails", "code 3")])
def test_a_process_that_ends_early_leaves_its_rows_and_a_reason(monkeypatch, tmp_path, code, verdict, reason):
    def dying(job, seconds, tick):
        Path(job["result"]).write_text('{"facts": {"card": "X"}}\n{"case": "step", "verdict": "passes"}\n{"case": "st')
        return code, "the log"

    monkeypatch.setattr(command, "run_worker", dying)
    found, facts = command.run_case("step", command.parse_options(ON_CPU), tmp_path, lambda seconds: None)
    assert facts == {"card": "X"}
    assert [row["verdict"] for row in found] == ["passes", verdict]
    assert reason in found[1]["remark"]


@pytest.mark.slow
def test_a_case_that_takes_too_long_is_killed(tmp_path):
    job = JOB | {"case": "attention", "folder": str(tmp_path), "result": str(tmp_path / "rows.jsonl")}
    assert command.run_worker(job, 0.0, lambda seconds: None)[0] is None
    assert not (tmp_path / "rows.jsonl").exists()


STARTS_ANOTHER = """
import json, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(json.loads(sys.argv[1])["result"], "w").write(str(other.pid))
time.sleep(600)
"""


def test_a_case_that_is_ended_leaves_no_process_of_a_launcher(tmp_path, monkeypatch):
    """torchrun gives each process that it starts a session of its own."""
    (tmp_path / "starts_another.py").write_text(STARTS_ANOTHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "starts_another")
    left = []

    def tick(seconds):
        if (told := tmp_path / "pid").exists() and told.read_text():
            left.append(psutil.Process(int(told.read_text())))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.run_worker(JOB | {"case": "attention", "result": str(tmp_path / "pid")}, 600, tick)
    assert psutil.wait_procs(left, timeout=60)[1] == []


def test_no_case_starts_after_the_time(check, monkeypatch):
    clock, do_case = [0.0], worker.main
    monkeypatch.setattr(worker, "main", lambda job: do_case(job) or clock.append(clock[-1] + 61))
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: clock[-1]))
    code, found, _ = check("--only", "attention", "base", "--minutes", "1")
    assert code == 0
    assert list(found["seconds"]) == ["attention"]  # which was started before the time was over
    (base,) = rows_of(found, "base")
    assert base["verdict"] == "not run"
    assert "--only base" in base["remark"]
    assert list(check("--only", "attention", "base", "--minutes", "1.1")[1]["seconds"]) == ["attention", "base"]


def test_agreement_is_a_share_of_what_was_measured():
    assert rows.within(10.9, 10, 0.1)
    assert not rows.within(11.1, 10, 0.1)
    assert not rows.within(1, float("nan"), 0.1)


# -----------------------------------------------------------------------------
# The command line


def test_without_a_gpu_one_sentence_says_how_to_run_it(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        command.main([])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert "finds no GPU here" in lines[0]
    assert lines[0].endswith("python -m tools.gpu_check --device cpu --size tiny")


def test_help_names_every_case_and_its_claim(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for name, (_, _, _, claim) in CASES.items():
        assert f"{name:10} {claim}" in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["--minutes", "0"], "--minutes 0: must be above 0"), (["--json", "/no/such/x.json"], "its folder is not there")],
)
def test_a_mistake_is_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(flags)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_sizes_follow_the_device():
    on_gpu, on_cpu = command.parse_options([]), command.parse_options(["--device", "cpu"])
    assert (on_gpu.size, on_gpu.precision) == ("2b", "bf16")
    assert (on_cpu.size, on_cpu.precision) == ("tiny", "no")


# -----------------------------------------------------------------------------
# What is compared


def test_the_golden_run_is_the_one_on_record():
    def pairs(line):
        return set(zip(line[::2], map(str, line[1::2]), strict=True))

    ours = trainer_command("model", "clips", "out", "cache", 1, exactness.GOLDEN_RUN)[2:]
    assert pairs(ours) == pairs(words("model", "clips", "out", "cache", max_train_steps=10))


def test_rows_of_attention_are_exact_and_a_wrong_one_is_seen():
    inputs = exactness.attention_inputs(JOB)
    exact, result = exactness.exact_rows(*inputs), exactness.attention.attend("flash", *inputs)
    assert exactness.error_of(result, exact) < 1e-5
    wrong = exactness.attention.attend("flash", inputs[0], inputs[1].flip(2), inputs[2], inputs[3])
    assert exactness.error_of(wrong, exact) > 0.1


def test_flops_counted_without_data_are_those_of_a_step(tmp_path):
    job = worker.step_job(JOB)
    run, configs = variants.our_run(job, tmp_path), worker.configs_of(JOB)
    shape = phases.memory.latents_of(configs, *job["shape"])
    assert counters.step_flops(configs, run.args, steps.script.velocity_loss, shape) == counters.count_flops(run.step) > 0


def test_offloaded_bytes_are_the_blocks_linear_layers():
    # Of 2 blocks of width 64 in fp32: to_q, to_k, to_v, to_out of one square each, the feed-forward's two of four.
    assert steps.offloaded_bytes(JOB) == 2 * 12 * 64 * 64 * 4


# -----------------------------------------------------------------------------
# On a GPU, with stand-ins


class Card(SimpleNamespace):
    """torch.cuda's answers for some cards of 24 GB; `fractions` are the limits that were set."""

    def __init__(self, monkeypatch, cards=1, gigabytes=24):
        super().__init__(fractions=[])
        properties = SimpleNamespace(name="NVIDIA Test", total_memory=gigabytes * GIB, major=9, minor=0)
        answers = {
            "is_available": lambda: True,
            "device_count": lambda: cards,
            "get_device_properties": lambda device: properties,
            "set_per_process_memory_fraction": self.fractions.append,
            "empty_cache": lambda: None,
            "synchronize": lambda device=None: None,
            "reset_peak_memory_stats": lambda device=None: None,
            "max_memory_allocated": lambda device=None: 5 * GIB,
            "max_memory_reserved": lambda device=None: 6 * GIB,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)


@pytest.mark.slow
def test_smaller_cards_are_a_share_of_the_card_and_larger_ones_are_not_run(monkeypatch, tmp_path):
    card, measured = Card(monkeypatch), []

    def flags_for(gigabytes, *inputs):
        saving = {"offload": True} if gigabytes == 8 else {}
        return saving, None, (80 // gigabytes, True), {}

    def measure(job, settings, flags, plan, parts, args, phases_too):
        measured.append((flags, plan, phases_too, card.fractions[-1]))
        yield rows.row(settings, 1, 1, "GiB", True)

    monkeypatch.setattr(estimate, "flags_for", flags_for)
    monkeypatch.setattr(phases, "measure_preset", measure)
    monkeypatch.setattr(phases.memory, "phase_parts", lambda *inputs: {})
    found = list(phases.check_memory(JOB | {"device": "cuda", "folder": str(tmp_path)}))
    assert [row["verdict"] for row in found] == ["passes"] * 4 + ["not run"] * 2
    assert "48 GB" in found[-2]["claim"]
    assert "80 GB" in found[-1]["claim"]
    shares = [pytest.approx((size * GIB - phases.CONTEXT) / (24 * GIB)) for size in (8, 12, 16, 24)]
    assert measured == [
        (["--offload"], (10, True), True, shares[0]),
        ([], (6, True), True, shares[1]),
        ([], (5, True), False, shares[2]),
        ([], (3, True), False, shares[3]),
    ]
    assert card.fractions[1::2] == [1.0] * 4


def test_a_gpus_peaks_are_its_allocators(monkeypatch):
    Card(monkeypatch)
    called = []
    assert counters.peak_bytes(lambda: called.append(1), "cuda", resident=7) == (5 * GIB, 6 * GIB)
    assert called == [1]


def test_one_gpu_runs_no_engine_and_says_so(monkeypatch):
    Card(monkeypatch)
    found = list(steps.check_engines(JOB | {"device": "cuda"}))
    assert [(row["verdict"], row["remark"]) for row in found] == [("not run", "this machine has 1 GPU")] * 4


@pytest.mark.slow
def test_two_gpus_run_every_engine_and_a_wrong_loss_fails(monkeypatch, tmp_path):
    Card(monkeypatch, cards=2)

    def run_workers(job, threads):
        losses = [1.0, 0.9 if job["engine"] != "zero2" or job["processes"] == 1 else 0.95]
        payload = {"all_reduce": 2 * steps.adapters_bytes(JOB)}
        return {"losses": losses, "seconds": [1.0, 2.0], "payload": payload, "held_mib": [3.0, 4.0]}

    monkeypatch.setattr(harness, "run_workers", run_workers)
    found = collect(steps.check_engines(JOB | {"device": "cuda", "folder": str(tmp_path)}))
    verdicts = {row["claim"].split(":")[0]: row["verdict"] for row in found if "reduced" not in row["claim"]}
    assert verdicts.pop("one process") == "noted"
    assert list(verdicts.values()) == ["passes", "passes", "fails", "passes"]
    (reduced,) = [row for row in found if "reduced" in row["claim"]]
    assert reduced["verdict"] == "fails"


@pytest.mark.slow
def test_the_baseline_without_memory_is_compared_at_a_smaller_shape(monkeypatch, tmp_path):
    Card(monkeypatch)
    tried = []

    def time_steps(job):
        tried.append((job["variant"], job["shape"], job["gradient_checkpointing"]))
        if job["shape"][0] == 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"seconds": [1.0 if job["variant"] == "ours" else 2.0], "flops": job["flops"], "matmul_peak": 1e12, "losses": [1.0]}

    monkeypatch.setattr(variants, "time_steps", time_steps)
    found = collect(steps.check_step(JOB | {"folder": str(tmp_path)}))
    assert tried == [
        ("reference", [9, 32, 48], "none"),
        ("reference", [9, 32, 48], "all"),
        ("reference", [5, 32, 48], "none"),
        ("ours", [5, 32, 48], "none"),
    ]
    assert [row["verdict"] for row in found] == ["passes", "noted", "passes"]
    assert (found[0]["measured"], found[2]["measured"]) == (2.0, 5.0)


def test_the_card_its_driver_and_the_versions_head_the_table(monkeypatch, tmp_path):
    Card(monkeypatch, cards=2)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '570.86.15, 3'\necho '570.86.15, 4'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = command.driver_facts() | worker.card_facts("cuda")
    heading = command.heading_of(facts | {"cuda": "12.8", "cudnn": 91002}, command.parse_options([]))
    assert heading.startswith("GPU: 2 x NVIDIA Test, 24.0 GiB; driver 570.86.15; CUDA 12.8, cuDNN 91002; ")
    assert f"torch {importlib.metadata.version('torch')}" in heading
    assert heading.endswith("size 2b, precision bf16")


def test_models_are_made_on_their_device():
    transformer = variants.make_transformer("tiny", torch.float16, "meta")
    assert {tensor.device.type for tensor in transformer.parameters()} == {"meta"}
    assert {tensor.dtype for tensor in transformer.parameters()} == {torch.float16}


def test_t5_keeps_its_wo_in_fp32_where_it_is_stored_in_fp16():
    encoder = worker.build_text_encoder(JOB | {"device": "cpu"})
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "stored_dtypes", lambda job: {"text_encoder": "fp16"})
        encoder = worker.build_text_encoder(JOB)
    dtypes = {name.rsplit(".", 2)[-2]: parameter.dtype for name, parameter in encoder.named_parameters()}
    assert dtypes["wo"] == torch.float32
    assert dtypes["wi_0"] == torch.float16


def test_nccls_collectives_are_counted(monkeypatch):
    def event(name, *shapes):
        return SimpleNamespace(name=lambda: name, shapes=lambda: list(shapes), dtypes=lambda: ["float"] * len(shapes))

    events = [event("nccl:all_reduce", [10]), event("nccl:_all_gather_base", [5]), event("c10d::_reduce_scatter_base_", [4], [8])]
    results = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))

    class Profile:
        profiler = results

        def __init__(self, **settings):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(counters, "profile", Profile)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert counters.count_collectives(lambda: None) == {"calls": 3, "all_reduce": 40, "all_gather": 40, "reduce_scatter": 32}


def test_a_set_checkpointing_is_that_of_the_flag(tmp_path):
    run = variants.our_run(worker.step_job(JOB, flags=["--gradient_checkpointing", "all"]), tmp_path)
    assert run.args.gradient_checkpointing == "all"
    assert run.trained.transformer.gradient_checkpointing
    variants.set_checkpointing(run.trained.transformer, "none")
    assert not run.trained.transformer.gradient_checkpointing
    assert model.blocks_to_recompute("auto", 2) == (2, False)
