"""What becomes of the kernels on targets that this machine does not have: access widths, memory, memory order."""

from __future__ import annotations

import re

import pytest

from anyep.errors import Unavailable
from anyep.kernels.gpu.target import SM_80, SM_90
from tests.gpu.programs import needs_triton, run_program

MOVING = {"scatter", "copy", "unpack", "pack", "expand", "quantise_scatter", "send", "dequantise", "reduce"}
"""Kernels that read and write rows."""
FILLING = {"fill_rows", "fill_gaps"}
WRITING = {*FILLING, *MOVING, "gather"}
NUMERIC = {"reduce", "quantise_scatter", "send", "dequantise", "logfmt_encode", "reduce_logfmt"}
"""Kernels whose products are rounded before they are added."""
OTHERS = {
    "find_entries",
    "number_entries",
    "place",
    "scatter_routing",
    "transpose_scales",
    "check_numbers",
    "announce",
    "settle",
    "connect",
}
FLAGS = {"tick", "signal", "wait", "meet"}
MOST_REGISTERS = 144
TARGETS = ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100", "gfx942"))]


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return request.param


@pytest.fixture(scope="module")
def forms(target, tmp_path_factory):
    how_many = "some" if target == "sm_90" else "all"
    return run_program("compiled", target, how_many, cache=tmp_path_factory.mktemp("cache"), timeout=900)


def _moves_16_bytes(target, instructions, *, loads):
    if target == "gfx942":
        return any(one.endswith(f"{'load' if loads else 'store'}_dwordx4") for one in instructions)
    return f"{'ld' if loads else 'st'}.global.v4.b32" in instructions


def _sends_as_is(form):
    return form["constants"].get("SCALES") == -1


def _instructions(forms, kernel):
    (form,) = [form for form in forms if form["kernel"] == kernel]
    return form["instructions"]


@needs_triton
def test_every_function_compiles(forms, target):
    without = {"quantise_scatter", "dequantise"} if target == "sm_80" else set()
    assert {form["kernel"] for form in forms} == (WRITING | NUMERIC | OTHERS | FLAGS) - without


@needs_triton
def test_nothing_spills_and_nothing_lives_in_local_memory(forms):
    assert [form for form in forms if form["memory"] != 0] == []


@needs_triton
def test_registers_leave_room_for_other_programs(forms):
    assert [form for form in forms if form["registers"] > MOST_REGISTERS] == []


@needs_triton
def test_rows_are_read_and_written_16_bytes_at_a_time(forms, target):
    for form in forms:
        if form["kernel"] in WRITING and form["constants"].get("BLOCK") != 128:
            assert _moves_16_bytes(target, form["instructions"], loads=False), form
            assert form["kernel"] in FILLING or _moves_16_bytes(target, form["instructions"], loads=True), form


@needs_triton
def test_no_product_is_added_unrounded(forms):
    """On gfx942 a true division is made of fused ones, so that there packed ones are looked for in what divides."""
    for form in forms:
        divides = "v_div_fixup_f32" in form["instructions"]
        fusing = ("fma.", "v_pk_fma_") if divides else ("fma.", "v_pk_fma_", "v_fma_", "v_fmac_", "v_mac_")
        fused = [one for one in form["instructions"] if one.startswith(fusing)]
        assert form["kernel"] not in NUMERIC or fused == [], form


@needs_triton
def test_nvidia_rounds_to_nearest_even_and_saturates(forms, target):
    bf16 = [form for form in forms if form["constants"].get("ELEMENT") == 0 and not _sends_as_is(form)]
    wanted = dict.fromkeys(("quantise_scatter", "send"), "cvt.rn.satfinite.e4m3x2.f32")
    wanted["reduce"] = "cvt.rn.bf16x2.f32"
    for form in bf16 if target != "gfx942" else []:
        kernel = form["kernel"]
        assert kernel not in wanted or target == "sm_80" or wanted[kernel] in form["instructions"], form


@needs_triton
def test_divisions_are_true_ones(forms, target):
    division = "v_div_fixup_f32" if target == "gfx942" else "div.rn.f32"
    for form in forms:
        dividing = {"quantise_scatter", "send", "logfmt_encode"}
        assert form["kernel"] not in dividing or _sends_as_is(form) or division in form["instructions"], form


@needs_triton
def test_nothing_is_approximated_or_flushed_to_zero(forms):
    """Interpreted kernels divide and round as the host does, whatever was compiled: only this shows the difference."""
    for form in forms:
        divides = "v_div_fixup_f32" in form["instructions"]  # and begins with an approximation
        pattern = r"\.(approx|full|ftz)\b|^v_(rsq|sqrt|exp|log)_" + ("" if divides else "|^v_rcp_")
        loose = [one for one in form["instructions"] if re.search(pattern, one)]
        assert form["kernel"] not in NUMERIC or loose == [], form


@needs_triton
def test_signals_release_and_waits_acquire_at_system_scope(forms, target):
    for kernel in ("signal", "meet"):
        told = set(_instructions(forms, kernel))
        released = (
            {"buffer_wbl2", "global_atomic_swap_x2"} if target == "gfx942" else {"atom.global.sys.release.exch.b64"}
        )
        assert released <= told, kernel
    for kernel in ("wait", "meet"):
        told = _instructions(forms, kernel)
        if target == "gfx942":
            assert "buffer_inv" in told
        else:
            assert any(one.startswith(("ld.", "atom.")) and "sys" in one and "acquire" in one for one in told), kernel


def test_a_device_without_fp8_offers_bf16():
    with pytest.raises(Unavailable, match="this is sm_80; use wire='bf16'"):
        SM_80.check_fp8()
    SM_90.check_fp8()
