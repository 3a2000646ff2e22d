"""``anyep bench --hosts``: what has to cross, what is refused, and a small run between network namespaces."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from anyep.cli.bench.hosts import carry_out
from anyep.cli.bench.hosts.plan import far_tokens, least_bytes
from anyep.cli.bench.launch import BenchmarkError
from anyep.cli.bench.plan import Workload
from anyep.cli.main import run
from anyep.errors import Unavailable
from anyep.layout.hosts import map_hosts
from anyep.testing import hosts as hosts_module
from anyep.testing.hosts import Hosts
from anyep.testing.oracle import Exchange, Routing

WORKLOAD = Workload(name="tiny", tokens=2, hidden=256, topk=2, experts=4, wire="fp8", routing="balanced")
HOSTS = map_hosts(["a", "a", "b", "b"])


@pytest.fixture
def exchange() -> Exchange:
    """Two tokens on each of four ranks with an expert each; ranks 0 and 1 are one host, 2 and 3 another."""
    chosen = [[[0, 1], [1, 2]], [[2, 3], [0, 3]], [[2, 3], [2, 3]], [[0, 1], [3, 2]]]
    weights = torch.ones(2, 2)
    routing = [Routing(topk_idx=torch.tensor(idx), topk_weights=weights) for idx in chosen]
    return Exchange(routing=routing, expert_rank=[0, 1, 2, 3])


def test_a_token_crosses_once_to_a_host_however_many_of_its_experts_are_there(exchange):
    np.testing.assert_array_equal(far_tokens(exchange, HOSTS), [[0, 3], [1, 0]])


def test_the_least_that_crosses_has_scales_experts_and_weights_and_bf16_back(exchange):
    there = 256 + 2 * 4 + 2 * (1 + 4)  # channels, two groups' scales, two columns
    assert least_bytes(WORKLOAD, exchange, HOSTS, "dispatch") == 4 * there
    assert least_bytes(WORKLOAD, exchange, HOSTS, "combine") == 4 * 512
    assert least_bytes(WORKLOAD, exchange, HOSTS, "gloo") == 4 * (there + 512)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hosts", "1x4"], "is not HOSTSxRANKS with at least 2 hosts"),
        (["--hosts", "two"], "is not HOSTSxRANKS"),
        (["--hosts", "2x2", "--link", "fast"], "'fast' is not a speed as 1gbit"),
        (["--hosts", "2x2", "--link", "0gbit"], "carries nothing"),
        (["--link", "1gbit"], "--link goes with --hosts"),
        (["--hosts", "2x2", "--transport", "shm"], "shm goes without --hosts; possible: auto, nixl, gloo"),
        (["--transport", "gloo"], "gloo goes with --hosts, or inside a job; possible: shm, inprocess"),
        (["--hosts", "2x2", "--compare", "gloo", "--ranks", "4"], "leave out --ranks, --compare"),
        (["--hosts", "3x1"], "--hosts needs --experts that the ranks divide, got 256 and 3"),
        (["--hosts", "2x2", "--wire", "fp32"], "--hosts goes with --wire bf16 or fp8"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(capsys, options, said):
    assert run(["bench", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_without_root_the_reason_is_told(capsys, monkeypatch):
    monkeypatch.setattr(hosts_module.os, "geteuid", lambda: 1000)
    assert run(["bench", "--hosts", "2x2"]) == 1
    assert "Unavailable: network namespaces need root" in capsys.readouterr().err


def test_what_other_links_gave_is_written_when_one_fails(tmp_path, monkeypatch, capsys):
    def launch(plan):
        if plan.link_mbit is None:
            raise BenchmarkError("rank 3 died with exit code -9")
        return []

    monkeypatch.setattr(carry_out, "check_hosts", lambda: None)
    monkeypatch.setattr(carry_out, "_launch", launch)
    file = tmp_path / "hosts.json"
    assert run(["bench", "--hosts", "2x2", "--link", "1gbit,none", "--tokens", "8", "--json", str(file)]) == 1
    result = json.loads(file.read_text())
    assert result["partial"] is True
    assert result["failures"] == ["links without a limit: rank 3 died with exit code -9"]
    assert "FAILED links without a limit" in capsys.readouterr().out


def test_hosts_are_measured_verified_and_counted(tmp_path):
    try:
        Hosts(1).close()
    except Unavailable as error:
        pytest.skip(str(error))
    file = tmp_path / "hosts.json"
    sizes = ["--tokens", "64", "--hidden", "512", "--experts", "16", "--topk", "4", "--routing", "balanced"]
    assert run(["bench", "--hosts", "2x2", "--link", "200mbit", "--rounds", "2", *sizes, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    rows = {row["op"]: row for row in result["hosts"]}
    assert list(rows) == ["dispatch", "combine", "dispatch_combine", "gloo", "gloo-ranks"]
    assert all(row["verified"] for row in rows.values())
    assert result["mismatches"] == []
    assert result["partial"] is False
    assert 1.0 < rows["combine"]["over_least"] < 1.3, "headers, and little else"
    assert rows["gloo"]["over_least"] > rows["gloo-ranks"]["over_least"] > rows["dispatch_combine"]["over_least"]
    assert len(rows["dispatch"]["link_shares"]) == 4, "two hosts, both ways"
    assert rows["gloo"]["ratio_median"] > 0
