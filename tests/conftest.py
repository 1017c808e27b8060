"""Fixtures: a tiny real CogVideoX folder, real clips, and the whole script run in this process."""

import functools
import gc
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny products: a second thread costs more than it brings
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train_cogvideox_lora as script
from cogvideox import metrics, preview
from demo.make_model import SMALL_CLIP, TRANSFORMERS, make_model
from tests import shortcuts
from tests.forked import ForkServer

ROOT = Path(__file__).resolve().parent.parent
# The keys of compiled code lack this variable, and the code of one kind of CPU gives wrong numbers with another's.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / f".pytest_cache/compiled_{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
shortcuts.take()
preview.SECONDS_TO_SHOW = 600  # all clips are shown, however busy the machine is
# Under nohup, or in the background of a shell, these are ignored, and the programs that tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


# With a file's tests on one worker (--dist loadfile), a long file that comes last leaves the other workers without work.
LONGEST_FIRST = [
    "test_demo.py",
    "test_engines.py",
    "test_cluster.py",
    "test_launch.py",
    "test_terminals.py",
    "test_gpu_check.py",
    "test_benchmark.py",
    "test_faults.py",
]
LONGEST_FIRST += [
    "test_family_runs.py",
    "test_fault_table.py",
    "test_encodings.py",
    "test_flags.py",
    "test_memory.py",
    "test_train.py",
    "test_output.py",
]


def pytest_collection_modifyitems(items):
    """Have the longest files come first; the order within a file and of all others stays."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else len(LONGEST_FIRST))


@pytest.fixture(autouse=True)
def no_network():
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1", "localhost")):
            return connect(self, address)
        raise AssertionError(f"a test tried to reach {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state a process; each run of the script here is to be the first."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def with_plot(monkeypatch):
    """Have runs draw loss.png."""
    monkeypatch.setattr(metrics, "plot_losses", shortcuts.plot_losses)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random model of the 2B's kind (sincos positions), with the real tokenizer."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", vae_channels=8, heads=2, head_width=16)


FAMILIES = list(TRANSFORMERS)
IMAGE_TO_VIDEO = [family for family in FAMILIES if "i2v" in family]


def example_of(family):
    """The script in examples/ for a family other than the 2B."""
    return f"examples/cogvideox{'' if family.startswith('1.5') else '_'}{family.replace('-', '_')}.sh"


@pytest.fixture(scope="session")
def family_model(tiny_model, tmp_path_factory):
    """A function from the name of a family to a random model of it."""

    @functools.cache
    def make(family):
        if family == "2b":
            return tiny_model
        size = SMALL_CLIP if family in IMAGE_TO_VIDEO else {}  # that of `words`: a learned table has no other positions
        return make_model(tmp_path_factory.mktemp("models") / family, vae_channels=8, head_width=32, family=family, **size)

    return make


@pytest.fixture(scope="session")
def rotary_model(family_model):
    """A random model of the 5B's kind."""
    return family_model("5b")


@pytest.fixture(scope="session")
def temporal_patch_model(family_model):
    """A random model of the 1.5's kind: rotary, latents taken two by two."""
    return family_model("1.5-5b")


@pytest.fixture(scope="session")
def image_model(family_model):
    """A random image-to-video model of the 5B's kind, with learned positions for clips of `words`."""
    return family_model("5b-i2v")


@pytest.fixture(scope="session")
def six_clips(tmp_path_factory):
    """A data folder with six of the demo's real clips."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "videos").mkdir()
    for name in ("prompts.txt", "videos.txt"):
        lines = (ROOT / "demo/dataset" / name).read_text().splitlines()[:6]
        (folder / name).write_text("\n".join(lines) + "\n")
    for line in lines:
        shutil.copy(ROOT / "demo/dataset" / line, folder / line)
    return folder


@pytest.fixture
def clips(six_clips, tmp_path):
    """A copy of the six clips that a test may spoil."""
    return shutil.copytree(six_clips, tmp_path / "clips")


@pytest.fixture(scope="session")
def encodings(tmp_path_factory):
    """An encoding cache that the tests of a session share."""
    return tmp_path_factory.mktemp("encodings")


# For tests that compare runs whose sums are taken in another order (two processes, another engine). Adam divides a gradient
# by its own size, so one that is mostly rounding (1e-9 here) moves its weight as far as any other, in a direction that differs
# between processors. With an epsilon well above the rounding, a step is at most lr / epsilon = 100 times the gradient, so four
# steps turn 1e-9 into 4e-7; measured 2e-8 under default, avx2 and avx512, where the usual epsilon gives 1e-5.
STEADY_ADAM = {"adam_epsilon": 1e-4}
STEADY_BOUND = 1e-6


def words(model, data, output, cache, **flags):
    """A command line: small and quick, with `flags` on top (True: a switch; None: left out; False: --no-...)."""
    base = {
        "pretrained_model_name_or_path": model,
        "instance_data_root": data,
        "output_dir": output,
        "encoding_cache_dir": cache,
        "height": 32,
        "width": 48,
        "max_num_frames": 9,
        "rank": 4,
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "num_inference_steps": 2,
        "eval_clips": 0,
        "gradient_checkpointing": "none",  # auto takes a step more before the first one, and tests count steps
        "report_to": "none",
    }
    line = []
    for name, value in (base | flags).items():
        if value is None:
            continue
        line.append(f"--no-{name}" if value is False else f"--{name}")
        if not isinstance(value, bool):
            line += [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    return line


@pytest.fixture
def train(tiny_model, six_clips, encodings, tmp_path):
    """Run the whole script in this process; returns the output folder."""
    runs = []

    def run(model=tiny_model, data=six_clips, output=None, cache=encodings, **flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        output = output or tmp_path / f"run-{len(runs)}"
        runs.append(output)
        script.main(script.parse_args(words(model, data, output, cache, **flags)))
        if not gc.get_freeze_count():  # the libraries' million objects, which the script's own collections would walk each time
            gc.collect()
            gc.freeze()
        return Path(output)

    return run


def state_of(folder):
    """path -> (time, size) of all files in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.fixture(scope="session")
def trained_runs():
    """The plain runs so far: flags -> (folder, its state)."""
    return {}


@pytest.fixture
def plain_run(train, trained_runs, tmp_path_factory, monkeypatch):
    """The folder of a run with these flags and nothing else changed, which is trained once a session. Copy it to change it."""

    def run(**flags):
        name = tuple(sorted((flag, str(value)) for flag, value in flags.items()))
        if name not in trained_runs:
            changes = monkeypatch._setattr + monkeypatch._setitem
            assert not changes, "a run of changed code would be shared with other tests"
            folder = train(output=tmp_path_factory.mktemp("plain") / "run", **flags)
            trained_runs[name] = folder, state_of(folder)
        folder, state = trained_runs[name]
        assert state_of(folder) == state, f"a test has changed the shared run {folder}"
        return folder

    return run


def lora_of(folder):
    """The exported weights of a run."""
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def same(a, b):
    """Whether two sets of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory, tiny_model):
    """The warm process of a session."""
    with ForkServer(tmp_path_factory.mktemp("forked"), environment(), tiny_model) as server:
        yield server


@pytest.fixture
def forked(fork_server):
    """Run the script in processes of its own, without the seconds that their imports take. None of them outlives the test."""
    yield fork_server
    fork_server.end_all()


def environment():
    """The environment for a process started by a test."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"], "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
