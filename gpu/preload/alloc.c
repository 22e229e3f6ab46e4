/* cuMemAlloc and cuMemFree: large blocks are made of pieces that can leave.
 *
 * A block is one range of addresses with pieces of at most 1 GiB mapped one after the other. Where
 * anything but the lack of memory is in the way, the driver's own cuMemAlloc makes the block. */

#include "qt.h"

#include <pthread.h>
#include <string.h>

#define DEVICES 64

static uint8_t usable[DEVICES]; /* 0: not asked; 1: no; 2: yes; 3: yes, for RDMA, too */

static uint8_t usable_for(CUdevice device)
{
	if (device < 0 || device >= DEVICES)
		return 1;
	if (!usable[device]) {
		int vmm = 0, fd = 0, rdma = 0;
		cu.cuDeviceGetAttribute(&vmm, ATTRIBUTE_VMM, device);
		cu.cuDeviceGetAttribute(&fd, ATTRIBUTE_POSIX_FD, device);
		cu.cuDeviceGetAttribute(&rdma, ATTRIBUTE_RDMA_VMM, device);
		usable[device] = !vmm || !fd ? 1 : rdma ? 3 : 2;
	}
	return usable[device];
}

static bool have_all(void)
{
	return cu.cuMemCreate && cu.cuMemRelease && cu.cuMemAddressReserve && cu.cuMemAddressFree && cu.cuMemMap &&
	       cu.cuMemUnmap && cu.cuMemSetAccess && cu.cuMemExportToShareableHandle &&
	       cu.cuMemImportFromShareableHandle && cu.cuCtxGetCurrent && cu.cuCtxGetDevice && cu.cuCtxSynchronize &&
	       cu.cuMemcpyDtoD_v2 && cu.cuDeviceGetAttribute;
}

static CUresult add_piece(CUdeviceptr at, uint64_t size, const struct properties *like)
{
	struct piece *piece = qt_piece_new(size);
	if (!piece)
		return CUDA_ERROR_OUT_OF_MEMORY;
	piece->made = *like;
	piece->away = true; /* not yet there */
	CUresult result = cu.cuMemCreate(&piece->real, size, like, 0);
	if (!result) {
		piece->away = false;
		result = cu.cuMemMap(at, size, 0, piece->real, 0);
	}
	struct mapping *mapping = result ? NULL : qt_mapping_new(at, size, 0, piece);
	if (mapping) {
		mapping->accessors = (unsigned)qt_accessors(like->at.id, mapping->access);
		return cu.cuMemSetAccess(at, size, mapping->access, mapping->accessors);
	}
	if (!result)
		cu.cuMemUnmap(at, size);
	qt_piece_drop(piece);
	return result ? result : CUDA_ERROR_OUT_OF_MEMORY;
}

static void undo(CUdeviceptr at, uint64_t size)
{
	size_t count;
	struct mapping *all = qt_mappings(&count);
	for (size_t i = 0; i < count; i++)
		if (all[i].at >= at && all[i].at < at + size)
			cu.cuMemUnmap(all[i].at, all[i].size);
	qt_mappings_forget(at, size);
	cu.cuMemAddressFree(at, size);
}

static CUresult make(struct block *block, uint8_t kind)
{
	struct properties like = {
		.type = TYPE_PINNED,
		.handle_types = HANDLE_POSIX_FD,
		.at = {LOCATION_DEVICE, block->device},
		.rdma = kind == 3,
	};
	CUresult result = cu.cuMemAddressReserve(&block->at, block->size, QT_GRAIN, 0, 0);
	if (result)
		return result;
	for (uint64_t done = 0; !result && done < block->size;) {
		uint64_t size = block->size - done < QT_PIECE ? block->size - done : QT_PIECE;
		result = add_piece(block->at + done, size, &like);
		done += size;
	}
	if (!result && !qt_block_new(*block))
		result = CUDA_ERROR_OUT_OF_MEMORY;
	if (result)
		undo(block->at, block->size);
	return result;
}

/* Blocks that were freed while a stream was captured: nothing may wait for the device then. */
static void free_late(void)
{
	if (qt_capturing())
		return;
	for (;;) {
		size_t count, i;
		struct block *all = qt_blocks(&count);
		for (i = 0; i < count && all[i].asked; i++)
			;
		if (i == count)
			return;
		qt_block_free(all[i].at);
	}
}

