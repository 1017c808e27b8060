"""Captions, prompts, tables and file names as people write them: what the model cannot read, and what a list does not say, is named."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import train_cogvideox_lora as script
from cogvideox import files, folder, survey, video
from cogvideox.decode import Framing, clip_framing
from cogvideox.files import at_home, read_json
from cogvideox.reader import Readers
from dataset import files_left_out, list_clips, locate, read_records
from tests.conftest import ROOT, environment, words
from tools import check_dataset, generate, lora_file, quality

CHINESE = ["一只灰色的兔子在草地上跳来跳去", "两只猫在房间里睡觉"]
SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1e"  # str.splitlines ends a line at each of them


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    """T5's tokenizer."""
    return folder.load_tokenizer(tiny_model)


def captions_of(clips, *captions):
    """Replace the first captions of a folder. Returns all of them."""
    lines = [*captions, *(clips / "prompts.txt").read_text().splitlines()[len(captions) :]]
    (clips / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


@pytest.fixture(scope="module", autouse=True)
def surveyed(six_clips, encodings):
    """Have the cache know the six clips, so that few runs start a decoder."""
    args = script.parse_args(words("m", six_clips, "o", encodings))
    with Readers(2) as readers:
        records, framing = read_records(six_clips)[0], survey.framing_of(args, folder.COGVIDEOX_2B)
        survey.remember_survey(survey.survey_clips(records, framing, args.seed, encodings, readers, show_progress=False), encodings)


@pytest.fixture
def check(encodings, monkeypatch):
    """tools.check_dataset in this process, without its picture."""
    monkeypatch.setattr(check_dataset, "look", lambda *arguments: ([], [], []))
    line = ["--height", "32", "--width", "48", "--max_num_frames", "9", "--encoding_cache_dir", str(encodings)]
    return lambda *arguments: check_dataset.main([*map(str, arguments), *line])


class Encoding(Exception):
    """The run has passed its checks."""


@pytest.fixture
def until_encoding(train, monkeypatch, tmp_path):
    """Run the script up to the encoding; returns the output folder."""

    def reached(*arguments):
        raise Encoding

    def run(**flags):
        with pytest.raises(Encoding):
            train(output=tmp_path / "until", **flags)
        return tmp_path / "until"

    monkeypatch.setattr(script, "encode_data", reached)
    return run


def told_at_exit(run, code, capsys, *arguments, **flags):
    """What a run that must end with this exit code has said."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments, **flags)
    out, err = capsys.readouterr()
    assert stop.value.code == code, err
    return out + err


# -----------------------------------------------------------------------------
# What T5 reads


@pytest.mark.parametrize(
    ("text", "unknown", "characters"),
    [
        ("A grey rabbit, 2 m wide, says “hi” in a café; ＡＢＣ.", 0, 1),
        (CHINESE[0], 1, 1),
        ("兔子", 1, 1),
        ("a naïve rabbit", 1, 12),
        (unicodedata.normalize("NFD", "a café"), 0, 1),  # T5 composes letters first
        ("a 🐇 runs", 1, 6),
        ("Кролик в траве", 1, 12),
        ("BUNNYTOON 兔子", 2, 11),
        ("\u200b", 1, 1),  # no token at all
        ("", 0, 1),
    ],
)
def test_characters_are_counted_that_t5_does_not_know(tokenizer, text, unknown, characters):
    assert folder.unknown_shares(tokenizer, [text])[0] == pytest.approx(unknown / characters)


def test_a_run_of_unknown_characters_is_one_token_so_tokens_would_not_tell(tokenizer):
    assert folder.token_ids(tokenizer, CHINESE) == [[3, 2, 1]] * 2
    assert tokenizer.unk_token_id == 2


def test_a_caption_that_t5_cannot_read_ends_the_run_or_is_skipped(clips, train, until_encoding, check, capsys):
    captions_of(clips, *CHINESE, "a naïve rabbit stands in the green grass beside a tree")
    told = told_at_exit(train, 3, capsys, data=clips, id_token="BUNNYTOON")
    rule = "100 % of its caption's characters are unknown to T5"
    assert f"ERROR[3]: videos.txt:1: videos/02.mp4: {rule}" in told
    assert f"ERROR[3]: videos.txt:2: videos/04.mp4: {rule}" in told
    assert told.count("ERROR[3]") == 2
    assert told_at_exit(check, 3, capsys, clips).count(rule) == 4
    output = until_encoding(data=clips, id_token="BUNNYTOON", bad_videos="skip", max_bad_share=0.5)
    dataset = read_json(output / "dataset.json")
    assert [clip["split"] for clip in dataset["clips"]] == [None] * 2 + ["trained"] * 4
    assert [clip["unknown_percent"] for clip in dataset["clips"]] == [100, 100, 2.3, 0, 0, 0]


def test_a_caption_with_some_unknown_characters_is_named_and_trained_on(clips, tokenizer):
    readings, dataset = described(clips, tokenizer, "a rabbit 🐇 runs", "a naïve rabbit stands in the green grass beside a tree", "...")
    assert [round(reading.unknown, 3) for reading in readings[:3]] == [0.083, 0.023, 0]
    assert "1 captions have more than 5 % of characters that T5 does not know (8 % in the first): videos/02.mp4" in dataset["remarks"]
    assert "1 captions have no letter: videos/05.mp4" in dataset["remarks"]
    assert [clip["problem"] for clip in dataset["clips"]] == [None] * 6
    assert [line.endswith("?") for line in survey.table_lines(dataset) if "240x160" in line] == [True] + [False] * 5


def described(clips, tokenizer, *captions, id_token=None):
    """(readings, dataset) of a folder with these captions, without decoding it."""
    captions_of(clips, *captions)
    records, _, _ = read_records(clips)
    readings = survey.read_captions(id_token, tokenizer, records)
    fact = {
        "note": "",
        "seconds": 1,
        "source_seconds": 1,
        "frames": 9,
        "height": 32,
        "width": 48,
        "source_width": 240,
        "source_height": 160,
    }
    fact |= {"used_percent": 100, "cropped_percent": 0, "stretch_percent": 0, "repeated_frames": 0, "source_frames": 49, "source_fps": 24}
    facts = survey.without_unreadable([fact | {"sha256": record.path, "reader": "decord"} for record in records], readings)
    return readings, survey.describe(records, facts, readings, 226, Framing(8, 9, ((32, 48),)))


def test_unlike_captions_that_are_equal_to_the_model_are_named(clips, tokenizer):
    start = "a rabbit runs through the long green grass beside the tree"
    long = "a very long caption " * 60
    pairs = [f"{start} 兔", f"{start} 猫", f"{long} one", f"{long} two", start, start]
    _, dataset = described(clips, tokenizer, *pairs)
    (remark,) = [remark for remark in dataset["remarks"] if "the same to the model" in remark]
    assert remark.startswith("4 captions are the same to the model as another, unlike one")
    assert remark.endswith("videos/02.mp4, videos/04.mp4, videos/05.mp4, videos/06.mp4")
    assert "2 clips share their caption with another: videos/07.mp4, videos/08.mp4" in dataset["remarks"]
    _, dataset = described(clips, tokenizer, *(f"{start} {sign}" for sign in "兔b猫def"))
    assert "2 captions are the same" in str(dataset["remarks"])
    _, dataset = described(clips, tokenizer, *(f"{start} {sign}" for sign in "abcdef"))
    assert "the same to the model" not in str(dataset["remarks"])


def test_captions_that_are_all_equal_to_the_model_end_the_run(clips, train, until_encoding, check, capsys):
    start = "a rabbit runs through the long green grass beside the tree"
    captions_of(clips, *(f"{start} {sign}" for sign in "一只灰色的兔"))
    sentence = "all 6 captions are the same tokens to the model, though they differ"
    assert told_at_exit(train, 3, capsys, data=clips).count(sentence) == 1
    assert told_at_exit(check, 3, capsys, clips).count(sentence) == 1
    captions_of(clips, *[start] * 6)  # alike as written: that was meant
    assert len(read_json(until_encoding(data=clips) / "dataset.json")["clips"]) == 6


def test_an_id_token_that_t5_cannot_read_ends_the_run(clips, train, check, capsys):
    sentence = "--id_token 兔子: 100 % of its characters are unknown to T5"
    assert sentence in told_at_exit(train, 3, capsys, data=clips, id_token="兔子")
    assert sentence in told_at_exit(check, 3, capsys, clips, "--id_token", "兔子")


def test_prompts_are_counted_in_tokens_and_unknown_characters_at_the_start(clips, train, capsys):
    (clips / "videos/04.mp4").unlink()  # ends the run after the checks
    prompt = "word " * 399 + ":::a rabbit 兔子:::a rabbit"
    told = told_at_exit(train, 3, capsys, data=clips, validation_prompt=prompt, negative_prompt="色调艳丽")
    assert "warning: validation prompt 1 has 400 tokens, and the model reads 226: the last 174 are cut: 'word word" in told
    assert "warning: validation prompt 2 has 22 % of characters that T5 does not know: 'a rabbit 兔子'" in told
    assert "warning: --negative_prompt has 100 % of characters that T5 does not know: '色调艳丽'" in told
    assert "validation prompt 3" not in told


def test_a_prompt_that_is_not_utf8_is_refused_with_the_flags(clips, tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9")
    line = words("m", clips, tmp_path / odd, tmp_path, id_token=odd, validation_prompt=odd)
    told = told_at_exit(script.parse_args, 2, capsys, line)
    for flag in ("id_token", "validation_prompt", "output_dir"):
        assert f"ERROR[2]: --{flag} '" in told
    assert told.count("caf\\udce9': is not UTF-8") == 3


def test_the_prompts_of_generate_are_counted_too_and_only_line_feeds_part_them(tiny_model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa rabbit\u2028runs\r\n\r\n兔子\n".encode())
    line = ["--pretrained_model_name_or_path", "m", "--lora", "x", "--prompts_file", str(tmp_path / "prompts.txt")]
    args = generate.build_parser().parse_args(line)
    generate.check_flags(args)
    assert args.prompts == ["a rabbit\u2028runs", "兔子"]
    embeddings = lora_file.encode_prompts(tiny_model, args.prompts, torch.device("cpu"))
    assert list(embeddings) == args.prompts
    assert capsys.readouterr().err.count("warning: this prompt has 100 % of characters that T5 does not know: '兔子'") == 1


def test_halves_for_the_quality_command_keep_captions_with_a_line_separator(clips, tmp_path):
    captions = captions_of(clips, "a rabbit\u2028runs")
    train_half, held_out = quality.write_halves(clips, tmp_path)
    assert [record.caption for record in read_records(train_half)[0]] == captions[:2] + captions[3:]
    assert [record.caption for record in read_records(held_out)[0]] == captions[2:3]


# -----------------------------------------------------------------------------
# Tables


def table(tmp_path, name, text):
    """(records, problems) of a data folder with this table and four files."""
    for number in range(1, 5):
        (tmp_path / f"{number}.mp4").write_bytes(b"something")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    records, problems, layout = read_records(tmp_path)
    assert problems or layout == name
    return [(record.listed, record.caption) for record in records], problems


def test_a_row_with_other_than_its_cells_is_named_with_its_line(tmp_path):
    rows = ["video,text", '1.mp4,"a rabbit,', 'in two lines"', "2.mp4,A rabbit, looking left", "3.mp4", "4.mp4,a bird,,", ""]
    pairs, problems = table(tmp_path, "metadata.csv", "\r\n".join(rows))
    assert pairs == [("1.mp4", "a rabbit, in two lines"), ("4.mp4", "a bird")]
    assert problems == [
        'metadata.csv:4: 3 cells in 2 columns (\'looking left\'); quote a text that has a ",": "a rabbit, running"',
        "metadata.csv:5: 1 cells in 2 columns",
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_a_csv_file_of_any_separator_and_with_a_byte_order_mark_is_read(tmp_path, separator):
    rows = [["video", " text "], ["1.mp4", "a rabbit"], ["2.mp4", f' "a bird{separator} flying"']]
    text = "\ufeff" + "".join(separator.join(row) + "\n" for row in rows)
    assert table(tmp_path, "metadata.csv", text)[0] == [("1.mp4", "a rabbit"), ("2.mp4", " ".join(f"a bird{separator} flying".split()))]


def test_a_quote_that_takes_in_other_rows_is_named(tmp_path):
    _, problems = table(tmp_path, "metadata.csv", 'video,text\n1.mp4,a 5" screen\n2.mp4,"a" bird\n3.mp4,a cat\n')
    assert "line 3: ',' expected after '\"'; write a quote inside a quoted text twice" in problems[0]
    _, problems = table(tmp_path, "metadata.csv", 'video,text\n1.mp4,a cat\n2.mp4,"a bird\n3.mp4,a cat\n')
    assert "line 3: unexpected end of data" in problems[0]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.json"])
def test_a_table_that_is_not_utf8_names_its_line(tmp_path, name):
    assert "(line 2: not UTF-8 (byte 0xe9); save the file as UTF-8)" in table(tmp_path, name, b"video,text\n1.mp4,caf\xe9\n")[1][0]


def test_a_caption_file_that_is_not_utf8_or_missing_is_named(tmp_path):
    _, problems = table(tmp_path, "1.txt", b"caf\xe9")
    assert problems[:2] == [
        "1.mp4: the caption 1.txt cannot be read (line 1: not UTF-8 (byte 0xe9); save the file as UTF-8)",
        "2.mp4: the caption 2.txt cannot be read (No such file or directory)",
    ]


def test_two_columns_of_one_name_are_refused_if_they_are_read(tmp_path):
    assert "two columns are called text" in table(tmp_path, "metadata.csv", "video,text,text\n1.mp4,a,b\n")[1][0]
    assert table(tmp_path, "metadata.csv", "video,text,note,note\n1.mp4,a,b,c\n")[0] == [("1.mp4", "a")]


def test_only_line_feeds_end_a_row_whatever_the_layout(tmp_path):
    captions = [f"a rabbit{sign}in the grass" for sign in (*SEPARATORS.split(" "), "\t")]
    names = [f"{number}.mp4" for number in range(len(captions))]
    jsonl = "\r\n".join(json.dumps({"video": n, "text": c}, ensure_ascii=False) for n, c in zip(names, captions, strict=True))
    assert "\u2028" in jsonl
    raw = "\n".join(f'{{"video": "{n}", "text": "{c}"}}' for n, c in zip(names, captions, strict=True))  # with bare control characters
    csv = "video,text\r\n" + "".join(f"{n},{c}\r\n" for n, c in zip(names, captions, strict=True))
    for name, text in (("jsonl", jsonl), ("jsonl", raw), ("csv", csv), ("json", f"[{jsonl.replace(chr(10), ',')}]")):
        place = tmp_path / f"metadata.{name}"
        pairs, problems = table(tmp_path, place.name, text)
        assert (pairs, problems) == ([(n, "a rabbit in the grass") for n in names], []), name
        place.unlink()
    for name, lines in (("prompts.txt", captions), ("videos.txt", names)):
        (tmp_path / name).write_bytes("\r\n".join(lines).encode())
    assert [(record.listed, record.caption) for record in read_records(tmp_path)[0]] == list(zip(names, captions, strict=True))


ODD_CELLS = [
    (5, "text is a number (5), not a text"),
    (float("nan"), "text is a number (nan), not a text"),
    (True, "text is a truth value (True), not a text"),
    (["a", "b"], "text is a list (['a', 'b']), not a text"),
    ({"en": "a"}, "text is an object ({'en': 'a'}), not a text"),
    (None, "empty text"),
    ("  ", "empty text"),
    ("NaN", "text is 'NaN', which stands for a missing value"),
    ("half \ud83d", "text has half a character: 'half \\ud83d'"),
]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.json"])
def test_a_cell_that_is_not_a_text_is_named_with_its_row(tmp_path, name):
    cells = [cell for cell, _ in ODD_CELLS]
    rows = [{"video": "1.mp4", "text": cell} for cell in [*cells, "a rabbit"]] + [{"video": "2.mp4"}, {"video": 3, "text": "a"}]
    text = json.dumps(rows) if name.endswith("json") else "".join(json.dumps(row) + "\n" for row in rows)
    pairs, problems = table(tmp_path, name, text)
    assert pairs == [("1.mp4", "a rabbit")]
    expected = [fault for _, fault in ODD_CELLS]
    assert problems[:-2] == [f"{name}:{number}: {fault}" for number, fault in enumerate(expected, 1)]
    assert problems[-2:] == [f"{name}:11: empty text", f"{name}:12: video is a number (3), not a text"]


def test_cells_of_parquet_and_of_the_datasets_package_are_checked_too(tmp_path, monkeypatch):
    rows = [{"video": "1.mp4", "text": cell} for cell in (b"a rabbit", float("nan"), None, "a bird")]
    (tmp_path / "1.mp4").write_bytes(b"something")
    reader = SimpleNamespace(read_table=lambda path: SimpleNamespace(column_names=["video", "text"], to_pylist=lambda: rows))
    package = ModuleType("pyarrow")
    package.parquet = reader
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", reader)
    faults = ["text is bytes (b'a rabbit'), not a text", "text is a number (nan), not a text", "empty text"]
    pairs, problems = table(tmp_path, "metadata.parquet", "")
    assert (pairs, problems) == ([("1.mp4", "a bird")], [f"metadata.parquet:{number}: {fault}" for number, fault in enumerate(faults, 1)])

    class Rows(list):
        column_names, features = ["video", "text"], {"video": "string"}

    hub = SimpleNamespace(Video=dict, load_dataset=lambda *args, **settings: Rows(rows))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    args = {"dataset_name": "a/b", "dataset_config_name": None, "cache_dir": None}
    args |= {"caption_column": None, "video_column": None, "image_column": None}
    records, problems, _ = list_clips(SimpleNamespace(**args, id_token=None, encoding_cache_dir=tmp_path))
    assert [record.caption for record in records] == ["a bird"]
    assert problems == [f"a/b:{number}: {fault}" for number, fault in enumerate(faults, 1)]


def test_every_row_that_is_no_json_is_named(tmp_path):
    rows = ['{"video": "1.mp4", "text": "a"}', "{'video': '2.mp4'}", '"3.mp4"', "", '{"video": "4.mp4", "text": "d"}']
    pairs, problems = table(tmp_path, "metadata.jsonl", "\n".join(rows))
    assert pairs == [("1.mp4", "a"), ("4.mp4", "d")]
    assert problems[0].startswith("metadata.jsonl:2: not JSON (Expecting property name")
    assert problems[1:] == ["metadata.jsonl:3: is no object"]


@pytest.mark.parametrize(
    "content",
    [
        [{"video": "1.mp4", "text": "a"}, {"video": "2.mp4", "text": "b"}],
        [{"file_path": "1.mp4", "text": "a", "type": "video"}, {"file_path": "2.mp4", "text": "b", "type": "video"}],  # VideoX-Fun
        [{"video_path": "1.mp4", "caption": "a"}, {"video_path": "2.mp4", "caption": "b"}],  # musubi-tuner
        {"1.mp4": "a", "2.mp4": "b"},
        {"1.mp4": {"caption": "a", "tags": "x"}, "2.mp4": {"caption": "b"}},  # kohya's scripts
    ],
)
def test_the_json_tables_of_other_trainers_are_read(tmp_path, content):
    assert table(tmp_path, "metadata.json", json.dumps(content)) == ([("1.mp4", "a"), ("2.mp4", "b")], [])


def test_another_json_file_is_named_and_never_hides_the_texts_of_the_clips(tmp_path):
    for content in ([1, 2], {"version": 1}, "text"):
        assert (
            "neither a list of objects nor an object of file names and captions"
            in table(tmp_path, "metadata.json", json.dumps(content))[1][0]
        )
    for number in range(1, 5):
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    assert [record.caption for record in read_records(tmp_path)[0]] == [f"caption {number}" for number in range(1, 5)]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/captions.json").write_text("[]")
    assert "there is captions.json: a table is given as --instance_data_root" in read_records(tmp_path / "other")[1][0]


def test_columns_are_those_of_the_flags_else_the_first_known_ones(tmp_path):
    text = "path,video,prompt,text\n1.mp4,2.mp4,a,b\n"
    assert table(tmp_path, "metadata.csv", text)[0] == [("2.mp4", "b")]
    records, _, _ = read_records(tmp_path, "prompt", "path")
    assert [(record.listed, record.caption) for record in records] == [("1.mp4", "a")]
    assert "no column text, video (it has: a, b)" in table(tmp_path, "metadata.csv", "a,b\n1.mp4,a\n")[1][0]


# -----------------------------------------------------------------------------
# Files that are not trained on


def left_out(root, **settings):
    """The names of files that a run on `root` leaves out."""
    records, problems, layout = read_records(root)
    assert problems == []
    args = {
        "caption_column": None,
        "video_column": None,
        "image_column": None,
        "instance_data_root": str(root),
        "eval_data_root": None,
        "prior_data_root": None,
        "encoding_cache_dir": "/no",
    }
    return files_left_out(SimpleNamespace(**args | settings), root, records, layout)


def add(root, *names):
    """Small files below a folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"something")


