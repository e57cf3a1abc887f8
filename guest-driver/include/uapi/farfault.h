/* SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR MIT */
/*
 * What a program may ask of /dev/farfaultN.
 *
 * The first call on a descriptor makes a GPU address space that mirrors the opener's: jobs use the
 * process's own pointers. It belongs to that address space alone; calls from another one (a child after
 * fork, a process that was sent the descriptor) fail with EPERM. poll() says POLLIN while there is an
 * ended job to be collected, POLLERR when the device does not answer any more, and POLLHUP when it was
 * unbound. open() and poll() wait for nothing else. open() fails with
 *   ENODEV  the device is being unbound
 *   EIO     the device does not answer any more
 *   ENOMEM  there is no memory for it
 *
 * Every call fails with
 *   ENODEV  the device was unbound or unplugged since the descriptor was opened
 *   EIO     the call needs the device, and that does not answer any more
 *   EINVAL  a field has a value that is not described here: reserved fields and unused arguments
 *           are zero, ranges are not empty and end within the address space of processes
 *   EFAULT  the argument, or memory that it points to, can't be accessed
 *   EPERM   the caller's address space is not the opener's
 *   ENOSPC  none has succeeded before, and the device has no context left, or no VRAM for its page tables
 *   ENOMEM  there is no memory for what the kernel needs for it
 *   ENOTTY  there is no such call
 * and with what is said at each.
 */
#ifndef _UAPI_FARFAULT_H
#define _UAPI_FARFAULT_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Raised by each addition. What exists keeps its number, layout and meaning. */
#define FARFAULT_UAPI_VERSION 2

struct farfault_info {
	__u32 uapi_version;	/* out: FARFAULT_UAPI_VERSION of the driver */
	__u32 context;		/* out: number of the address space on the GPU */
	__u64 vram_size;	/* out: bytes */
	__u64 serial;		/* out: tells this GPU from others */
	__u32 max_waves;	/* out: most waves of one job */
	__u32 max_jobs;		/* out: most jobs of this descriptor not yet collected by WAIT */
};

#define FARFAULT_IOC_INFO _IOR('F', 0x00, struct farfault_info)

/*
 * Kernels and their arguments. Addresses and lengths are multiples of 8 bytes; memory is seen as
 * little-endian 64-bit words. Unused arguments are zero; lengths, repeat and steps are not. Ranges
 * end within the address space of processes, and those of COPY may not overlap. All else is EINVAL.
 */
enum farfault_kernel {
	FARFAULT_KERNEL_FILL = 1,		/* destination, length, pattern */
	FARFAULT_KERNEL_COPY = 2,		/* destination, source, length; not overlapping */
	FARFAULT_KERNEL_SUM = 3,		/* source, length; result: the sum */
	FARFAULT_KERNEL_ADD = 4,		/* destination, length, addend */
	FARFAULT_KERNEL_ATOMIC_ADD = 5,		/* destination, addend, repeat of each wave;
						 * result: before the last addition */
	FARFAULT_KERNEL_COMPARE_AND_SWAP = 6,	/* destination, expected, desired; result: before */
	FARFAULT_KERNEL_POINTER_CHASE = 7,	/* start, steps; result: last word read */
};

/*
 * Starts a job and returns its fence at once.
 *   EAGAIN  max_jobs jobs have not been collected yet, or the GPU has no room: wait for one first
 */
struct farfault_submit {
	__u32 kernel;		/* in: enum farfault_kernel */
	__u32 waves;		/* in: 1 to max_waves; COMPARE_AND_SWAP and POINTER_CHASE: 1 */
	__u64 arguments[4];	/* in: by kernel */
	__u64 fence;		/* out: name of the job, never zero */
};

#define FARFAULT_IOC_SUBMIT _IOWR('F', 0x01, struct farfault_submit)

enum farfault_job_status {
	FARFAULT_JOB_OK = 0,
	FARFAULT_JOB_FAULT = 1,		/* may not access fault_address: see access */
	FARFAULT_JOB_KILLED = 2,	/* by somebody, or because the machine went to sleep */
	FARFAULT_JOB_BUS_ERROR = 3,	/* the GPU could not reach the memory behind fault_address */
	FARFAULT_JOB_DEVICE_LOST = 4,	/* the device stopped answering, or was unbound or
					 * unplugged, while the job was under way */
	FARFAULT_JOB_MEMORY_ERROR = 5,	/* the memory behind fault_address has failed: its contents
					 * are lost, and a CPU that touches it gets SIGBUS */
};

