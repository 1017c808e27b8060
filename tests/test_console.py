"""Messages, bars and exit codes: what reaches the terminal, from which rank, and in which form."""

import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cogvideox import console, folder, stopping
from tests.conftest import ROOT


@pytest.fixture
def level():
    """Whatever a test sets, the next one finds the usual level."""
    yield console.configure
    console.configure()
    logging.getLogger().handlers.clear()


def test_messages_stand_as_they_are_and_warnings_say_so(capsys):
    console.say("\nclips: 8")
    console.warn("a clip is short")
    console.log.debug("a detail")
    assert capsys.readouterr() == ("", "\nclips: 8\nwarning: a clip is short\n")


def test_other_ranks_are_silent_unless_a_message_is_for_every_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console.say("once a run")
    console.warn("once a run")
    console.say("process 1 of 2", on_every_rank=True)
    assert capsys.readouterr().err == "process 1 of 2\n"


def test_verbose_shows_details_with_the_time_and_the_rank_of_every_process(capsys, monkeypatch, level):
    monkeypatch.setenv("RANK", "1")
    level(verbose=True)
    console.say("\nfrom rank 1")
    with console.timed("load the VAE"):
        pass
    told = capsys.readouterr().err
    assert re.fullmatch(r"\n\d\d:\d\d:\d\d \[rank 1\] from rank 1\n\d\d:\d\d:\d\d \[rank 1\] debug: load the VAE: \d+\.\d s\n", told)


def test_a_part_that_fails_is_not_said_to_have_taken_a_time(capsys, level):
    level(verbose=True)
    with pytest.raises(ValueError, match="broken"), console.timed("load the VAE"):
        raise ValueError("broken")
    assert "load the VAE" not in capsys.readouterr().err