STRAY = ["extra.mp4", "videos/deep/b.mkv", "notes.txt", "videos/a.xyz"]
SYSTEMS = [".DS_Store", "videos/._02.mp4", "videos/Thumbs.db", "desktop.ini", ".git/config.mp4"]


@pytest.mark.parametrize("layout", ["lines", "csv", "jsonl", "json", "labels", "beside"])
def test_files_of_the_folder_that_are_not_trained_on_are_named(clips, layout):
    records, _, _ = read_records(clips)
    if layout != "lines":
        (clips / "prompts.txt").unlink()
        (clips / "videos.txt").unlink()
        rows = [{"video": record.listed, "text": record.caption} for record in records]
        texts = {
            "csv": "video,text\n" + "".join(f'{row["video"]},"{row["text"]}"\n' for row in rows),
            "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            "json": json.dumps(rows),
        }
        if layout in texts:
            (clips / f"metadata.{layout}").write_text(texts[layout])
        for record in records if layout not in texts else []:
            text = clips / ("labels" if layout == "labels" else "videos") / Path(record.listed).with_suffix(".txt").name
            text.parent.mkdir(exist_ok=True)
            text.write_text(record.caption)
    assert left_out(clips) == []
    add(clips, *STRAY, *SYSTEMS)
    assert sorted(left_out(clips)) == sorted(STRAY)
    assert set(left_out(clips)[:2]) == {"extra.mp4", "videos/deep/b.mkv"}  # clips come first
    assert [(r.path, r.caption) for r in read_records(clips)[0]] == [(r.path, r.caption) for r in records]


