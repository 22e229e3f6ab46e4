/* Handles for other processes of the container: CUDA's own cannot be made of our blocks.
 *
 * A handle names a socket of the process that made it, and a block. Who opens the handle asks there
 * for the block's pieces, as descriptors, and maps them. A thread that exists from the first handle
 * on answers, to processes of the same user. Handles of everything else are CUDA's. */

#include "qt.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef QT_IPC /* a test has its own */
#define QT_IPC "/run/quickthaw"
#endif
#define MAGIC "QTIPC1\n"
#define OPENED 1024
#define WITHIN_S 10

struct handle {
	char magic[8];
	unsigned char name[8]; /* of the process that made it */
	uint64_t at, size, asked;
	uint8_t rest[24];
};
_Static_assert(sizeof(struct handle) == sizeof(struct ipc_handle), "a handle is 64 octets");

struct opened {
	struct handle of;
	CUdeviceptr at;
	unsigned times;
};

struct batch { /* the answer: pieces from `first` on, as many as descriptors */
	uint64_t first, sizes[QT_BATCH];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct opened opened[OPENED];
static unsigned char my_name[8];
static pid_t listening; /* a child of fork() has no thread */
static int listener = -1;

static void address_of(struct sockaddr_un *address, const unsigned char *name)
{
	char hex[17];
	for (int i = 0; i < 8; i++)
		snprintf(hex + 2 * i, 3, "%02x", name[i]);
	*address = (struct sockaddr_un){.sun_family = AF_UNIX};
	snprintf(address->sun_path, sizeof address->sun_path, "%s/gpu-ipc-%s", QT_IPC, hex);
}

static unsigned pieces_of(CUdeviceptr at, uint64_t size, uint64_t first, struct batch *batch, int *fds)
{
	unsigned count = 0;
	uint64_t number = 0;
	qt_gate_enter(0);
	qt_book_lock();
	for (uint64_t done = 0; done < size && count < QT_BATCH; number++) {
		struct mapping *mapping = qt_mapping_at(at + done);
		if (!mapping)
			break;
		if (number >= first) {
			if (cu.cuMemExportToShareableHandle(&fds[count], mapping->piece->real, HANDLE_POSIX_FD, 0))
				break;
			batch->sizes[count++] = mapping->size;
		}
		done += mapping->size;
	}
	qt_book_unlock();
	qt_gate_leave();
	return count;
}

static void answer(int s)
{
	struct ucred who;
	socklen_t length = sizeof who;
	struct {
		struct handle of;
		uint64_t first;
	} asked;
	struct batch batch;
	int fds[QT_BATCH];
	if (getsockopt(s, SOL_SOCKET, SO_PEERCRED, &who, &length) || who.uid != geteuid())
		return;
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){.tv_sec = WITHIN_S}, sizeof(struct timeval));
	while (recv(s, &asked, sizeof asked, 0) == sizeof asked) {
		batch.first = asked.first;
		unsigned count = pieces_of(asked.of.at, asked.of.size, asked.first, &batch, fds);
		bool sent = qt_send(s, &batch, sizeof batch, fds, count);
		qt_close_all(fds, &count);
		if (!sent)
			return;
	}
}

static void *serve(void *nothing)
{
	(void)nothing;
	prctl(PR_SET_NAME, "quickthaw-ipc");
	for (;;) {
		int s = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (s < 0)
			continue;
		answer(s);
		close(s);
	}
	return NULL;
}

static bool begin(void)
{
	struct sockaddr_un address;
	if (listening == getpid())
		return true;
	int random = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	bool named = random >= 0 && read(random, my_name, sizeof my_name) == sizeof my_name;
	if (random >= 0)
		close(random);
	listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	address_of(&address, my_name);
	if (!named || listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) ||
	    chmod(address.sun_path, 0600) || listen(listener, 64) || !qt_thread(serve))
		return false;
	listening = getpid();
	return true;
}

static CUresult instead_get(struct ipc_handle *handle, CUdeviceptr at)
{
	qt_book_lock();
	struct block *block = qt_block_at(at);
	struct handle made = {.magic = MAGIC};
	bool ours = block && block->asked;
	if (ours) {
		made.at = block->at;
		made.size = block->size;
		made.asked = block->asked;
	}
	qt_book_unlock();
	if (!ours || !handle)
		return cu.cuIpcGetMemHandle(handle, at);
	pthread_mutex_lock(&lock);
	bool begun = begin();
	pthread_mutex_unlock(&lock);
	if (!begun) {
		qt_complain("no socket in %s: memory cannot be shared between processes", QT_IPC);
		return CUDA_ERROR_MAP_FAILED;
	}
	memcpy(made.name, my_name, sizeof my_name);
	memcpy(handle, &made, sizeof made);
	return CUDA_SUCCESS;
}

static CUresult map_piece(CUdeviceptr at, uint64_t size, int fd, const struct access *access, size_t count)
{
	CUhandle real;
	CUresult result = cu.cuMemImportFromShareableHandle(&real, (void *)(intptr_t)fd, HANDLE_POSIX_FD);
	if (result)
		return result;
	qt_book_lock();
	struct piece *piece = qt_piece_new(size);
	if (piece) {
		piece->real = real;
		piece->foreign = true;
		result = cu.cuMemMap(at, size, 0, real, 0);
		if (!result && !qt_mapping_new(at, size, 0, piece)) {
			cu.cuMemUnmap(at, size);
			result = CUDA_ERROR_OUT_OF_MEMORY;
		}
		if (result)
			qt_piece_drop(piece);
		else
			result = cu.cuMemSetAccess(at, size, access, count);
	} else {
		cu.cuMemRelease(real);
		result = CUDA_ERROR_OUT_OF_MEMORY;
	}
	qt_book_unlock();
	return result;
}

