"""How a verb ends: exit codes of signals, closed pipes and our own faults; text out of files that cannot act."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from helpers import altered

from mteo_deploy.cli import main
from mteo_deploy.commands.common import echo, show_table, verb
from mteo_deploy.text import one_line, shown, text_lines

COMMAND = [sys.executable, "-m", "mteo_deploy.cli"]
WAITING = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import click
from mteo_deploy.commands.common import verb

@click.command()
@verb
def wait():
    print("ready", flush=True)
    try:
        time.sleep(60)
    finally:
        print("swept", flush=True)

wait()
"""


def ended(function: Callable[[], None], *arguments: str) -> Result:
    return CliRunner().invoke(click.command()(verb(function)), list(arguments))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_sweep_and_have_their_exit_code(number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "swept\n")
    assert err == f"error: {'interrupted' if number == signal.SIGINT else 'terminated'}\n"


def test_a_closed_pipe_is_141() -> None:
    script = f"{' '.join(COMMAND)} doctor --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_our_own_fault_is_exit_code_3_and_debug_shows_where() -> None:
    def fault() -> None:
        raise TypeError("a\n\nb")

    result = ended(fault)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == "error: internal error, please report: TypeError: a; --debug shows the traceback\n"
    shows = ended(fault, "--debug")
    assert shows.exit_code == 3 and "Traceback" in shows.stderr and "in fault" in shows.stderr
    refused = CliRunner().invoke(main, ["--debug", "inspect", "nowhere"])
    assert refused.exit_code == 2 and "Traceback" in refused.stderr and refused.stderr.splitlines()[-1].startswith("error: ")


def test_a_full_disk_is_exit_code_2() -> None:
    def full() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    result = ended(full)
    assert result.exit_code == 2 and "No space left" in result.stderr and "free space" in result.stderr


def test_no_text_acts_on_what_shows_it() -> None:
    assert shown("\x1b]0;x\x07 a\tb\nc\x9b\u202e\u2028\ud800é字") == "\\x1b]0;x\\x07 a\tb\nc\\x9b\\u202e\\u2028\\ud800é字"
    assert one_line(" a\r\n b\x00") == "a b\\x00"

    def say() -> None:
        echo("\x1b[2J")
        show_table("[/x]", ["a"], [["pip install 'mteo-deploy[openvino]'"], ["[/x]\x1b"]])

    lines = [line.rstrip() for line in ended(say).stdout.splitlines()]
    assert lines[:3] == ["\\x1b[2J", "[/x]", " a"] and lines[-1] == " [/x]\\x1b"
    assert "mteo-deploy[openvino]" in ended(say).stdout and "\x1b" not in ended(say).stdout


def test_a_name_in_a_manifest_does_not_act(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b", lambda manifest: manifest["backbone"].update(source="\x1b]0;owned\x07"))
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert "\x1b" not in result.output and (result.exit_code == 2 or "\\x1b]0;owned\\x07" in result.stdout)


def test_only_line_ends_divide_lines() -> None:
    assert text_lines("a\u2028b\r\n\r\n c\rd\n") == ["a\u2028b", "c", "d"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "x"])
def test_options_take_finite_numbers(value: str) -> None:
    for option in ("--seconds", "--max-error", "--max-p50-ms"):
        result = CliRunner().invoke(main, ["verify", "nowhere", f"{option}={value}"])
        assert result.exit_code == 2 and f"{value!r} is not a finite number" in result.stderr


def test_no_threads_are_refused(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(main, ["build", str(tiny_bundle), "--threads", "0"])
    assert result.exit_code == 2 and "--threads of 1 or more" in result.stderr
