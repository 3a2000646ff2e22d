"""gloo as an engine: interfaces, hosts that cannot be reached, links that are cut."""

from __future__ import annotations

import time

import pytest

from anyep.errors import Unavailable
from anyep.testing.hosts import Hosts, check_hosts, run_on_hosts
from anyep.testing.processes import run_processes
from anyep.transport.inprocess import local_group
from anyep.transport.interfaces import addresses, choose_interface
from tests.transport import engine_ranks


def _hosts(num_hosts: int) -> Hosts:
    try:
        check_hosts()
        return Hosts(num_hosts)
    except Unavailable as error:
        pytest.skip(str(error))


def test_opening_and_closing_leaves_no_thread_and_no_descriptor():
    for before, after in run_processes(2, engine_ranks.open_and_close, 4):
        assert after == before


def test_an_interface_that_does_not_exist_is_refused_on_all_ranks_with_those_that_do():
    for told in run_processes(2, engine_ranks.open_on, ["lo", "nowhere0"]):
        assert told.startswith("Unavailable")
        assert "'nowhere0' (asked for) does not exist" in told
        assert "lo (127.0.0.1)" in told


def test_hosts_that_cannot_reach_each_other_are_told_host_interface_and_port():
    with _hosts(2) as hosts:
        hosts.cut(1)
        with hosts.start([1, 1], engine_ranks.open_on, [None, None], 2.0) as ranks:
            told = ranks.results(60)
    for text in told:
        assert text.startswith("Unavailable")
        assert "rank 1 could not reach rank 0" in text or "cannot be reached at 10.77.0.1 port" in text
        for part in ("its interface eth0", "from eth0 (10.77.0.2)", "firewall"):
            assert part in text


def test_a_host_without_a_free_port_is_named_on_all_ranks():
    with _hosts(2) as hosts, hosts.start([1, 1], engine_ranks.open_without_ports) as ranks:
        told = ranks.results(60)
    for text in told:
        assert text.startswith("Unavailable")
        for part in ("no port could be opened on eth0 (10.77.0.1)", "ip_local_port_range", "close what listens there"):
            assert part in text


def test_between_hosts_the_interface_of_the_network_is_chosen():
    with _hosts(2) as hosts, hosts.start([1, 1], engine_ranks.meet_and_describe) as ranks:
        told = ranks.results(60)
    assert told[0]["interface"] == "eth0 (10.77.0.1): there is no default route; the first one"


def test_a_link_that_is_cut_is_silence_and_not_an_end(tmp_path):
    with _hosts(2) as hosts, hosts.start([1, 1], engine_ranks.talk_over_a_cut, str(tmp_path)) as ranks:
        _until(lambda: len(list(tmp_path.glob("met-*"))) == 2)
        hosts.cut(1)
        (tmp_path / "cut").touch()
        _until(lambda: len(list(tmp_path.glob("waited-*"))) == 2)
        hosts.mend(1)
        assert ranks.results(60) == [(False, True), (False, True)]


def test_a_group_of_one_has_an_engine_too():
    (told,) = local_group(1).run(lambda member: engine_ranks.meet_and_describe(member, 0))
    assert told["engine"].startswith("gloo")


def test_the_variable_that_gloo_knows_names_the_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert choose_interface().name == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere1")
    with pytest.raises(Unavailable, match="'nowhere1' \\(named by GLOO_SOCKET_IFNAME\\) does not exist"):
        choose_interface()
    assert choose_interface("lo").reason == "asked for"


def test_the_loopback_interface_is_the_last_choice(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert addresses()["lo"] == "127.0.0.1"
    assert (choose_interface().name == "lo") == (set(addresses()) == {"lo"})


@pytest.mark.slow
def test_last_words_arrive_over_a_slow_link_though_their_sender_closes():
    """1 MiB over 4 Mbit/s takes two seconds: as long as it moves, the sender waits."""
    try:
        told = run_on_hosts([1, 1], engine_ranks.speak_and_go, 64, link_mbit=4)
    except Unavailable as error:
        pytest.skip(str(error))
    assert told == ["closed", True]


def _until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
