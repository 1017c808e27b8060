"""The ranges of requirements.txt: old and missing packages are named before they are imported, and the floors are what pip gets."""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

import train_cogvideox_lora as script
from cogvideox import versions
from tests.conftest import ROOT, environment, words
from tests.test_cluster import program

PROGRAMS = [path.stem for path in sorted((ROOT / "tools").glob("*.py")) if "def main" in path.read_text()]
PROGRAMS += [path.parent.name for path in sorted((ROOT / "tools").glob("*/__main__.py"))]
TESTED = {requirement.name: requirement for requirement in versions.read_requirements(ROOT / "tests/requirements.txt")}


def range_of(name):
    """The range of a package in requirements.txt."""
    return re.search(rf"^{name}(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]


@pytest.fixture
def have(monkeypatch):
    """A function that replaces the installed versions of the packages that it is given; None: not installed."""
    installed = versions.installed

    def replace(**changed):
        monkeypatch.setattr(versions, "installed", lambda name: changed[name] if name in changed else installed(name))

    return replace


@pytest.mark.parametrize(
    ("version", "expected"),
    {
        "2.5.1": False,
        "2.6.0": True,
        "2.13.0+cpu": True,
        "2.9.0": False,
        "2.9.1+cu128": False,
        "2.9.0a0+50eac811a6.nv25.08": True,  # containers: built from what came before the release
        "2.6.0a0+ecf3bae40a.nv25.01": True,
        "2.5.0a0+b465a5843b.nv24.09": False,
        "2.15.0.dev20261101": True,
        "2.6.0rc1": True,
        "1.99.post3": False,
        "git": True,
    }.items(),
)
def test_a_range_takes_pre_releases_and_builds_of_a_release_that_it_takes(version, expected):
    assert versions.fits(SpecifierSet(">=2.6,!=2.9.0,!=2.9.1"), version) is expected


def test_torch_versions_with_slow_convolutions_are_excluded():
    wanted = {requirement.name: requirement for requirement in versions.read_requirements(ROOT / "requirements.txt")}["torch"]
    fits = [versions.fits(wanted.specifier, version) for version in ("2.8.0", "2.9.0+cu128", "2.9.1", "2.10.0", "2.13.0")]
    assert fits == [True, False, False, True, True]


def test_all_packages_outside_their_ranges_are_named_in_one_sentence_with_the_command(have):
    assert versions.problem() is None
    have(av="14.0.1", torch="2.9.1+cu128", transformers=None, diffusers="0.50.0.dev0")
    sentence = versions.problem()
    assert "torch 2.9.1+cu128 (!=2.9.0,!=2.9.1,>=" in sentence
    assert f"no transformers ({range_of('transformers')} is needed)" in sentence
    assert f"av 14.0.1 ({range_of('av')} is needed)" in sentence
    command = f"; run {sys.executable} -m pip install 'torch!=2.9.0,!=2.9.1,"
    assert command in sentence
    assert sentence.endswith(f"' 'transformers{range_of('transformers')}' 'av{range_of('av')}'")
    assert "diffusers" not in sentence


@pytest.mark.parametrize("name", versions.DISPENSABLE)
def test_a_package_that_the_trainer_does_without_may_be_absent_but_not_old(have, name):
    have(**{name: None})
    assert versions.problem() is None
    have(**{name: "0.1"})
    assert f"{name} 0.1 (" in versions.problem()


def test_a_module_of_another_package_counts_and_a_folder_of_that_name_does_not(monkeypatch, tmp_path):
    assert versions.installed("no_such_package") is None
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert versions.installed("no_such_package") is None  # import would find it: a namespace
    (tmp_path / "no_such_package/__init__.py").write_text("")
    assert versions.installed("no_such_package") == "unknown"
    assert versions.misfit("no_such_package>=3") is None


@pytest.mark.parametrize("command", [["train_cogvideox_lora.py"], *(["-m", f"tools.{name}"] for name in PROGRAMS)], ids=lambda c: c[-1])
def test_every_program_names_an_old_package_before_any_import(tmp_path, command):
    """Packages with a wrong version lie before the real ones; importing one would end the program in another way."""
    (tmp_path / "av-14.0.1.dist-info").mkdir()
    (tmp_path / "av-14.0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: av\nVersion: 14.0.1\n")
    for name in ("torch", "numpy", "tqdm", "psutil", "safetensors"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    paths = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, env=paths, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith(f"\nERROR[2]: not what requirements.txt asks for: av 14.0.1 ({range_of('av')} is needed); run ")
    assert run.stderr.count("\n") == 2


@pytest.mark.slow
def test_the_trainer_and_the_gpu_check_start_without_any_optional_package(tmp_path):
    """The packages that requirements.txt does not name, or that it calls dispensable, are hidden as if they were not installed."""
    hidden = ["deepspeed", "bitsandbytes", "prodigyopt", "wandb", "datasets", *versions.DISPENSABLE]
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery\n"
        "finder = importlib.machinery.PathFinder\n"
        "find = finder.find_spec\n"
        f"finder.find_spec = lambda name, *rest: None if name in {hidden} else find(name, *rest)\n"
    )
    code = "import importlib.util, train_cogvideox_lora, tools.gpu_check.steps; print(importlib.util.find_spec('deepspeed'))"
    paths = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=paths, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (0, "None"), run.stderr


def test_a_python_without_packages_is_told_what_to_install():
    """-S leaves out the folder of packages, as the python of another environment would."""
    run = subprocess.run([sys.executable, "-S", "train_cogvideox_lora.py"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.startswith(f"\nERROR[2]: {sys.executable} lacks the packages of requirements.txt")
    assert f"pip install -r {ROOT / 'requirements.txt'} -c {ROOT / 'constraints.txt'}\n" in run.stderr


def test_an_old_python_is_named(monkeypatch):
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.10.12")
    assert versions.problem() == f"Python 3.10.12 ({sys.executable}) is too old: 3.11 or newer is needed"


def test_one_process_of_a_machine_speaks_and_all_end(have, monkeypatch, capsys):
    versions.check()
    have(av="14.0.1")
    waited = []
    monkeypatch.setattr(versions.time, "sleep", waited.append)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stop:
            versions.check()
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("ERROR[2]") == lines
    assert waited == [3]


@pytest.mark.parametrize(
    ("flag", "package"),
    [({"optimizer": "prodigy"}, "prodigyopt"), ({"use_8bit_adam": True}, "bitsandbytes"), ({"base_precision": "nf4"}, "bitsandbytes")],
)
def test_a_flag_names_a_package_that_is_older_than_the_tested_one(have, capsys, flag, package):
    needed = TESTED[package].specifier
    have(**{package: "0.0.9"})
    with pytest.raises(SystemExit):
        script.parse_args(words("m", "d", "o", "c", **flag))
    assert f"{package} 0.0.9 ({needed} is needed); run pip install '{package}{needed}'" in capsys.readouterr().err
    have(**{package: str(needed).removeprefix(">=")})
    script.parse_args(words("m", "d", "o", "c", **flag))


def test_compiling_asks_for_a_torch_that_compiles_under_selective_checkpointing(have, capsys):
    have(torch="2.8.0+cu128")
    assert versions.problem() is None
    script.parse_args(words("m", "d", "o", "c"))
    with pytest.raises(SystemExit):
        script.parse_args(words("m", "d", "o", "c", compile=True))
    assert "--compile: torch 2.8.0+cu128 (>=2.10 is needed); run pip install 'torch>=2.10', or omit the flag" in capsys.readouterr().err
    have(torch="2.10.0a0+b558c986e8.nv25.11")
    script.parse_args(words("m", "d", "o", "c", compile=True))


def test_pip_gets_the_floor_of_every_requirement():
    """`make test-oldest` installs what this prints."""
    files = ["requirements.txt", "tests/requirements.txt"]
    run = subprocess.run(
        [sys.executable, "-m", "cogvideox.versions", *files], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    pinned = dict(line.split("==") for line in run.stdout.splitlines())
    wanted = [requirement for file in files for requirement in versions.read_requirements(ROOT / file)]
    assert list(pinned) == [requirement.name for requirement in wanted]
    for requirement in wanted:
        assert pinned[requirement.name] in requirement.specifier
        assert f">={pinned[requirement.name]}" in str(requirement.specifier)


def test_ci_tries_the_oldest_releases_where_the_ranges_are_not_those_that_passed(tmp_path):
    for name in (".ci/run", "requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    program(tmp_path / "fake", "make", '#!/usr/bin/env bash\necho "$1"\n')

    def targets():
        paths = os.environ | {"PATH": f"{tmp_path / 'fake'}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", tmp_path / ".ci/run"], env=paths, capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()

    assert targets() == ["check", "test", "test-oldest"]  # no hashes
    subprocess.run("sha256sum requirements.txt tests/requirements.txt > tests/oldest.sha256", shell=True, cwd=tmp_path, check=True)
    assert targets() == ["check", "test"]
    (tmp_path / "requirements.txt").write_text((ROOT / "requirements.txt").read_text().replace("av>=17", "av>=16"))
    assert targets() == ["check", "test", "test-oldest"]


@pytest.mark.parametrize("name", ["pillow", "imageio-ffmpeg", "protobuf"])
def test_a_module_that_another_distribution_brings_counts_as_installed(name, monkeypatch):
    def absent(name):
        raise versions.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "version", absent)
    assert versions.installed(name) == "unknown"  # such as pillow-simd's PIL
    monkeypatch.setattr(versions, "MODULES", {name: "no.such.module"})
    assert versions.installed(name) is None