def test_all_problems_are_printed_once_and_the_exit_code_is_theirs(capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        console.fail(console.BAD_DATA, ["the first", "the second"])
    assert end.value.code == 3
    assert capsys.readouterr().err == "\nERROR[3]: the first\nERROR[3]: the second\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(console.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(console.signal, "signal", lambda number, handler: None)  # that of the tests themselves
    with pytest.raises(SystemExit) as end:
        console.fail(console.BAD_DATA, "the first")
    assert end.value.code == 3
    assert capsys.readouterr().err == ""


@pytest.fixture
def clock(monkeypatch):
    """The time of bars, in seconds, in a list."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("fails", "told"), [(True, False), (False, True)])
def test_a_rank_that_waits_for_the_end_of_a_refused_run_does_not_say_that_it_saves(fails, told):
    end = "console.fail(2, 'wrong')" if fails else "console.time.sleep(3)"
    words = f"from cogvideox import console, stopping; stopping.listen(); print('ready', flush=True); {end}"
    command = [sys.executable, "-c", words]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"RANK": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(1)
        process.send_signal(signal.SIGTERM)  # as the launcher does once rank 0 has ended
        error = process.communicate(timeout=30)[1].decode()
    assert ("SIGTERM: finishing the current step" in error) is told
    assert process.returncode == (2 if fails else 0)


def test_a_bar_in_a_log_file_prints_a_line_every_30_seconds(capsys, clock):
    bar = console.progress(range(100), "training", unit="step")
    for _ in bar:
        clock[0] += 1.0
        bar.set_postfix_str("loss 0.1", refresh=False)
    lines = capsys.readouterr().err.splitlines()
    steps = [int(re.search(r"(\d+)/100", line)[1]) for line in lines]
    assert steps == [0, 30, 60, 90, 100]
    bar.refresh()
    bar.close()
    assert capsys.readouterr().err == ""  # the last count once
    assert all(line.startswith("training:") for line in lines)
    assert "loss 0.1" in lines[-1]


@pytest.mark.parametrize("leave", [True, False])
def test_a_bar_that_is_drawn_often_or_inside_another_prints_no_more_lines(capsys, clock, leave):
    outer = console.progress(total=9, desc="training")
    for _ in range(2):
        with console.progress(total=3000, desc="scoring", leave=leave) as inner:
            for _ in range(310):
                clock[0] += 0.125
                inner.update()
                inner.refresh()
        outer.update()
    outer.close()
    lines = capsys.readouterr().err.splitlines()
    counts = [re.match(r"(\w+): .* (\d+)/\d+ \[", line).groups() for line in lines]
    inner = [("scoring", "0"), ("scoring", "240"), ("scoring", "310")]
    assert counts == [("training", "0"), *inner, ("training", "1"), *inner, ("training", "2")]
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_a_bar_that_an_error_ends_shows_how_far_it_came(capsys, clock):
    def broken(items):
        for item in items:
            if item == 4:
                raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken(console.progress(range(9), "copying"))
    assert "4/9" in capsys.readouterr().err.splitlines()[-1]


def test_other_ranks_draw_no_bar(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert list(console.progress(range(3), "training", disable=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_the_hubs_own_bars_are_of_this_kind(capsys, monkeypatch, clock, tmp_path):
    def download(name, tqdm_class=None, **settings):
        with tqdm_class(total=1000, desc="Downloading", disable=None) as bar:
            for _ in range(1000):
                clock[0] += 0.125
                bar.update()
                bar.refresh()
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder.find_model("owner/name", None, None, None)
    assert re.findall(r"(\d+)/1000", capsys.readouterr().err) == ["0", "240", "480", "720", "960", "1000"]


def test_every_bar_of_the_project_is_of_this_kind():
    """But the reference program's, which stands for a trainer that knows nothing of this one."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("cogvideox/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("demo/*.py")]
    users = {str(file.relative_to(ROOT)) for file in files if re.search(r"import tqdm|from tqdm|trange", file.read_text())}
    assert users == {"cogvideox/console.py", "tools/benchmark/reference.py"}


def test_a_bar_on_a_terminal_is_rewritten_in_place(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for _ in console.progress(range(3), "training", mininterval=0):
        pass
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.count("\r") >= 3


def test_nothing_heavy_is_imported_for_messages_and_flags():
    code = "import sys; import cogvideox.console, cogvideox.flags, cogvideox.stopping; print({'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "set()"


def test_a_closed_terminal_costs_messages_and_not_the_run(monkeypatch):
    class Closed:
        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            raise OSError(5, "Input/output error")

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stderr", Closed())
    console.say("nobody reads this")
    assert list(console.progress(range(3), "training")) == [0, 1, 2]


def test_a_hang_up_is_noted_unless_nohup_has_the_process_ignore_it(monkeypatch):
    for before, noted in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        handlers = {signal.SIGHUP: before}
        monkeypatch.setattr(signal, "getsignal", handlers.get)
        monkeypatch.setattr(signal, "signal", handlers.__setitem__)
        stopping.listen()
        assert (handlers[signal.SIGHUP] == stopping.note) == noted
        assert handlers[signal.SIGTERM] == stopping.note


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("reader", ["a pipe that ended", "a full disk", "closed"])
def test_output_that_nobody_can_read_changes_neither_the_run_nor_its_exit_code(name, reader):
    code = (
        "import sys, warnings; from cogvideox import console\n"
        "for _ in console.progress(range(3), 'training', mininterval=0): print('a' * 9999); print('b', file=sys.stderr); console.say('c')\n"
        "warnings.warn('d'); sys.stdout.flush(); sys.exit(7)"
    )
    ended, writer = os.pipe()
    os.close(ended)
    place, other = (1, 2) if name == "stdout" else (2, 1)
    full = os.open("/dev/full", os.O_WRONLY)
    to = {"a pipe that ended": f"{place}>&{writer}", "a full disk": f"{place}>&{full}", "closed": f"{place}>&-"}[reader]
    command = ["bash", "-c", f'exec "$0" -c "$1" {to}', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, pass_fds=[writer, full])
    os.close(writer)
    os.close(full)
    assert done.returncode == 7, done
    kept = done.stderr if name == "stdout" else done.stdout
    assert [line for line in kept.splitlines() if line in ("b", "c")] == ["b", "c"] * 3 if other == 2 else kept.count("a" * 9999) == 3
    assert "Traceback" not in kept
    assert "Exception ignored" not in kept


def test_the_launchers_death_is_not_the_second_signal(monkeypatch):
    ended, parent = [], [100]
    monkeypatch.setattr(stopping, "received", {"signal": 0, "time": 0.0, "output_dir": None, "launcher": 100})
    monkeypatch.setattr(stopping.os, "getppid", lambda: parent[0])
    monkeypatch.setattr(stopping.os, "_exit", ended.append)
    clock = [10.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    stopping.note(signal.SIGHUP, None)
    clock[0], parent[0] = 60.0, 1  # a long step; the launcher has died, of which the system tells by SIGTERM
    stopping.note(signal.SIGTERM, None)
    assert (stopping.stop_requested(), ended) == (signal.SIGHUP, [])
    stopping.note(signal.SIGTERM, None)
    assert ended == [143]


@pytest.mark.parametrize(
    ("variables", "handler", "told"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "_": "/usr/bin/nohup"}, signal.SIG_DFL, True),
        ({"TORCHELASTIC_RUN_ID": "none", "_": "/usr/bin/nohup"}, signal.SIG_IGN, False),
        ({"TORCHELASTIC_RUN_ID": "none", "_": "/usr/bin/torchrun"}, signal.SIG_DFL, False),
        ({"_": "/usr/bin/nohup"}, signal.SIG_DFL, False),
    ],
)
def test_a_launcher_that_undoes_nohup_is_told(monkeypatch, capsys, variables, handler, told):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    stopping.listen()
    assert ("PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT" in capsys.readouterr().err) == told


@pytest.mark.parametrize("verbose", [False, True])
def test_a_line_of_a_library_is_left_out_and_nothing_else(capsys, level, verbose):
    level(verbose)
    for name, beginning in console.NOT_FOR_THE_USER.items():
        logger = logging.getLogger(name)
        assert bool(logger.filter(logger.makeRecord(name, logging.WARNING, "", 0, beginning + ": %s", ("why",), None))) == verbose
        assert logger.filter(logger.makeRecord(name, logging.WARNING, "", 0, "out of memory", (), None))

    @console.without_line("Using decoupled")
    def library():
        print("Using decoupled weight decay\nanother line")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        library()
    assert capsys.readouterr().out == ("Using decoupled weight decay\n" if verbose else "") + "another line\n"
