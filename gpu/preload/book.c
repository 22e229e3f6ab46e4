/* What device memory there is: physical pieces, where they are mapped, blocks made of them.
 *
 * A handle that the program holds is not the driver's but ours: the driver gives a new one when the
 * memory has come back, the program's stays. Ours carry a mark that the driver's have not. */

#include "qt.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define MARK 0x7174000000000000ull
#define MARK_BITS 0xffff000000000000ull

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct piece **pieces; /* by id; 0 where it is free */
static uint64_t end = 1, room;
static struct mapping *mappings;
static size_t mapped, mappings_room;
static struct block *blocks;
static size_t blocks_count, blocks_room;

void qt_book_lock(void) { pthread_mutex_lock(&lock); }
void qt_book_unlock(void) { pthread_mutex_unlock(&lock); }

/* Returns the array with room for one more; 0: no memory, and it is as it was. */
static void *grown(void *array, size_t count, size_t *space, size_t size)
{
	if (count < *space)
		return array;
	size_t more = *space ? *space * 2 : 64;
	void *moved = realloc(array, more * size);
	if (moved)
		*space = more;
	return moved;
}

static uint64_t free_id(void)
{
	static uint64_t hint = 1;
	for (uint64_t i = 0; i + 1 < end; i++) {
		uint64_t id = 1 + (hint + i) % (end - 1);
		if (!pieces[id]) {
			hint = id;
			return id;
		}
		if (i > 64)
			break;
	}
	return end;
}

struct piece *qt_piece_new(uint64_t size)
{
	uint64_t id = free_id();
	if (id == end) {
		size_t space = room;
		void *moved = grown(pieces, end, &space, sizeof *pieces);
		if (!moved)
			return NULL;
		pieces = moved;
		room = space;
	}
	struct piece *piece = calloc(1, sizeof *piece);
	if (!piece)
		return NULL;
	piece->id = id;
	piece->size = size;
	pieces[id] = piece;
	if (id == end)
		end++;
	return piece;
}

struct piece *qt_piece(uint64_t id) { return id && id < end ? pieces[id] : NULL; }
uint64_t qt_pieces_end(void) { return end; }
CUhandle qt_handle(const struct piece *piece) { return MARK | piece->id; }

struct piece *qt_by_handle(CUhandle handle)
{
	return (handle & MARK_BITS) == MARK ? qt_piece(handle & ~MARK_BITS) : NULL;
}

void qt_piece_drop(struct piece *piece)
{
	if (piece->references || piece->mapped)
		return;
	if (!piece->away)
		cu.cuMemRelease(piece->real);
	pieces[piece->id] = NULL;
	free(piece);
}

/* The number of mappings that begin at `at` or before. */
static size_t place(CUdeviceptr at)
{
	size_t low = 0, high = mapped;
	while (low < high) {
		size_t middle = (low + high) / 2;
		if (mappings[middle].at <= at)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

struct mapping *qt_mapping_new(CUdeviceptr at, uint64_t size, uint64_t offset, struct piece *piece)
{
	void *moved = grown(mappings, mapped, &mappings_room, sizeof *mappings);
	if (!moved)
		return NULL;
	mappings = moved;
	size_t index = place(at);
	memmove(&mappings[index + 1], &mappings[index], (mapped - index) * sizeof *mappings);
	mapped++;
	mappings[index] = (struct mapping){.at = at, .size = size, .offset = offset, .piece = piece};
	piece->mapped++;
	return &mappings[index];
}

struct mapping *qt_mapping_at(CUdeviceptr at)
{
	size_t index = place(at);
	if (!index)
		return NULL;
	struct mapping *found = &mappings[index - 1];
	return at < found->at + found->size ? found : NULL;
}

struct mapping *qt_mappings(size_t *count)
{
	*count = mapped;
	return mappings;
}

void qt_mappings_forget(CUdeviceptr at, uint64_t size)
{
	size_t index = place(at);
	if (index && mappings[index - 1].at == at)
		index--;
	size_t after = index;
	while (after < mapped && mappings[after].at < at + size) {
		struct piece *piece = mappings[after++].piece;
		piece->mapped--;
		qt_piece_drop(piece);
	}
	memmove(&mappings[index], &mappings[after], (mapped - after) * sizeof *mappings);
	mapped -= after - index;
}

static size_t block_place(CUdeviceptr at)
{
	size_t low = 0, high = blocks_count;
	while (low < high) {
		size_t middle = (low + high) / 2;
		if (blocks[middle].at <= at)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

bool qt_block_new(struct block block)
{
	void *moved = grown(blocks, blocks_count, &blocks_room, sizeof *blocks);
	if (!moved)
		return false;
	blocks = moved;
	size_t index = block_place(block.at);
	memmove(&blocks[index + 1], &blocks[index], (blocks_count - index) * sizeof *blocks);
	blocks_count++;
	blocks[index] = block;
	return true;
}

struct block *qt_block_at(CUdeviceptr at)
{
	size_t index = block_place(at);
	if (!index)
		return NULL;
	struct block *found = &blocks[index - 1];
	return at < found->at + found->size ? found : NULL;
}

struct block *qt_blocks(size_t *count)
{
	*count = blocks_count;
	return blocks;
}

void qt_block_forget(CUdeviceptr at)
{
	size_t index = block_place(at);
	if (!index || blocks[index - 1].at != at)
		return;
	memmove(&blocks[index - 1], &blocks[index], (blocks_count - index) * sizeof *blocks);
	blocks_count--;
}