def test_a_caption_without_a_clip_and_a_clip_without_a_list_are_named_and_runs_and_caches_are_not(clips, tmp_path):
    add(clips, "labels/99.txt", "run/dataset_report.txt", "run/validation/a.mp4", "cache/clips/a.safetensors", "eval/videos/b.mp4")
    (clips / "videos.txt").write_text("\n".join((clips / "videos.txt").read_text().splitlines()[1:]))
    (clips / "prompts.txt").write_text("\n".join((clips / "prompts.txt").read_text().splitlines()[1:]))
    settings = {"encoding_cache_dir": str(clips / "cache"), "eval_data_root": str(clips / "eval"), "prior_data_root": None}
    assert left_out(clips, **settings) == ["videos/02.mp4", "labels/99.txt"]
    shutil.move(clips / "videos", tmp_path / "elsewhere")
    (clips / "videos").symlink_to(tmp_path / "elsewhere")
    args = SimpleNamespace(caption_column=None, video_column=None, image_column=None, instance_data_root=str(clips), **settings)
    records, _, layout = read_records(clips, allow_external_paths=True)
    assert files_left_out(args, clips, records, layout) == ["videos/02.mp4", "labels/99.txt"]


def test_a_table_elsewhere_names_what_lies_beside_its_clips_only(clips):
    records, _, _ = read_records(clips)
    add(clips, "other.mp4", "videos/more.mp4")
    (clips / "list.json").write_text(json.dumps({record.listed: record.caption for record in records}))
    assert left_out(clips / "list.json") == ["videos/more.mp4"]


