"""Which clips of a data folder have no caption, and writing one into any layout that the trainer reads.

A list is read again before each caption is written, and written under a temporary name: what a person writes meanwhile stays, and a kill
at any moment leaves the old list or the new one.
"""

import codecs
import csv
import io
import json
import os
import re
from pathlib import Path

from cogvideox.files import at_home, read_json_lines, write_durably
from dataset import LINE_FILES, TEXT_FILES, caption_file, choose_columns, read_records, table_rows


def list_all(args):
    """(records, problems, layout) of --instance_data_root, clips without a caption among them."""
    return read_records(args.instance_data_root, args.caption_column, args.video_column, args.allow_external_paths, may_lack_captions=True)


def folder_of(args):
    """The data folder; of a table, the one that it lies in."""
    root = Path(at_home(args.instance_data_root)).absolute()
    return root.parent if root.is_file() else root


class Journal:
    """captions.jsonl: what this tool has written, so that it never takes a person's caption for its own, and what it need not ask again.

    An entry is on disk before the list is written. settings: a hash of all that an answer depends on.
    """

    def __init__(self, path):
        self.path = path
        self.entries = [entry for entry in read_json_lines(path) if isinstance(entry, dict) and {"clip", "caption"} <= entry.keys()]

    def wrote(self, record):
        """Whether the caption of a clip is one that this tool wrote."""
        return any(entry["clip"] == record.listed and entry["caption"] == record.caption for entry in self.entries)

    def answer_for(self, record, settings):
        """The last entry for a clip with these settings, or None."""
        found = [entry for entry in self.entries if entry["clip"] == record.listed and entry.get("settings") == settings]
        return found[-1] if found else None

    def add(self, entry):
        """Append an entry, flushed to disk."""
        self.entries.append(entry)
        with open(self.path, "ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            whole = file.read(1) in (b"", b"\n")  # a kill may have left half a line
            file.write(b"" if whole else b"\n")
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def put(args, layout, record, caption):
    """Write one caption into its list. Returns False, and writes nothing, if the clip's entry has been changed since it was read."""
    records, _, now = list_all(args)
    current = next((other for other in records if other.where == record.where), None)
    if now != layout or current is None or (current.listed, current.caption) != (record.listed, record.caption):
        return False
    folder, number = folder_of(args), int(record.where.rpartition(":")[2]) if layout != TEXT_FILES else 0
    if layout == TEXT_FILES:
        path = caption_file(folder, folder / record.listed)
        write_durably(path, caption.encode() + b"\n")
        return True
    path = folder / ((args.caption_column or "prompts.txt") if layout == LINE_FILES else layout)
    content = path.read_bytes() if path.exists() else b""
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    text = content.decode("utf-8-sig")
    if layout == LINE_FILES:
        text = with_line(text, number, caption)
    else:
        column = choose_columns(table_rows(path, [])[0], args.caption_column, args.video_column)[0][0]
        with_cell = {".jsonl": with_jsonl_cell, ".json": with_json_cell}.get(path.suffix.lower(), with_csv_cell)
        text = with_cell(text, number, column, caption)
    write_durably(path, mark + text.encode())
    return True


def with_line(text, number, caption):
    """A text with another line `number`, counted from 1; all others stay as they are. Only line feeds end a line."""
    lines = text.removesuffix("\n").split("\n") if text else []
    ending = "\r" if "\r\n" in text else ""
    lines += [ending] * (number - len(lines))
    lines[number - 1] = caption + ending
    return "\n".join(lines) + "\n"


def with_csv_cell(text, number, column, caption):
    """A CSV text with another cell in the row that begins at line `number`; all other rows stay as they are."""
    lines, start, header = list(io.StringIO(text, newline="")), 0, None
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(iter(lines), delimiter=delimiter, skipinitialspace=True, strict=True)
    for cells in reader:
        first, start = start, reader.line_num
        header = header or [cell.strip() for cell in cells]
        if first == number - 1:
            cells[header.index(column)] = caption
            row, ending = io.StringIO(), "\r\n" if lines[start - 1].endswith("\r\n") else "\n"
            csv.writer(row, delimiter=delimiter, lineterminator=ending).writerow(cells)
            return "".join([*lines[:first], row.getvalue(), *lines[start:]])
    raise ValueError(f"no row begins at line {number}")


def with_jsonl_cell(text, number, column, caption):
    """A JSON-lines text with another value in the object of line `number`."""
    line = text.split("\n")[number - 1]
    row = json.loads(line.strip(), strict=False) | {column: caption}
    changed = json.dumps(row, ensure_ascii=False) + ("\r" if line.endswith("\r") else "")
    return "\n".join([*text.split("\n")[: number - 1], changed, *text.split("\n")[number:]])


def with_json_cell(text, number, column, caption):
    """A JSON text with another value in entry `number`, indented as before."""
    content = json.loads(text, strict=False)
    place = list(content)[number - 1] if isinstance(content, dict) else number - 1
    content[place] = caption if isinstance(content[place], str) else content[place] | {column: caption}
    indent = re.search(r"\n([ \t]+)\S", text)
    ending = text[len(text.rstrip()) :]
    return json.dumps(content, ensure_ascii=False, indent=indent[1] if indent else None) + ending
