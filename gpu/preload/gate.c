/* The gate: every call into the driver goes through it, and waits while it is closed.
 *
 * Threads are not stopped: one that does not call the driver goes on, and no system call of the
 * program is interrupted. A call that has entered is waited for: the gate is closed when nobody is
 * inside. Who is inside is counted in slots of their own cache lines, which threads share by chance
 * only, so that a call costs two uncontended additions.
 *
 * The order of the two writes and reads on both sides is what makes it right: a caller counts
 * itself and then looks at the gate, the closer closes and then looks at the counts; all of it
 * sequentially consistent, so at least one of them sees the other.
 */

#include "qt.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 64
#define LOOK_NS 50000

static struct slot {
	_Alignas(64) atomic_int inside;
	atomic_uint last; /* number of the function */
} slots[SLOTS];

static atomic_int closed;
static pid_t owner; /* a child of fork() is not kept waiting */
static __thread int depth __attribute__((tls_model("initial-exec")));

static struct slot *mine(void)
{
	uintptr_t at = (uintptr_t)&depth >> 6;
	return &slots[(at ^ at >> 6 ^ at >> 14) % SLOTS];
}

static void wait_open(void)
{
	while (atomic_load(&closed) && getpid() == owner)
		syscall(SYS_futex, &closed, FUTEX_WAIT_PRIVATE, 1, (void *)0, (void *)0, 0);
}

void qt_gate_enter(unsigned number)
{
	if (depth) {
		depth++;
		return;
	}
	struct slot *slot = mine();
	for (;;) {
		atomic_fetch_add(&slot->inside, 1);
		if (__builtin_expect(!atomic_load(&closed) || getpid() != owner, 1))
			break;
		atomic_fetch_sub(&slot->inside, 1);
		int error = errno;
		wait_open();
		errno = error;
	}
	atomic_store_explicit(&slot->last, number, memory_order_relaxed);
	depth = 1;
}

void qt_gate_exempt(void)
{
	depth = 1;
}

void qt_gate_leave(void)
{
	if (--depth == 0)
		atomic_fetch_sub(&mine()->inside, 1);
}

static bool empty(void)
{
	int inside = 0;
	for (int i = 0; i < SLOTS; i++)
		inside += atomic_load(&slots[i].inside);
	return inside == 0;
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

bool qt_gate_close(unsigned within_ms)
{
	uint64_t until = now_ns() + (uint64_t)within_ms * 1000000u;
	owner = getpid();
	atomic_store(&closed, 1);
	while (!empty()) {
		if (now_ns() > until) {
			qt_gate_open();
			return false;
		}
		nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
	}
	return true;
}

void qt_gate_open(void)
{
	atomic_store(&closed, 0);
	syscall(SYS_futex, &closed, FUTEX_WAKE_PRIVATE, 1 << 30, (void *)0, (void *)0, 0);
}

bool qt_gate_closed(void)
{
	return atomic_load(&closed);
}

const char *qt_gate_inside(void)
{
	for (int i = 0; i < SLOTS; i++) {
		if (atomic_load(&slots[i].inside) > 0) {
			const char *name = qt_entries[atomic_load(&slots[i].last) % QT_THUNKS].name;
			return name ? name : "a call";
		}
	}
	return "nobody";
}
