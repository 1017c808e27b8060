"""The pages (README, CONTRIBUTING, docs/): every flag, file, command, test and link in them exists."""

import ast
import re
import subprocess

import pytest
from PIL import Image

import train_cogvideox_lora as script
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
FOREIGN_FLAGS = {"--multi_gpu", "--help"}  # accelerate's, argparse's
FOLDERS = ("cogvideox", "configs", "demo", "docs", "examples", "tests", "tools")
MADE_BY_COMMANDS = ("demo/output", "demo/old_film", "demo/tasks", "demo/tiny_model", "demo/cache")

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def known_flags():
    """The flags of the trainer, of the tools and of the demo's programs."""
    known = {option for action in script.build_parser()._actions for option in action.option_strings} | FOREIGN_FLAGS
    for program in [*(ROOT / "tools").rglob("*.py"), *(ROOT / "demo").glob("*.py")]:
        known |= set(re.findall(r"\"(--[a-z_0-9]+)\"", program.read_text()))
        if "benchmark" in str(program):  # a table of names becomes flags there
            known |= {f"--{name}" for name in re.findall(r"\(\"([a-z_]+)\", ", program.read_text())}
    return known


def is_there(name):
    """Whether a file of the repository exists. A tool may be one file or a package."""
    path = ROOT / name
    return path.exists() or (path.suffix == ".py" and (path.with_suffix("") / "__main__.py").exists())


@each_page
def test_every_flag_exists(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]+(?:-[a-z_]+)*", page.read_text()))
    assert named <= known_flags(), named - known_flags()


def test_the_readme_names_the_flags_of_most_tasks():
    assert len(set(re.findall(r"(?<![\w-])--[a-z_0-9]+", README))) > 40


@each_page
def test_every_file_in_backticks_exists(page):
    for name in re.findall(r"`([\w./-]+)(?:::\w+)?`", page.read_text()):
        top = name.split("/")[0]
        ours = (top in FOLDERS and "/" in name) or ("/" not in name and name.endswith((".sh", ".yaml", ".py")))
        if ours and not name.startswith(MADE_BY_COMMANDS):
            assert is_there(name), name


@each_page
def test_every_test_that_is_named_exists(page):
    for name, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text()):
        defined = {node.name for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.FunctionDef)}
        assert test in defined, f"{name}::{test}"


@each_page
def test_every_module_script_and_make_target_exists(page):
    text = page.read_text()
    for module in set(re.findall(r"python -m ((?:tools|demo|cogvideox)\.[a-z_]+)", text)):
        assert is_there(module.replace(".", "/") + ".py"), module
    for name in set(re.findall(r"\b(?:bash|sbatch) ([\w/]+\.\w+)", text)):
        assert is_there(name), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.M))
    assert named <= targets, named - targets


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_the_readme_links_every_page():
    linked = {(ROOT / target.split("#")[0]).resolve() for target in re.findall(r"\]\(([^)]+)\)", README)}
    assert {page.resolve() for page in PAGES[1:]} <= linked


def test_the_tree_names_every_part_and_every_tool():
    tree = README.split("## The tree")[1]
    parts = {path.stem for path in (ROOT / "cogvideox").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"`cogvideox/(\w+)\.py`", tree)) == parts
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} | {path.parent.name for path in (ROOT / "tools").glob("*/__main__.py")}
    assert set(re.findall(r"`tools/(\w+)(?:\.py|/|/__main__\.py)`", tree)) == tools - {"__init__"}
    for name in ("train_cogvideox_lora.py", "dataset.py", "cogvideox/cluster.sh", "configs/", "examples/", "demo/", "tests/"):
        assert f"`{name}`" in tree, name


def test_the_readme_can_be_read_in_one_sitting_and_says_first_what_was_not_run():
    lines = README.splitlines()
    assert len(lines) < 180
    assert "**Not run on the real weights" in "\n".join(lines[:30])
    assert any(line.startswith("make demo") for line in lines[:15])  # on the first screen


def test_the_readmes_snippet_is_python():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    compile(snippet, "README.md", "exec")


def test_the_picture_is_there_and_small():
    path = ROOT / "docs/demo.png"
    assert path.stat().st_size < 2e6
    assert 800 < Image.open(path).width < 1000


@each_page
def test_no_placeholder_is_left(page):
    assert not re.search(r"\b[A-Z]+_(TABLE|REPORT)\b", page.read_text())


def test_no_line_says_what_this_machine_is_called():
    tracked = subprocess.run(
        ["git", "grep", "-nIE", r"/(home|root)/[a-z]+/", "--", "*.md", "*.sh", "cogvideox", "tools"], cwd=ROOT, capture_output=True
    )
    assert tracked.stdout == b""
