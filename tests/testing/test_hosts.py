"""Hosts played by network namespaces: ranks have their own network, links are slow or cut, nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyep.errors import Unavailable
from anyep.testing import hosts as hosts_module
from anyep.testing.hosts import Hosts, check_hosts, run_on_hosts
from anyep.testing.processes import RankFailed
from tests.testing import host_ranks
from tests.transport.ranks import fail_on, python_path

NAMESPACES = Path("/run/netns")


@pytest.fixture(autouse=True, scope="module")
def _possible():
    try:
        check_hosts()
        Hosts(1).close()
    except Unavailable as error:
        pytest.skip(str(error))


def namespaces_of(pid: int) -> list[str]:
    return [path.name for path in NAMESPACES.glob(f"anyep-{pid}-*")]


def test_ranks_of_a_host_share_its_network_and_its_name_and_those_of_others_do_not():
    told = run_on_hosts([2, 1], host_ranks.where)
    names, networks = [name for name, _ in told], [network for _, network in told]
    assert names[0] == names[1] != names[2]
    assert networks[0] == networks[1] == {"lo": "127.0.0.1", "eth0": "10.77.0.1"}
    assert networks[2] == {"lo": "127.0.0.1", "eth0": "10.77.0.2"}
    assert namespaces_of(os.getpid()) == []


def test_a_host_may_have_no_ranks():
    assert len(run_on_hosts([1, 0, 1], host_ranks.where)) == 2


def test_hosts_reach_each_other_until_a_link_is_cut_and_again_when_it_is_mended():
    with Hosts(2) as hosts:

        def arrives() -> bool:
            with hosts.start([1, 1], host_ranks.shout, hosts.addresses[1]) as ranks:
                return bool(ranks.results(30)[1])

        assert arrives()
        hosts.cut(1)
        assert not arrives()
        hosts.mend(1)
        assert arrives()


def test_a_link_is_as_slow_as_it_was_ordered_and_its_bytes_are_counted():
    num_bytes = 5_000_000
    with Hosts(2, link_mbit=100) as hosts:
        with hosts.start([1, 1], host_ranks.stream, 10, num_bytes // 10, 4) as ranks:
            (_, sent, _), (took_s, _, received) = ranks.results(60)
        carried = hosts.carried(0)
    assert num_bytes * 8 / took_s < 110e6
    assert num_bytes < sent < 1.1 * num_bytes
    assert num_bytes < received < 1.1 * num_bytes
    assert carried.sent >= sent


def test_several_sets_of_hosts_exist_at_once():
    with Hosts(2) as one, Hosts(2) as other:
        one.cut(1)
        with other.start([1, 1], host_ranks.shout, other.addresses[1]) as ranks:
            assert ranks.results(30) == [True, True]


def test_nothing_stays_behind_when_a_rank_fails():
    with pytest.raises(RankFailed, match="rank 1 fails on purpose"):
        run_on_hosts([1, 1], fail_on, 1)
    assert namespaces_of(os.getpid()) == []


def test_nothing_stays_behind_when_who_made_the_hosts_is_killed(tmp_path):
    program = (
        "from anyep.testing.hosts import Hosts\n"
        "from tests.testing import host_ranks\n"
        "if __name__ == '__main__':\n"
        f"    Hosts(1).start([1], host_ranks.wait_for, {str(tmp_path)!r}).outcomes(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    maker = subprocess.Popen([sys.executable, "-c", program], env=environment)
    _until(lambda: (tmp_path / "0").exists() or maker.poll() is not None)
    assert namespaces_of(maker.pid)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    _until(lambda: not namespaces_of(maker.pid))


def test_what_is_left_of_others_that_have_ended_is_removed():
    name = "anyep-999999-1-0-host0"  # a process with this number did not start at tick 1
    subprocess.run(["ip", "netns", "add", name], check=True)
    Hosts(1).close()
    assert not (NAMESPACES / name).exists()


@pytest.mark.parametrize("num_hosts", [0, 251])
def test_a_number_of_hosts_that_cannot_be_is_refused(num_hosts):
    with pytest.raises(ValueError, match=f"from 1 to 250, got {num_hosts}"):
        Hosts(num_hosts)


def test_more_ranks_than_there_are_hosts_for_are_refused():
    with Hosts(1) as hosts, pytest.raises(ValueError, match=r"1 hosts, and ranks_per_host is \[1, 1\]"):
        hosts.start([1, 1], host_ranks.where)


def test_without_iproute2_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(hosts_module.shutil, "which", lambda tool: None)
    with pytest.raises(Unavailable, match="need ip and tc: install iproute2"):
        Hosts(1)


def test_without_root_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="need root"):
        Hosts(1)


def _until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
