"""tools.caption, with a tiny random model of the real class and with a stand-in for a server: every clip gets a caption that CogVideoX
can read, of the frames that are trained on, none is lost, and none that a person wrote is touched."""

import base64
import io
import json
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration

from cogvideox import folder, survey
from cogvideox.decode import clip_framing
from cogvideox.files import read_json_lines
from cogvideox.reader import Readers
from dataset import files_left_out, read_records
from tests.conftest import ROOT
from tools import check_dataset
from tools.caption import __main__ as program
from tools.caption import lists, model, rules

GOOD = (
    "A large grey rabbit with round cheeks and soft fur stands on a green meadow beside an old oak tree. It lifts its head, sniffs the "
    "warm air and slowly turns towards a small yellow butterfly that flutters past its nose. Moments later the rabbit reaches out with "
    "one paw and smiles. Finally it sits down in the grass and watches the butterfly rise into a clear blue sky. Bright morning light "
    "falls through the leaves and lays soft shadows on the ground. The mood is calm, gentle and playful, like the first day of summer."
)
SIZE = ["--height", "32", "--width", "48", "--max_num_frames", "9"]
LIMIT = 226


@pytest.fixture(scope="module")
def tokenizer():
    """CogVideoX's T5 tokenizer."""
    return folder.load_tokenizer(ROOT / "demo")


# -----------------------------------------------------------------------------
# Rules


def test_a_caption_in_the_models_style_keeps_all_rules(tokenizer):
    assert rules.faults_of(GOOD, tokenizer, "BUNNYTOON", LIMIT) == []
    assert 90 <= len(GOOD.split()) <= 100
    assert rules.tidy(f'<think>a rabbit</think>\n**Caption:** "{GOOD}"') == GOOD
    assert rules.tidy(GOOD.replace(" on a", "\non a")) == GOOD


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("", "it was empty"),
        ("A rabbit stands on a meadow.", "it had 6 words"),
        (f"{GOOD} {GOOD.replace('rabbit', 'hare').replace('grass', 'moss')}", "it was too long"),
        (f"The video shows a rabbit. {GOOD}", 'it began with "The video"'),
        (f"In this short clip, a rabbit runs. {GOOD}", 'it began with "In this short clip"'),
        (f"Sure! {GOOD}", 'it began with "Sure"'),
        (f"A video of a rabbit. {GOOD}", 'it began with "A video"'),
        (f"{GOOD} The camera cuts to a bird.", 'it said "camera cuts"'),
        (f"{GOOD} In the last frame it sleeps.", 'it said "last frame"'),
        (f"{GOOD}\n\nIt sleeps.", "several paragraphs"),
        (f"- {GOOD}\n- It sleeps.", "it was a list"),
        (f"1. {GOOD}", "it was a list"),
        (f"{GOOD} Finally it sleeps. Finally it sleeps!", "it said a sentence twice"),
        (f"{GOOD} Finally it", "its last sentence had no end"),
        (f"{GOOD} A naïve 兔 sleeps.", "characters that cannot be read (ï 兔)"),
    ],
)
def test_a_broken_rule_is_named(tokenizer, answer, fault):
    assert fault in "; ".join(rules.faults_of(rules.tidy(answer), tokenizer, None, LIMIT))


@pytest.mark.parametrize(
    "start", ["A picture frame hangs on the wall.", "A hair clip holds her curls.", "The camera follows a dog.", "An iris opens."]
)
def test_things_that_a_video_may_show_are_no_faults(tokenizer, start):
    assert rules.faults_of(f"{start} {GOOD}", tokenizer, None, LIMIT) == []


def test_tokens_are_t5s_and_the_trigger_word_counts(tokenizer):
    own = len(tokenizer(GOOD).input_ids)
    assert rules.count_tokens(GOOD, tokenizer, None) == own
    assert rules.count_tokens(GOOD, tokenizer, "BUNNYTOON") > own
    assert rules.faults_of(GOOD, tokenizer, None, own) == []
    assert "too long" in rules.faults_of(GOOD, tokenizer, "BUNNYTOON", own)[0]


