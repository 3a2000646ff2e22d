"""Importing anyep does nothing but define names."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROBE = """
import builtins, json, os, sys, threading
import torch  # whatever torch does is not ours

environment = dict(os.environ)
threads = threading.active_count()
tasks = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
opened = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = os.fsdecode(arguments[0]), arguments[1], arguments[2] or 0
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes or not path.endswith((".py", ".pyc", ".so")):
            opened.append(path)
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.putenv", "os.unsetenv", "subprocess.Popen"):
        opened.append(event)
sys.dont_write_bytecode = True  # caching bytecode is the interpreter's, not the package's
sys.addaudithook(hook)
import anyep
print(json.dumps({
    "modules": sorted(set(sys.modules) & {"numba", "llvmlite", "matplotlib", "rich", "click", "mpi4py", "triton"}),
    "environment": dict(os.environ) == environment,
    "threads": threading.active_count() - threads,
    "tasks": len(os.listdir("/proc/self/task")) - tasks if tasks else 0,
    "opened": opened,
}))
"""


def test_importing_is_inert(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 1, lines
    expected = {"modules": [], "environment": True, "threads": 0, "tasks": 0, "opened": []}
    assert json.loads(lines[0]) == expected
    assert list(tmp_path.iterdir()) == []
