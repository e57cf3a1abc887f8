/* SPDX-License-Identifier: GPL-2.0 */
/*
 * One trace event for each fault, migration and invalidation: events/farfault/ in tracefs.
 * The numbers of access, direction, cause and event are those of kapi/trace.rs.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM farfault

#if !defined(FARFAULT_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define FARFAULT_TRACE_H

#include <linux/tracepoint.h>

TRACE_EVENT(farfault_fault,
	TP_PROTO(u32 device, u32 context, u64 address, u32 access, int result, u64 pages),
	TP_ARGS(device, context, address, access, result, pages),
	TP_STRUCT__entry(
		__field(u32, device)
		__field(u32, context)
		__field(u64, address)
		__field(u32, access)
		__field(int, result)
		__field(u64, pages)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->context = context;
		__entry->address = address;
		__entry->access = access;
		__entry->result = result;
		__entry->pages = pages;
	),
	TP_printk("device=%u context=%u address=0x%llx access=%s result=%d pages=%llu",
		  __entry->device, __entry->context, __entry->address,
		  __print_symbolic(__entry->access, { 1, "read" }, { 2, "write" }, { 3, "atomic" }),
		  __entry->result, __entry->pages)
);

TRACE_EVENT(farfault_migrate,
	TP_PROTO(u32 device, u32 context, u64 start, u64 end, u32 direction, u32 cause, u64 moved,
		 u64 nr),
	TP_ARGS(device, context, start, end, direction, cause, moved, nr),
	TP_STRUCT__entry(
		__field(u32, device)
		__field(u32, context)
		__field(u64, start)
		__field(u64, end)
		__field(u32, direction)
		__field(u32, cause)
		__field(u64, moved)
		__field(u64, nr)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->context = context;
		__entry->start = start;
		__entry->end = end;
		__entry->direction = direction;
		__entry->cause = cause;
		__entry->moved = moved;
		__entry->nr = nr;
	),
	TP_printk("device=%u context=%u start=0x%llx end=0x%llx to=%s cause=%s moved=%llu of=%llu",
		  __entry->device, __entry->context, __entry->start, __entry->end,
		  __print_symbolic(__entry->direction, { 0, "device" }, { 1, "system" }),
		  __print_symbolic(__entry->cause, { 0, "gpu-fault" }, { 1, "cpu-fault" },
				   { 2, "request" }, { 3, "evict" }, { 4, "unbind" }),
		  __entry->moved, __entry->nr)
);

TRACE_EVENT(farfault_invalidate,
	TP_PROTO(u32 device, u32 context, u64 start, u64 end, u32 event, bool blocked),
	TP_ARGS(device, context, start, end, event, blocked),
	TP_STRUCT__entry(
		__field(u32, device)
		__field(u32, context)
		__field(u64, start)
		__field(u64, end)
		__field(u32, event)
		__field(bool, blocked)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->context = context;
		__entry->start = start;
		__entry->end = end;
		__entry->event = event;
		__entry->blocked = blocked;
	),
	TP_printk("device=%u context=%u start=0x%llx end=0x%llx event=%s blocked=%d",
		  __entry->device, __entry->context, __entry->start, __entry->end,
		  __print_symbolic(__entry->event, { 0, "unmap" }, { 1, "clear" },
				   { 2, "protection-vma" }, { 3, "protection-page" },
				   { 4, "soft-dirty" }, { 5, "release" }, { 6, "migrate" },
				   { 7, "exclusive" }),
		  __entry->blocked)
);

#endif

/* Outside of the guard: read again with other macros. */
#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