def test_the_report_names_what_is_left_out_and_shortens_a_long_list(clips, until_encoding, check, capsys):
    add(clips, *(f"videos/{number}.mp4" for number in range(100, 120)), "notes.md", ".hidden.mp4")
    output = until_encoding(data=clips)
    dataset, report = read_json(output / "dataset.json"), (output / "dataset_report.txt").read_text()
    assert len(dataset["left_out"]) == 21
    first = ", ".join(f"videos/{number}.mp4" for number in range(100, 108))
    assert f"20 clips or pictures of the folder are not trained on: {first} and 12 more\n" in report
    assert "1 other files of the folder are not trained on: notes.md\n" in report
    assert "20 clips or pictures of the folder are not trained on" in capsys.readouterr().err
    check(clips)
    assert "1 other files of the folder are not trained on: notes.md\n" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Names


ODD_NAMES = [b"caf\xe9.mp4", b"~x.mp4", b"~root.mp4", b"file:x.mp4", b"concat:a.mp4", b"-x.mp4", b"%03d a?#&*[1].mp4", "兔子.mp4".encode()]


@pytest.fixture
def oddly_named(six_clips, tmp_path, monkeypatch):
    """The current folder, with one clip under odd names, each with a caption."""
    root = tmp_path / os.fsdecode(b"d\xe9ta")
    root.mkdir()
    for name in map(os.fsdecode, ODD_NAMES):
        shutil.copy(six_clips / "videos/04.mp4", root / name)
        (root / name).with_suffix(".txt").write_text("a rabbit runs")
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(picture).save(root / os.fsdecode(b"\xe9.png"))
    (root / os.fsdecode(b"\xe9.txt")).write_text("a picture")
    monkeypatch.chdir(root)
    return root


