/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The first program, in C, with nothing but the header: the GPU fills memory from malloc() and sums
 * it. Usage: first_c [device]; the exit code is 0 if the sum is right.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <uapi/farfault.h>

#define WORDS ((size_t)1 << 20)
#define PATTERN UINT64_C(42)
#define TIMEOUT_NS (10 * INT64_C(1000000000))

/* Runs one job to its end. Returns 0 and its result, or -1 after it has said why not. */
static int run(int gpu, const char *name, struct farfault_submit job, uint64_t *result)
{
	struct farfault_wait wait = { .timeout_ns = TIMEOUT_NS };

	if (ioctl(gpu, FARFAULT_IOC_SUBMIT, &job) < 0) {
		fprintf(stderr, "first_c: SUBMIT of %s: %s\n", name, strerror(errno));
		return -1;
	}
	wait.fence = job.fence;
	if (ioctl(gpu, FARFAULT_IOC_WAIT, &wait) < 0) {
		fprintf(stderr, "first_c: WAIT for %s: %s\n", name, strerror(errno));
		return -1;
	}
	if (wait.status != FARFAULT_JOB_OK) {
		fprintf(stderr, "first_c: %s ended with status %u at address 0x%llx, access %u\n", name,
			wait.status, (unsigned long long)wait.fault_address, wait.access);
		return -1;
	}
	*result = wait.result;
	return 0;
}

int main(int argc, char **argv)
{
	const char *path = argc > 1 ? argv[1] : "/dev/farfault0";
	struct farfault_info info;
	uint64_t *data;
	uint64_t sum = 0;
	int gpu;

	gpu = open(path, O_RDWR | O_CLOEXEC);
	if (gpu < 0) {
		fprintf(stderr, "first_c: open %s: %s; is the driver loaded?\n", path, strerror(errno));
		return 1;
	}
	if (ioctl(gpu, FARFAULT_IOC_INFO, &info) < 0) {
		fprintf(stderr, "first_c: INFO: %s\n", strerror(errno));
		return 1;
	}
	printf("%s: %llu MiB of VRAM, jobs of up to %u waves\n", path,
	       (unsigned long long)(info.vram_size >> 20), info.max_waves);

	data = malloc(WORDS * sizeof(*data));
	if (!data) {
		fprintf(stderr, "first_c: no memory\n");
		return 1;
	}

	/*
	 * The pages do not exist yet: the GPU's faults make them, in VRAM. If a job were still running
	 * after an error, memory that it writes must not be freed: leave by exit, which ends it first.
	 */
	struct farfault_submit fill = {
		.kernel = FARFAULT_KERNEL_FILL,
		.waves = 1,
		.arguments = { (uintptr_t)data, WORDS * sizeof(*data), PATTERN },
	};
	struct farfault_submit add_up = {
		.kernel = FARFAULT_KERNEL_SUM,
		.waves = 1,
		.arguments = { (uintptr_t)data, WORDS * sizeof(*data) },
	};
	uint64_t nothing;

	if (run(gpu, "FILL", fill, &nothing) < 0 || run(gpu, "SUM", add_up, &sum) < 0)
		return 1;

	/* The CPU touches one word: its page comes home from VRAM. */
	printf("the GPU's sum is %llu, the last word is %llu\n", (unsigned long long)sum,
	       (unsigned long long)data[WORDS - 1]);
	if (sum != WORDS * PATTERN || data[WORDS - 1] != PATTERN) {
		fprintf(stderr, "first_c: wrong: every word should be %llu\n",
			(unsigned long long)PATTERN);
		return 1;
	}

	free(data);
	close(gpu);
	return 0;
}
