"""Which engine is opened, and what is told where it cannot be."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from anyep.errors import Unavailable
from anyep.testing.hosts import Hosts, check_hosts
from anyep.testing.processes import run_processes
from anyep.transport.engines import open_engine
from anyep.transport.inprocess import local_group
from anyep.transport.nixl_agent import load_nixl
from tests.transport import engine_ranks
from tests.transport.ranks import python_path


@pytest.fixture
def _without_nixl(monkeypatch):
    real = importlib.import_module

    def import_module(name, package=None):
        if name.startswith("nixl"):
            raise ImportError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


def _has_nixl() -> bool:
    try:
        load_nixl()
    except Unavailable:
        return False
    return True


def test_threads_of_a_process_get_the_engine_between_threads():
    told = local_group(2).run(lambda member: open_engine("auto", member).engine.name)
    assert told == ["inprocess", "inprocess"]


def test_processes_get_nixl_where_it_is_installed_and_gloo_elsewhere():
    for name, reason in run_processes(2, engine_ranks.open_by_name, ["auto", "auto"], False):
        if _has_nixl():
            assert (name, reason) == ("nixl", "NIXL is installed on all ranks")
        else:
            assert name == "gloo"
            assert "anyep[nixl]" in reason


def test_gloo_is_chosen_for_all_when_one_rank_has_no_nixl():
    for name, reason in run_processes(2, engine_ranks.open_by_name, ["auto", "auto"], True):
        assert name == "gloo"
        assert reason.startswith("ranks 0-1 have no NIXL" if not _has_nixl() else "rank 1 has no NIXL")


def test_nixl_that_was_asked_for_and_is_missing_names_the_extra():
    for kind, text in run_processes(2, engine_ranks.open_by_name, ["nixl", "nixl"], True):
        assert kind == "Unavailable"
        assert "pip install 'anyep[nixl]'" in text


@pytest.mark.usefixtures("_without_nixl")
def test_what_is_possible_instead_is_told():
    with pytest.raises(Unavailable, match="or use the engine 'gloo'"):
        load_nixl()


def test_ranks_that_ask_for_different_engines_are_all_told():
    for kind, text in run_processes(2, engine_ranks.open_by_name, ["gloo", "auto"], False):
        assert kind == "ValueError"
        assert "'gloo' on rank 0, 'auto' on rank 1" in text


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"one of 'auto', 'nixl', 'gloo', 'inprocess', got 'tcp'"):
        local_group(1).run(lambda member: open_engine("tcp", member))


def test_the_engine_between_threads_is_not_for_processes():
    for kind, text in run_processes(1, engine_ranks.open_by_name, ["inprocess"], False):
        assert kind == "Unavailable"
        assert "anyep.local_group(R)" in text


@pytest.mark.skipif(not _has_nixl(), reason="NIXL is not installed")
def test_hosts_that_nixl_does_not_reach_are_named():
    try:
        check_hosts()
    except Unavailable as error:
        pytest.skip(str(error))
    with Hosts(2) as hosts:
        hosts.cut(1)
        with hosts.start([1, 1], engine_ranks.open_by_name, ["nixl", "nixl"], False, 2.0) as ranks:
            told = ranks.results(60)
    for kind, text in told:
        assert kind == "Unavailable"
        for part in ("eth0 (10.77.0.1)", "eth0 (10.77.0.2)", "TCP at any port"):
            assert part in text


@pytest.mark.skipif(not _has_nixl(), reason="NIXL is not installed")
def test_nixl_takes_the_device_that_was_asked_for():
    try:
        check_hosts()
    except Unavailable as error:
        pytest.skip(str(error))
    for interface, expected in (("eth0", "nixl"), ("lo", "Unavailable")):
        with Hosts(2) as hosts:
            names = ["nixl", "nixl"], False, 3.0, interface
            with hosts.start([1, 1], engine_ranks.open_by_name, *names) as ranks:
                assert [kind for kind, _ in ranks.results(60)] == [expected] * 2


@pytest.mark.skipif(not _has_nixl(), reason="NIXL is not installed")
def test_a_device_that_ucx_does_not_have_is_refused():
    for kind, text in run_processes(2, engine_ranks.open_by_name, ["nixl", "nixl"], False, 5.0, "nowhere0"):
        assert kind == "Unavailable"
        assert "nowhere0" in text


@pytest.mark.skipif(not _has_nixl(), reason="NIXL is not installed")
def test_a_process_that_used_nixl_ends_well():
    """Its libraries' destructors can crash, after all results are out; here they do not."""
    program = (
        "from anyep.testing.engine_steps import meet, opened\n"
        "from anyep.transport.engine_nixl import NixlEngine\n"
        "from anyep.transport.inprocess import local_group\n"
        "def work(member):\n"
        "    with opened(lambda: NixlEngine(member)) as engine:\n"
        "        meet(engine)\n"
        "local_group(2).run(work)\n"
        "print('done', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "done\n", ended.stderr
    assert ended.returncode == 0