enum farfault_access {
	FARFAULT_ACCESS_READ = 1,
	FARFAULT_ACCESS_WRITE = 2,
	FARFAULT_ACCESS_ATOMIC = 3,
};

/*
 * Waits for a job, and collects its result: the fence is forgotten then. poll() reports POLLIN
 * while a job has ended that is not collected.
 *   ENOENT     no such job
 *   ETIMEDOUT  it has not ended in time; it goes on, and can be waited for again
 *   EINTR      a signal with a handler came first; likewise. Other signals, and what stops a
 *              process for a while, do not end the call
 * A WAIT that is under way when the device is unbound gets FARFAULT_JOB_DEVICE_LOST for its job;
 * calls after that fail with ENODEV.
 */
struct farfault_wait {
	__u64 fence;		/* in: the job; zero: any. out: the job */
	/*
	 * In: from now; zero: look only; negative: no limit but the device's.
	 * Out, after EINTR: what is left of it.
	 */
	__s64 timeout_ns;
	__u64 result;		/* out: by kernel */
	__u64 fault_address;	/* out: page that a failed job could not access */
	__u32 status;		/* out: enum farfault_job_status */
	__u32 access;		/* out: enum farfault_access of a failed job */
};

#define FARFAULT_IOC_WAIT _IOWR('F', 0x02, struct farfault_wait)

/*
 * Ends a job that was submitted and not collected. It ends with FARFAULT_JOB_KILLED, if it has not
 * ended already.
 *   ENOENT  no such job
 */
struct farfault_kill {
	__u64 fence;		/* in */
};

#define FARFAULT_IOC_KILL _IOW('F', 0x03, struct farfault_kill)

enum farfault_place {
	FARFAULT_PLACE_NONE = 0,
	FARFAULT_PLACE_RAM = 1,
	FARFAULT_PLACE_VRAM = 2,
};

/*
 * Moves the pages of a range to RAM or VRAM. What cannot move (files, shared and pinned memory)
 * stays where it is: that is counted, and no error. A page that others have, too, may be on its way
 * home already, as when one of them closes its descriptor: until it has come it counts as not in VRAM,
 * and is in no place for FARFAULT_QUERY. So does every page of memory that may not be read (PROT_NONE),
 * wherever it is: it comes home on request all the same.
 *   EFAULT  part of the range is not mapped
 *   ENOMEM  no memory for the call itself
 *   EBUSY   the range kept changing while it was counted; what could move has moved
 */
struct farfault_migrate {
	__u64 address;		/* in: aligned to the page size */
	__u64 length;		/* in: bytes, likewise, not zero */
	__u32 destination;	/* in: FARFAULT_PLACE_RAM or FARFAULT_PLACE_VRAM */
	__u32 reserved;
	__u64 moved;		/* out: pages moved now */
	__u64 there;		/* out: pages that were there before */
	__u64 stayed;		/* out: pages that are elsewhere */
};

#define FARFAULT_IOC_MIGRATE _IOWR('F', 0x04, struct farfault_migrate)

enum farfault_advice {
	FARFAULT_ADVICE_DEFAULT = 0,	/* a GPU fault on anonymous memory moves the page (or the
					 * huge page) to VRAM, other memory is mapped where it is */
	FARFAULT_ADVICE_PREFER_GPU = 1,	/* like DEFAULT, with all of the range in the same 2 MiB */
	FARFAULT_ADVICE_PREFER_CPU = 2,	/* a GPU fault brings the page to RAM and maps it there */
	FARFAULT_ADVICE_MAP_ONLY = 3,	/* a GPU fault maps the page where it is */
};

/*
 * Says where the pages of a range should be when the GPU wants them. It moves nothing by itself,
 * and stays in force for these addresses until it is said otherwise or the descriptor is closed.
 *   ENOSPC  too many ranges with an advice of their own
 */
struct farfault_advise {
	__u64 address;		/* in: aligned to the page size */
	__u64 length;		/* in: bytes, likewise, not zero */
	__u32 advice;		/* in: enum farfault_advice */
	__u32 reserved;
};

#define FARFAULT_IOC_ADVISE _IOW('F', 0x05, struct farfault_advise)

