"""Console output on terminals and elsewhere."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import signal
import struct
import sys
import termios
from pathlib import Path

import pytest

from gatdist.monitor.console import Console, shown_path, tensorboard_command
from gatdist.monitor.numbers import count, duration, number, percent

START = {
    "data": "builtin:digits",
    "run_dir": "s3://bucket/digits",
    "total_samples": 192_000,
    "samples_seen": 0,
    "workers": 2,
    "device": "cpu",
    "num_samples": 1797,
    "num_shards": 12,
    "parameters": {"generator": 412_345, "discriminator": 398_765},
}
METRICS = {
    "fid": 2.1,
    "fid_real_split": 1.9,
    "fid_over_real_split": 1.1,
    "kid": 8e-4,
    "class_share_min": 0.07,
}
ALARM = {
    "name": "discriminator_won",
    "message": "the discriminator has won; try r1",
    "samples_seen": 4096,
}
DONE = {
    "status": "finished",
    "reason": "run.total_samples = 192,000 reached",
    "samples_seen": 192_000,
    "metrics": METRICS,
    "run_dir": "s3://bucket/digits",
    "samples": "samples/fakes-000192000.png",
    "tensorboard": True,
}


def tick(samples_seen, **values):
    return {
        "samples_seen": samples_seen,
        "throughput/samples_per_s": 1310.0,
        "loss/generator": 0.412,
        "loss/discriminator": 0.693,
        **values,
    }


def plain(*events):
    """Return the lines of these events without a terminal."""
    stream = io.StringIO()
    with Console(stream) as console:
        for kind, fields in events:
            console.event(kind, fields)
    return stream.getvalue().splitlines()


class Terminal:
    """A real pseudo-terminal, and the text visible on it."""

    def __init__(self, columns):
        self.controller, self.terminal = pty.openpty()
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(self.terminal, "w", encoding="utf-8")
        self.columns = columns

    def show(self, *events):
        """Return everything that was ever visible: a list of lines per event."""
        console, raw, frames = Console(self.stream, is_terminal=True), "", []
        for kind, fields in events:
            console.event(kind, fields)
            raw += self._written()
            frames.append(screen(raw))
        console.close()
        self.stream.close()
        os.close(self.controller)
        return frames

    def _written(self):
        self.stream.write("\0")  # a marker to read up to, since a terminal may be slow
        self.stream.flush()
        written = b""
        while not written.endswith(b"\0"):
            written += os.read(self.controller, 1 << 16)
        return written[:-1].decode()


def screen(raw):
    """Return the lines that these characters produce on a terminal of sufficient width."""
    lines, row, column = [""], 0, 0
    for control, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", raw):
        if control == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif control == "\r":
            column = 0
        elif control == "\x1b[2K":
            lines[row] = ""
        elif found := re.fullmatch(r"\x1b\[(\d+)A", control):
            row -= int(found[1])
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_plain_output_has_one_line_per_log_interval_and_no_control_characters():
    lines = plain(("start", START), *[("log", tick(4096 * i)) for i in (1, 2, 3)])
    for fact in ("builtin:digits", "1,797", "12 shards", "2 workers", "cpu", "s3://bucket/digits"):
        assert fact in lines[0]
    assert "generator 412,345, discriminator 398,765" in lines[1]
    assert len(lines) == 5
    # 187,904 are left, at 1,310 per second.
    for fact in ("2%", "4,096/192,000", "1,310/s", "2:23", "G 0.412", "D 0.693"):
        assert fact in lines[2]
    assert all(line.isascii() and line.isprintable() and line == line.rstrip() for line in lines)


def test_resuming_reports_the_start():
    [first, _] = plain(("start", START | {"samples_seen": 16_384}))
    for fact in ("builtin:digits", "16,384", "192,000"):
        assert fact in first


def test_metrics_stay_in_the_line_of_progress():
    evaluation = {"samples_seen": 8192, "metrics": METRICS, "seconds": 3.14}
    lines = plain(
        ("start", START),
        ("log", tick(4096)),
        ("evaluation", evaluation),
        ("log", tick(8192)),
        ("log", tick(12_288, **{"metric/kid": 0.5})),
    )
    for fact in ("8,192", "3.1 s", "fid 2.10 (1.10 x", "kid 0.0008", "7.0%"):
        assert fact in lines[3]
    assert "fid" not in lines[2]
    assert lines[4].endswith("fid 2.10")
    assert lines[5].endswith("kid 0.500")


def test_alarm_is_shown_once_and_counted():
    lines = plain(("start", START), *[("alarm", ALARM)] * 3, ("done", DONE))
    assert lines[2].startswith(f"! {ALARM['message']} ")
    assert "4,096" in lines[2]
    assert sum(ALARM["message"] in line for line in lines) == 1
    assert any(line.split()[:3] == ["alarms", "discriminator_won", "(3"] for line in lines)


def test_printed_command_for_tensorboard_works_unchanged(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    program, flag, folder = shlex.split(tensorboard_command("runs/my digits"))
    assert Path(program).samefile(Path(sys.executable).parent / "tensorboard")
    assert [flag, folder] == ["--logdir", "runs/my digits"]
    (tmp_path / "tensorboard").touch(mode=0o755)
    assert tensorboard_command("runs/digits") == "tensorboard --logdir runs/digits"


def test_final_message_has_the_result_and_where_to_look(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "tensorboard").touch(mode=0o755)
    lines = plain(("start", START), ("done", DONE))
    assert re.search(rf"\d\.\d s .*192,000 .*{DONE['reason']}", lines[2])
    metrics, *paths = [line.split(maxsplit=1) for line in lines[3:]]
    assert metrics[1].startswith("fid 2.10 (1.10 x")
    assert paths == [
        ["samples", "s3://bucket/digits/samples/fakes-000192000.png"],
        ["curves", "tensorboard --logdir s3://bucket/digits"],
    ]
    silent = plain(("start", START), ("done", DONE | {"tensorboard": False}))
    assert not any("--logdir" in line for line in silent)
    [line] = plain(("done", {"status": "interrupted", "samples_seen": 5}))
    assert " 5 samples" in line


def test_notes_warnings_and_checkpoints_are_separate_lines():
    events = [
        ("note", {"message": "a"}),
        ("warning", {"message": "b"}),
        ("checkpoint", {"samples_seen": 9}),
    ]
    assert plain(*events) == ["a", "warning: b", "checkpoint at 9 samples"]


def test_messages_are_not_interpreted_as_markup_or_control_characters(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a pipe still gets plain text
    message = "[bold red]a[/] :smile: \x1b[31mred\x1b[0m \x1b[2J\rb"
    assert plain(("note", {"message": message})) == [r"[bold red]a[/] :smile: red \x1b[2J\rb"]
    [frame] = Terminal(80).show(("warning", {"message": message}))
    assert frame[0] == r"warning: [bold red]a[/] :smile: red \x1b[2J\rb"


def test_no_color_and_dumb_terminals_are_respected(monkeypatch):
    def written():
        stream = io.StringIO()
        with Console(stream, is_terminal=True) as console:
            console.event("start", START)
            console.event("warning", {"message": "m"})
        return stream.getvalue()

    assert "\x1b[1;33mwarning:" in written()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", written())
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in written()


def test_killed_process_does_not_leave_the_cursor_hidden():
    stream = io.StringIO()
    console = Console(stream, is_terminal=True)
    console.event("start", START)
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l")


def test_other_long_work_shows_a_bar_that_its_summary_replaces():
    work = {"message": "packing", "total": 4, "unit": "images"}
    summary = {"message": "after 1 s", "rows": {"skipped": "a\n            b", "empty": ""}}
    events = [("work", work), ("progress", {"done": 1, "found": 3}), ("summary", summary)]
    frames = Terminal(80).show(*events)
    assert [frame[0] for frame in frames] == ["packing"] * 3
    assert frames[0][1].endswith("0/4 images")
    assert frames[1][1].startswith("100%")
    assert frames[1][1].endswith("4/4 images")
    assert frames[2][1:4] == ["done after 1 s", "  skipped   a", "            b"]
    assert plain(*events) == [frames[0][0], *frames[2][1:4]]


def test_values_that_are_no_numbers_do_not_stop_the_output():
    bad = {"loss/generator": None, "loss/discriminator": float("nan"), "metric/fid": float("inf")}
    [line] = plain(("log", tick(4096, **bad)))
    assert "G n/a" in line
    assert "D n/a" in line
    assert line.endswith("fid n/a")
    assert len(plain(("log", {"samples_seen": 4096}))) == 1


@pytest.mark.parametrize("columns", [12, 30, 60, 80, 120, 250])
def test_terminal_shows_one_line_that_is_rewritten_and_always_fits(columns, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")  # otherwise the rest of the bar is drawn in another colour
    ticks = [("log", tick(48_000 * i, **{"metric/fid": 12.3})) for i in (1, 2, 3, 4)]
    frames = Terminal(columns).show(("start", START), *ticks)
    for frame in frames:
        assert len(frame) == len(frames[0])  # no line was added
        assert len(frame[-1]) < columns
        assert frame[:-1] == frames[0][:-1]
    assert [frame[-1].split()[0] for frame in frames] == ["0%", "25%", "50%", "75%", "100%"]
    if columns >= 30:
        bars = [frame[-1].count("━") for frame in frames[1:]]
        assert bars == sorted(set(bars))  # the bar grows
    if columns >= 120:
        assert "192,000/192,000" in frames[-1][-1]
        assert frames[-1][-1].endswith("fid 12.3")


def test_messages_are_printed_above_the_progress_line():
    frames = Terminal(100).show(
        ("start", START),
        ("log", tick(48_000)),
        ("alarm", ALARM),
        ("checkpoint", {"samples_seen": 48_000}),
        ("log", tick(96_000)),
        ("done", DONE),
    )
    assert frames[2][-2].startswith(f"! {ALARM['message']} ")
    assert frames[2][-1] == frames[1][-1]
    assert frames[3] == frames[2]  # a checkpoint prints nothing
    assert frames[4][:-1] == frames[2][:-1]
    assert frames[5][: len(frames[4])] == frames[4]  # the last progress line stays
    assert DONE["reason"] in frames[5][len(frames[4])]
    assert frames[5][-1] == ""  # the cursor is on a new line


def test_long_alarm_is_wrapped_between_words():
    message = (
        "the discriminator has won; try a smaller optim.discriminator.learning_rate or stronger r1"
    )
    frames = Terminal(50).show(("alarm", ALARM | {"message": message}))
    lines = frames[-1][:-1]
    assert len(lines) > 1
    assert all(len(line) <= 50 for line in lines)
    assert " ".join(" ".join(lines).split()).startswith(f"! {message} ")


def test_signal_handler_may_print_while_a_line_is_being_written():
    class Interrupted(io.StringIO):
        def write(self, text):
            if text.startswith("first"):
                console.event("note", {"message": "stopping after a checkpoint"})
            return super().write(text)

    stream = Interrupted()
    console = Console(stream)
    console.event("note", {"message": "first"})
    assert stream.getvalue() == "first\nstopping after a checkpoint\n"


def test_terminal_without_unicode_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # would raise
    console = Console(stream, is_terminal=True)
    console.event("start", START)
    console.event("log", tick(96_000))
    console.close()
    stream.seek(0)
    assert "----" in stream.read()


def test_paths_below_the_current_folder_are_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path(str(tmp_path / "runs" / "digits")) == "runs/digits"
    outside = str(Path(tmp_path.anchor) / "elsewhere")
    assert shown_path(outside) == outside
    assert shown_path("s3://bucket/run") == "s3://bucket/run"
    done = {"samples_seen": 1, "run_dir": str(tmp_path / "my runs"), "tensorboard": True}
    [line] = plain(("done", done))[1:]
    assert line.endswith("tensorboard --logdir 'my runs'")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0), "0.00"),
        (number(0.69314), "0.693"),
        (number(12.345), "12.3"),
        (number(-3.14159), "-3.14"),
        (number(99.96), "100.0"),
        (number(1234.5), "1,234"),
        (number(2.13e-7), "2.1e-07"),
        (number(4.2e9), "4.2e+09"),
        (number(float("nan")), "n/a"),
        (number(None), "n/a"),
        (count(192_000.4), "192,000"),
        (percent(0.0712), "7.1%"),
        (percent(0.994), "99.4%"),
        (percent(0.5), "50%"),
        (duration(4.24), "4.2 s"),
        (duration(59.7), "1:00"),
        (duration(151), "2:31"),
        (duration(11_109), "3:05:09"),
        (duration(float("inf")), "?"),
    ],
)
def test_numbers_are_formatted_for_people(shown, expected):
    assert shown == expected


def test_signal_during_a_write_does_not_deadlock():
    """An unread terminal blocks the writer; then a signal handler writes, too."""
    master, slave = pty.openpty()
    with open(slave, "w") as stream:
        terminal, heard = Console(stream), []

        def handle(number, frame):
            try:
                terminal.event("note", {"message": "stopping after a checkpoint"})
            finally:
                heard.append(os.read(master, 65536))

        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.01)
        try:
            for _ in range(400):
                terminal.event("note", {"message": "a line of progress " * 5})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    os.close(master)
    assert len(heard) > 3


def test_closed_stream_does_not_end_the_run() -> None:
    stream = io.StringIO()
    console = Console(stream)
    stream.close()
    console.event("note", {"message": "still here"})