def test_the_best_answer_is_shortened_at_the_end_of_a_sentence_or_there_is_none(tokenizer):
    long = f"{GOOD} {GOOD.replace('rabbit', 'hare')} And then"
    part, was_shortened = rules.best_of(["A rabbit.", long], tokenizer, None, LIMIT)
    assert was_shortened
    assert part != long
    assert part.endswith(".")
    assert part.startswith(GOOD)
    assert rules.faults_of(part, tokenizer, None, LIMIT) == []
    assert rules.best_of(["A rabbit.", f"The video shows it. {GOOD}", "word " * 90], tokenizer, None, LIMIT) == (None, False)
    assert rules.best_of([long, GOOD], tokenizer, None, LIMIT) == (GOOD, False)


# -----------------------------------------------------------------------------
# A server


class Server:
    """What vLLM and Ollama answer, as far as the tool asks. Keeps the messages and the pictures of each request.

    answers: called with the number of the request and the prompt; an int is a status.
    """

    def __init__(self, answers):
        self.answers, self.prompts, self.pictures, self.times = answers, [], [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({"object": "list", "data": [{"id": "tiny-vlm", "object": "model", "created": 0, "owned_by": "test"}]})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                (message,) = request["messages"]
                urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
                texts = [part["text"] for part in message["content"] if part["type"] == "text"]
                answer = server.answers(len(server.prompts), texts[-1])
                server.prompts.append(texts[-1])
                server.times.append(texts[:-1])
                server.pictures.append([np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls])
                assert request["model"] == "tiny-vlm"
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
                self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": "tiny-vlm", "choices": [choice]})

            def reply(self, content):
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@contextmanager
def serving(answers):
    """A Server at work."""
    server = Server(answers)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def numbered(number, prompt=None):
    """A good caption that no other number gets."""
    names = ["ash", "beech", "birch", "cedar", "elm", "fir", "larch", "lime", "maple", "oak", "pine", "plum", "rowan", "willow", "yew"]
    return GOOD.replace("old oak", f"old {names[number]}")


def uncaptioned(clips, keep=0):
    """Leave only the first captions of a folder. Returns them."""
    lines = (clips / "prompts.txt").read_text().splitlines()[:keep]
    (clips / "prompts.txt").write_text("".join(f"{line}\n" for line in lines))
    return lines


class GreyFrames:
    """`Readers` of grey clips: starting a process and decoding take longer than the rest of a test."""

    def __init__(self, workers, timeout_seconds):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def read_all(self, requests):
        for _ in requests:
            yield {}, np.full((9, 32, 48, 3), 128, np.uint8), None


@pytest.fixture
def caption(tmp_path, encodings, tokenizer, monkeypatch):
    """tools.caption in this process."""
    monkeypatch.setattr(program, "Readers", GreyFrames)
    monkeypatch.setattr(program, "load_tokenizer", lambda path: tokenizer)

    def run(root, *words, endpoint=None):
        line = [root, *SIZE, "--encoding_cache_dir", encodings, "--sheet", tmp_path / "sheet.png", *words]
        line += ["--endpoint", endpoint] if endpoint else []
        program.main([str(word) for word in line])

    return run


def told(run, code, capsys, *arguments, **settings):
    """What a run has said that ends with this exit code."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments, **settings)
    out, err = capsys.readouterr()
    assert stop.value.code == code, out + err
    return out + err


def captions_in(root):
    """The captions that the trainer reads, all of them."""
    records, problems, _ = read_records(root)
    assert problems == []
    return [record.caption for record in records]


def test_bad_answers_are_asked_for_again_with_the_reason_and_every_clip_gets_its_own_caption(clips, caption, capsys, tokenizer):
    kept = uncaptioned(clips, keep=2)
    answers = ["The video shows a rabbit.", "", "- a\n- b"] + [numbered(i) for i in range(4)]
    order = [0, 3, 1, 4, 2, 5, 6]  # the first three clips are answered badly at first

    with serving(lambda number, prompt: answers[order[number]]) as server:
        caption(clips, "--samples", "0", "--id_token", "BUNNYTOON", "--tries", "2", endpoint=server.endpoint)
    assert captions_in(clips) == kept + [numbered(i) for i in range(4)]
    assert rules.PROMPT in server.prompts[1]
    assert 'Your last answer was: "The video shows a rabbit."' in server.prompts[1]
    assert 'it began with "The video"; begin with the subject itself' in server.prompts[1]
    assert server.prompts[0] == server.prompts[6] == rules.PROMPT
    err = capsys.readouterr().err
    assert "4 of 6 clips are to be captioned; 2 captions stay as they are" in err
    count = rules.count_tokens(numbered(0), tokenizer, "BUNNYTOON")
    assert f"4 captions written: median {len(GOOD.split())} words, {count} of 226 tokens" in err
    assert "3 asked for again, 0 shortened, 0 without" in err
    assert "2 captions already begin with BUNNYTOON, which --id_token puts there once more in training: videos/02.mp4, videos/04.mp4" in err


def read_window(root, number, args):
    """The frames of a clip as the trainer reads them."""
    records, _, _ = read_records(root, may_lack_captions=True)
    framing = survey.framing_of(args, folder.COGVIDEOX_2B)
    with Readers(1) as readers:
        return readers.read(records[number].path, clip_framing(records[number], framing, 42))[1]


@pytest.mark.slow
def test_the_model_sees_the_frames_of_the_window_that_is_trained_with_their_times(clips, caption, monkeypatch):
    monkeypatch.setattr(program, "Readers", Readers)
    lines = ["videos/02.mp4 | 0.000-0.625", "videos/02.mp4 | 1.250-1.875"]
    (clips / "videos.txt").write_text("\n".join(lines))
    uncaptioned(clips)
    with serving(numbered) as server:
        caption(clips, "--samples", "0", "--frames", "3", endpoint=server.endpoint)
    args = program.parse([str(clips), *SIZE])
    windows = [read_window(clips, number, args) for number in (0, 1)]
    assert [len(window) for window in windows] == [5, 5]
    for number in (0, 1):
        assert len(server.pictures[number]) == 3
        for picture, index in zip(server.pictures[number], (0, 2, 4), strict=True):
            own, other = (np.abs(picture.astype(int) - window[index]).mean() for window in (windows[number], windows[1 - number]))
            assert own < 3
            assert other > 4 * own
    assert server.times[0] == ["At 0.0 seconds:", "At 0.2 seconds:", "At 0.5 seconds:"]
    assert captions_in(clips) == [numbered(0), numbered(1)]


def test_large_frames_are_shrunk_and_small_ones_left_alone():
    frames = np.zeros((9, 40, 60, 3), np.uint8)
    assert {picture.size for _, picture in model.pictures_of(frames, 8, 8, 30)} == {(30, 20)}
    assert {picture.size for _, picture in model.pictures_of(frames, 8, 8, 512)} == {(60, 40)}
    assert [at for at, _ in model.pictures_of(frames, 8, 3, 512)] == [0, 0.5, 1]
    assert len(model.pictures_of(frames[:1], 8, 8, 512)) == 1


def test_a_clip_whose_answers_all_break_rules_stays_open_and_is_named(clips, caption, capsys):
    uncaptioned(clips, keep=4)
    with serving(lambda number, prompt: numbered(number) if number > 1 else "A rabbit.") as server:
        said = told(caption, 3, capsys, clips, "--samples", "0", "--tries", "2", endpoint=server.endpoint)
    assert "ERROR[3]: videos.txt:5: videos/07.mp4: no caption after 2 tries (it had 2 words, and 90 to 100 words are needed)" in said
    lines = (clips / "prompts.txt").read_text().splitlines()
    assert lines[4:] == ["", numbered(2)]
    with serving(numbered) as server:
        caption(clips, "--samples", "0", endpoint=server.endpoint)
    assert len(server.prompts) == 1
    assert captions_in(clips)[4:] == [numbered(0), numbered(2)]


def test_a_persons_caption_stays_and_a_placeholder_does_not(clips, caption):
    kept = uncaptioned(clips, keep=6)
    (clips / "prepare.json").write_text(json.dumps({"placeholders": {"videos/04.mp4": kept[1], "videos/05.mp4": "another text"}}))
    with serving(numbered) as server:
        caption(clips, "--samples", "0", endpoint=server.endpoint)
        assert captions_in(clips) == [kept[0], numbered(0), *kept[2:]]
        caption(clips, "--samples", "0", endpoint=server.endpoint)
        assert len(server.prompts) == 1
        caption(clips, "--samples", "0", "--redo", endpoint=server.endpoint)
        assert captions_in(clips) == [kept[0], numbered(1), *kept[2:]]
        edited = numbered(1).replace("grey", "white")
        (clips / "prompts.txt").write_text((clips / "prompts.txt").read_text().replace(numbered(1), edited))
        caption(clips, "--samples", "0", "--redo", endpoint=server.endpoint)
    assert captions_in(clips) == [kept[0], edited, *kept[2:]]
    assert len(server.prompts) == 2


def test_what_a_person_writes_during_the_run_stays(clips, caption, capsys):
    uncaptioned(clips)

    def answers(number, prompt):
        if number == 1:
            lines = (clips / "prompts.txt").read_text().split("\n")
            (clips / "prompts.txt").write_text("\n".join([lines[0], "a person's caption", "another"]))
        return numbered(number)

    with serving(answers) as server:
        caption(clips, "--samples", "0", endpoint=server.endpoint)
    expected = [numbered(0), "a person's caption", "another", *(numbered(i) for i in (3, 4, 5))]
    assert captions_in(clips) == expected
    assert "2 left as they are, because somebody changed them meanwhile" in capsys.readouterr().err


def test_samples_come_first_and_nothing_is_written_without_a_yes(clips, caption, capsys, monkeypatch, tmp_path):
    uncaptioned(clips)
    with serving(numbered) as server:
        said = told(caption, 2, capsys, clips, endpoint=server.endpoint)
        assert "ERROR[2]: --yes: without a terminal nobody can be asked; look at" in said
        assert len(server.prompts) == 3
        assert " ".join(numbered(2).split()) in " ".join(said.split())
        assert Image.open(tmp_path / "sheet.png").height > 150
        answers = iter(["n\n", "y\n"])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: next(answers)))
        caption(clips, endpoint=server.endpoint)
        assert "nothing written; captions.jsonl keeps the samples" in capsys.readouterr().err
        assert (clips / "prompts.txt").read_text() == ""
        caption(clips, endpoint=server.endpoint)
    assert len(server.prompts) == 6  # the samples were not asked for again
    assert captions_in(clips) == [numbered(i) for i in (0, 3, 1, 4, 5, 2)]  # clips 1, 3 and 6 were the samples


def test_another_prompt_asks_for_new_samples(clips, caption, tmp_path):
    uncaptioned(clips, keep=5)
    (tmp_path / "prompt.txt").write_text("Describe it.\n")
    with serving(numbered) as server:
        with pytest.raises(SystemExit):
            caption(clips, endpoint=server.endpoint)
        caption(clips, "--yes", "--prompt", tmp_path / "prompt.txt", endpoint=server.endpoint)
    assert server.prompts == [rules.PROMPT, "Describe it."]
    assert captions_in(clips)[5] == numbered(1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--endpoint", "http://127.0.0.1:9/v1"], "--endpoint http://127.0.0.1:9/v1: no connection ("),
        (["--endpoint", "127.0.0.1:9"], "--endpoint 127.0.0.1:9: an address begins with http:// or https://"),
        (["--model", "no/folder/of/a/model"], "--model no/folder/of/a/model: cannot be loaded ("),
        (["--dataset_name", "a/b"], "--dataset_name: captions cannot be written into a hub dataset"),
        (["--tries", "0"], "--tries 0: must be at least 1"),
    ],
)
def test_a_mistake_ends_in_one_sentence(clips, caption, capsys, monkeypatch, words, sentence):
    uncaptioned(clips)
    monkeypatch.setattr("openai.DEFAULT_MAX_RETRIES", 0)
    monkeypatch.setattr("openai._constants.MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    said = told(caption, 2, capsys, clips, *words)
    assert f"ERROR[2]: {sentence}" in said
    assert "Traceback" not in said


def test_an_answer_that_is_an_error_ends_the_run_and_keeps_the_captions(clips, caption, capsys):
    uncaptioned(clips)
    with serving(lambda number, prompt: 404 if number == 2 else numbered(number)) as server:
        said = told(caption, 2, capsys, clips, "--samples", "0", endpoint=server.endpoint)
    assert f"ERROR[2]: --endpoint {server.endpoint}: answered 404" in said
    assert (clips / "prompts.txt").read_text() == f"{numbered(0)}\n{numbered(1)}\n"


def test_two_at_once_are_refused(clips, caption, capsys):
    from filelock import FileLock

    with FileLock(clips / ".captions.lock"):
        assert "another tools.caption is at work there; wait for it" in told(caption, 3, capsys, clips)


# -----------------------------------------------------------------------------
# Layouts

TABLES = {  # before, the number of the open row, and after
    "metadata.csv": (
        '\ufeffvideo, text ,note\r\n1.mp4,,"a, b"\r\n2.mp4,"kept, as it is",\r\n',
        2,
        '\ufeffvideo, text ,note\r\n1.mp4,A rabbit runs,"a, b"\r\n2.mp4,"kept, as it is",\r\n',
    ),
    "metadata.tsv": ("video\ttext\n2.mp4\tkept\n1.mp4\t\n", 3, "video\ttext\n2.mp4\tkept\n1.mp4\tA rabbit runs\n"),
    "metadata.jsonl": (
        '{"text":"kept","video":"2.mp4"}\n\n{"video":"1.mp4","fps":8}\n',
        3,
        '{"text":"kept","video":"2.mp4"}\n\n{"video": "1.mp4", "fps": 8, "text": "A rabbit runs"}\n',
    ),
    "metadata.json": (
        '[\n  {\n    "text": "kept",\n    "video": "2.mp4"\n  },\n  {\n    "text": null,\n    "video": "1.mp4"\n  }\n]\n',
        2,
        '[\n  {\n    "text": "kept",\n    "video": "2.mp4"\n  },\n  {\n    "text": "A rabbit runs",\n    "video": "1.mp4"\n  }\n]\n',
    ),
    "names.json": ('{"2.mp4": "kept", "1.mp4": ""}', 2, '{"2.mp4": "kept", "1.mp4": "A rabbit runs"}'),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_tables_open_cell_is_filled_and_every_other_byte_stays(tmp_path, name):
    text, number, expected = TABLES[name]
    for clip in ("1.mp4", "2.mp4"):
        (tmp_path / clip).write_bytes(b"something")
    (tmp_path / name).write_bytes(text.encode())
    args = program.parse([str(tmp_path / name)])
    records, problems, layout = lists.list_all(args)
    assert problems == []
    (record,) = [record for record in records if not record.caption]
    assert (record.listed, record.where) == ("1.mp4", f"{name}:{number}")
    assert lists.put(args, layout, record, "A rabbit runs")
    assert (tmp_path / name).read_bytes().decode() == expected
    assert not lists.put(args, layout, record, "Another")  # it is no longer open
    assert sorted(captions_in(tmp_path / name))[0] == "A rabbit runs"


def test_a_caption_with_a_comma_and_quotes_is_quoted_in_a_csv_file():
    text = lists.with_csv_cell("video,text\n1.mp4,\n", 2, "text", 'a rabbit, "running"')
    assert text == 'video,text\n1.mp4,"a rabbit, ""running"""\n'


@pytest.mark.parametrize("place", ["labels", "beside", "nothing"])
def test_a_text_file_for_each_clip_is_written_also_where_there_is_none_yet(clips, caption, place):
    for name in ("prompts.txt", "videos.txt"):
        (clips / name).unlink()
    where = clips / ("labels" if place == "labels" else "videos")
    where.mkdir(exist_ok=True)
    if place != "nothing":
        (where / "02.txt").write_text("a person's caption\n")
    with serving(numbered) as server:
        caption(clips, "--samples", "0", endpoint=server.endpoint)
    texts = [(where / f"{name}.txt").read_text() for name in ("02", "04", "05")]
    assert texts[0] == ("a person's caption\n" if place != "nothing" else f"{numbered(0)}\n")
    assert len(captions_in(clips)) == 6
    assert len(server.prompts) == (5 if place != "nothing" else 6)


def test_lines_keep_their_ends_and_their_byte_order_mark(clips):
    (clips / "prompts.txt").write_bytes("\ufeffone\r\n\r\nthree\r\n".encode())
    args = program.parse([str(clips)])
    records, _, layout = lists.list_all(args)
    assert [record.caption for record in records] == ["one", "", "three", "", "", ""]
    assert lists.put(args, layout, records[1], "two")
    assert lists.put(args, layout, records[4], "five")
    assert (clips / "prompts.txt").read_bytes() == "\ufeffone\r\ntwo\r\nthree\r\n\r\nfive\r\n".encode()


def test_the_trainer_still_refuses_a_missing_caption(clips):
    uncaptioned(clips, keep=2)
    assert "videos.txt:3 ('videos/05.mp4') has no partner in prompts.txt" in read_records(clips)[1][0]
    (clips / "prompts.txt").unlink()
    assert "no such file" in read_records(clips)[1][0]


def test_the_files_of_the_tools_are_not_named_as_left_out(clips):
    for name in ("captions.jsonl", "prepare.json", "other.json"):
        (clips / name).write_text("{}")
    args = program.parse([str(clips)])
    records, _, layout = read_records(clips)
    assert files_left_out(args, clips, records, layout) == ["other.json"]


# -----------------------------------------------------------------------------
# A model on this machine

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_vlm(path):
    """A random SmolVLM that says words of GOOD, in the files of a hub model."""
    vocabulary = [*SPECIAL, *sorted(set(GOOD.split()))]  # some words end a sentence
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, **names, additional_special_tokens=SPECIAL[4:], clean_up_tokenization_spaces=True
    )
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": len(vocabulary), **ids}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    network = SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=4, scale_factor=2))
    network.generation_config.pad_token_id, network.generation_config.eos_token_id = 0, None  # it never ends
    images = getattr(transformers, "SmolVLMImageProcessorPil", None) or transformers.SmolVLMImageProcessor
    for part in (network, fast, images(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})):
        part.save_pretrained(path)
    (path / "processor_config.json").write_text(json.dumps({"processor_class": "SmolVLMProcessor", "image_seq_len": 4}))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """The folder of a tiny vision-language model of SmolVLM's class."""
    return make_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.mark.slow
