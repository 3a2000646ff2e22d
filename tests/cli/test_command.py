"""The commands as users run them, small."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyep.cli import doctor
from anyep.cli.main import run
from anyep.transport.nixl_device import Tried

SMALL = ["--tokens", "7", "--hidden", "200", "--topk", "3", "--experts", "8", "--routing", "balanced", "--rounds", "2"]


def bench(*options):
    return run(["bench", *options])


def anyep(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "anyep", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "0"], "--ranks"),
        (["--tokens", "none"], "'none' is not a valid integer"),
        (["--wire", "bf17"], "'bf17' is not one of bf16, fp16, fp32, fp8"),
        (["--compare", "gloo,nccl"], "'nccl' is not one of gloo, mpich"),
        (["--transport", "rdma"], "'rdma' is not one of"),
        (["--routing", "no-such-file.npz"], "no-such-file.npz"),
        (["--routing", "balanced", "--topk", "9", "--experts", "8"], "--topk 9 is more than --experts 8"),
        (["--experts", "77"], "77"),
        (["--transport", "inprocess", "--compare", "gloo"], "--compare needs rank processes"),
        (["--routing", "balanced", "--experts", "9", "--ranks", "2", "--compare", "gloo"], "--ranks divides"),
        (["--wire", "fp32,bf16", "--compare", "gloo"], "got fp32, bf16"),
        (["--hidden", "0"], "--hidden"),
        (["--tokens", "0", "--compare", "gloo"], "--compare goes with --tokens of at least 1"),
        (["--latency", "2x1,two"], "'two' is not RANKSxTOKENS"),
        (["--latency", "2x129"], "up to 128 tokens"),
        (["--sweep", "1,2"], "'1,2' is not a list as tokens=1,8,32"),
        (["--picture", "a.png"], "--picture draws a --sweep"),
        (["--sweep", "tokens=1", "--wire", "fp8,bf16", "--picture", "a.png"], "of one --wire"),
        (["--sweep", "tokens=1", "--picture", "a.doc"], "must end in .png"),
        (["--sweep", "tokens=1", "--picture", "no-such-folder/a.png"], "no-such-folder is no directory to write in"),
        (["--json", "no-such-folder/a.json"], "no-such-folder is no directory to write in"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(capsys, options, said):
    assert bench(*options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("anyep bench: ")
    assert said in line


def test_an_unknown_command(capsys):
    assert run(["conquer"]) == 2
    assert "conquer" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert run(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert run(["bench", "--help"]) == 0
    assert "--routing" in capsys.readouterr().out
    assert run(["--version"]) == 0
    capsys.readouterr()
    assert run([]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Usage: anyep")
    assert captured.err == ""
    assert "..." not in captured.out.partition("Commands:")[2], "each command's line is whole"


def test_threads_are_measured_and_verified(capsys, tmp_path):
    file = tmp_path / "result.json"
    code = bench("--transport", "inprocess", "--ranks", "2", "--wire", "fp8,bf16", "--json", str(file), *SMALL)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "verified" in out
    assert "WRONG" not in out
    data = json.loads(file.read_text())
    assert {row["wire"] for row in data["rows"]} == {"fp8", "bf16"}
    assert {row["op"] for row in data["rows"]} == {
        "dispatch",
        "dispatch_cached",
        "combine",
        "combine_copied_in",
        "dispatch_combine",
        "dispatch_combine_copied_in",
        "dispatch_padded",
        "combine_padded",
        "combine_padded_logfmt10",
        "dispatch_combine_padded",
        "dispatch_combine_padded_logfmt10",
    }
    assert all(1 <= row["message_rounds"] <= 6 and row["us_p99"] <= row["us_max"] for row in data["rows"])
    assert all(row["verified"] and row["us_min"] <= row["us_median"] <= row["us_max"] for row in data["rows"])
    assert data["paired"] == []
    assert [(row["layout"], row["wire"]) for row in data["overlap"]] == [
        (layout, wire) for wire in ("fp8", "bf16") for layout in ("compact", "padded")
    ]
    assert all(row["verified"] and row["compute_us_median"] > 0 for row in data["overlap"])
    assert data["machine"]["cores"] >= 1


WRONG = 0xA5


class Spoiled:
    """A kernel set whose one function does its work and then writes one wrong byte."""

    def __init__(self, kernels, function, address):
        self._kernels = kernels
        setattr(self, function, self._spoil(getattr(kernels, function), address))

    def __getattr__(self, name):
        return getattr(self._kernels, name)

    def _spoil(self, function, address):
        def spoiled(*arguments):
            result = function(*arguments)
            address(arguments)
            return result

        return spoiled


def spoil_table(position):
    """Spoil the first byte of the first array that a peer table names; all ranks write the same there."""

    def spoil(arguments):
        table = ctypes.c_int64.from_address(arguments[position])
        if table.value:
            ctypes.c_uint8.from_address(table.value).value = WRONG

    return spoil


def spoil_out(arguments):
    ctypes.c_uint8.from_address(arguments[-1]).value = WRONG


@pytest.mark.parametrize(
    ("wire", "function", "address", "operation"),
    [
        ("bf16", "scatter", spoil_table(7), "dispatch"),
        ("fp8", "quantise_scatter", spoil_table(9), "dispatch"),
        ("fp8", "quantise_scatter", spoil_table(10), "dispatch"),
        ("bf16", "scatter_routing", spoil_table(12), "dispatch"),
        ("bf16", "reduce", spoil_out, "combine"),
    ],
)
def test_one_wrong_byte_makes_the_command_fail(capsys, monkeypatch, tmp_path, wire, function, address, operation):
    import anyep.exchange.setup as setup

    load = setup.load
    monkeypatch.setattr(setup, "load", lambda name: Spoiled(load(name), function, address))
    file = tmp_path / "result.json"
    large = ["129" if option == "7" else option for option in SMALL]  # padded batches find places by what is spoiled
    code = bench("--transport", "inprocess", "--ranks", "2", "--wire", wire, "--json", str(file), *large)
    assert code == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert f"MISMATCH 129-tokens {wire}, {operation}: " in out
    wrong = [row["op"] for row in json.loads(file.read_text())["rows"] if not row["verified"]]
    assert operation in wrong


def test_processes_meet_gloo_and_mpich(tmp_path):
    pytest.importorskip("mpi4py")
    file = tmp_path / "result.json"
    done = anyep("bench", "--ranks", "2", "--compare", "gloo,mpich", "--json", str(file), *SMALL, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    data = json.loads(file.read_text())
    alone = [pair for pair in data["paired"] if pair["in_a_row"] == 1]
    in_a_row = [pair for pair in data["paired"] if pair["in_a_row"] > 1]
    assert [(pair["peer"], pair["op"]) for pair in in_a_row] == [(pair["peer"], pair["op"]) for pair in alone]
    assert [(pair["peer"], pair["op"]) for pair in alone] == [
        ("gloo", "dispatch_combine"),
        ("gloo", "dispatch_combine_copied_in"),
        ("mpich", "dispatch_combine"),
        ("mpich", "dispatch_combine_copied_in"),
        ("gloo", "dispatch_combine_padded"),
        ("gloo", "dispatch_combine_padded_logfmt10"),
        ("mpich", "dispatch_combine_padded"),
        ("mpich", "dispatch_combine_padded_logfmt10"),
    ]
    assert all(pair["verified"] and pair["ratio_median"] > 0 for pair in data["paired"])
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_command_that_is_ended_leaves_nothing(tmp_path, number, code):
    options = ["--ranks", "2", "--tokens", "100", "--hidden", "64", "--rounds", "1000000"]
    command = [sys.executable, "-m", "anyep", "bench", *options]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as bench:
        try:
            pids = ranks_of(bench, 2)
            bench.send_signal(number)
            _, said = bench.communicate(timeout=60)
        finally:
            bench.kill()
    assert bench.returncode == code
    (line,) = said.strip().splitlines()  # behind ^C comes an empty one
    assert line.startswith("anyep: ")
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):  # one in the middle of its start dies with its parent
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks_of(bench, num_ranks):
    """Return the process ids of the ranks, as soon as all have been started."""
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
    while len(pids := children.read_text().split()) < num_ranks:
        assert bench.poll() is None, bench.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return pids


@pytest.mark.parametrize("tokens", ["0", "1"])
def test_hardly_any_tokens(tmp_path, tokens):
    file = tmp_path / "result.json"
    options = ["--ranks", "2", "--tokens", tokens, "--hidden", "200", "--rounds", "1", "--json", str(file)]
    assert bench("--transport", "inprocess", *options) == 0
    assert all(row["verified"] for row in json.loads(file.read_text())["rows"])


def test_latency_has_ranks_of_its_own(tmp_path):
    file = tmp_path / "result.json"
    options = ["--hidden", "200", "--rounds", "2", "--json", str(file)]
    done = anyep("bench", "--latency", "2x1,2x0,3x0", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "latency: 200 channels" in done.stdout
    data = json.loads(file.read_text())
    assert data["rows"] == []
    assert data["copy_gb_s"] is None
    rows = [row for row in data["latency"] if row["op"] == "dispatch_combine"]
    assert [(row["ranks"], row["tokens"]) for row in rows] == [(2, 1), (2, 0), (3, 0)]
    assert {row["op"] for row in data["latency"]} >= {"dispatch_combine_padded", "combine_padded_logfmt10"}
    assert all(row["verified"] and row["us_min"] <= row["us_median"] <= row["us_p99"] for row in data["latency"])
    assert all(row["in_a_row"] > 1 and row["in_a_row_us_median"] > 0 for row in data["latency"])
    assert [row["message_rounds"] for row in rows if row["tokens"] == 0] == [2, 2]


def test_a_sweep_is_a_table_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "result.json", tmp_path / "sweep.png"
    options = ["--ranks", "2", "--hidden", "200", "--rounds", "2", "--json", str(file), "--picture", str(picture)]
    done = anyep("bench", "--sweep", "tokens=200,1,0", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "came along" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(file.read_text())["sweep"]
    assert [row["tokens"] for row in rows] == [0, 1, 200]
    for row in rows:
        assert set(row["ways"]) == {"automatic", "rendezvous", "eager"}
        assert all(way["verified"] for way in row["ways"].values())
        assert row["automatic_ratio"] > 0
    shares = [{name: way["dispatch_eager_share"] for name, way in row["ways"].items()} for row in rows]
    assert [share["rendezvous"] for share in shares] == [0, 0, 0]
    assert [share["eager"] for share in shares] == [0, 1, 1]


def test_a_picture_without_its_package_names_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench("--ranks", "2", "--sweep", "tokens=1", "--picture", str(tmp_path / "a.png")) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("anyep: Unavailable: ")
    assert "anyep[pictures]" in line


def test_the_shipped_trace_is_the_default():
    done = anyep("bench", "--ranks", "2", "--tokens", "5", "--hidden", "64", "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "top-8 of 256" in done.stdout
    assert "routing trace" in done.stdout


def test_it_works_inside_a_torchrun_job(tmp_path):
    file = tmp_path / "result.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            "-m",
            "anyep",
            "bench",
            "--compare",
            "gloo",
            "--json",
            str(file),
            *SMALL,
        ],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text())
    assert {row["ranks"] for row in data["rows"]} == {2}
    assert done.stdout.count("7-tokens: 2 ranks") == 1
    assert len(data["paired"]) == 8  # four operations, each alone and in a row


def test_mpich_without_its_packages_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert bench("--ranks", "2", "--compare", "mpich", *SMALL) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("anyep: Unavailable: ")
    assert "anyep[bench]" in line


def test_too_little_memory_makes_it_smaller(capsys, monkeypatch):
    monkeypatch.setattr("anyep.cli.bench.carry_out.available_memory_bytes", lambda: 3 << 29)
    options = ["--transport", "inprocess", "--ranks", "1", "--rounds", "1", "--routing", "balanced", "--hidden", "2048"]
    assert bench(*options, "--tokens", "1000000") == 0
    out = capsys.readouterr().out
    assert "smaller, to fit this machine's memory" in out
    assert "instead of 1000000" in out


def test_no_memory_at_all(capsys, monkeypatch):
    monkeypatch.setattr("anyep.cli.bench.carry_out.available_memory_bytes", lambda: 1 << 20)
    assert bench("--ranks", "2", *SMALL) == 1
    assert "CapacityError" in capsys.readouterr().err


def test_doctor_says_what_is_possible(capsys):
    code = run(["doctor"])
    out = capsys.readouterr().out
    assert code == 0, out
    for topic in ("processor", "memory", "kernel cache", "futex", "memfd", "pidfd", "transport shm", "comparison gloo"):
        assert topic in out
    assert "The basic job is possible here" in out
    for topic in ("between hosts gloo", "between hosts nixl", "CUDA tensors", "GPU memory nixl"):
        (line,) = [line for line in out.splitlines() if line.startswith(topic)]
        assert line.split()[len(topic.split())] in ("yes", "no")


def test_doctor_tries_whether_nixl_carries_a_gpu_s_memory(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("anyep.transport.nixl_agent.load_nixl", lambda: None)
    monkeypatch.setattr("anyep.transport.nixl_device.try_device", lambda where: Tried(False, f"{where}: not here"))
    assert doctor._gpu_memory_nixl() == doctor.Finding(
        topic="GPU memory nixl",
        text="cuda:1: not here; rows of a GPU pass through pinned host memory with and without it",
        possible=False,
    )


def test_doctor_names_the_extras_of_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    monkeypatch.setitem(sys.modules, "nixl_cu12", None)
    monkeypatch.setitem(sys.modules, "nixl", None)
    assert run(["doctor"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "anyep[bench]" in told
    assert "anyep[nixl]" in told


@pytest.mark.parametrize("options", [["--interface", "lo"], ["--engine", "gloo"], ["--timeout", "10"]])
def test_doctor_does_not_ignore_what_belongs_to_peers(capsys, options):
    assert run(["doctor", *options]) == 2
    assert (
        capsys.readouterr().err
        == f"anyep doctor: {options[0]} goes with --peers, which every rank of a job runs"
        + (" (see anyep doctor --help)\n")
    )


def test_doctor_says_what_is_impossible(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANYEP_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("anyep.cli.machine_facts.available_memory_bytes", lambda: 1 << 20)
    from anyep.machine import compiler

    compiler.cache_directory.cache_clear()
    try:
        assert run(["doctor"]) == 1
    finally:
        compiler.cache_directory.cache_clear()
    out = capsys.readouterr().out
    assert "The basic job is impossible here: memory, kernel cache." in out
    assert "ANYEP_CACHE_DIR" in out
