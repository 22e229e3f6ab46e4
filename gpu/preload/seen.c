/* Calls after which a process may not come back from a checkpoint, counted while they last.
 *
 * A checkpoint of such a process succeeds and its restore never does, so the host asks before it
 * touches anything. */

#include "qt.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define STREAMS 256

static atomic_uint flags;
static atomic_int peers, opened;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t capturing[STREAMS];
static unsigned captures;

void qt_see(uint32_t what)
{
	atomic_fetch_or(&flags, what);
}

uint32_t qt_seen(void)
{
	return atomic_load(&flags) | (atomic_load(&peers) > 0 ? SEEN_PEER_ACCESS : 0) |
	       (atomic_load(&opened) > 0 ? SEEN_IPC_OPEN : 0);
}

unsigned qt_capturing(void)
{
	pthread_mutex_lock(&lock);
	unsigned count = captures;
	pthread_mutex_unlock(&lock);
	return count;
}

static void capture_began(const uint64_t *arguments, CUresult result)
{
	if (result)
		return;
	pthread_mutex_lock(&lock);
	if (captures < STREAMS)
		capturing[captures++] = arguments[0];
	pthread_mutex_unlock(&lock);
}

static void capture_ended(const uint64_t *arguments, CUresult result)
{
	if (result == CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD)
		return;
	pthread_mutex_lock(&lock);
	for (unsigned i = 0; i < captures; i++) {
		if (capturing[i] == arguments[0]) {
			capturing[i] = capturing[--captures];
			break;
		}
	}
	pthread_mutex_unlock(&lock);
}

static void counted(atomic_int *counter, int by, CUresult result)
{
	if (!result)
		atomic_fetch_add(counter, by);
}

static void peer_on(const uint64_t *a, CUresult result) { (void)a; counted(&peers, 1, result); }
static void peer_off(const uint64_t *a, CUresult result) { (void)a; counted(&peers, -1, result); }
static void opens(const uint64_t *a, CUresult result) { (void)a; counted(&opened, 1, result); }
static void closes(const uint64_t *a, CUresult result) { (void)a; counted(&opened, -1, result); }

static void flagged(uint32_t what, CUresult result)
{
	if (!result)
		qt_see(what);
}

static void imports(const uint64_t *a, CUresult result) { (void)a; flagged(SEEN_IMPORTED, result); }
static void shares(const uint64_t *a, CUresult result) { (void)a; flagged(SEEN_IPC_SHARED, result); }
static void pool_shares(const uint64_t *a, CUresult result) { (void)a; flagged(SEEN_EXPORTED, result); }
static void pool_peer(const uint64_t *a, CUresult result) { (void)a; flagged(SEEN_PEER_ACCESS, result); }
static void managed(const uint64_t *a, CUresult result) { (void)a; flagged(SEEN_MANAGED, result); }
static void multicast(const uint64_t *a, CUresult result) { (void)a; flagged(SEEN_MULTICAST, result); }
static void external(const uint64_t *a, CUresult result) { (void)a; flagged(SEEN_EXTERNAL, result); }
static void graphics(const uint64_t *a, CUresult result) { (void)a; flagged(SEEN_GRAPHICS, result); }

static const struct {
	const char *name; /* every version of it */
	void (*after)(const uint64_t *arguments, CUresult result);
} watched[] = {
	{"cuStreamBeginCapture", capture_began},
	{"cuStreamBeginCaptureToGraph", capture_began},
	{"cuStreamEndCapture", capture_ended},
	{"cuCtxEnablePeerAccess", peer_on},
	{"cuCtxDisablePeerAccess", peer_off},
	{"cuMemPoolSetAccess", pool_peer},
	{"cuIpcGetMemHandle", shares},
	{"cuIpcGetEventHandle", shares},
	{"cuIpcOpenMemHandle", opens},
	{"cuIpcOpenEventHandle", opens},
	{"cuIpcCloseMemHandle", closes},
	{"cuMemPoolExportToShareableHandle", pool_shares},
	{"cuMemPoolImportFromShareableHandle", imports},
	{"cuMemAllocManaged", managed},
	{"cuMulticastCreate", multicast},
	{"cuImportExternalMemory", external},
	{"cuImportExternalSemaphore", external},
	{"cuGraphicsGLRegisterBuffer", graphics},
	{"cuGraphicsGLRegisterImage", graphics},
	{"cuGraphicsEGLRegisterImage", graphics},
	{"cuEGLStreamConsumerConnect", graphics},
	{"cuEGLStreamProducerConnect", graphics},
};

static bool is_version(const char *name, const char *base)
{
	size_t length = strlen(base);
	return strncmp(name, base, length) == 0 && (name[length] == 0 || name[length] == '_');
}

void qt_see_begin(void)
{
	for (unsigned i = 0; i < QT_THUNKS && qt_entries[i].name; i++)
		for (size_t k = 0; k < sizeof watched / sizeof *watched; k++)
			if (is_version(qt_entries[i].name, watched[k].name))
				qt_entries[i].after = watched[k].after;
}