def test_a_real_class_reads_the_frames_without_torchvision_and_repeats_its_answers(vlm, monkeypatch):
    assert not transformers.utils.is_torchvision_available()
    monkeypatch.setattr(model, "MOST_NEW_TOKENS", 12)
    write = model.local_writer(str(vlm), 42)
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)
    pictures, others = model.pictures_of(frames, 8, 8, 512), model.pictures_of(255 - frames, 8, 8, 512)
    answers = [write(pictures, "Describe the rabbit.", number) for number in (0, 1, 2)]
    assert [write(pictures, "Describe the rabbit.", number) for number in (0, 1, 2)] == answers
    assert len(set(answers)) == 3
    assert all(set(re.findall(r"\w+", answer)) <= set(re.findall(r"\w+", GOOD)) for answer in answers)
    assert write(others, "Describe the rabbit.", 1) != answers[1]


@pytest.mark.slow
def test_a_run_of_the_real_class_is_killed_and_resumed_and_writes_what_one_run_would_have(
    forked, clips, vlm, tokenizer, encodings, tmp_path
):
    """Its words are random and never end, so that every answer is too long and is asked for again, or shortened."""
    kept, other = uncaptioned(clips, keep=1), shutil.copytree(clips, tmp_path / "other")
    line = [*SIZE, "--model", vlm, "--samples", "0", "--frames", "2", "--encoding_cache_dir", encodings]
    program.main([str(word) for word in [other, *line]])
    expected = captions_in(other)
    assert len(set(expected)) == 6
    for kill in (True, True, True, False):
        before = len(read_json_lines(clips / "captions.jsonl"))
        (run,) = forked.start([clips, *line], module="tools.caption")
        while kill and run.poll() is None and len(read_json_lines(clips / "captions.jsonl")) == before:
            time.sleep(0.005)
        if kill:
            run.send_signal(signal.SIGKILL)
        assert run.wait(150) == (-signal.SIGKILL if kill else 0), run.output()
        open_lines = [record.caption for record in read_records(clips, may_lack_captions=True)[0]]
        assert all(line in ("", caption) for line, caption in zip(open_lines, expected, strict=True))
    assert captions_in(clips) == expected
    assert expected[:1] == kept
    assert all(rules.faults_of(caption, tokenizer, None, LIMIT) == [] for caption in expected[1:])
    assert sorted(entry["caption"] for entry in read_json_lines(clips / "captions.jsonl")) == sorted(expected[1:])  # each asked for once