def test_every_reader_reads_files_of_any_name(oddly_named, six_clips, tmp_path):
    args = SimpleNamespace(dataset_name=None, instance_data_root=".", caption_column=None, video_column=None, allow_external_paths=False)
    args.id_token, args.image_column, args.encoding_cache_dir = None, None, str(tmp_path / "cache")
    records, problems, _ = list_clips(args)
    assert problems == []
    assert {os.fsencode(record.listed) for record in records} == {*ODD_NAMES, b"\xe9.png"}
    assert [record.reason for record in records] == [None] * 9
    assert all(os.path.isabs(record.path) for record in records)
    small = Framing(8, 5, ((32, 48),))
    with Readers(1) as readers:
        for reader in ("decord", "pyav"):
            _, expected = readers.read(six_clips / "videos/04.mp4", small, reader=reader)
            for record in (record for record in records if record.listed.endswith("mp4")):
                facts, frames = readers.read(record.path, small, reader=reader)
                assert facts["reader"] == reader
                assert (frames == expected).all(), record.listed
        (picture,) = [record for record in records if record.listed.endswith("png")]
        assert readers.read(picture.path, small)[1].shape == (1, 32, 48, 3)
        assert readers.read(picture.path, clip_framing(picture, Framing(8, 5, ((48, 32),), reshape_mode="random"), 1))[0]["height"] == 48


