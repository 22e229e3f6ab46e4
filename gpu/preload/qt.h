/* libquickthaw-gpu: what its parts know of each other. See docs/gpu.md, and docs/formats.md for what
 * it says to the host. */
#ifndef QT_H
#define QT_H

#include "abi.h"
#include "sizes.h"

#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* --- table.c: the driver's functions --------------------------------------------------------- */

struct entry {
	void *real;          /* in libcuda; 0 until it is known */
	void *instead;       /* ours, of the same type, called in its place */
	void (*after)(const uint64_t *arguments, CUresult result);
	const char *name;
	uint8_t stack_words;
	bool ungated;        /* does nothing to a device, or to another process */
};

extern HIDDEN struct entry qt_entries[QT_THUNKS];
extern HIDDEN char qt_thunks[];

/* The driver, called by the library itself: past the gate. */
#define QT_DRIVER(X) \
	X(cuMemAlloc_v2, (CUdeviceptr *, size_t)) \
	X(cuMemFree_v2, (CUdeviceptr)) \
	X(cuMemCreate, (CUhandle *, size_t, const struct properties *, unsigned long long)) \
	X(cuMemRelease, (CUhandle)) \
	X(cuMemAddressReserve, (CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long)) \
	X(cuMemAddressFree, (CUdeviceptr, size_t)) \
	X(cuMemMap, (CUdeviceptr, size_t, size_t, CUhandle, unsigned long long)) \
	X(cuMemUnmap, (CUdeviceptr, size_t)) \
	X(cuMemSetAccess, (CUdeviceptr, size_t, const struct access *, size_t)) \
	X(cuMemExportToShareableHandle, (void *, CUhandle, unsigned, unsigned long long)) \
	X(cuMemImportFromShareableHandle, (CUhandle *, void *, unsigned)) \
	X(cuMemGetAllocationPropertiesFromHandle, (struct properties *, CUhandle)) \
	X(cuMemRetainAllocationHandle, (CUhandle *, void *)) \
	X(cuMemGetAddressRange_v2, (CUdeviceptr *, size_t *, CUdeviceptr)) \
	X(cuMulticastBindMem, (CUhandle, size_t, CUhandle, size_t, size_t, unsigned long long)) \
	X(cuPointerGetAttribute, (void *, unsigned, CUdeviceptr)) \
	X(cuPointerGetAttributes, (unsigned, unsigned *, void **, CUdeviceptr)) \
	X(cuIpcGetMemHandle, (struct ipc_handle *, CUdeviceptr)) \
	X(cuIpcOpenMemHandle_v2, (CUdeviceptr *, struct ipc_handle, unsigned)) \
	X(cuIpcCloseMemHandle, (CUdeviceptr)) \
	X(cuCtxGetCurrent, (CUcontext *)) \
	X(cuCtxSetCurrent, (CUcontext)) \
	X(cuCtxGetDevice, (CUdevice *)) \
	X(cuCtxSynchronize, (void)) \
	X(cuCtxDestroy_v2, (CUcontext)) \
	X(cuCtxEnablePeerAccess, (CUcontext, unsigned)) \
	X(cuCtxDisablePeerAccess, (CUcontext)) \
	X(cuDevicePrimaryCtxReset_v2, (CUdevice)) \
	X(cuDevicePrimaryCtxRelease_v2, (CUdevice)) \
	X(cuDevicePrimaryCtxRetain, (CUcontext *, CUdevice)) \
	X(cuDevicePrimaryCtxGetState, (CUdevice, unsigned *, int *)) \
	X(cuDeviceGetAttribute, (int *, int, CUdevice)) \
	X(cuDeviceGetUuid_v2, (unsigned char *, CUdevice)) \
	X(cuMemcpyDtoD_v2, (CUdeviceptr, CUdeviceptr, size_t)) \
	X(cuStreamCreate, (CUstream *, unsigned)) \
	X(cuStreamSynchronize, (CUstream)) \
	X(cuStreamDestroy_v2, (CUstream)) \
	X(cuGetErrorName, (CUresult, const char **)) \
	X(cuGetProcAddress, (const char *, void **, int, uint64_t)) \
	X(cuGetProcAddress_v2, (const char *, void **, int, uint64_t, int *))

struct driver {
#define QT_MEMBER(name, arguments) CUresult (*name) arguments;
	QT_DRIVER(QT_MEMBER)
#undef QT_MEMBER
};
extern HIDDEN struct driver cu;

HIDDEN void *qt_learn(void);                            /* handle of libcuda; 0: it is not loaded */
HIDDEN void *qt_cover(void *real, const char *name);    /* the thunk of a function of libcuda */
HIDDEN void *qt_thunk(unsigned number);
HIDDEN const char *qt_error(CUresult result);

/* --- gate.c: calls of the program wait while its memory is away -------------------------------- */

HIDDEN void qt_gate_enter(unsigned number);
HIDDEN void qt_gate_leave(void);
HIDDEN void qt_gate_exempt(void);                       /* this thread never waits */
HIDDEN bool qt_gate_close(unsigned within_ms);          /* false: someone stays inside, it is open again */
HIDDEN void qt_gate_open(void);
HIDDEN bool qt_gate_closed(void);
HIDDEN const char *qt_gate_inside(void);                /* who is inside, after a failed close */

