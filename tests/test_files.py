import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddnp_jax import files

ROOT = Path(__file__).parents[1]


def test_what_is_written_is_what_is_read(tmp_path):
    files.write_bytes(tmp_path / "bytes", b"\x00\xff\r\n")
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff\r\n"
    files.write_text(str(tmp_path / "text"), "ρ\n")
    assert (tmp_path / "text").read_bytes() == b"\xcf\x81\n"
    files.write_json(tmp_path / "value.json", {"a": [1, 2.5], "none": None})
    assert (tmp_path / "value.json").read_text() == '{\n  "a": [\n    1,\n    2.5\n  ],\n  "none": null\n}\n'
    assert files.read_json(tmp_path / "value.json") == {"a": [1, 2.5], "none": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text", "value.json"]


def test_a_value_that_is_not_json_leaves_the_file_as_it_is(tmp_path):
    path = tmp_path / "report.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    for content in (b'{"seed": ', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            files.read_json(path)
        assert str(error.value).startswith(f"{path} is not JSON (")
        assert str(error.value).endswith("); restore a good copy, or delete it.")
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        files.read_json(tmp_path / "nothing.json")


KILLED = """
import os, signal, sys
from ddnp_jax import files

path, event = sys.argv[1:]
files.write_text(path, "old" * 1000)
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(os, event, kill) if event != "rename" else sys.addaudithook(lambda what, _: what == "os.rename" and kill())
files.write_text(path, "new" * 1000)
"""


@pytest.mark.parametrize("event", ["fsync", "rename"])
def test_a_kill_leaves_the_old_file_whole(event, tmp_path):
    path = tmp_path / "file"
    command = [sys.executable, "-c", KILLED, str(path), event]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert path.read_text() == "old" * 1000
    files.write_text(path, "next")  # what the kill left behind is in nobody's way
    assert path.read_text() == "next"
    assert os.listdir(tmp_path) == ["file"]


def test_content_is_on_disk_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def renamed(path, target):
        calls.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    files.write_bytes(tmp_path / "file", b"1")
    assert calls == ["file.tmp", "rename", tmp_path.name]
