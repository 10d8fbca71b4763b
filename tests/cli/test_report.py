"""How a command that cannot finish ends: the line it prints and its exit code."""

from __future__ import annotations

import errno
import os

import pytest
import typer
from safetensors import SafetensorError

from gearshift.cli.report import reporting_errors
from gearshift.errors import GearshiftError


def end_of(error: BaseException, capsys: pytest.CaptureFixture[str], **arguments: object) -> tuple[int, str]:
    """Exit code and stderr of a command that raises ``error``."""

    def command(**arguments: object) -> None:
        raise error

    with pytest.raises(typer.Exit) as exited:
        reporting_errors(command, kept="half is kept; add --resume")(**arguments)
    return exited.value.exit_code, capsys.readouterr().err


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str]):
    mistake = GearshiftError("given 3, expected 2; give 2")
    assert end_of(mistake, capsys) == (1, "error: given 3, expected 2; give 2\n")


def test_ctrl_c_says_what_was_kept(capsys: pytest.CaptureFixture[str]):
    assert end_of(KeyboardInterrupt(), capsys) == (130, "stopped: half is kept; add --resume\n")


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model"), "out/model"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "out"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "out"),
    ],
)
def test_a_full_disk_names_the_path(error: Exception, where: str, capsys: pytest.CaptureFixture[str]):
    code, line = end_of(error, capsys, out="out")
    assert code == 1
    assert line.startswith(f"error: no space left on the disk while writing {where}; nothing half-written")


def test_other_system_errors_name_the_file(capsys: pytest.CaptureFixture[str]):
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "secret.json")
    assert end_of(denied, capsys) == (1, "error: Permission denied: secret.json\n")


def test_a_bug_keeps_its_traceback():
    def command() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        reporting_errors(command, kept="")()


def test_a_damaged_file_is_no_full_disk():
    def command() -> None:
        raise SafetensorError("invalid header")

    with pytest.raises(SafetensorError):
        reporting_errors(command, kept="")()


def test_a_command_that_succeeds_is_left_alone():
    seen: list[int] = []
    reporting_errors(seen.append, kept="")(7)
    assert seen == [7]