/* --- seen.c: calls that the host must know of -------------------------------------------------- */

enum seen {
	SEEN_PEER_ACCESS = 1 << 0,   /* one GPU may use the memory of another */
	SEEN_IMPORTED = 1 << 1,      /* a handle of another process is imported */
	SEEN_IPC_OPEN = 1 << 2,      /* memory or an event of another process is open */
	SEEN_IPC_SHARED = 1 << 3,    /* a handle for another process was made */
	SEEN_MANAGED = 1 << 4,
	SEEN_MULTICAST = 1 << 5,
	SEEN_EXTERNAL = 1 << 6,      /* memory or semaphores of another API */
	SEEN_GRAPHICS = 1 << 7,
	SEEN_EXPORTED = 1 << 8,      /* a descriptor of own memory was made */
	SEEN_STAYS = 1 << 9,         /* memory that the library does not move: the driver must */
};
HIDDEN uint32_t qt_seen(void);
HIDDEN void qt_see(uint32_t what);
HIDDEN void qt_see_begin(void);                         /* puts itself into the table */
HIDDEN unsigned qt_capturing(void);                     /* streams that are being captured */

/* --- book.c: device memory, where it is mapped ------------------------------------------------- */

#define QT_LEAST (8u << 20)                             /* smaller allocations are the driver's */
#define QT_PIECE (1ull << 30)                           /* of a large block, so that it moves in parts */
#define QT_GRAIN (2ull << 20)
#define QT_ACCESSORS 8

struct piece {                                          /* physical memory */
	uint64_t id;                                    /* from 1; what the program has as a handle is made of it */
	CUhandle real;
	uint64_t size;
	struct properties made;
	unsigned references;                            /* of the program */
	unsigned mapped;
	bool foreign;                                   /* imported by the program */
	bool stays;                                     /* cannot be exported */
	bool away;
};

struct mapping {
	CUdeviceptr at;
	uint64_t size, offset;
	struct piece *piece;
	unsigned accessors;
	struct access access[QT_ACCESSORS];
};

struct block {                                          /* made by cuMemAlloc */
	CUdeviceptr at;
	uint64_t asked, size;
	CUcontext context;
	CUdevice device;
};

HIDDEN void qt_book_lock(void);
HIDDEN void qt_book_unlock(void);
HIDDEN struct piece *qt_piece_new(uint64_t size);
HIDDEN struct piece *qt_piece(uint64_t id);             /* 0: there is none */
HIDDEN uint64_t qt_pieces_end(void);                    /* ids are below it */
HIDDEN void qt_piece_drop(struct piece *piece);         /* released where nobody needs it any more */
HIDDEN CUhandle qt_handle(const struct piece *piece);
HIDDEN struct piece *qt_by_handle(CUhandle handle);
HIDDEN struct mapping *qt_mapping_new(CUdeviceptr at, uint64_t size, uint64_t offset, struct piece *piece);
HIDDEN struct mapping *qt_mapping_at(CUdeviceptr at);   /* the one that has this address; 0 */
HIDDEN struct mapping *qt_mappings(size_t *count);      /* by address */
HIDDEN void qt_mappings_forget(CUdeviceptr at, uint64_t size);
HIDDEN bool qt_block_new(struct block block);
HIDDEN struct block *qt_block_at(CUdeviceptr at);
HIDDEN struct block *qt_blocks(size_t *count);
HIDDEN void qt_block_forget(CUdeviceptr at);

/* --- alloc.c, vmm.c, contexts.c, ipc.c: what is called in place of the driver ------------------- */

struct replaced {
	const char *name;                               /* as libcuda exports it */
	void *instead;
};
extern HIDDEN const struct replaced qt_alloc_replaced[], qt_vmm_replaced[], qt_contexts_replaced[], qt_ipc_replaced[];
HIDDEN CUresult qt_block_free(CUdeviceptr at);          /* the book is locked */
HIDDEN void qt_peers_added(CUdevice by, CUdevice of);
HIDDEN size_t qt_accessors(CUdevice device, struct access *into); /* at most QT_ACCESSORS */

/* --- move.c: memory leaves and comes back ------------------------------------------------------- */

HIDDEN CUresult qt_drop_all(void);                      /* every piece that moves is unmapped and released */
HIDDEN CUresult qt_bring(struct piece *piece, int fd, bool own);
HIDDEN void qt_move_end(void);
HIDDEN bool qt_moves(const struct piece *piece);
HIDDEN unsigned qt_away(void);                          /* pieces that are not here */

/* --- passing.c ----------------------------------------------------------------------------------- */

#define QT_BATCH 64 /* descriptors in one message */

HIDDEN bool qt_send(int s, void *data, size_t size, const int *fds, unsigned count);
HIDDEN ssize_t qt_receive(int s, struct iovec *parts, size_t parts_count, int *fds, unsigned *count);
HIDDEN void qt_close_all(int *fds, unsigned *count);

/* --- serve.c, service thread -------------------------------------------------------------------- */

HIDDEN void qt_serve_begin(void);                       /* once; starts the thread */
HIDDEN bool qt_thread(void *(*run)(void *));            /* one that no signal of the program reaches */
HIDDEN void qt_complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
HIDDEN const char *qt_complaint(void);

#endif
