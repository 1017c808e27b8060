"""Caption the clips of a data folder: python -m tools.caption ROOT [the trainer's data flags].

    python -m tools.caption ~/disney --id_token DISNEY                                    SmolVLM2 on this machine
    python -m tools.caption ~/disney --endpoint http://127.0.0.1:8000/v1                  a server: vLLM, Ollama, LM Studio, OpenAI

The model sees the frames that are trained on, so give the data flags of the run. Three samples come first, then a question. A caption
that a person wrote is never replaced. A stopped command goes on where it stopped.
"""

import contextlib
import os
import statistics
import sys
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock, Timeout

from cogvideox import flags, versions
from cogvideox.console import BAD_DATA, BAD_FLAGS, fail, progress, say
from cogvideox.decode import clip_framing
from cogvideox.files import at_home, key_of
from cogvideox.folder import UNKNOWN_REFUSED, facts_for_data, load_tokenizer, unknown_shares
from cogvideox.reader import Readers, decode_workers
from cogvideox.survey import begin_with, framing_of, is_placeholder, printable, read_placeholders, some
from cogvideox.video import contact_sheet
from dataset import JOURNAL, decodable
from tools.caption.lists import Journal, folder_of, list_all, put
from tools.caption.model import NoCaptions, local_writer, pictures_of, served_writer
from tools.caption.rules import PROMPT, best_of, count_tokens, faults_of, tidy

DEMO = Path(__file__).resolve().parent.parent.parent / "demo"
MODEL = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
OPENAI = "openai>=1.60"


def parse(words):
    """The checked flags. Ends with exit code 2 and all problems."""
    parser = flags.new_parser(__doc__)
    parser.prog, parser.usage = "python -m tools.caption", "python -m tools.caption ROOT [flags]"
    parser.add_argument("root", nargs="?", help="the data folder, or a table; or --instance_data_root")
    flag = flags.flag_group(parser, "captions")
    flag("--model", None, f"image-text-to-text model, a hub id or a folder (default: {MODEL}); with --endpoint the served model's name")
    flag("--endpoint", None, "address of a server that speaks OpenAI's protocol, such as http://127.0.0.1:8000/v1; key: OPENAI_API_KEY")
    flag("--prompt", None, "what the model is asked, or a text file with it (default: a caption in CogVideoX's style)")
    flag("--frames", 8, "frames of each clip that the model sees, evenly spaced", at_least=1)
    flag("--frame_size", 512, "pixels of the longer side of such a frame at most", at_least=16)
    flag("--tries", 3, "how often a caption that breaks a rule is asked for", at_least=1)
    flag("--samples", 3, "clips that are captioned and shown before the question whether to go on", at_least=0)
    flag("--yes", False, "go on after the samples without a question")
    flag("--redo", False, "also replace the captions that this tool wrote, unless they have been edited")
    flag("--sheet", "caption_samples.png", "where the picture of the samples goes")
    flag("--tokenizer", str(DEMO), "model folder whose tokenizer counts (default: CogVideoX's own)")
    flag("--cache_dir", None, "as of the trainer: the encodings' cache is in it")
    flag("--seed", 42, "seed of random crops, and of second answers")
    flags.add_data_flags(parser)
    flags.add_data_model_flag(flag)
    args = parser.parse_args(words)
    args.instance_data_root = args.root or args.instance_data_root
    problems = flags.out_of_bounds(args) + flags.check_data_flags(args) + check_flags(args)
    args.facts, found = facts_for_data(args)
    if problems := problems + found:
        flags.refuse(parser, problems)
    return args


def check_flags(args):
    """What is wrong with the flags beside their bounds, as sentences. Reads --prompt if it is a file."""
    problems = []
    if args.dataset_name:
        problems.append("--dataset_name: captions cannot be written into a hub dataset; give a folder or a table as ROOT")
    if args.windows != "one":
        problems.append(f"--windows {args.windows}: a line has one caption for all its windows; list each window (python -m tools.prepare)")
    if args.endpoint:
        if urlsplit(args.endpoint).scheme not in ("http", "https"):
            problems.append(f"--endpoint {args.endpoint}: an address begins with http:// or https://, such as http://127.0.0.1:8000/v1")
        if fault := versions.misfit(OPENAI):
            problems.append(f"--endpoint: {fault}; run pip install '{OPENAI}'")
    path = Path(at_home(args.prompt or ""))
    try:
        args.prompt = path.read_text(encoding="utf-8").strip() if args.prompt and path.is_file() else args.prompt or PROMPT
    except (OSError, ValueError) as error:
        problems.append(f"--prompt {path}: cannot be read ({error})")
    return problems


@dataclass(frozen=True)
class Answer:
    """A caption, or None if no try gave one; how often it was asked for; whether it was shortened; and the last answer's faults."""

    caption: str | None
    tries: int
    is_shortened: bool
    faults: list


