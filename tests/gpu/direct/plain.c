/* A program of the driver's API, linked with libcuda: blocks that threads look at without pause.
 *
 * plain DIRECTORY MIB BLOCKS THREADS: fills BLOCKS blocks of MIB, then THREADS threads copy words of
 * them to the host and compare. Writes DIRECTORY/status once and again: answers, wrong ones, errors,
 * interrupted system calls. Ends when DIRECTORY/stop is there. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

typedef int CUresult;
typedef uint64_t CUdeviceptr;
extern CUresult cuInit(unsigned), cuDevicePrimaryCtxRetain(void **, int), cuCtxSetCurrent(void *);
extern CUresult cuMemAlloc_v2(CUdeviceptr *, size_t), cuMemFree_v2(CUdeviceptr);
extern CUresult cuMemcpyHtoD_v2(CUdeviceptr, const void *, size_t), cuMemcpyDtoH_v2(void *, CUdeviceptr, size_t);
extern CUresult cuMemGetAddressRange_v2(CUdeviceptr *, size_t *, CUdeviceptr), cuCtxSynchronize(void);

static size_t size;
static int blocks_count;
static CUdeviceptr *blocks;
static void *context;
static atomic_ulong answers, wrong, errors, interrupted, made;
static atomic_int ending;
static _Atomic int last_error;

static void failed(int code)
{
	atomic_fetch_add(&errors, 1);
	last_error = code;
}

static uint64_t word(int block, size_t at) { return ((uint64_t)block << 40 | at) * 0x9E3779B97F4A7C15ull; }

static void *look(void *seed)
{
	unsigned random = (unsigned)(uintptr_t)seed;
	uint64_t got[512];
	cuCtxSetCurrent(context);
	if (random & 1) { /* a thread that no signal reaches */
		sigset_t all;
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, NULL);
	}
	while (!ending) {
		int block = rand_r(&random) % blocks_count;
		size_t at = (size_t)rand_r(&random) % (size / sizeof got) * sizeof got;
		int code = cuMemcpyDtoH_v2(got, blocks[block] + at, sizeof got);
		if (code)
			failed(code);
		for (size_t i = 0; !code && i < 512; i++)
			if (got[i] != word(block, at / 8 + i))
				atomic_fetch_add(&wrong, 1);
		atomic_fetch_add(&answers, 1);
	}
	return NULL;
}

static void *make(void *nothing)
{
	(void)nothing;
	cuCtxSetCurrent(context);
	while (!ending) {
		CUdeviceptr at, base;
		size_t range, asked = 9437185;
		uint64_t there = 0, put = made;
		int code = cuMemAlloc_v2(&at, asked);
		if (!code)
			code = cuMemcpyHtoD_v2(at + 8192, &put, 8);
		if (!code)
			code = cuMemcpyDtoH_v2(&there, at + 8192, 8);
		if (!code)
			code = cuMemGetAddressRange_v2(&base, &range, at + 8192);
		if (code)
			failed(code);
		else if (there != put || base != at || range < asked)
			atomic_fetch_add(&wrong, 1);
		code = cuMemFree_v2(at);
		if (code)
			failed(code);
		atomic_fetch_add(&made, 1);
	}
	return NULL;
}

static void *sleeper(void *nothing)
{
	(void)nothing;
	struct epoll_event event;
	int set = epoll_create1(0);
	while (!ending)
		if (epoll_wait(set, &event, 1, 200) < 0 && errno == EINTR)
			atomic_fetch_add(&interrupted, 1);
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	char path[4096], renamed[4096], stop[4096];
	snprintf(path, sizeof path, "%s/status.new", argv[1]);
	snprintf(renamed, sizeof renamed, "%s/status", argv[1]);
	snprintf(stop, sizeof stop, "%s/stop", argv[1]);
	size = (size_t)atoi(argv[2]) << 20;
	blocks_count = atoi(argv[3]);
	int threads = atoi(argv[4]), code = cuInit(0);
	if (!code)
		code = cuDevicePrimaryCtxRetain(&context, 0);
	if (!code)
		code = cuCtxSetCurrent(context);
	blocks = calloc((size_t)blocks_count, sizeof *blocks);
	uint64_t *host = malloc(size);
	for (int i = 0; !code && i < blocks_count; i++) {
		for (size_t at = 0; at < size / 8; at++)
			host[at] = word(i, at);
		code = cuMemAlloc_v2(&blocks[i], size);
		if (!code)
			code = cuMemcpyHtoD_v2(blocks[i], host, size);
	}
	if (code) {
		fprintf(stderr, "plain: CUDA error %d\n", code);
		return 1;
	}
	pthread_t thread;
	for (int i = 0; i < threads; i++)
		pthread_create(&thread, NULL, look, (void *)(uintptr_t)(i + 2));
	pthread_create(&thread, NULL, make, NULL);
	pthread_create(&thread, NULL, sleeper, NULL);
	while (access(stop, F_OK)) {
		FILE *file = fopen(path, "w");
		fprintf(file, "{\"answers\": %lu, \"wrong\": %lu, \"errors\": %lu, \"error\": %d, \"interrupted\": %lu, \"made\": %lu}\n",
			answers, wrong, errors, last_error, interrupted, made);
		fclose(file);
		rename(path, renamed);
		usleep(20000);
	}
	ending = 1;
	usleep(300000);
	return errors || wrong ? 1 : 0;
}