# -----------------------------------------------------------------------------
# The audit


def audit(clips, *captions, id_token=None):
    """The audit's sentences of a folder with these captions."""
    lines = [*captions, *(numbered(i) for i in range(6 - len(captions)))]
    (clips / "prompts.txt").write_text("".join(f"{line}\n" for line in lines))
    records, problems, _ = read_records(clips)
    assert problems == []
    if id_token:
        records = [SimpleNamespace(listed=record.listed, caption=f"{id_token} {record.caption}") for record in records]
    return list(survey.caption_audit(records, id_token, clips))


def test_short_captions_and_placeholders_are_named(clips):
    captions = [f"The {name} rabbit runs." for name in ("white", "grey")]
    others = [" ".join(numbered(i).split()[::-1]) for i in range(4)]
    (clips / "prepare.json").write_text(json.dumps({"placeholders": {"videos/02.mp4": captions[0]}}))
    found = audit(clips, *captions, *others)
    assert found[0].startswith("1 captions are placeholders of tools.prepare")
    assert found[0].endswith(": videos/02.mp4")
    assert found[1].startswith("1 captions have fewer than 20 words; CogVideoX was trained on 90 to 100")
    assert found[1].endswith(": videos/04.mp4")


def test_captions_that_begin_alike_are_named_and_equal_ones_are_not_named_twice(clips):
    distinct = [" ".join([*GOOD.split()[3 * i :], *GOOD.split()[: 3 * i]]) for i in range(6)]
    assert audit(clips, *distinct) == []
    assert audit(clips, *distinct[:5], distinct[0]) == []
    (sentence,) = audit(clips, *distinct[:5], f"{distinct[0]} Then it sleeps.")
    assert sentence == "2 captions begin with the same 10 words as another that differs: videos/02.mp4, videos/08.mp4"