/* The current device, and the one that the memory is of where it is another. */
static size_t accessors(struct access *access, int fd)
{
	CUdevice device = 0;
	CUhandle real;
	struct properties of = {0};
	cu.cuCtxGetDevice(&device);
	access[0] = (struct access){{LOCATION_DEVICE, device}, ACCESS_READWRITE};
	if (cu.cuMemImportFromShareableHandle(&real, (void *)(intptr_t)fd, HANDLE_POSIX_FD))
		return 1;
	CUresult result = cu.cuMemGetAllocationPropertiesFromHandle
				  ? cu.cuMemGetAllocationPropertiesFromHandle(&of, real)
				  : CUDA_ERROR_INVALID_VALUE;
	cu.cuMemRelease(real);
	if (result || of.at.type != LOCATION_DEVICE || of.at.id == device)
		return 1;
	access[1] = (struct access){of.at, ACCESS_READWRITE};
	return 2;
}

static void forget(CUdeviceptr at, uint64_t size)
{
	qt_book_lock();
	for (uint64_t done = 0; done < size;) {
		struct mapping *mapping = qt_mapping_at(at + done);
		if (!mapping)
			break;
		uint64_t next = mapping->size;
		cu.cuMemUnmap(at + done, next);
		qt_mappings_forget(at + done, next);
		done += next;
	}
	qt_book_unlock();
	cu.cuMemAddressFree(at, size);
}

static CUresult fetch(int s, const struct handle *of, CUdeviceptr at)
{
	struct {
		struct handle of;
		uint64_t first;
	} ask = {.of = *of};
	CUresult result = CUDA_SUCCESS;
	for (uint64_t done = 0; done < of->size && !result;) {
		struct batch batch;
		struct iovec part = {&batch, sizeof batch};
		struct access access[2];
		int fds[QT_BATCH];
		unsigned count = 0;
		if (send(s, &ask, sizeof ask, MSG_NOSIGNAL) != sizeof ask ||
		    qt_receive(s, &part, 1, fds, &count) != sizeof batch || !count)
			result = CUDA_ERROR_INVALID_VALUE;
		size_t many = result ? 0 : accessors(access, fds[0]);
		for (unsigned i = 0; i < count && !result; i++) {
			if (batch.sizes[i] > of->size - done)
				result = CUDA_ERROR_INVALID_VALUE;
			else
				result = map_piece(at + done, batch.sizes[i], fds[i], access, many);
			done += result ? 0 : batch.sizes[i];
		}
		ask.first += count;
		qt_close_all(fds, &count);
	}
	return result;
}

static CUresult open_new(struct opened *place, const struct handle *of)
{
	struct sockaddr_un address;
	struct timeval limit = {.tv_sec = WITHIN_S};
	CUdeviceptr at;
	if (of->size % QT_GRAIN || !of->size)
		return CUDA_ERROR_INVALID_VALUE;
	CUresult result = cu.cuMemAddressReserve(&at, of->size, QT_GRAIN, 0, 0);
	if (result)
		return result;
	int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	address_of(&address, of->name);
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	if (s < 0 || connect(s, (struct sockaddr *)&address, sizeof address))
		result = CUDA_ERROR_INVALID_VALUE;
	else
		result = fetch(s, of, at);
	if (s >= 0)
		close(s);
	if (result)
		forget(at, of->size);
	else
		*place = (struct opened){*of, at, 1};
	return result;
}

static CUresult instead_open(CUdeviceptr *at, struct ipc_handle handle, unsigned flags)
{
	struct handle of;
	memcpy(&of, &handle, sizeof of);
	if (memcmp(of.magic, MAGIC, sizeof of.magic))
		return cu.cuIpcOpenMemHandle_v2(at, handle, flags);
	if (listening == getpid() && !memcmp(of.name, my_name, sizeof my_name))
		return CUDA_ERROR_INVALID_CONTEXT; /* as CUDA says to the process that made it */
	CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
	struct opened *place = NULL;
	qt_serve_begin(); /* so that the host learns what is open */
	pthread_mutex_lock(&lock);
	for (int i = 0; i < OPENED; i++) {
		if (opened[i].times && !memcmp(&opened[i].of, &of, sizeof of)) {
			place = &opened[i];
			place->times++;
			result = CUDA_SUCCESS;
			break;
		}
		if (!opened[i].times && !place)
			place = &opened[i];
	}
	if (place && result)
		result = open_new(place, &of);
	if (!result)
		*at = place->at;
	pthread_mutex_unlock(&lock);
	return result;
}

static CUresult instead_close(CUdeviceptr at)
{
	CUresult result = CUDA_SUCCESS;
	bool ours = false;
	pthread_mutex_lock(&lock);
	for (int i = 0; i < OPENED && !ours; i++) {
		if (!opened[i].times || opened[i].at != at)
			continue;
		ours = true;
		if (--opened[i].times == 0) {
			result = cu.cuCtxSynchronize();
			forget(at, opened[i].of.size);
		}
	}
	pthread_mutex_unlock(&lock);
	return ours ? result : cu.cuIpcCloseMemHandle(at);
}

const struct replaced qt_ipc_replaced[] = {
	{"cuIpcGetMemHandle", (void *)instead_get},
	{"cuIpcOpenMemHandle_v2", (void *)instead_open},
	{"cuIpcOpenMemHandle", (void *)instead_open},
	{"cuIpcCloseMemHandle", (void *)instead_close},
	{NULL, NULL},
};