def ask(write, pictures, args, tokenizer):
    """The Answer of a model: asked again with the reason until a caption keeps the rules, at most --tries times."""
    attempts, limit, prompt = [], args.facts.max_text_seq_length, args.prompt
    for number in range(args.tries):
        attempts.append(tidy(write(pictures, prompt, number)))
        faults = faults_of(attempts[-1], tokenizer, args.id_token, limit)
        if not faults:
            break
        last = " ".join(attempts[-1].split())[:800]
        prompt = f'{args.prompt}\n\nYour last answer was: "{last}"\nIt cannot be used: {"; ".join(faults)}. Write the paragraph again.'
    caption, is_shortened = best_of(attempts, tokenizer, args.id_token, limit)
    return Answer(caption, len(attempts), is_shortened, faults)


class Captions:
    """The captions of a run: asks for them, keeps them in the journal and writes them into the lists, one by one."""

    def __init__(self, args, layout, journal, write, name, tokenizer, readers):
        self.args, self.layout, self.journal, self.write, self.name = args, layout, journal, write, name
        self.tokenizer, self.readers, self.framing = tokenizer, readers, framing_of(args, args.facts)
        self.words, self.tokens, self.asked_again, self.shortened, self.failures, self.kept = [], [], 0, 0, [], 0

    def settings_of(self, record):
        """A hash of all that the answer for a clip depends on, but for the content of the file."""
        args, framing = self.args, asdict(clip_framing(record, self.framing, self.args.seed))
        return key_of(record.listed, framing, self.name, args.prompt, args.frames, args.frame_size, args.tries, args.id_token, args.seed)

    def make(self, records, bar):
        """Yield (record, pictures, caption) of each clip for which there is a caption, which is in the journal then."""
        requests = [(record.path, clip_framing(record, self.framing, self.args.seed)) for record in records]
        for record, (_, frames, reason) in zip(records, self.readers.read_all(requests), strict=True):
            name, settings = f"{printable(record.where)}: {printable(record.listed)}", self.settings_of(record)
            known = None if self.args.redo else self.journal.answer_for(record, settings)
            if reason:
                self.failures.append(f"{name}: {reason}")
            elif known:
                yield record, pictures_of(frames, self.framing.fps, self.args.frames, self.args.frame_size), known["caption"]
            else:
                pictures = pictures_of(frames, self.framing.fps, self.args.frames, self.args.frame_size)
                answer = ask(self.write, pictures, self.args, self.tokenizer)
                self.asked_again += answer.tries > 1
                self.shortened += answer.is_shortened
                if answer.caption is None:
                    tries = f"{answer.tries} {'try' if answer.tries == 1 else 'tries'}"
                    rule = "; give more --tries or another --model, or write it yourself"
                    self.failures.append(f"{name}: no caption after {tries} ({answer.faults[0]}){rule}")
                else:
                    made = {"clip": record.listed, "caption": answer.caption, "tries": answer.tries, "shortened": answer.is_shortened}
                    self.journal.add(made | {"model": self.name, "settings": settings})
                    yield record, pictures, answer.caption
            bar.update(1)

    def keep(self, record, caption):
        """Write a caption into its list, unless somebody has changed the entry since."""
        if not put(self.args, self.layout, record, caption):
            self.kept += 1
            return
        self.words.append(len(caption.split()))
        self.tokens.append(count_tokens(caption, self.tokenizer, self.args.id_token))

    def summary(self):
        """One sentence on what was done."""
        if not self.words:
            return "no caption written"
        tokens = f"{statistics.median(self.tokens):g} of {self.args.facts.max_text_seq_length} tokens, {max(self.tokens)} at most"
        trigger = f" with {self.args.id_token} before them" if self.args.id_token else ""
        middle = f"{len(self.words)} captions written: median {statistics.median(self.words):g} words, {tokens}{trigger}"
        changed = f"; {self.kept} left as they are, because somebody changed them meanwhile" if self.kept else ""
        return f"{middle}; {self.asked_again} asked for again, {self.shortened} shortened, {len(self.failures)} without{changed}"


