"""Rows quantised on the device before they leave it: half of the bytes go to the host."""

from __future__ import annotations

import torch

from anyep.exchange.device.devices import Device, allocate
from anyep.exchange.device.pinned import Move, Passage
from anyep.exchange.endpoint import Endpoint
from anyep.exchange.wire import Rows
from anyep.layout.regions import MemoryAccount


class Quantiser:
    """``quantise_scatter`` with every token's row at its own place in one array."""

    def __init__(self, device: Device, passage: Passage, host: Endpoint, account: MemoryAccount) -> None:
        self._device = device
        self._stream = passage.stream
        self._passage = passage
        self._host = host
        self._account = account
        tokens = torch.arange(host.max_tokens, dtype=torch.int32, device="cpu")
        self._entries = torch.stack([torch.zeros_like(tokens), tokens])
        self._entries = self._entries.to(device.where)
        """rank 0 and its own row, for each token: int32 [2, Tmax]"""
        device.lend(self._entries, passage.stream)
        device.wait(device.mark(device.current_stream()))

    def launch(self, rows: Rows) -> Rows:
        """Launch the quantising of rows on the device behind what its stream follows; return the rows that it makes.

        Their memory is the caller's stream's.
        """
        assert rows.quantise_from is not None
        host, wire = self._host, self._host.wire
        made = Rows(
            x=self._room((rows.num_tokens, wire.hidden), wire.dtype),
            scales=self._room((rows.num_tokens, wire.scale_columns), wire.scale_dtype),
            quantise_from=None,
        )
        assert made.scales is not None
        tables = self._room((2,), torch.int64)
        self._device.follow(self._stream, self._device.mark(self._device.current_stream()))
        where = torch.tensor([made.x.data_ptr(), made.scales.data_ptr()], dtype=torch.int64, device="cpu")
        self._passage.give([Move(where, tables)])
        ranks_addr, rows_addr = (self._entries[which].data_ptr() for which in range(2))
        with self._device.on(self._stream):
            self._device.kernels.quantise_scatter(
                *(rows.x.data_ptr(), int(rows.quantise_from), wire.hidden, host.scale_code, 0, rows.num_tokens),
                *(1, ranks_addr, rows_addr, tables.data_ptr(), tables.data_ptr() + 8),
            )
        for lent in (tables, made.x, made.scales):
            self._device.lend(lent, self._stream)
        return made

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return allocate(self._device, shape, dtype, self._account.__str__)
