"""The README: every flag, file and command in it exists."""

import re
import subprocess

import train_cogvideox_lora as script
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_every_flag_in_the_readme_exists():
    known = {option for action in script.build_parser()._actions for option in action.option_strings}
    known |= {"--multi_gpu"}  # of accelerate
    for tool in (ROOT / "tools").glob("*.py"):
        known |= set(re.findall(r"\"(--[a-z_]+)\"", tool.read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]+(?:-[a-z_]+)*", TEXT)) - {"--json", "--help"}
    assert len(named) > 30
    assert named <= known, named - known


def test_every_file_in_the_tree_exists_and_every_part_is_in_it():
    tree = TEXT.split("## The tree")[1]
    for name in re.findall(r"[\w./]+\.(?:py|yaml|sh)\b", tree):
        assert (ROOT / name).exists(), name
    parts = {p.name for p in (ROOT / "cogvideox").glob("*.py")} - {"__init__.py"}
    assert {name.split("/")[1] for name in re.findall(r"cogvideox/\w+\.py", tree)} == parts


def test_every_tool_and_make_target_in_the_readme_exists():
    for tool in set(re.findall(r"python -m tools\.(\w+)", TEXT)):
        assert (ROOT / f"tools/{tool}.py").exists(), tool
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"\bmake ([a-z-]+)", TEXT)) <= set(targets)
    for name in re.findall(r"`(tests/\w+\.py)`", TEXT):
        assert (ROOT / name).exists(), name


def test_no_placeholder_is_left_in_the_readme():
    assert not re.search(r"\b[A-Z]+_(TABLE|REPORT)\b", TEXT)


def test_no_line_of_the_readme_says_what_this_machine_is_called():
    tracked = subprocess.run(
        ["git", "grep", "-nIE", r"/(home|root)/[a-z]+/", "--", "*.md", "*.sh", "cogvideox", "tools"], cwd=ROOT, capture_output=True
    )
    assert tracked.stdout == b""