@pytest.mark.parametrize(
    ("start", "id_token", "sentence"),
    [
        ("DISNEYa mouse", "DISNEY", "1 captions have a trigger word without a space after it (DISNEYa... in the first): videos/02.mp4"),
        ("DISNEYa mouse", None, "1 captions have a trigger word without a space after it (DISNEYa... in the first): videos/02.mp4"),
        ("DISNEY a mouse", "DISNEY", "1 captions already begin with DISNEY, which --id_token puts there once more: videos/02.mp4"),
        ("DISNEY a mouse", None, None),
        ("NASA's mouse", None, None),
        ("A mouse", "DISNEY", None),
    ],
)
def test_a_trigger_word_that_is_fused_or_stands_twice_is_named(clips, start, id_token, sentence):
    distinct = [" ".join([*GOOD.split()[3 * i :], *GOOD.split()[: 3 * i]]) for i in range(1, 6)]
    assert audit(clips, f"{start} {GOOD}", *distinct, id_token=id_token) == ([sentence] if sentence else [])


def test_check_dataset_names_pairs_of_captions_with_the_same_words(clips):
    records = read_records(clips)[0]
    assert list(check_dataset.alike_captions(records)) == []
    words = GOOD.split()
    alike = [
        SimpleNamespace(listed=f"{n}.mp4", caption=text)
        for n, text in enumerate((GOOD, " ".join(words[50:] + words[:50]), "A bird sings."))
    ]
    assert list(check_dataset.alike_captions(alike)) == ["1 pairs of captions have 80 % of their words in common: 0.mp4 and 1.mp4"]


def test_the_trainer_tells_what_the_audit_finds(clips, encodings, capsys, monkeypatch):
    monkeypatch.setattr(check_dataset, "look", lambda *arguments: ([], [], []))
    captions = [f"A rabbit number {n} runs." for n in "abcdef"]
    (clips / "prompts.txt").write_text("\n".join(captions))
    check_dataset.main([str(clips), *SIZE, "--encoding_cache_dir", str(encodings)])
    assert "6 captions have fewer than 20 words" in capsys.readouterr().out
