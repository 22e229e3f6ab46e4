/* The program's own virtual memory management: its pieces leave, too, and its handles stay valid. */

#include "qt.h"

#include <string.h>

static CUresult instead_create(CUhandle *handle, size_t size, const struct properties *wished, unsigned long long flags)
{
	if (!handle || !wished || wished->type != TYPE_PINNED || wished->at.type != LOCATION_DEVICE)
		return cu.cuMemCreate(handle, size, wished, flags);
	struct properties like = *wished;
	like.handle_types |= HANDLE_POSIX_FD;
	CUhandle real;
	CUresult result = cu.cuMemCreate(&real, size, &like, flags);
	bool stays = result && result != CUDA_ERROR_OUT_OF_MEMORY && like.handle_types != wished->handle_types;
	if (stays)
		result = cu.cuMemCreate(&real, size, wished, flags);
	if (result)
		return result;
	qt_serve_begin();
	qt_book_lock();
	struct piece *piece = qt_piece_new(size);
	if (piece) {
		piece->real = real;
		piece->made = stays ? *wished : like;
		piece->references = 1;
		piece->stays = stays;
		*handle = qt_handle(piece);
	}
	qt_book_unlock();
	if (!piece) {
		cu.cuMemRelease(real);
		return CUDA_ERROR_OUT_OF_MEMORY;
	}
	return result;
}

static CUresult instead_import(CUhandle *handle, void *shared, unsigned type)
{
	CUhandle real;
	CUresult result = cu.cuMemImportFromShareableHandle(&real, shared, type);
	if (result)
		return result;
	qt_book_lock();
	struct piece *piece = qt_piece_new(0);
	if (piece) {
		piece->real = real;
		piece->references = 1;
		piece->foreign = true;
		*handle = qt_handle(piece);
	}
	qt_book_unlock();
	if (!piece)
		*handle = real;
	return result;
}

static CUresult instead_release(CUhandle handle)
{
	qt_book_lock();
	struct piece *piece = qt_by_handle(handle);
	CUresult result = CUDA_SUCCESS;
	if (!piece)
		result = cu.cuMemRelease(handle);
	else if (!piece->references)
		result = CUDA_ERROR_INVALID_VALUE;
	else {
		piece->references--;
		qt_piece_drop(piece); /* mapped, we keep the driver's handle until it is not */
	}
	qt_book_unlock();
	return result;
}

static CUresult instead_map(CUdeviceptr at, size_t size, size_t offset, CUhandle handle, unsigned long long flags)
{
	qt_book_lock();
	struct piece *piece = qt_by_handle(handle);
	CUresult result = cu.cuMemMap(at, size, offset, piece ? piece->real : handle, flags);
	if (piece && !result && !qt_mapping_new(at, size, offset, piece)) {
		cu.cuMemUnmap(at, size);
		result = CUDA_ERROR_OUT_OF_MEMORY;
	}
	qt_book_unlock();
	return result;
}

static CUresult instead_unmap(CUdeviceptr at, size_t size)
{
	qt_book_lock();
	CUresult result = cu.cuMemUnmap(at, size);
	if (!result)
		qt_mappings_forget(at, size);
	qt_book_unlock();
	return result;
}

static void keep_access(struct mapping *mapping, const struct access *access)
{
	for (unsigned i = 0; i < mapping->accessors; i++) {
		if (memcmp(&mapping->access[i].by, &access->by, sizeof access->by) == 0) {
			mapping->access[i] = *access;
			return;
		}
	}
	if (mapping->accessors < QT_ACCESSORS)
		mapping->access[mapping->accessors++] = *access;
	else
		mapping->piece->stays = true;
}

static CUresult instead_access(CUdeviceptr at, size_t size, const struct access *access, size_t count)
{
	qt_book_lock();
	CUresult result = cu.cuMemSetAccess(at, size, access, count);
	for (CUdeviceptr next = at; !result && next < at + size;) {
		struct mapping *mapping = qt_mapping_at(next);
		if (!mapping)
			break;
		for (size_t i = 0; i < count; i++) {
			keep_access(mapping, &access[i]);
			if (access[i].flags && access[i].by.type == LOCATION_DEVICE &&
			    mapping->piece->made.at.type == LOCATION_DEVICE &&
			    access[i].by.id != mapping->piece->made.at.id)
				qt_see(SEEN_PEER_ACCESS);
		}
		next = mapping->at + mapping->size;
	}
	qt_book_unlock();
	return result;
}

static CUresult instead_export(void *shared, CUhandle handle, unsigned type, unsigned long long flags)
{
	qt_book_lock();
	struct piece *piece = qt_by_handle(handle);
	CUresult result = cu.cuMemExportToShareableHandle(shared, piece ? piece->real : handle, type, flags);
	qt_book_unlock();
	if (!result)
		qt_see(SEEN_EXPORTED);
	return result;
}

static CUresult instead_properties(struct properties *found, CUhandle handle)
{
	qt_book_lock();
	struct piece *piece = qt_by_handle(handle);
	CUresult result = cu.cuMemGetAllocationPropertiesFromHandle(found, piece ? piece->real : handle);
	qt_book_unlock();
	return result;
}

static CUresult instead_retain(CUhandle *handle, void *at)
{
	qt_book_lock();
	struct mapping *mapping = qt_mapping_at((CUdeviceptr)(uintptr_t)at);
	CUresult result = CUDA_SUCCESS;
	if (mapping && handle) {
		mapping->piece->references++;
		*handle = qt_handle(mapping->piece);
	} else {
		result = cu.cuMemRetainAllocationHandle(handle, at);
	}
	qt_book_unlock();
	return result;
}

static CUresult instead_bind(CUhandle multicast, size_t offset, CUhandle handle, size_t from, size_t size,
			     unsigned long long flags)
{
	qt_book_lock();
	struct piece *piece = qt_by_handle(handle);
	CUresult result = cu.cuMulticastBindMem(multicast, offset, piece ? piece->real : handle, from, size, flags);
	if (piece && !result)
		piece->stays = true;
	qt_book_unlock();
	return result;
}

const struct replaced qt_vmm_replaced[] = {
	{"cuMemCreate", (void *)instead_create},
	{"cuMemImportFromShareableHandle", (void *)instead_import},
	{"cuMemRelease", (void *)instead_release},
	{"cuMemMap", (void *)instead_map},
	{"cuMemUnmap", (void *)instead_unmap},
	{"cuMemSetAccess", (void *)instead_access},
	{"cuMemExportToShareableHandle", (void *)instead_export},
	{"cuMemGetAllocationPropertiesFromHandle", (void *)instead_properties},
	{"cuMemRetainAllocationHandle", (void *)instead_retain},
	{"cuMulticastBindMem", (void *)instead_bind},
	{NULL, NULL},
};
