"""report.html: made from whatever is there, bounded, escaped, and played by a browser where one is installed."""

import ast
import contextlib
import dataclasses
import html
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import train_cogvideox_lora as script
from cogvideox import charts, hub, report
from cogvideox.folder import COGVIDEOX_2B, fill_in_defaults
from cogvideox.video import contact_sheet, write_video
from tests import conftest
from tests.conftest import ROOT

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
HOSTILE = "a bird <script>alert(1)</script> \"' & </textarea> {{ 7 * 7 }} {% endif %}"


def training_line(step, **values):
    """A line as the trainer logs it."""
    line = {"step": step, "loss": 1 + 1 / (step + 1), "grad_norm": 0.1, "learning_rate": 1e-4, "seconds_per_step": 2.0}
    return line | {"data_wait_percent": 3.0, "peak_memory_gib": 1.5} | values


def evaluation_line(step, loss):
    """A line as an evaluation logs it."""
    bands = [{"timestep": t, "train": loss, "held_out": loss + 0.1, "train_base": 1.4, "held_out_base": 1.5} for t in (125, 375, 625, 875)]
    losses = {"eval_train_loss": loss, "eval_held_out_loss": loss + 0.1, "eval_train_base_loss": 1.4, "eval_held_out_base_loss": 1.5}
    rest = {"update_share": 0.01, "best_step": 2, "eval_caption_gap": [0.043, 0.01], "eval_caption_base_gap": [0.021, 0.01]}
    return {"step": step, "eval_bands": bands} | losses | rest


def write_metrics(folder, lines):
    """metrics.jsonl."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_validation(folder, step, prompts, content=None):
    """A validation's files: real videos, or `content` in their place."""
    rng, place = np.random.default_rng(step), folder / f"validation/step-{step:06d}"
    place.mkdir(parents=True)
    videos = [{"prompt": prompt, "seed": 42, "name": f"{i:02d}-x-seed42.mp4"} for i, prompt in enumerate(prompts)]
    for video in videos:
        if content is None:
            write_video(place / video["name"], rng.integers(0, 255, (9, 32, 48, 3), dtype=np.uint8), 8)
        else:
            (place / video["name"]).write_bytes(content)
    record = {"settings": {"height": 32, "width": 48, "num_frames": 9}, "videos": videos}
    (place / "videos.json").write_text(json.dumps(record))


def write_status(folder, code, reason, step, **more):
    """status.json."""
    (folder / "status.json").write_text(json.dumps({"code": code, "reason": reason, "step": step, "checkpoint": None} | more))


def write_dataset(folder, caption):
    """dataset.json: a clip that is used and one that is not."""
    clip = {"line": "videos.txt:1", "path": "videos/02.mp4", "caption": caption, "tokens": 40, "is_caption_cut": False, "problem": None}
    clip |= {"split": "trained", "notes": [caption], "source_width": 240, "source_height": 160, "source_frames": 49, "source_fps": 24.0}
    clip |= {"reader": "decord", "frames": 9, "height": 64, "width": 96, "seconds": 1.12, "used_percent": 55.0, "cropped_percent": 0.0}
    bad = {
        "line": "videos.txt:2",
        "path": caption,
        "caption": caption,
        "tokens": 40,
        "is_caption_cut": False,
        "problem": "cut",
        "notes": [],
    }
    content = {"clips": [clip, bad], "remarks": [f"1 clips used: {caption}"], "problems": [caption]}
    (folder / "dataset.json").write_text(json.dumps(content))


def run_of(**facts):
    """What run.json holds of a run of a LoRA; its prompts are hostile."""
    flags = {"training_type": "lora", "rank": 8, "lora_alpha": 4.0, "target_modules": ["to_q", "to_k"], "learning_rate": 5e-4}
    flags |= {"lr_scheduler": "constant", "optimizer": "adamw", "mixed_precision": "bf16", "seed": 42, "ema_decay": 0.0, "fps": 8.0}
    flags |= {"id_token": "TOK", "validation_prompt": HOSTILE}
    known = hub.NO_FACTS | {"base_model": "THUDM/CogVideoX-2b", "is_base_on_hub": True, "example_prompt": HOSTILE}
    return report.run_facts(
        flags, known | {"device": "CPU", "engine": "one process"} | facts, flags | {"rank": 128, "validation_prompt": None}
    )