@pytest.mark.slow
def test_a_run_on_files_of_any_name_ends_well(oddly_named, train, tmp_path):
    flags = {"video_reshape_mode": "random", "eval_share": 0.2, "eval_clips": 1, "report_to": "tensorboard"}
    output = train(data=oddly_named, output=tmp_path / "兔子 out", cache=tmp_path / "cache", **flags)
    dataset = read_json(output / "dataset.json")
    assert {os.fsencode(clip["path"]) for clip in dataset["clips"]} == {*ODD_NAMES, b"\xe9.png"}
    assert [clip["problem"] for clip in dataset["clips"]] == [None] * 9
    assert dataset["left_out"] == []
    assert "\ncaf?.mp4 " in (output / "dataset_report.txt").read_text(encoding="utf-8")
    assert "caf?.mp4" in (output / "report.html").read_text(encoding="utf-8")


def test_a_crop_of_a_plain_name_stays_where_it_was():
    crops = [
        clip_framing(SimpleNamespace(listed=name, window=None), Framing(8, 5, ((32, 48),), reshape_mode="random"), 42)
        for name in ("a.mp4", "é.mp4")
    ]
    assert [(round(crop.crop_x * 255), round(crop.crop_y * 255)) for crop in crops] == [(207, 21), (3, 5)]


