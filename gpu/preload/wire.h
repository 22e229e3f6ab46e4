/* What the library and the host say to each other: docs/formats.md. One message of a SEQPACKET
 * socket each, little-endian, as shim/gpu/direct/wire.py has it. */
#ifndef QT_WIRE_H
#define QT_WIRE_H

#include <stdint.h>

#define QT_MAGIC 0x31475451u /* QTG1 */
#define QT_VERSION 1
#ifndef QT_SOCKET /* a test has its own */
#define QT_SOCKET "/run/quickthaw/gpu.sock"
#endif
#define QT_THREAD "quickthaw-gpu"
#define QT_SAID 200

enum kind {
	HELLO = 1, /* from the library, first */
	CLOSE,     /* value: within how many ms; count: for how many ms at most, unless DROP follows */
	CLOSED,
	BUSY, /* with words: it is open again */
	LEND, /* the pieces, please */
	PIECES,
	NEXT,
	LENT,
	DROP, /* the host has them all: unmap and release */
	DROPPED,
	FILL, /* with ids and descriptors; value 1: copy to memory of your own */
	FILLED, /* count: how many are still away */
	OPEN,
	OPENED,
	FAILED, /* with words; whatever is away stays away */
	STATE,  /* HELLO again, please */
};

struct head {
	uint32_t magic;
	uint16_t version, kind;
	uint32_t count, value; /* value: microseconds in answers */
};

struct hello {
	struct head head;
	uint32_t pid; /* as the process knows it */
	uint32_t closed, away, capturing;
	uint64_t pieces, octets, largest; /* that move */
	uint32_t seen, mappings;
	char said[QT_SAID]; /* the last complaint */
};

struct lent {
	uint64_t id, size;
	uint8_t uuid[16]; /* of the GPU */
};

#endif
