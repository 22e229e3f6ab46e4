/* What a context's end and access between GPUs mean for blocks that cuMemAlloc would have made. */

#include "qt.h"

#define DEVICES 64

static uint64_t peers[DEVICES]; /* of a device: bit N says that device N may use its memory */

static void forget_context(CUcontext context)
{
	qt_book_lock();
	size_t count;
	struct block *all = qt_blocks(&count);
	for (size_t i = 0; i < count;) {
		if (all[i].context == context) {
			qt_block_free(all[i].at);
			all = qt_blocks(&count);
			i = 0;
		} else {
			i++;
		}
	}
	qt_book_unlock();
}

/* Whether there are blocks of a device, or of a context where there is one. */
static bool has_blocks(CUdevice device, CUcontext context)
{
	bool found = false;
	qt_book_lock();
	size_t count;
	struct block *all = qt_blocks(&count);
	for (size_t i = 0; i < count && !found; i++)
		found = context ? all[i].context == context : all[i].device == device;
	qt_book_unlock();
	return found;
}

static CUresult instead_destroy(CUcontext context)
{
	CUcontext current = NULL;
	if (context && has_blocks(0, context) && !cu.cuCtxGetCurrent(&current) && !cu.cuCtxSetCurrent(context)) {
		cu.cuCtxSynchronize();
		cu.cuCtxSetCurrent(current);
		forget_context(context);
	}
	return cu.cuCtxDestroy_v2(context);
}

/* Whether the device's primary context is `context`: asked while it is active. */
static CUcontext active(CUdevice device)
{
	unsigned flags;
	int is_active = 0;
	if (!has_blocks(device, NULL) || cu.cuDevicePrimaryCtxGetState(device, &flags, &is_active) || !is_active)
		return NULL;
	CUcontext context = NULL;
	if (cu.cuDevicePrimaryCtxRetain(&context, device))
		return NULL;
	cu.cuDevicePrimaryCtxRelease_v2(device);
	return context;
}

static CUresult instead_reset(CUdevice device)
{
	CUcontext context = active(device);
	if (context)
		forget_context(context);
	return cu.cuDevicePrimaryCtxReset_v2(device);
}

static CUresult instead_release(CUdevice device)
{
	CUcontext context = active(device);
	CUresult result = cu.cuDevicePrimaryCtxRelease_v2(device);
	unsigned flags;
	int is_active = 1;
	if (context && !cu.cuDevicePrimaryCtxGetState(device, &flags, &is_active) && !is_active)
		forget_context(context);
	return result;
}

size_t qt_accessors(CUdevice device, struct access *into)
{
	size_t count = 0;
	into[count++] = (struct access){{LOCATION_DEVICE, device}, ACCESS_READWRITE};
	for (int i = 0; i < DEVICES && count < QT_ACCESSORS; i++)
		if (device < DEVICES && peers[device] >> i & 1)
			into[count++] = (struct access){{LOCATION_DEVICE, i}, ACCESS_READWRITE};
	return count;
}

void qt_peers_added(CUdevice by, CUdevice of)
{
	if (by < 0 || by >= DEVICES || of < 0 || of >= DEVICES)
		return;
	qt_book_lock();
	peers[of] |= 1ull << by;
	size_t count, mapped;
	struct block *blocks = qt_blocks(&count);
	struct mapping *all = qt_mappings(&mapped);
	for (size_t i = 0; i < mapped; i++) {
		struct block *block = count && blocks ? qt_block_at(all[i].at) : NULL;
		if (!block || block->device != of)
			continue;
		all[i].accessors = (unsigned)qt_accessors(of, all[i].access);
		cu.cuMemSetAccess(all[i].at, all[i].size, all[i].access, all[i].accessors);
	}
	qt_book_unlock();
}

static bool device_of(CUcontext context, CUdevice *device)
{
	CUcontext current = NULL;
	bool known = !cu.cuCtxGetCurrent(&current) && !cu.cuCtxSetCurrent(context) && !cu.cuCtxGetDevice(device);
	cu.cuCtxSetCurrent(current);
	return known;
}

static CUresult instead_enable(CUcontext peer, unsigned flags)
{
	CUdevice by, of;
	CUresult result = cu.cuCtxEnablePeerAccess(peer, flags);
	if (!result && !cu.cuCtxGetDevice(&by) && device_of(peer, &of))
		qt_peers_added(by, of);
	return result;
}

const struct replaced qt_contexts_replaced[] = {
	{"cuCtxDestroy_v2", (void *)instead_destroy},
	{"cuDevicePrimaryCtxReset_v2", (void *)instead_reset},
	{"cuDevicePrimaryCtxRelease_v2", (void *)instead_release},
	{"cuCtxEnablePeerAccess", (void *)instead_enable},
	{NULL, NULL},
};
