/* The part of the CUDA driver's interface that the library uses, as cuda.h of CUDA 12 and 13 has it.
 * Written down here because the package is built where no CUDA is; tests/unit/test_gpu_preload.py
 * compares it with cuda.h where there is one. */
#ifndef QT_ABI_H
#define QT_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef uint64_t CUhandle; /* CUmemGenericAllocationHandle */
typedef void *CUcontext;
typedef void *CUstream;

enum {
	CUDA_SUCCESS = 0,
	CUDA_ERROR_INVALID_VALUE = 1,
	CUDA_ERROR_OUT_OF_MEMORY = 2,
	CUDA_ERROR_NOT_INITIALIZED = 3,
	CUDA_ERROR_INVALID_CONTEXT = 201,
	CUDA_ERROR_MAP_FAILED = 205,
	CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,

	LOCATION_DEVICE = 1,         /* CU_MEM_LOCATION_TYPE_DEVICE */
	TYPE_PINNED = 1,             /* CU_MEM_ALLOCATION_TYPE_PINNED */
	HANDLE_POSIX_FD = 1,         /* CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR */
	ACCESS_READWRITE = 3,        /* CU_MEM_ACCESS_FLAGS_PROT_READWRITE */
	CAPTURE_RELAXED = 2,         /* CU_STREAM_CAPTURE_MODE_RELAXED */
	ATTRIBUTE_RDMA_VMM = 110,    /* CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED */
	ATTRIBUTE_VMM = 102,         /* CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED */
	ATTRIBUTE_POSIX_FD = 103,    /* CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED */
	POINTER_CONTEXT = 1,         /* CU_POINTER_ATTRIBUTE_… */
	POINTER_LEGACY_IPC = 10,
	POINTER_RANGE_START = 11,
	POINTER_RANGE_SIZE = 12,
};

struct location {
	uint32_t type;
	int32_t id;
};

struct properties { /* CUmemAllocationProp */
	uint32_t type;
	uint32_t handle_types;
	struct location at;
	void *win32;
	uint8_t compression;
	uint8_t rdma;
	uint16_t usage;
	uint8_t reserved[4];
};

struct access { /* CUmemAccessDesc */
	struct location by;
	uint32_t flags;
};

struct ipc_handle { /* CUipcMemHandle */
	char reserved[64];
};

#endif
