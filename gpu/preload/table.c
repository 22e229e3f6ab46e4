/* The driver's functions: which is behind which thunk, and what we do in its place or after it.
 *
 * A program gets at them in three ways: linked with libcuda, by dlsym, by cuGetProcAddress (as the
 * CUDA runtime does, shared or static). In each of them it is given the thunk. What the library
 * does not know it passes on.
 */

#include "qt.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

/* So that it loads where glibc is 2.28, in which these two are in a library of their own. */
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlvsym, dlvsym@GLIBC_2.2.5");

struct entry qt_entries[QT_THUNKS] = {
#define QT_FUNCTION(function, words) {.name = #function, .stack_words = words},
#include "functions.h"
#undef QT_FUNCTION
};
#define QT_FUNCTION(function, words) +1
static const unsigned known = 0
#include "functions.h"
	;
#undef QT_FUNCTION

struct driver cu;
HIDDEN void *(*qt_real_dlsym)(void *, const char *);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *_Atomic libcuda;
static unsigned used = known;
static char names[QT_THUNKS][40]; /* of functions that functions.h has not */

static const struct replaced *const replaced[] = {
	qt_alloc_replaced, qt_vmm_replaced, qt_contexts_replaced, qt_ipc_replaced,
};

static bool is_thunk(const void *function)
{
	const char *at = function;
	return at >= qt_thunks && at < qt_thunks + QT_THUNKS * QT_THUNK_SIZE;
}

void *qt_thunk(unsigned number)
{
	return qt_thunks + QT_THUNK_SIZE * (size_t)number;
}

static bool starts(const char *name, const char *with)
{
	return strncmp(name, with, strlen(with)) == 0;
}

static bool version_of(const char *name, const char *base)
{
	size_t length = strlen(base);
	return strncmp(name, base, length) == 0 && (name[length] == 0 || starts(name + length, "_v"));
}

static struct entry *entry_named(const char *name)
{
	for (unsigned i = 0; i < used; i++)
		if (strcmp(qt_entries[i].name, name) == 0)
			return &qt_entries[i];
	return NULL;
}

static void prepare(void)
{
	for (unsigned i = 0; i < known; i++) {
		const char *name = qt_entries[i].name;
		qt_entries[i].ungated = starts(name, "cuCheckpoint") || starts(name, "cuGet") ||
					starts(name, "cuDriverGet");
	}
	for (size_t i = 0; i < sizeof replaced / sizeof *replaced; i++) {
		for (const struct replaced *each = replaced[i]; each->name; each++) {
			struct entry *entry = entry_named(each->name);
			if (entry)
				entry->instead = each->instead;
		}
	}
	qt_see_begin();
}

static void real_dlsym(void)
{
	if (!qt_real_dlsym)
		*(void **)&qt_real_dlsym = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
}

void *qt_learn(void)
{
	void *handle = atomic_load(&libcuda);
	if (handle)
		return handle;
	real_dlsym();
	handle = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
	if (!handle)
		return NULL;
	pthread_mutex_lock(&lock);
	if (!atomic_load(&libcuda)) {
		prepare();
#define QT_MEMBER(name, arguments) *(void **)&cu.name = qt_real_dlsym(handle, #name);
		QT_DRIVER(QT_MEMBER)
#undef QT_MEMBER
		/* Last: a call that finds this set goes on at once. */
		for (unsigned i = 0; i < known; i++)
			__atomic_store_n(&qt_entries[i].real, qt_real_dlsym(handle, qt_entries[i].name), __ATOMIC_RELEASE);
		atomic_store(&libcuda, handle);
	}
	pthread_mutex_unlock(&lock);
	return handle;
}

/* A version of a function that libcuda does not export by name gets what its brother has. */
static void add(void *real, const char *name)
{
	struct entry *entry = &qt_entries[used];
	strncpy(names[used], name, sizeof names[used] - 1);
	*entry = (struct entry){.real = real, .name = names[used], .stack_words = 12};
	for (unsigned i = 0; i < known; i++) {
		struct entry *brother = &qt_entries[i];
		if (version_of(brother->name, name) && (brother->instead || brother->after)) {
			entry->instead = brother->instead;
			entry->after = brother->after;
		}
	}
	used++;
}

void *qt_cover(void *real, const char *name)
{
	if (is_thunk(real))
		return real;
	void *thunk = real;
	pthread_mutex_lock(&lock);
	for (unsigned i = 0; i < QT_THUNKS; i++) {
		if (i == used && used < QT_THUNKS)
			add(real, name);
		if (i < used && qt_entries[i].real == real) {
			thunk = qt_thunk(i);
			break;
		}
	}
	pthread_mutex_unlock(&lock);
	return thunk;
}

static CUresult not_there(void)
{
	return CUDA_ERROR_NOT_INITIALIZED;
}

struct target {
	void *function;
	uint64_t stack_words;
};
HIDDEN struct target qt_enter(unsigned number);
HIDDEN void qt_leave(unsigned number, const uint64_t *arguments, CUresult result);
struct answer {
	void *function;
	uint64_t decided;
};
HIDDEN struct answer qt_lookup(void *handle, const char *name);

struct target qt_enter(unsigned number)
{
	struct entry *entry = &qt_entries[number];
	if (__builtin_expect(!entry->real, 0))
		qt_learn();
	if (!entry->ungated)
		qt_gate_enter(number);
	if (!entry->real)
		return (struct target){(void *)not_there, 0};
	return (struct target){entry->instead ? entry->instead : entry->real, entry->stack_words};
}

void qt_leave(unsigned number, const uint64_t *arguments, CUresult result)
{
	struct entry *entry = &qt_entries[number];
	if (entry->after)
		entry->after(arguments, result);
	if (!entry->ungated)
		qt_gate_leave();
}

struct answer qt_lookup(void *handle, const char *name)
{
	real_dlsym();
	if (name[0] != 'c' || name[1] != 'u' || name[2] < 'A' || name[2] > 'Z')
		return (struct answer){NULL, false};
	bool named = handle != RTLD_DEFAULT && handle != RTLD_NEXT;
	void *library = qt_learn(), *found = named ? qt_real_dlsym(handle, name) : NULL;
	void *real = library ? qt_real_dlsym(library, name) : NULL;
	if (real && (!named || found == real || is_thunk(found)))
		return (struct answer){qt_cover(real, name), true};
	/* Our own names are no sign that there is a driver: dlerror() says what RTLD_NEXT lacks. */
	if (!real && (named ? is_thunk(found) : entry_named(name) != NULL))
		return (struct answer){qt_real_dlsym(RTLD_NEXT, name), true};
	return (struct answer){NULL, false};
}

const char *qt_error(CUresult result)
{
	const char *name = NULL;
	if (cu.cuGetErrorName)
		cu.cuGetErrorName(result, &name);
	return name ? name : "an unknown error";
}
