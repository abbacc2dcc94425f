"""Tickets: among programs that share some work, the last to have done its part goes on. Nobody waits."""

import triton
import triton.language as tl


@triton.jit
def is_last(ticket, programs):
    """Take a ticket after this program's stores; whether it is the last of so many programs, which then see all stores.

    The last one also sets the counter `ticket` back to zero, for the next launch.
    """
    # Without this barrier nothing orders the other warps' stores before the ticket of the warp that takes it.
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last