#define FARFAULT_PAGE_WRITE	(1 << 0)	/* writes are allowed */
#define FARFAULT_PAGE_HUGE	(1 << 1)	/* mapped by a 2 MiB entry */
#define FARFAULT_PAGE_ATOMIC	(1 << 2)	/* GPU only: atomics are allowed */
#define FARFAULT_PAGE_ACCESSED	(1 << 3)	/* GPU only: used since it was mapped or looked at */
#define FARFAULT_PAGE_DIRTY	(1 << 4)	/* GPU only: written since it was mapped */

/* One page, as the CPU's page tables and as the GPU's own have it. */
struct farfault_page {
	__u8 cpu_place;		/* enum farfault_place; NONE: not in memory, or never touched */
	__u8 cpu_flags;		/* FARFAULT_PAGE_* */
	__u8 gpu_place;		/* enum farfault_place; NONE: the GPU would fault */
	__u8 gpu_flags;		/* FARFAULT_PAGE_* */
	__u8 advice;		/* enum farfault_advice */
	__u8 reserved[3];
	__u64 cpu_vram;		/* where cpu_place is VRAM: the page's address there, else zero */
	__u64 gpu_vram;		/* where gpu_place is VRAM: the page's address there, else zero */
};

/*
 * Asks where the pages of a range are. It moves and maps nothing. Each page's answer is true at one
 * moment between call and return.
 *   EFAULT  part of the range is not mapped
 *   EBUSY   the range kept changing while it was looked at
 */
struct farfault_query {
	__u64 address;		/* in: aligned to the page size */
	__u64 length;		/* in: bytes, likewise, not zero */
	__u64 pages;		/* in: pointer to one struct farfault_page for each page */
};

#define FARFAULT_IOC_QUERY _IOW('F', 0x06, struct farfault_query)

/* Counts since the descriptor was opened, for its address space. */
struct farfault_stats {
	__u64 gpu_faults;		/* faults of the GPU served */
	__u64 gpu_faults_failed;	/* of these, ended in a failed job */
	__u64 cpu_faults;		/* faults of CPUs on pages in VRAM */
	__u64 pages_to_vram;		/* for a fault or on request */
	__u64 pages_to_ram;		/* for a fault, on request, evicted, at a close or for the machine's sleep */
	__u64 pages_evicted;		/* of these, to make room in VRAM */
	__u64 pages_mapped;		/* entries written to the GPU's page tables, in pages */
	__u64 invalidations;		/* calls of the MMU notifier that unmapped something */
	__u64 migrate_ns;		/* time spent in migrations, nanoseconds */
	__u64 jobs;			/* jobs ended */
};

#define FARFAULT_IOC_STATS _IOR('F', 0x07, struct farfault_stats)

/* Sends an empty command to the GPU and waits for the answer: the cost of the way there and back. */
#define FARFAULT_IOC_PING _IO('F', 0x08)

/*
 * Takes the pages of a range from the CPU, for atomics of the GPU on pages in RAM; pages in VRAM
 * come home for it. A job need not ask: its atomics take what they find in RAM, page by page. This
 * takes a range ahead of them.
 *
 * A page is the GPU's until a CPU touches it, the kernel changes its mapping (fork, mprotect and the
 * like) or another device takes it: nobody is kept from a page, and nobody waits for its release.
 * QUERY says which pages the GPU has: gpu_place is RAM with FARFAULT_PAGE_ATOMIC, and cpu_flags is
 * without FARFAULT_PAGE_WRITE. What the GPU loses without a touch (by ADVISE, or because the
 * descriptor is closed) is in nobody's page tables until the next one: QUERY says NONE then, and
 * MIGRATE lets it stay.
 *
 * Only private anonymous memory can be taken, with what a private mapping of a file has of its own.
 * For atomics on other memory in RAM the GPU and the CPU share the page, and their atomics are
 * atomic towards each other.
 *   EFAULT      part of the range is not mapped, or may not be written
 *   EOPNOTSUPP  part of the range is of another kind: a shared mapping, hugetlbfs
 *   ENOSPC      there is no VRAM for page tables
 *   ENOMEM      no memory to bring pages home, or for pages that were never touched
 *   EBUSY       pages of the range kept changing, or the handler of a userfaultfd has not answered
 *               for a while
 *   EINTR       the process is being killed
 * After an error, some pages of the range may have been taken or have come home. Those that may not
 * be written keep their content and their mapping.
 */
struct farfault_exclusive {
	__u64 address;		/* in: aligned to the page size */
	__u64 length;		/* in: bytes, likewise, not zero */
};

#define FARFAULT_IOC_EXCLUSIVE _IOW('F', 0x09, struct farfault_exclusive)

#endif
