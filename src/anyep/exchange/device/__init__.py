"""Dispatch and combine where tensors lie in a device's memory: the same protocol, whose counts stay on the device.

What is shared with the host (``exchange/``), and what is not:

=============== ================================================ ======================================================
part            host                                             device
=============== ================================================ ======================================================
agreement       headers on the lanes of a transport              the same, on the same lanes
checks          outgoing, returning, wire                        the same, for tensors of the device
memory          the transport's arena                            of the device, within peers' ``reach`` (``landing``)
routing         kernels: route                                   begin_route, which nobody waits for (``plan``)
counts          travel with the announcement                     announce_counts, to the *board* of every rank
places          compiled settle and connect                      kernels settle, or connect (``dispatch_form``)
rows            scatter, quantise_scatter, scatter_routing       send: the same at once, on tables in device memory
eager rows      of small pairs, to slots, then expand            of every padded batch where slots fit (``slots``)
sums            reduce, reduce_weights, reduce_logfmt            the same kernels
order           messages, awaited by every rank                  of a stream, or words (``order``, ``concurrent``)
=============== ================================================ ======================================================

*Where memory lives* is said by one object, a :class:`~anyep.exchange.device.devices.Device`: where a caller's tensors
must lie, streams and events, how words come to the host, and the kernels. Nothing else here knows CUDA; tests put
host memory and interpreted kernels in its place.

*Who reaches what* is said by a second one, a :class:`~anyep.exchange.device.reach.Reach`: where ranks share one device
every tensor is within reach; where each has its own, what is cut from a heap that all have mapped
(``transport/cuda_symmetric.py``). Places are counted from a base, so that kernels do not know the difference.

*Between hosts* nobody reaches another's device. There none of the above is used: calls are those of CPU tensors between
two copies through pinned memory (``staged``, ``staged_halves``, ``pinned``, ``quantised``).

*Halves.* ``post`` launches what concerns this rank alone (route, announce, padded rows to slots) and tells the others
so; ``finish`` waits on the host until all have posted. The **second half** of every rank (places, rows, or blocks of
those that are here, and sums) is then launched by whoever comes first, for all ranks, in rank order
(:class:`~anyep.exchange.device.order.PhaseSplit`): on one stream nothing that is launched ever waits for anything, so
that ranks may be threads, or calls of one thread with ``wait=False``. Ranks with streams of their own wait for words on
the device instead (:class:`~anyep.exchange.device.concurrent.Concurrent`), a bounded number of times.

*The host waits for the device* once in a dispatch whose number of rows is not known before: for the ledger, which comes
along while rows are moved, without the GIL. With ``static_rows``, in the padded layout, for a cached dispatch and for a
combine it does not wait at all. What goes wrong there kernels write to pinned memory; the next call says it, or
``barrier`` (``faults``).

*Streams.* Memory is allocated on the caller's stream. The exchange runs on a stream of its own, which follows an event
of the caller's and which the caller's follows afterwards; so memory needs no other care. What outlives a call
is lent to the exchange's stream: what the buffer keeps, and a handle's memory in a call on another stream than its own.
"""
