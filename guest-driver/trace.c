// SPDX-License-Identifier: GPL-2.0
/* The trace events' code, and out-of-line copies of their calls. No logic. */
#include <linux/types.h>

#define CREATE_TRACE_POINTS
#include "trace.h"

#include "helpers.h"

void farfault_c_trace_fault(u32 device, u32 context, u64 address, u32 access, int result,
			    u64 pages)
{
	trace_farfault_fault(device, context, address, access, result, pages);
}

void farfault_c_trace_migrate(u32 device, u32 context, u64 start, u64 end, u32 direction,
			      u32 cause, u64 moved, u64 nr)
{
	trace_farfault_migrate(device, context, start, end, direction, cause, moved, nr);
}

void farfault_c_trace_invalidate(u32 device, u32 context, u64 start, u64 end, u32 event,
				 bool blocked)
{
	trace_farfault_invalidate(device, context, start, end, event, blocked);
}