@pytest.mark.parametrize(
    ("name", "expected"), [("~", "HOME"), ("~/x.mp4", "HOME/x.mp4"), ("~x.mp4", "~x.mp4"), ("~root/x", "~root/x"), ("a/~/b", "a/~/b")]
)
def test_only_a_tilde_with_a_slash_is_the_home_folder(monkeypatch, name, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    assert at_home(name) == at_home(Path(name)) == expected.replace("HOME", "/home/someone")


def test_no_other_code_expands_a_tilde():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("cogvideox/*.py"), *ROOT.glob("tools/**/*.py")]
    assert [path.name for path in sources if "expanduser" in path.read_text()] == ["files.py"]
    assert Path(files.__file__).read_text().count("expanduser") == 1


@pytest.mark.parametrize(
    ("listed", "hint"),
    [
        ("videos\\02.mp4", "; there is videos/02.mp4, with / between folders"),
        ("C:\\data\\videos\\02.mp4", "; there is videos/02.mp4, with / between folders"),
        ('"videos/02.mp4"', "; there is videos/02.mp4"),
        ("/home/me/data/videos/02.mp4", "; there is videos/02.mp4"),
        ("videos\\03.mp4", ""),
        (unicodedata.normalize("NFD", "videos/é.mp4"), "; there is videos/é.mp4"),
        ("\ud800.mp4", None),
    ],
)
def test_another_systems_spelling_of_a_name_is_hinted_at(tmp_path, listed, hint):
    add(tmp_path, "videos/02.mp4", "videos/é.mp4")
    _, reason = locate(tmp_path, listed, allow_external_paths=False)
    assert reason == f"no such file{hint}" if hint is not None else reason.startswith("cannot be opened")
    assert locate(tmp_path, "videos/02.mp4", False) == (tmp_path / "videos/02.mp4", None)


