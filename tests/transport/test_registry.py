"""Transports by name: the choice, its reason, and refusals that say what is possible."""

from __future__ import annotations

import re

import pytest

from anyep.errors import AnyEPError, Unavailable
from anyep.testing.processes import run_processes
from anyep.transport import nixl_agent
from anyep.transport.inprocess import local_group
from anyep.transport.registry import check_name, open_transport
from tests.transport import ranks

OPTIONS = {"lanes": ranks.LANES, "ring": 2, "heap_bytes": 0, "timeout_s": 10.0}


@pytest.mark.parametrize(
    ("asked", "name", "reason"),
    [
        ("auto", "inprocess", "ranks are threads of this process"),
        ("inprocess", "inprocess", "asked for; ranks are threads of this process"),
        ("shm", "shm", "asked for; all ranks are processes of one host"),
        (
            "gloo",
            "inprocess",
            "'gloo', which was asked for, goes between hosts, and there is only one; ranks are threads of this process",
        ),
    ],
)
def test_threads(asked, name, reason):
    def work(member):
        opened = open_transport(member, transport=asked, **OPTIONS)
        got = ranks.exchange(opened.transport, 0)
        opened.transport.close()
        return opened.transport.name, opened.reason, got

    assert local_group(2).run(work) == [(name, reason, [0, 1])] * 2


def test_an_engine_that_is_asked_for_must_be_there_on_one_host_too(monkeypatch):
    monkeypatch.setattr(nixl_agent, "_MODULES", ("no_such_module",))

    def work(member):
        with pytest.raises(Unavailable, match=r"NIXL is not installed .* pip install 'anyep\[nixl\]'"):
            open_transport(member, transport="nixl", **OPTIONS)

    local_group(2).run(work)


def test_processes():
    asked = [
        ("auto", "shm: all ranks are processes of one host"),
        ("shm", "shm: asked for; all ranks are processes of one host"),
    ]
    for name, told in asked:
        assert run_processes(2, ranks.open_by_name, name, OPTIONS) == [told] * 2
    refused = run_processes(2, ranks.open_by_name, "inprocess", OPTIONS)
    for text in refused:
        assert re.search(r"Unavailable: .*member of anyep.local_group.*'shm' is possible", text)


@pytest.mark.parametrize("name", ["nvlink", "", "SHM", None])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"transport must be one of 'auto', .* 'nixl', 'cuda_symmetric', got"):
        check_name(name)
    with pytest.raises(ValueError, match="transport must be one of"):
        open_transport(local_group(1)[0], transport=name, **OPTIONS)


def test_a_group_that_is_none():
    with pytest.raises(TypeError, match="group must be"):
        open_transport(object(), transport="auto", **OPTIONS)


def test_refusal_is_an_anyep_error():
    assert issubclass(Unavailable, AnyEPError)