def show_samples(path, samples):
    """Write the picture of the samples, each a strip of the frames that the model saw above its caption, and print the captions."""
    rows = []
    for record, pictures, caption in samples:
        small = [picture.resize((160, max(1, 160 * picture.height // picture.width))) for _, picture in pictures]
        strip = np.concatenate([np.asarray(picture) for picture in small], axis=1)
        rows.append((record.listed, strip[None]))
        rows += [(line, None) for line in textwrap.wrap(caption, max(480, strip.shape[1]) // 7)]
        say(f"\n{printable(record.listed)}\n{textwrap.fill(caption, 100)}")
    contact_sheet(path, rows, f"{len(samples)} samples: the frames that the model saw, and its caption")
    say(f"\nthe samples with their frames: {path}")


def go_on(args, count):
    """Whether to caption the rest after the samples. Ends the program with a sentence where there is nobody to ask."""
    if args.yes:
        return True
    if not sys.stdin or not sys.stdin.isatty():
        fail(BAD_FLAGS, f"--yes: without a terminal nobody can be asked; look at {args.sheet}, then give --yes to caption {count} clips")
    say(f"\ngo on with {count} clips? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def open_clips(records, journal, placeholders, redo):
    """The records that have no caption: none, the placeholder of tools.prepare or, with `redo`, one that this tool wrote."""
    return [
        record
        for record in records
        if not record.caption or is_placeholder(record.listed, record.caption, placeholders) or (redo and journal.wrote(record))
    ]


def list_open(args, tokenizer):
    """(records without a caption, sentences about those that cannot be decoded, layout, journal). Exit code 3 if the lists are wrong."""
    records, problems, layout = list_all(args)
    folder = folder_of(args)
    if layout.endswith(".parquet"):
        problems.append(f"{layout}: captions are not written into Parquet; save the table as metadata.jsonl or metadata.csv")
    if args.id_token and (share := unknown_shares(tokenizer, [args.id_token])[0]) > UNKNOWN_REFUSED:
        problems.append(f"--id_token {args.id_token}: {100 * share:.0f} % of its characters are unknown to T5; use plain Latin letters")
    if not problems and not os.access(folder, os.W_OK):
        problems.append(f"{folder}: permission denied: captions are written there")
    if problems:
        fail(BAD_DATA, problems)
    journal, placeholders = Journal(folder / JOURNAL), read_placeholders(folder)
    found = open_clips(records, journal, placeholders, args.redo)
    say(f"{len(found)} of {len(records)} clips are to be captioned; {len(records) - len(found)} captions stay as they are")
    if twice := begin_with(records, args.id_token):
        say(f"{len(twice)} captions already begin with {args.id_token}, which --id_token puts there once more in training: {some(twice)}")
    unusable = [f"{printable(r.where)}: {printable(r.listed)}: {r.reason}" for r in found if r.reason]
    found = [replace(r, path=decodable(r.path, args.encoding_cache_dir)) for r in found if not r.reason]
    return found, unusable, layout, journal


def caption_all(captions, records):
    """Caption the samples, ask, and caption the rest."""
    args, count = captions.args, min(captions.args.samples, len(records))
    chosen = {round(i * (len(records) - 1) / max(count - 1, 1)) for i in range(count)}
    first, rest = [records[i] for i in sorted(chosen)], [r for i, r in enumerate(records) if i not in chosen]
    samples = []
    if first:
        with progress(desc="samples", total=len(first), unit="clip") as bar:
            samples = list(captions.make(first, bar))
        if samples:
            show_samples(args.sheet, samples)
        if not go_on(args, len(records)):
            say(f"nothing written; {JOURNAL} keeps the samples. Change --prompt, --model or --frames, and run the command again")
            return
    for record, _, caption in samples:
        captions.keep(record, caption)
    with progress(desc="captions", total=len(rest), unit="clip", disable=not rest) as bar:
        for record, _, caption in captions.make(rest, bar):
            captions.keep(record, caption)
    say(captions.summary())


@contextlib.contextmanager
def alone_in(folder):
    """Lock a data folder against a second tools.caption, whose captions this one would write over."""
    lock = FileLock(folder / ".captions.lock", timeout=0, fallback_to_soft=False)
    try:
        if folder.is_dir():
            lock.acquire()
    except Timeout:
        fail(BAD_DATA, f"{folder}: another tools.caption is at work there; wait for it")
    except OSError:  # read-only, or a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def main(words=None):
    """The command line."""
    args = parse(words)
    tokenizer = load_tokenizer(Path(args.tokenizer))
    with alone_in(folder_of(args)):
        records, unusable, layout, journal = list_open(args, tokenizer)
        try:
            if records:
                name = args.model if args.endpoint else args.model or MODEL
                write, name = served_writer(args.endpoint, name, args.seed) if args.endpoint else (local_writer(name, args.seed), name)
                with Readers(min(2, decode_workers()), args.clip_timeout_seconds) as readers:
                    captions = Captions(args, layout, journal, write, name, tokenizer, readers)
                    caption_all(captions, records)
                unusable += captions.failures
        except NoCaptions as error:
            fail(BAD_FLAGS, f"{error}; captions so far are kept, and the same command goes on")
        except KeyboardInterrupt:
            say("stopped: captions so far are kept, and the same command goes on")
            raise SystemExit(130) from None
    if unusable:
        fail(BAD_DATA, unusable)


if __name__ == "__main__":
    main()
