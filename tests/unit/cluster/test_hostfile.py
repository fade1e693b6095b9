"""What DeepSpeed's launcher reads: where it would show a traceback, or start something else than was written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simple_llama.cluster.hostfile import check_environment_files, option, read_hostfile
from simple_llama.common.errors import UserError
from tiny_job import ROOT

HOSTFILES = {
    "none there": (None, "expected a hostfile"),
    "a folder": ("folder", "expected a hostfile"),
    "empty": ("", "expected at least one line"),
    "comments alone": ("# host-a slots=1\n\n", "expected at least one line"),
    "no slots": ("host-a\n", ":1: expected 'HOST slots=N', found 'host-a'"),
    "slots of words": ("host-a slots=two\n", ":1: expected 'HOST slots=N'"),
    "negative slots": ("host-a slots=-1\n", ":1: expected 'HOST slots=N'"),
    "no slot": ("host-a slots=0\n", ":1: expected 1 to 1024 slots, found 0"),
    "enormous slots": (f"host-a slots={'9' * 400}\n", ":1: expected 1 to 1024 slots, found 9999"),
    "a host twice": ("host-a slots=1\nhost-b slots=1\nhost-a slots=1\n", ":3: expected each host once, found host-a"),
    "more behind it": ("host-a slots=1 gpus=2\n", ":1: expected 'HOST slots=N'"),
    "an option as a name": ("-oProxyCommand=x slots=1\n", ":1: expected 'HOST slots=N'"),
    "no text": (b"\xff\xfe\x00", "expected a hostfile"),
    "a name with a NUL": (b"host\x00a slots=1\n", ":1: expected 'HOST slots=N'"),
    "another host behind a vertical tab": ("host-a slots=1\x0bhost-b slots=1\n", ":1: expected 'HOST slots=N'"),
    "another host behind a line separator": ("host-a slots=1\u2028host-b slots=1\n", ":1: expected 'HOST slots=N'"),
    "more than a megabyte": ("# a comment\n" * 10**5, "expected at most 1,048,576 bytes"),
    "a named pipe": ("pipe", "expected a file, found a named pipe"),
    "a device that never ends": ("/dev/zero", "expected a file, found a device"),
    "a shell command": ("host;reboot slots=1\n", ":1: expected 'HOST slots=N'"),
}


@pytest.mark.parametrize("case", HOSTFILES)
def test_a_bad_hostfile_is_refused(tmp_path: Path, case: str) -> None:
    """Where DeepSpeed's launcher would show a traceback, or start something else than was written."""
    content, words = HOSTFILES[case]
    path = tmp_path / "hostfile"
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "/dev/zero":
        path.symlink_to(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as refused:
        read_hostfile(str(path))
    assert str(path) in str(refused.value) and words in str(refused.value)


def test_a_good_hostfile_is_read(tmp_path: Path) -> None:
    """The project's own, which has comments; lines that end as on Windows and on an old Mac."""
    assert read_hostfile(str(ROOT / "hostfile")) == ["localhost"]
    (tmp_path / "hostfile").write_bytes(b"a slots=1\r\nb\x0b slots=2\rc slots=3 # last")
    assert read_hostfile(str(tmp_path / "hostfile")) == ["a", "b", "c"]
    assert read_hostfile("") == []


@pytest.mark.parametrize(
    ("command", "value"),
    [
        (["deepspeed", "--hostfile", "h", "x.py"], "h"),
        (["deepspeed", "--no_ssh_check", "--hostfile=h", "x.py"], "h"),
        (["deepspeed", "-H", "h", "x.py"], "h"),
        (["deepspeed", "x.py", "--hostfile", "h"], ""),  # an option of the script
        (["torchrun", "x.py"], ""),
        (["deepspeed", "-Hh", "x.py"], "h"),
        (["deepspeed", "--host=h", "x.py"], "h"),
        (["deepspeed", "--num_gpus", "2", "--hostf", "h", "x.py"], "h"),
        (["deepspeed", "--hostfile", "g", "-H", "h", "x.py"], "h"),
        (["deepspeed", "--hostfile"], ""),
    ],
)
def test_options_of_the_launcher_stand_before_the_script(command: list[str], value: str) -> None:
    """What stands behind the script is the script's."""
    assert option(command, "--hostfile", "-H") == value


@pytest.mark.parametrize("line", ["", "# a comment", "PATH", "1A=b", "A B=c", " A=b"])
def test_a_line_that_deepspeed_env_cannot_have(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed splits each line at "=", so a blank line or a comment is a traceback there, or a broken export."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "variables"
    path.write_text(f"PATH=/bin:$PATH\n{line}\nA=\n")
    with pytest.raises(UserError, match="variables:2: expected NAME=value"):
        check_environment_files({"DS_ENV_FILE": str(path)})
    path.write_text("PATH=/bin:$PATH\nA=\n")
    check_environment_files({"DS_ENV_FILE": str(path)})
    check_environment_files({"DS_ENV_FILE": "none"})


def test_an_environment_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe or device is none to DeepSpeed, which asks as we do; one of 2 MB is refused."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("variables")
    check_environment_files({"DS_ENV_FILE": "variables"})
    Path("large").write_text("A=b\n" * 2**19)
    with pytest.raises(UserError, match="large: expected lines NAME=value, found: expected at most 1,048,576 bytes"):
        check_environment_files({"DS_ENV_FILE": "large"})


RANK = """
from simple_llama.cluster.hostfile import check_own_hostfile
from simple_llama.common.errors import UserError
try:
    check_own_hostfile()
    print("starts")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("options", "mark", "words"),
    [
        ("--hostfile missing", "CROSS_SIZE", "--hostfile missing: expected a hostfile, found no such file"),
        ("-H /dev/null", "CROSS_SIZE", "--hostfile /dev/null: expected a hostfile"),
        ("--hostfile there", "CROSS_SIZE", "starts"),
        ("--num_gpus 1", "CROSS_SIZE", "starts"),
        ("--hostfile missing", "SOME_OTHER", "starts"),  # another launcher's rank
    ],
)
def test_a_rank_sees_the_hostfile_of_its_launch(tmp_path: Path, options: str, mark: str, words: str) -> None:
    """As DeepSpeed does: the `deepspeed` command, below it a launcher, below it the rank. The paths are the command's,
    whose folder is another one."""
    (tmp_path / "there").write_text("localhost slots=1\n")
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launch").write_text(f"cd / && {mark}=1 {sys.executable} {tmp_path}/rank.py; exit $?\n")
    (tmp_path / "deepspeed").write_text("#!/bin/sh\nsh ./launch; exit $?\n")
    (tmp_path / "deepspeed").chmod(0o755)
    command = ["./deepspeed", *options.split(), "rank.py", "--hostfile", "of_the_script"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert words in done.stdout, done