def test_a_name_with_a_backslash_is_a_name(tmp_path):
    add(tmp_path, "a\\b.mp4", "a:/x.mp4")
    assert locate(tmp_path, "a\\b.mp4", False) == (tmp_path / "a\\b.mp4", None)
    assert locate(tmp_path, "a://x.mp4", False) == (tmp_path / "a:/x.mp4", None)


def test_a_terminal_of_another_encoding_shows_escapes():
    code = "import cogvideox.console; print('兔 caf\\udce9')"
    settings = {"env": environment() | {"PYTHONIOENCODING": "ascii:strict"}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **settings)
    assert (done.returncode, done.stdout) == (0, "\\u5154 caf\\udce9\n"), done.stderr


# -----------------------------------------------------------------------------
# Text in pictures


def drawn(text):
    """The pixels of a line of text."""
    picture = Image.new("RGB", (400, 18), "white")
    video.draw_text(ImageDraw.Draw(picture), 4, 13, text)
    return np.asarray(picture)


@pytest.fixture
def no_other_fonts(monkeypatch):
    """No fonts but matplotlib's."""
    monkeypatch.setattr(video, "system_fonts", list)
    monkeypatch.setattr(video, "CJK_FONT", "no_such_package")
    video.font_of.cache_clear()
    yield monkeypatch
    video.font_of.cache_clear()


def test_each_letter_of_these_alphabets_has_a_shape_of_its_own(no_other_fonts):
    letters = "БДЖЯёЇαβλαøłğő"
    shapes = {letter: drawn(letter).tobytes() for letter in letters}
    assert len(set(shapes.values())) == len(set(letters))  # a box would be the same for all
    assert (drawn("caf\u00e9") == drawn("cafe\u0301")).all()
    assert (drawn("rabbit") != drawn("rabbis")).any()


def test_what_no_font_has_is_written_as_an_escape(no_other_fonts):
    assert (drawn("兔 Ж") == drawn("\\u5154 Ж")).all()
    assert (drawn("🐇 \x1b[1m caf\udce9 Ж") == drawn("\\U0001f407 \\x1b[1m caf\\udce9 Ж")).all()
    assert (drawn("兔 Ж") != drawn("\\u732b Ж")).any()


def test_the_optional_package_and_then_the_systems_fonts_have_the_other_letters(no_other_fonts, tmp_path):
    import matplotlib

    font, sign = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf"), "\u2312"  # a sign that DejaVu Sans lacks
    escaped = drawn(sign)
    assert (escaped == drawn(f"\\u{ord(sign):04x}")).mean() > 0.9
    no_other_fonts.setattr(video, "system_fonts", lambda: ["/no/such.ttf", str(font)])
    video.font_of.cache_clear()
    from_system = drawn(sign)
    no_other_fonts.setattr(video, "system_fonts", list)
    video.font_of.cache_clear()
    add(tmp_path, "some_font/__init__.py")
    shutil.copy(font, tmp_path / "some_font/some.otf")
    no_other_fonts.syspath_prepend(tmp_path)
    no_other_fonts.setattr(video, "CJK_FONT", "some_font")
    assert (drawn(sign) == from_system).all()
    assert (from_system != escaped).any()


def test_a_contact_sheet_has_its_title_and_labels_in_these_fonts(no_other_fonts, tmp_path):
    sheets = []
    for title, label in itertools.product(("Жук", "Жил"), ("兔子.mp4: Кролик", "\\u5154\\u5b50.mp4: Кролик", "Крот")):
        video.contact_sheet(tmp_path / "sheet.png", [(label, np.zeros((1, 20, 100, 3), np.uint8))], title)
        sheets.append(np.asarray(Image.open(tmp_path / "sheet.png")))
    assert (sheets[0] == sheets[1]).all()
    assert (sheets[0] != sheets[2]).any()
    assert (sheets[0][:18] != sheets[3][:18]).any()
    assert (sheets[0][18:] == sheets[3][18:]).all()
