/* The service thread: does what the host says while the program's calls wait at the gate.
 *
 * It sleeps in sigwaitinfo until the host sends its thread a signal that it alone has asked for and
 * that no other thread notices. Then it connects, and hangs up when the host does: at a checkpoint
 * no socket is open. A host that is silent for longer than it said is left, and the gate opened. */

#include "qt.h"
#include "wire.h"

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_sigmask, pthread_sigmask@GLIBC_2.2.5");

#define WAKE 61         /* SIGRTMAX - 3 of a process; the library asks for no handler */
#define SILENT_MS 20000 /* how long the host may be silent between two messages */

struct message {
	struct head head;
	uint8_t body[QT_BATCH * sizeof(struct lent)];
	size_t length; /* of the body */
	int fds[QT_BATCH];
	unsigned fds_count;
};

static pthread_mutex_t saying = PTHREAD_MUTEX_INITIALIZER;
static char said[QT_SAID];

void qt_complain(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	pthread_mutex_lock(&saying);
	vsnprintf(said, sizeof said, format, arguments);
	pthread_mutex_unlock(&saying);
	va_end(arguments);
}

static uint32_t since_us(const struct timespec *began)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint32_t)((now.tv_sec - began->tv_sec) * 1000000 + (now.tv_nsec - began->tv_nsec) / 1000);
}

static bool answer(int s, enum kind kind, uint32_t count, uint32_t value)
{
	struct head head = {QT_MAGIC, QT_VERSION, (uint16_t)kind, count, value};
	return qt_send(s, &head, sizeof head, NULL, 0);
}

static bool tell(int s, enum kind kind, const char *format, ...)
{
	struct {
		struct head head;
		char words[QT_SAID];
	} text = {.head = {QT_MAGIC, QT_VERSION, (uint16_t)kind, 0, 0}};
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text.words, sizeof text.words, format, arguments);
	va_end(arguments);
	return qt_send(s, &text, sizeof text, NULL, 0);
}

static void close_fds(struct message *message)
{
	qt_close_all(message->fds, &message->fds_count);
}

/* False: the host has hung up, is silent, or speaks another language. */
static bool receive(int s, struct message *message)
{
	struct iovec parts[2] = {{&message->head, sizeof message->head}, {message->body, sizeof message->body}};
	ssize_t size = qt_receive(s, parts, 2, message->fds, &message->fds_count);
	if (size >= (ssize_t)sizeof message->head && message->head.magic == QT_MAGIC &&
	    message->head.version == QT_VERSION) {
		message->length = (size_t)size - sizeof message->head;
		return true;
	}
	close_fds(message);
	return false;
}

static bool say_hello(int s)
{
	struct hello hello = {.head = {QT_MAGIC, QT_VERSION, HELLO, 0, 0}};
	qt_book_lock();
	size_t mappings;
	qt_mappings(&mappings);
	for (uint64_t id = 1; id < qt_pieces_end(); id++) {
		const struct piece *piece = qt_piece(id);
		if (!piece)
			continue;
		hello.seen |= piece->foreign ? SEEN_IMPORTED : piece->stays ? SEEN_STAYS : 0;
		if (!qt_moves(piece))
			continue;
		hello.pieces++;
		hello.octets += piece->size;
		hello.largest = piece->size > hello.largest ? piece->size : hello.largest;
		hello.away += piece->away;
	}
	qt_book_unlock();
	hello.pid = (uint32_t)getpid();
	hello.closed = qt_gate_closed();
	hello.capturing = qt_capturing();
	hello.seen |= qt_seen();
	hello.mappings = (uint32_t)mappings;
	pthread_mutex_lock(&saying);
	memcpy(hello.said, said, sizeof said);
	pthread_mutex_unlock(&saying);
	return qt_send(s, &hello, sizeof hello, NULL, 0);
}

static void silent_after(int s, uint32_t ms)
{
	struct timeval limit = {ms / 1000, (ms % 1000) * 1000};
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
}