static CUresult instead_alloc(CUdeviceptr *at, size_t size)
{
	struct block block = {.asked = size, .size = (size + QT_GRAIN - 1) & ~(QT_GRAIN - 1)};
	uint8_t kind = 1;
	if (size >= QT_LEAST && at && have_all() && !cu.cuCtxGetCurrent(&block.context) && block.context &&
	    !cu.cuCtxGetDevice(&block.device))
		kind = usable_for(block.device);
	if (kind < 2)
		return cu.cuMemAlloc_v2(at, size);
	qt_serve_begin();
	qt_book_lock();
	free_late();
	CUresult result = make(&block, kind);
	qt_book_unlock();
	if (!result) {
		*at = block.at;
		return result;
	}
	if (result != CUDA_ERROR_OUT_OF_MEMORY)
		qt_complain("a block of %zu octets cannot be made to move: %s", size, qt_error(result));
	return cu.cuMemAlloc_v2(at, size); /* the driver has the last word on what fits */
}

CUresult qt_block_free(CUdeviceptr at)
{
	struct block block = *qt_block_at(at);
	undo(block.at, block.size);
	qt_block_forget(block.at);
	return CUDA_SUCCESS;
}

static CUresult instead_free(CUdeviceptr at)
{
	qt_book_lock();
	struct block *block = qt_block_at(at);
	bool ours = block && block->at == at && block->asked, later = ours && qt_capturing();
	CUcontext context = ours ? block->context : NULL;
	if (later)
		block->asked = 0;
	qt_book_unlock();
	if (!ours)
		return cu.cuMemFree_v2(at);
	if (later)
		return CUDA_SUCCESS;
	/* As the driver's own does: what uses the block ends first. */
	CUcontext current = NULL;
	cu.cuCtxGetCurrent(&current);
	cu.cuCtxSetCurrent(context);
	CUresult result = cu.cuCtxSynchronize();
	cu.cuCtxSetCurrent(current);
	if (result)
		return result;
	qt_book_lock();
	free_late();
	if (qt_block_at(at) && qt_block_at(at)->at == at)
		qt_block_free(at);
	qt_book_unlock();
	return result;
}

static bool range_of(CUdeviceptr at, struct block *found)
{
	qt_book_lock();
	struct block *block = qt_block_at(at);
	bool there = block && block->asked && at < block->at + block->asked;
	if (there)
		*found = *block;
	qt_book_unlock();
	return there;
}

static CUresult instead_range(CUdeviceptr *base, size_t *size, CUdeviceptr at)
{
	struct block block;
	if (!range_of(at, &block))
		return cu.cuMemGetAddressRange_v2(base, size, at);
	if (base)
		*base = block.at;
	if (size)
		*size = block.asked;
	return CUDA_SUCCESS;
}

/* A block tells of itself what one of cuMemAlloc does. */
static void correct(void *data, unsigned attribute, const struct block *block)
{
	switch (attribute) {
	case POINTER_CONTEXT:
		*(CUcontext *)data = block->context;
		break;
	case POINTER_LEGACY_IPC:
		*(unsigned *)data = 1;
		break;
	case POINTER_RANGE_START:
		*(CUdeviceptr *)data = block->at;
		break;
	case POINTER_RANGE_SIZE:
		*(size_t *)data = block->asked;
		break;
	}
}

static CUresult instead_attribute(void *data, unsigned attribute, CUdeviceptr at)
{
	struct block block;
	CUresult result = cu.cuPointerGetAttribute(data, attribute, at);
	if (data && range_of(at, &block)) {
		bool ours = attribute == POINTER_CONTEXT || (attribute >= POINTER_LEGACY_IPC && attribute <= POINTER_RANGE_SIZE);
		correct(data, attribute, &block);
		return ours ? CUDA_SUCCESS : result;
	}
	return result;
}

static CUresult instead_attributes(unsigned count, unsigned *which, void **data, CUdeviceptr at)
{
	struct block block;
	CUresult result = cu.cuPointerGetAttributes(count, which, data, at);
	if (!result && range_of(at, &block))
		for (unsigned i = 0; i < count; i++)
			if (data[i])
				correct(data[i], which[i], &block);
	return result;
}

static CUresult instead_get(const char *name, void **found, int version, uint64_t flags)
{
	CUresult result = cu.cuGetProcAddress(name, found, version, flags);
	if (!result && found && *found && name)
		*found = qt_cover(*found, name);
	return result;
}

static CUresult instead_get_v2(const char *name, void **found, int version, uint64_t flags, int *status)
{
	CUresult result = cu.cuGetProcAddress_v2(name, found, version, flags, status);
	if (!result && found && *found && name)
		*found = qt_cover(*found, name);
	return result;
}

const struct replaced qt_alloc_replaced[] = {
	{"cuMemAlloc_v2", (void *)instead_alloc},
	{"cuMemFree_v2", (void *)instead_free},
	{"cuMemGetAddressRange_v2", (void *)instead_range},
	{"cuPointerGetAttribute", (void *)instead_attribute},
	{"cuPointerGetAttributes", (void *)instead_attributes},
	{"cuGetProcAddress", (void *)instead_get},
	{"cuGetProcAddress_v2", (void *)instead_get_v2},
	{NULL, NULL},
};
