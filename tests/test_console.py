"""Progress: plain lines where nobody watches, a bar on a terminal, silence when asked."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from galray.console import Console


def test_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(interval=0.0)
    assert not console.terminal
    with console.stage("mock", "20 stars in Gaia form") as advance:
        advance(0.25, "5 of 20 stars")
        advance(0.5, "10 of 20 stars")
    captured = capsys.readouterr()
    assert captured.out == "", "progress is not a result"
    lines = captured.err.splitlines()
    assert lines[0] == "  mock       20 stars in Gaia form"
    assert lines[1] == "  mock        25 %  5 of 20 stars"
    assert lines[2] == "  mock        50 %  10 of 20 stars"
    assert re.fullmatch(r"  mock       done in \d+\.\d s", lines[3])
    assert len(lines) == 4
    assert "\r" not in captured.err
    assert "\x1b" not in captured.err


def test_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(interval=3600.0).stage("catalog", "files") as advance:
        for i in range(1000):
            advance(i / 1000, "x")
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True, interval=0.0)
    console.say("hello")
    console.warn("careful")
    with console.stage("mock", "stars") as advance:
        advance(0.5, "half")
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_warning_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    Console().warn("member flow-001 failed")
    assert capsys.readouterr().err == "warning: member flow-001 failed\n"


def test_failed_stage_is_not_said_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), Console().stage("mock", "stars"):
        raise RuntimeError
    assert "done" not in capsys.readouterr().err


def test_bar_on_a_terminal() -> None:
    code = (
        "import select, sys\n"
        "from galray.console import Console\n"
        "console = Console()\n"
        "assert console.terminal\n"
        "with console.stage('moments', '3 passes') as advance:\n"
        "    advance(0.5, 'half way')\n"
        "    select.select([sys.stdin], [], [], 120)\n"  # until the bar has been seen
    )
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    try:
        while block := os.read(leader, 4096):
            shown += block
            if b"50%" in shown and process.stdin:
                process.stdin.close()
                process.stdin = None
    except OSError:
        pass  # Linux reports the closed terminal as an error
    os.close(leader)
    assert process.wait() == 0
    text = shown.decode()
    assert "50%" in text
    assert "half way" in text
    assert "\x1b[" in text, "the bar is drawn in place"
    assert re.search(r"moments\s+done in \d", text)
