/* Memory leaves and comes back. The gate is closed, the device idle: nobody but us uses it.
 *
 * Back it comes as handles of another process, and a process that has such a one mapped cannot be
 * restored from a checkpoint, so its content is copied to memory of this process: as much device
 * memory as one piece has is needed twice for a moment. Where that is not there, the foreign
 * handle stays, and the host is told. */

#include "qt.h"

static CUdeviceptr window; /* addresses for foreign pieces while they are copied */
static uint64_t window_size;

bool qt_moves(const struct piece *piece)
{
	return piece && !piece->foreign && !piece->stays && (piece->references || piece->mapped);
}

unsigned qt_away(void)
{
	unsigned count = 0;
	for (uint64_t id = 1; id < qt_pieces_end(); id++)
		count += qt_piece(id) && qt_piece(id)->away;
	return count;
}

CUresult qt_drop_all(void)
{
	size_t count;
	CUresult result = CUDA_SUCCESS;
	struct mapping *all = qt_mappings(&count);
	for (size_t i = 0; i < count && !result; i++)
		if (qt_moves(all[i].piece) && !all[i].piece->away)
			result = cu.cuMemUnmap(all[i].at, all[i].size);
	for (uint64_t id = 1; id < qt_pieces_end() && !result; id++) {
		struct piece *piece = qt_piece(id);
		if (!qt_moves(piece) || piece->away)
			continue;
		result = cu.cuMemRelease(piece->real);
		piece->away = !result;
	}
	return result;
}

static CUcontext context_for(CUdevice device)
{
	size_t count;
	struct block *all = qt_blocks(&count);
	for (size_t i = 0; i < count; i++)
		if (all[i].device == device)
			return all[i].context;
	CUcontext found = NULL;
	cu.cuDevicePrimaryCtxRetain(&found, device);
	return found;
}

static CUresult open_window(uint64_t size)
{
	if (size <= window_size)
		return CUDA_SUCCESS;
	qt_move_end();
	CUresult result = cu.cuMemAddressReserve(&window, 2 * size, QT_GRAIN, 0, 0);
	window_size = result ? 0 : size;
	return result;
}

void qt_move_end(void)
{
	if (window_size)
		cu.cuMemAddressFree(window, 2 * window_size);
	window_size = 0;
}

static CUresult visible(CUdeviceptr at, const struct piece *piece, CUhandle real)
{
	struct access access = {piece->made.at, ACCESS_READWRITE};
	CUresult result = cu.cuMemMap(at, piece->size, 0, real, 0);
	if (result)
		return result;
	result = cu.cuMemSetAccess(at, piece->size, &access, 1);
	if (result)
		cu.cuMemUnmap(at, piece->size);
	return result;
}

/* The content of a foreign handle in memory of our own. */
static CUresult copied(struct piece *piece, CUhandle foreign, CUhandle *own)
{
	CUresult result = open_window(piece->size);
	if (!result)
		result = cu.cuMemCreate(own, piece->size, &piece->made, 0);
	if (result)
		return result;
	CUdeviceptr from = window, to = window + window_size;
	result = visible(from, piece, foreign);
	if (!result) {
		result = visible(to, piece, *own);
		if (!result) {
			result = cu.cuMemcpyDtoD_v2(to, from, piece->size);
			CUresult waited = cu.cuStreamSynchronize(NULL);
			result = result ? result : waited;
			cu.cuMemUnmap(to, piece->size);
		}
		cu.cuMemUnmap(from, piece->size);
	}
	if (result)
		cu.cuMemRelease(*own);
	return result;
}

static CUresult map_again(struct piece *piece)
{
	size_t count;
	CUresult result = CUDA_SUCCESS;
	struct mapping *all = qt_mappings(&count);
	for (size_t i = 0; i < count && !result; i++) {
		if (all[i].piece != piece)
			continue;
		result = cu.cuMemMap(all[i].at, all[i].size, all[i].offset, piece->real, 0);
		if (!result && all[i].accessors)
			result = cu.cuMemSetAccess(all[i].at, all[i].size, all[i].access, all[i].accessors);
	}
	return result;
}

CUresult qt_bring(struct piece *piece, int fd, bool own)
{
	CUhandle foreign, ours;
	CUresult result = cu.cuCtxSetCurrent(context_for(piece->made.at.id));
	if (!result)
		result = cu.cuMemImportFromShareableHandle(&foreign, (void *)(intptr_t)fd, HANDLE_POSIX_FD);
	if (result)
		return result;
	piece->real = foreign;
	if (own && copied(piece, foreign, &ours) == CUDA_SUCCESS) {
		piece->real = ours;
		cu.cuMemRelease(foreign);
	} else if (own) {
		qt_see(SEEN_IMPORTED);
	}
	result = map_again(piece);
	piece->away = false;
	return result;
}
