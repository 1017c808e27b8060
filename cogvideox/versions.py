"""The installed packages against requirements.txt, before the first of them is imported.

As a program it prints the oldest versions that the given files of requirements allow, one a line for pip: `make test-oldest`.
"""

import importlib.util
import os
import platform
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
MODULES = {"pillow": "PIL", "imageio-ffmpeg": "imageio_ffmpeg", "protobuf": "google.protobuf"}  # where pip's name is another
DISPENSABLE = ("decord", "tensorboard")  # PyAV reads what decord would, and --report_to asks for tensorboard itself


def read_requirements(file):
    """The requirements of a file that this machine needs, as `packaging` reads them."""
    from packaging.requirements import Requirement

    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    return [requirement for requirement in wanted if not requirement.marker or requirement.marker.evaluate()]


def installed(name):
    """The version of an installed package, "unknown" for a module that another package brings, or None. Imports nothing."""
    try:
        if version := metadata.version(name):  # None where removing the package was cut short
            return version
    except metadata.PackageNotFoundError:
        pass
    try:
        spec = importlib.util.find_spec(MODULES.get(name, name))
    except (ModuleNotFoundError, ValueError):
        return None
    return "unknown" if spec and spec.origin else None  # a folder of that name has no origin


def fits(specifier, version):
    """Whether a version is in a range. A container's 2.6.0a0+nv25.01 counts as 2.6.0 too; 2.9.0a0 is not the excluded 2.9.0."""
    from packaging.version import InvalidVersion, Version

    try:
        base = Version(version).base_version
    except InvalidVersion:  # unknown, or a build with a name of its own
        return True
    return specifier.contains(version, prereleases=True) or specifier.contains(base)


def misfit(requirement):
    """What is wrong with a package, such as "av 14.0.1 (>=17 is needed)", or None. requirement: packaging's, or a text: "av>=17"."""
    if isinstance(requirement, str):
        from packaging.requirements import Requirement

        requirement = Requirement(requirement)
    version = installed(requirement.name)
    needed = f" ({requirement.specifier} is needed)" if requirement.specifier else ""
    if version is None:
        return f"no {requirement.name}{needed}"
    return None if fits(requirement.specifier, version) else f"{requirement.name} {version}{needed}"


def problem():
    """A sentence with every package that is missing or outside its range, and the command that mends it, or None."""
    file, pip = ROOT / "requirements.txt", f"{shlex.quote(sys.executable)} -m pip install"
    if not file.is_file():  # a copy of the script alone
        return None
    if sys.version_info < OLDEST_PYTHON:
        return f"Python {platform.python_version()} ({sys.executable}) is too old: {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed"
    try:
        wanted = read_requirements(file)
    except ModuleNotFoundError:  # packaging itself
        command = f"{pip} -r {shlex.quote(str(file))} -c {shlex.quote(str(file.with_name('constraints.txt')))}"
        return f"{sys.executable} lacks the packages of requirements.txt: activate the environment that has them, or run {command}"
    wanted = [wish for wish in wanted if wish.name not in DISPENSABLE or installed(wish.name)]
    bad = {f"{wish.name}{wish.specifier}": fault for wish in wanted if (fault := misfit(wish))}
    return f"not what requirements.txt asks for: {', '.join(bad.values())}; run {pip} {shlex.join(bad)}" if bad else None


def check():
    """End the program with exit code 2 and one sentence if a package is missing or outside its range. Needs no package itself."""
    if sentence := problem():
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of each machine, which may have packages of its own
            print(f"\nERROR[2]: {sentence}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher kills all processes when the first one exits: let the first print before
        raise SystemExit(2)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for requirement in read_requirements(Path(path)):
            print(*(f"{requirement.name}=={part.version}" for part in requirement.specifier if part.operator == ">="))