def write_run(folder, **facts):
    """run.json."""
    assert report.write_run_facts(folder, run_of(**facts)) is None


@pytest.fixture
def whole_run(tmp_path):
    """The files of a run that is done; its prompts, captions and messages are hostile."""
    folder = tmp_path / "my-lora"
    folder.mkdir()
    write_metrics(folder, [line for step in range(5) for line in (training_line(step), evaluation_line(step, 1.4 - 0.1 * step))])
    for step in (0, 2, 4):
        write_validation(folder, step, ["a rabbit", HOSTILE])
    rows = [("a clip", np.zeros((9, 32, 48, 3), np.uint8)), ("decoded", np.ones((9, 32, 48, 3), np.uint8))]
    contact_sheet(folder / "encoded/contact_sheet.png", rows)
    write_dataset(folder, HOSTILE)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    write_run(folder, total_steps=4)
    write_status(folder, 0, "done", 4, verdict="learned", verdict_sentences=["The held-out loss fell.", HOSTILE])
    return folder


def page_of(folder):
    """Write the report and read it."""
    assert report.write_report(folder) is None
    return (folder / "report.html").read_text()


def visible(page):
    """A page without its script, its style and its embedded files."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"data:[a-z0-9/]+;base64,[A-Za-z0-9+/=]*", "data:", page)


def test_an_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path, whole_run):
    empty = tmp_path / "empty"
    empty.mkdir()
    said = [
        "No validation videos yet",
        "metrics.jsonl has no steps yet",
        "no dataset.json",
        "There is no snippet: run.json",
        "no run.json: flags",
        "No verdict yet",
    ]
    page, full = page_of(empty), page_of(whole_run)
    assert [words for words in said if words not in page] == []
    assert [words for words in said if words in full] == []
    assert "could not be rendered" not in page + full
    assert "running" in visible(page)
    assert [path.name for path in empty.iterdir()] == ["report.html"]


def test_a_whole_run_is_on_the_page(whole_run):
    page = page_of(whole_run)
    text = visible(page)
    for words in ("step 4 of 4", "<p class=verdict>learned</p>", "The held-out loss fell.", "best step: 2", "base model, step 0", "--rank"):
        assert words in text, words
    assert page.count("data:video/mp4;base64,") == 6
    assert page.count("data:image/png;base64,") == 1
    assert text.count("<svg") == 6
    assert text.index("--rank") < text.index("flags at their defaults") < text.index("--seed")
    assert "<td>240x160 49f @24</td><td>decord</td><td>9</td>" in text
    assert 'from_pretrained("THUDM/CogVideoX-2b", torch_dtype=torch.bfloat16)' in html.unescape(text)


def test_captions_and_messages_are_text_and_nothing_comes_from_outside(whole_run):
    page = page_of(whole_run)
    assert HOSTILE not in page
    assert len(re.findall("<script", page)) == 1  # the page's own
    assert visible(page).count("&lt;script&gt;alert(1)") >= 10
    assert visible(page).count("{{ 7 * 7 }} {% endif %}") >= 10  # no caption is a template
    assert "49 {%" not in page
    addresses = re.findall(r"(?:src|href|action|data|poster)=[\"']?([^\"' >]+)", page)
    assert addresses
    assert all(address.startswith(("data:video/mp4", "data:image/png")) for address in addresses)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", visible(page))
    assert "default-src 'none'" in page


def test_files_that_are_cut_odd_or_being_written_cost_nothing_else(whole_run):
    lines = [training_line(1), training_line(2, loss=float("nan")), training_line(3, grad_norm=None), {"loss": 1.0}]
    write_metrics(whole_run, lines)
    with open(whole_run / "metrics.jsonl", "a") as file:
        file.write('17\n"text"\n{"step": 4, "los')
    (whole_run / "status.json").write_text('{"code": ')
    (whole_run / "run.json").write_text('{"flags": 3, "facts": [], "started": "x"}')
    (whole_run / "validation/step-000004/.00-x-seed42.partial.mp4").write_bytes(b"begun")
    (whole_run / "validation/step-000004/videos.json").write_text("{")
    (whole_run / "validation/step-000004/01-x-seed42.mp4").write_bytes(b"")
    page = page_of(whole_run)
    assert "could not be rendered" not in page
    assert "1 non-finite values are omitted" in page
    assert page.count("data:video/mp4;base64,") == 5
    assert "data:image/png" in page
    (whole_run / "status.json").write_text('{"code": 0, "step": 3, "verdict": "fine", "verdict_sentences": 7}')
    write_metrics(whole_run, [training_line(1), {"step": 2, "eval_train_loss": 1.0, "eval_bands": 7}])
    page = page_of(whole_run)
    assert page.count("could not be rendered (TypeError") == 1  # the curves alone
    assert "data:video/mp4" in page


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (0, "done", '"done">done'),
        (143, "stopped by SIGTERM", '"stopped">stopped by SIGTERM'),
        (5, "gradients", '"failed">failed: gradients'),
    ],
)
def test_how_the_run_ended_is_told_and_a_resumed_one_runs_again(tmp_path, code, reason, words):
    write_metrics(tmp_path, [training_line(step) for step in range(1, 11)])
    write_run(tmp_path, total_steps=100)
    write_status(tmp_path, code, reason, 10)
    assert words in page_of(tmp_path)
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "status.json", (hour_ago, hour_ago))
    page = page_of(tmp_path)
    assert words not in page
    assert 'class="running"' in page
    assert "step 10 of 100" in page
    assert "About 3.0 minutes of training remaining" in page


@pytest.mark.slow
def test_a_hundred_thousand_steps_make_a_small_page_quickly(tmp_path):
    rng = np.random.default_rng(0)
    lines = [training_line(step, loss=1 + float(rng.normal()) * 0.1) for step in range(1, 100_001)]
    lines[50_000]["loss"] = 7.25
    write_metrics(tmp_path, lines)
    started = time.monotonic()
    page = page_of(tmp_path)
    assert time.monotonic() - started < 60  # a second or two where nothing else runs
    assert len(page) < 1_000_000
    thinned = charts.thin([(line["step"], line["loss"]) for line in lines])
    assert len(thinned) <= charts.CURVE_POINTS
    assert (50_001, 7.25) in thinned
    assert (50_001, 7.25) not in charts.evenly([(line["step"], line["loss"]) for line in lines], charts.CURVE_POINTS)


def test_videos_keep_to_a_budget_the_first_and_the_newest_before_all(tmp_path):
    for step in range(0, 110, 10):
        write_validation(tmp_path, step, ["one", "two"], content=bytes(3000))
    steps, _, _ = report.read_videos(tmp_path)
    videos, shown = report.choose_videos(steps)
    assert shown == list(steps)
    assert len(videos) == 22
    videos, shown = report.choose_videos(steps, budget=4000 * 2 * 5)
    assert len(shown) == 5
    assert shown[0] == 0
    assert shown[-1] == 100
    assert max(b - a for a, b in zip(shown, shown[1:], strict=False)) <= 30
    assert len(videos) == 10
    videos, shown = report.choose_videos(steps, budget=4000 * 3)
    assert videos == {(0, "00-x-seed42.mp4"), (100, "00-x-seed42.mp4")}
    assert report.choose_videos({}) == (set(), [])


def test_what_does_not_fit_is_said_and_linked(tmp_path, monkeypatch):
    for step in range(20):
        write_validation(tmp_path, step, ["one", "two"], content=bytes(3000))
    page = page_of(tmp_path)
    assert f"{report.MOST_STEPS} of 20 steps are shown" in page
    assert "href=" not in page
    whole = report.choose_videos
    monkeypatch.setattr(report, "choose_videos", lambda steps: whole(steps, budget=4000 * 3))
    page = page_of(tmp_path)
    assert "2 of 20 steps are shown" in page
    assert "2 videos did not fit" in page
    links = re.findall('href="([^"]+)"', page)
    assert links == ["validation/step-000000/01-x-seed42.mp4", "validation/step-000019/01-x-seed42.mp4"]
    assert all((tmp_path / link).is_file() for link in links)


def test_a_report_that_cannot_be_written_is_a_sentence_and_the_old_one_stays(whole_run, monkeypatch):
    old = page_of(whole_run)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cogvideox.files.os.replace", full)
    problem = report.write_report(whole_run)
    assert "report.html was not written" in problem
    assert "No space left" in problem
    assert "run.json was not written" in report.write_run_facts(whole_run, run_of())
    assert (whole_run / "report.html").read_text() == old
    assert not list(whole_run.glob(".*"))


def test_run_json_holds_neither_tokens_nor_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    flags = {
        "hub_token": "secret",
        "instance_data_root": "/home/somebody/clips",
        "tracker_name": "x hf_abcdefgh12345",
        "output_dir": "/home/somebody2",
    }
    assert report.write_run_facts(tmp_path, report.run_facts(flags, {"device": "CPU"})) is None
    text = (tmp_path / "run.json").read_text()
    record = json.loads(text)
    assert record["flags"] == {"instance_data_root": "~/clips", "tracker_name": "x hf_...", "output_dir": "/home/somebody2"}
    assert "secret" not in text
    assert set(record["versions"]) == {"python", "torch", "diffusers", "transformers", "accelerate", "peft"}
    page = page_of(tmp_path)
    assert "~/clips" in page
    assert "somebody/" not in page


def test_run_json_alone_is_a_report(tmp_path):
    write_run(tmp_path, total_steps=100)
    text = html.unescape(visible(page_of(tmp_path)))
    for words in ("step 0 of 100", "--rank", hub.snippet(run_of()), "Start prompts with <code>TOK</code>", "first checkpoint writes it"):
        assert words in text, words
    assert "could not be rendered" not in text


def test_flags_that_the_model_fills_in_are_at_their_defaults_and_given_ones_are_not():
    args = script.parse_args(conftest.words("m", "d", "o", "c", height=512, width=None, max_num_frames=None))
    rotary = dataclasses.replace(COGVIDEOX_2B, positions="rotary", sample_size=(768, 1360), sample_frames=81, fps=16.0)
    fill_in_defaults(args, rotary)
    plan, accelerator = (
        SimpleNamespace(clips=[1], clips_per_step=1, total_steps=1),
        SimpleNamespace(num_processes=1, device=torch.device("cpu")),
    )
    data, video = SimpleNamespace(records=[SimpleNamespace(caption="a")]), {"num_frames": 9, "height": 512, "width": 1360}
    run = report.describe_run(args, rotary, accelerator, "DDP", plan, data, video, 1, "CogVideoXPipeline")
    own, rest = (dict(report.settings(run)[part]) for part in ("own", "rest"))
    assert own["--height"] == "512"
    by_model = {"--width": "1360", "--max_num_frames": "81", "--fps": "16.0", "--validation_scheduler": "dpm", "--use_dynamic_cfg": "yes"}
    assert {name: rest.get(name) for name in by_model} == by_model


def test_the_report_shows_the_snippet_of_the_model_card(whole_run):
    hub.write_model_card(whole_run, run_of())
    snippet = (whole_run / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    assert snippet in html.unescape(visible(page_of(whole_run)))
    called = next(node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pipe")
    assert called.args[0].value == HOSTILE


@pytest.mark.parametrize(("flag", "shown"), [("no", "fp32"), ("bf16", "bf16")])
def test_the_card_tells_the_precision_by_its_name(tmp_path, flag, shown):
    run = run_of()
    run["flags"]["mixed_precision"] = flag
    hub.write_model_card(tmp_path, run)
    names, _, values = [line.split(" | ") for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("|")]
    assert values[names.index("precision")] == shown


@pytest.mark.parametrize(
    "token", ['x: - "y"', "a\n---\nbase_model: other", "# no", "'", "\x1b[31m", "yes", "1e3", "{{ 7 * 7 }}", "\u2028 \ud800"]
)
def test_the_header_of_the_card_survives_odd_tokens_and_captions(tmp_path, token):
    run = run_of(videos=[[token, "validation/step-000002/00.mp4"]], example_prompt=token)
    run["flags"]["id_token"] = token
    hub.write_model_card(tmp_path, run)
    card = (tmp_path / "README.md").read_text()
    header = ModelCard(card).data
    assert header.instance_prompt == token
    assert header.base_model == "THUDM/CogVideoX-2b"
    assert header.tags == ["text-to-video", "cogvideox", "lora", "diffusers"]
    assert card.count("validation/step-000002/00.mp4") == 1
    assert "49" not in card


def test_a_report_needs_nothing_heavy():
    words = "import sys; from cogvideox import report; print([m for m in ('torch', 'huggingface_hub', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_the_tool_writes_it_again(whole_run, tmp_path, monkeypatch, capsys):
    from tools import report as tool

    monkeypatch.setattr("sys.argv", ["report", str(whole_run)])
    tool.main()
    assert capsys.readouterr().out.strip() == str(whole_run / "report.html")
    for name in ("none", "no_run"):  # a folder without a run, such as that of the clips, stays as it is
        (tmp_path / "no_run").mkdir(exist_ok=True)
        monkeypatch.setattr("sys.argv", ["report", str(tmp_path / name)])
        with pytest.raises(SystemExit) as ended:
            tool.main()
        assert ended.value.code == 2
        assert "give the --output_dir of a run" in capsys.readouterr().err
    assert not list((tmp_path / "no_run").iterdir())
    (tmp_path / "no_run/dataset.json").write_text("{}")  # of a run that ended at its data
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "no_run")])
    tool.main()
    assert (tmp_path / "no_run/report.html").exists()


# Plays all videos, moves the slider, and posts what the players say every half a second.
PROBE = """<script>
let errors = [];
window.addEventListener("error", event => errors.push(event.message));
setTimeout(() => { $("step").value = 1; $("step").oninput(); $("play").click(); }, 500);
setInterval(() => fetch("http://127.0.0.1:PORT/", {method: "POST", mode: "no-cors", body: JSON.stringify({
  videos: [...document.querySelectorAll("video")].map(v => [v.readyState, v.duration, v.videoWidth, v.error && v.error.code, v.paused]),
  shown: $("now").textContent, errors,
  outside: performance.getEntriesByType("resource").map(e => e.name).filter(n => !/^(blob:|data:|http:..127)/.test(n)),
})}), 500);
</script>"""


def browser_line(page, profile, *flags):
    """The command that opens a file in headless Chromium."""
    base = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    return [BROWSER, *base, *flags, f"file://{page}"]


def look(page, profile):
    """Open a page. Returns (the page as its script has changed it, what was logged)."""
    flags = ("--virtual-time-budget=3000", "--dump-dom")
    done = subprocess.run(browser_line(page, profile, *flags), capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def watch(page, profile, is_enough, seconds=60):
    """Open a page with the probe and give back what it posted: the first that is enough, or the last in so many seconds."""
    posts = queue.Queue()

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posts.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page.write_text(page.read_text().replace("PORT", str(server.server_port)))
    with open(profile.with_suffix(".log"), "w") as log:
        browser = subprocess.Popen(browser_line(page, profile, "--remote-debugging-port=0"), stdout=log, stderr=log)
    seen, deadline = None, time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and not (seen and is_enough(seen)):
            with contextlib.suppress(queue.Empty):
                seen = posts.get(timeout=1)
    finally:
        browser.terminate()
        browser.wait(30)
        server.shutdown()
        server.server_close()
    return seen, profile.with_suffix(".log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: whether a browser plays the report was not seen")
def test_a_browser_plays_every_video_without_errors(whole_run, tmp_path):
    for path in whole_run.rglob("*.mp4"):
        with av.open(str(path)) as video:
            stream = video.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    page = page_of(whole_run)
    dom, log = look(whole_run / "report.html", tmp_path / "profile")
    assert "CONSOLE" not in log
    assert 'id="compare">' in dom  # the script has run under the page's own policy
    # The same page with a script that asks the players; such a script is what the policy refuses.
    probed = page.replace("</body>", PROBE + "</body>")
    (tmp_path / "refused.html").write_text(probed)
    assert "Content Security Policy" in look(tmp_path / "refused.html", tmp_path / "profile")[1]
    (tmp_path / "probed.html").write_text(re.sub(r"<meta http-equiv=[^>]*>", "", probed))

    def is_enough(seen):
        return all(error or (ready >= 2 and not paused) for ready, _, _, error, paused in seen["videos"])

    seen, log = watch(tmp_path / "probed.html", tmp_path / "profile", is_enough)
    assert seen, "the page told nothing of its players"
    assert "CONSOLE" not in log
    assert (seen["errors"], seen["outside"], seen["shown"]) == ([], [], "step 2")
    assert len(seen["videos"]) == 8  # six in the table, two large ones
    if all(error == 4 for _, _, _, error, _ in seen["videos"]):
        pytest.skip("this Chromium was built without H.264; the videos are h264, yuv420p")
    for ready, seconds, width, error, paused in seen["videos"]:
        assert ready >= 2
        assert (width, error, paused) == (48, None, False)
        assert seconds == pytest.approx(9 / 8, abs=0.05)


def test_the_charts_have_round_ticks():
    assert charts.ticks(0.005, 0.058) == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert charts.ticks(0, 100_000) == pytest.approx([0, 20_000, 40_000, 60_000, 80_000, 100_000])
    assert "Logarithmic" in charts.line_chart("x", [("y", "one", [(1, 0.1), (2, 50.0)])])["note"]
    assert "Logarithmic" not in charts.line_chart("x", [("y", "one", [(1, 0.1), (2, 5.0)])])["note"]
    for odd in ([(1, 0.0)], [(1, 5.0), (2, 5.0)], [(0, -1e-30), (0, 1e30)]):
        assert charts.line_chart("x", [("y", "one", odd)])["lines"]
    means = charts.running_mean([(step, 2.0) for step in range(50)], 10)
    assert [value for _, value in means] == pytest.approx([2.0] * 50)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1.3751, 1.3762], ["1.3752", "1.3754", "1.3756", "1.3758", "1.3760", "1.3762"]),
        ([9.5e-5, 1e-4], ["9.5e-5", "9.6e-5", "9.7e-5", "9.8e-5", "9.9e-5", "1.0e-4"]),
        ([0, 1e-4], ["0.00000", "0.00002", "0.00004", "0.00006", "0.00008", "0.00010"]),
        ([1e-6, 1e-3], ["1e-6", "1e-5", "1e-4", "1e-3"]),
        ([0, 100], ["0", "20", "40", "60", "80", "100"]),
        ([-3, 4], ["-2", "0", "2", "4"]),
    ],
)
def test_the_values_of_an_axis_differ_and_fit_beside_it(values, labels):
    _, marks = charts.axis(values, 200, is_log=min(values) > 0 and max(values) / min(values) > 100)
    assert charts.tick_labels(marks) == labels
    assert max(map(len, labels)) <= charts.LONGEST_LABEL


def test_the_motion_of_videos_is_a_curve_and_stands_below_each_and_the_one_without_the_trigger_is_named(tmp_path):
    write_validation(tmp_path, 0, ["OLDFILM a bird"], b"video")
    write_validation(tmp_path, 4, ["OLDFILM a bird"], b"video")
    name, more = "00-x-seed42.mp4", "without_trigger/00-a-bird-seed42.mp4"
    for step in (0, 4):
        place = tmp_path / f"validation/step-{step:06d}"
        record = json.loads((place / "videos.json").read_text())
        record["videos"].append({"prompt": "a bird", "seed": 42, "name": more, "without": "OLDFILM", "partner": name})
        (place / "videos.json").write_text(json.dumps(record))
        (place / more).parent.mkdir()
        (place / more).write_bytes(b"video")
    first = {"step": 0, "motion": 20.5, "motion_base": 20.5, "motion_data": None, "videos": [{"name": name, "motion": 20.5}]}
    last = {"step": 4, "motion": 3.25, "motion_base": 20.5, "motion_data": 14.0, "moved_with_trigger": 18.0, "moved_without_trigger": 9.0}
    lines = [training_line(4), first, last | {"videos": [{"name": name, "motion": 3.25}, {"name": more, "motion": None}, "?"]}]
    part = report.videos(tmp_path, lines)
    assert [row["prompt"] for row in part["rows"]] == ["OLDFILM a bird", "without the trigger: a bird"]
    assert [[cell["motion"] for cell in row["cells"]] for row in part["rows"]] == [["motion 20.5", "motion 3.2"], ["", ""]]
    assert all(cell["source"] for row in part["rows"] for cell in row["cells"])
    motion, distance = charts.video_charts(lines)
    assert [label for label, _ in motion["legend"]] == ["videos", "step 0", "training clips"]
    assert len(motion["lines"][2]["points"].split()) == 2  # the data's is drawn across
    assert [label for label, _ in distance["legend"]] == ["with the trigger", "without it"]
    assert charts.video_charts(lines[:1]) == []
    write_metrics(tmp_path, lines)
    assert "motion 3.2" in report.page(tmp_path)
    assert "Motion in grey levels per second" not in report.page(tmp_path / "validation")