/* A capture of a stream that has begun must end first: nothing may be asked of the device then. */
static bool close_gate(int s, uint32_t within_ms, uint32_t silent_ms)
{
	struct timespec began;
	clock_gettime(CLOCK_MONOTONIC, &began);
	if (silent_ms)
		silent_after(s, silent_ms);
	for (;;) {
		uint32_t passed = since_us(&began) / 1000;
		if (passed >= within_ms)
			return tell(s, BUSY, "a stream is being captured");
		if (!qt_capturing()) {
			if (!qt_gate_close(within_ms - passed))
				return tell(s, BUSY, "%s has not returned", qt_gate_inside());
			if (!qt_capturing())
				return answer(s, CLOSED, 0, since_us(&began));
			qt_gate_open();
		}
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
}

static bool lend_batch(int s, uint64_t *id, unsigned *sent)
{
	struct {
		struct head head;
		struct lent lent[QT_BATCH];
	} batch = {.head = {QT_MAGIC, QT_VERSION, PIECES, 0, 0}};
	int fds[QT_BATCH];
	unsigned count = 0;
	CUresult result = CUDA_SUCCESS;
	for (; *id < qt_pieces_end() && count < QT_BATCH; ++*id) {
		const struct piece *piece = qt_piece(*id);
		if (!qt_moves(piece) || piece->away)
			continue;
		batch.lent[count] = (struct lent){.id = piece->id, .size = piece->size};
		result = cu.cuDeviceGetUuid_v2(batch.lent[count].uuid, piece->made.at.id);
		if (!result)
			result = cu.cuMemExportToShareableHandle(&fds[count], piece->real, HANDLE_POSIX_FD, 0);
		if (result)
			break;
		count++;
	}
	batch.head.count = count;
	bool done = result ? tell(s, FAILED, "a piece cannot be exported: %s", qt_error(result))
			   : !count || qt_send(s, &batch, sizeof batch.head + count * sizeof *batch.lent, fds, count);
	for (unsigned i = 0; i < count; i++)
		close(fds[i]);
	*sent = result ? 0 : count;
	return done && !result;
}

static bool lend(int s, struct message *message)
{
	struct timespec began;
	clock_gettime(CLOCK_MONOTONIC, &began);
	uint32_t all = 0;
	for (uint64_t id = 1;;) {
		unsigned sent;
		if (!lend_batch(s, &id, &sent))
			return false;
		if (!sent)
			return answer(s, LENT, all, since_us(&began));
		all += sent;
		if (!receive(s, message) || message->head.kind != NEXT)
			return false;
	}
}

static bool drop(int s)
{
	struct timespec began;
	clock_gettime(CLOCK_MONOTONIC, &began);
	CUresult result = qt_drop_all();
	if (result)
		return tell(s, FAILED, "a piece cannot be let go: %s", qt_error(result));
	return answer(s, DROPPED, qt_away(), since_us(&began));
}

static bool fill(int s, struct message *message)
{
	struct timespec began;
	clock_gettime(CLOCK_MONOTONIC, &began);
	uint64_t ids[QT_BATCH];
	unsigned count = message->fds_count;
	CUresult result = CUDA_SUCCESS;
	if (count > QT_BATCH || message->length != count * sizeof *ids)
		return tell(s, FAILED, "%u descriptors, and ids of %zu octets", count, message->length);
	memcpy(ids, message->body, message->length);
	for (unsigned i = 0; i < count && !result; i++) {
		struct piece *piece = qt_piece(ids[i]);
		if (piece && piece->away)
			result = qt_bring(piece, message->fds[i], message->head.value);
	}
	close_fds(message);
	if (result)
		return tell(s, FAILED, "a piece cannot come back: %s", qt_error(result));
	return answer(s, FILLED, qt_away(), since_us(&began));
}

static bool open_gate(int s)
{
	if (qt_away())
		return tell(s, FAILED, "%u pieces are away", qt_away());
	qt_move_end();
	qt_gate_open();
	return answer(s, OPENED, 0, 0);
}

static bool do_it(int s, struct message *message)
{
	bool closed = qt_gate_closed();
	switch (message->head.kind) {
	case STATE:
		return say_hello(s);
	case CLOSE:
		return closed ? answer(s, CLOSED, 0, 0) : close_gate(s, message->head.value, message->head.count);
	case OPEN:
		return open_gate(s);
	default:
		break;
	}
	if (!closed)
		return tell(s, FAILED, "the gate is open");
	qt_book_lock();
	bool done = false;
	switch (message->head.kind) {
	case LEND:
		done = lend(s, message);
		break;
	case DROP:
		done = drop(s);
		break;
	case FILL:
		done = fill(s, message);
		break;
	default:
		tell(s, FAILED, "a message of kind %u is not known", message->head.kind);
	}
	qt_book_unlock();
	return done;
}

static void talk(void)
{
	static struct message message;
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = QT_SOCKET};
	int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (s < 0)
		return;
	silent_after(s, SILENT_MS);
	if (connect(s, (struct sockaddr *)&address, sizeof address) == 0 && say_hello(s)) {
		while (receive(s, &message)) {
			bool goes_on = do_it(s, &message);
			close_fds(&message);
			if (!goes_on)
				break;
		}
	}
	close(s);
	/* The host has left: while all is here, so may the program go on. */
	if (qt_gate_closed() && !qt_away())
		qt_gate_open();
}

static void *serve(void *nothing)
{
	(void)nothing;
	prctl(PR_SET_NAME, QT_THREAD);
	qt_gate_exempt();
	sigset_t wake;
	sigemptyset(&wake);
	sigaddset(&wake, WAKE);
	for (;;)
		if (sigwaitinfo(&wake, NULL) == WAKE)
			talk();
	return NULL;
}

bool qt_thread(void *(*run)(void *))
{
	sigset_t all, before;
	pthread_t thread;
	pthread_attr_t attributes;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	int wrong = pthread_create(&thread, &attributes, run, NULL);
	pthread_attr_destroy(&attributes);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return !wrong;
}

void qt_serve_begin(void)
{
	static pid_t _Atomic begun; /* a child of fork() has none */
	pid_t me = getpid(), was = begun;
	if (was != me && atomic_compare_exchange_strong(&begun, &was, me) && !qt_thread(serve))
		qt_complain("the service thread cannot be started");
}
