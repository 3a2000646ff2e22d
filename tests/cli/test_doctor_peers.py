"""``anyep doctor --peers``: ranks tell where they are, hosts are measured in pairs, and who is cut off is named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from anyep.cli import doctor_peers, peer_probe
from anyep.cli.doctor_peers import examine
from anyep.cli.main import run
from anyep.errors import Unavailable
from anyep.testing.hosts import Hosts
from anyep.testing.processes import run_processes
from tests.transport.ranks import python_path


def examine_hosts(group, rank, ranks_per_host):
    os.environ["ANYEP_RANKS_PER_HOST"] = str(ranks_per_host)
    peer_probe._STREAM_S = 0.01
    return examine(group, "gloo", "lo", 20.0)


def test_every_pair_of_hosts_is_measured_and_all_ranks_know():
    reports = run_processes(4, examine_hosts, 2)
    for report in reports:
        assert report.is_well
        assert [facts.interface for facts in report.facts] == ["lo"] * 4
        assert [pair.hosts for pair in report.pairs] == [(0, 1)]
        (pair,) = report.pairs
        assert min(pair.latency_us, pair.there_gbit_s, pair.back_gbit_s) > 0
        assert report.engine.startswith("gloo of torch")


def test_one_host_has_no_pairs():
    for report in run_processes(2, examine_hosts, 2):
        assert report.is_well
        assert report.pairs == []


def examine_behind_a_wall(group, rank):
    """Nobody reaches rank 1's port."""
    os.environ["ANYEP_RANKS_PER_HOST"] = "1"
    reach = doctor_peers.cannot_reach
    doctor_peers.cannot_reach = lambda address, port, timeout_s: "no route" if rank != 1 else reach(address, port, 5)
    return examine(group, "gloo", "lo", 20.0)


def test_pairs_that_do_not_reach_each_other_are_named_before_any_engine_is_opened():
    for report in run_processes(2, examine_behind_a_wall):
        assert not report.is_well
        assert report.engine == ""
        (sentence,) = report.unreachable
        assert sentence.startswith("host ")
        assert "(rank 0, lo 127.0.0.1) does not reach host" in sentence
        assert sentence.endswith("no route")


def test_outside_of_a_job_it_says_how_to_start_one(capsys):
    assert run(["doctor", "--peers"]) == 1
    assert "torchrun --nnodes=2" in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_under_torchrun():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": python_path(), "ANYEP_RANKS_PER_HOST": "1"}
    command = [*launcher, "-m", "anyep", "doctor", "--peers", "--engine", "gloo", "--interface", "lo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "latency us" in done.stdout
    assert "engine: gloo of torch" in done.stdout


def examine_a_cut(group, rank):
    return examine(group, "gloo", None, 2.0)


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_named():
    try:
        hosts = Hosts(2)
    except Unavailable as error:
        pytest.skip(str(error))
    with hosts:
        hosts.cut(1)
        with hosts.start([1, 1], examine_a_cut) as ranks:
            for report in ranks.results(60):
                assert len(report.unreachable) == 2
                assert "(rank 0, eth0 10.77.0.1) does not reach host" in report.unreachable[0]
