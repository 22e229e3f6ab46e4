/* A stand-in for libcuda.so.1: what quickthaw sees of the driver, on a machine without a GPU.
 *
 * Device memory is a memfd mapped at the device's address, so that a program can look at it
 * directly. A checkpoint is asked for by another process and made by a thread of this one, which
 * copies the memory to one private anonymous area, closes the device files and leaves eventfds in
 * their places; a restore does the reverse. Behaviour: docs/gpu-facts.md. */
#define _GNU_SOURCE
#include "process.h"
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

#define API __attribute__((visibility("default")))
#define MOST 8192
#define CONTEXT_BYTES (4u << 20)
#define GRANULARITY (2ull << 20)

typedef int CUresult;
typedef uint64_t CUdeviceptr;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, OPERATING_SYSTEM = 304, INVALID_HANDLE = 400, ILLEGAL_STATE = 401, NOT_FOUND = 500,
       NOT_READY = 600, NOT_SUPPORTED = 801, UNKNOWN = 999 };

API struct control qt_standin_control = {.magic = MAGIC};
#define ME qt_standin_control

struct handle { int used, fd, device, refs, imported; uint64_t size, staged_at; };
struct mapping { int used, readable, writable, is_alloc; uint64_t at, size, offset; struct handle *of; };
static struct handle handles[MOST];
static struct mapping mappings[MOST];
static struct { int minor, fd; uint8_t uuid[16]; } devices[DEVICES];
static int count, control_fd = -1, uvm_fd = -1, event_fd = -1, socket_fd = -1, current = -1;
static pthread_mutex_t big = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int inside, closed;
static uint64_t busy_until;
static char *addresses; /* of the device, reserved: a restore maps them anew, piece by piece */
#define ADDRESSES_BYTES (1280ull << 20)
#define ADDRESSES_PIECE (64ull << 10)
static char *staging;
static uint64_t staging_bytes;

static uint64_t now_ms(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000 + (uint64_t)at.tv_nsec / 1000000;
}
static void pause_ms(long ms) {
    struct timespec rest = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&rest, &rest) && errno == EINTR) {}
}

/* Every call of a program waits here while the process is locked. `big` is held inside. */
static void enter(void) {
    pthread_mutex_lock(&big);
    while (closed) pthread_cond_wait(&changed, &big);
    inside++;
}
static CUresult leave(CUresult result) {
    inside--;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&big);
    return result;
}
#define ENTER if (!ME.initialised) return NOT_INITIALIZED; enter()

/* Devices */

static void device_path(char path[256], int minor) { snprintf(path, 256, "%s/nvidia%d", dev_dir(), minor); }
static const char *named(char path[256], const char *name) {
    snprintf(path, 256, "%s/%s", dev_dir(), name);
    return path;
}
static int open_device(const char *path) { return open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); }

static int find_devices(void) {
    char path[256];
    count = 0;
    for (int minor = 0; minor < DEVICES; minor++) {
        device_path(path, minor);
        struct stat st;
        if (stat(path, &st)) continue;
        devices[count].minor = minor;
        devices[count].fd = -1;
        uuid_of((unsigned)minor, devices[count].uuid);
        count++;
    }
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (visible && *visible >= '0' && *visible <= '9' && !visible[1] && *visible - '0' < count) {
        devices[0] = devices[*visible - '0'];
        count = 1;
    }
    return count;
}

static int open_devices(void) {
    char path[256];
    if ((control_fd = open_device(named(path, "nvidiactl"))) < 0) return -1;
    uvm_fd = open_device(named(path, "nvidia-uvm"));
    for (int i = 0; i < count; i++) {
        device_path(path, devices[i].minor);
        if ((devices[i].fd = open_device(path)) < 0) return -1;
    }
    return 0;
}

static void to_eventfd(int fd) {
    if (fd < 0) return;
    int other = eventfd(0, EFD_CLOEXEC);
    if (other >= 0) { dup3(other, fd, O_CLOEXEC); close(other); }
}
static int back_to_device(int fd, const char *path) {
    if (fd < 0) return 0;
    int other = open_device(path);
    if (other < 0) return -1;
    dup3(other, fd, O_CLOEXEC);
    close(other);
    return 0;
}

static void tell_minors(void) {
    ME.minors_count = (uint32_t)count;
    for (int i = 0; i < count; i++) ME.minors[i] = (uint32_t)devices[i].minor;
}
static void account(void) {
    uint64_t bytes[DEVICES] = {0};
    for (int i = 0; i < MOST; i++)
        if (handles[i].used && !handles[i].imported && handles[i].fd >= 0)
            bytes[devices[handles[i].device].minor] += handles[i].size;
    if (current >= 0 && ME.state != CHECKPOINTED) bytes[devices[current].minor] += CONTEXT_BYTES;
    for (int i = 0; i < DEVICES; i++) ME.bytes[i] = bytes[i];
}

/* Memory */

static struct handle *new_handle(int fd, uint64_t size, int device) {
    for (int i = 0; i < MOST; i++)
        if (!handles[i].used) {
            handles[i] = (struct handle){1, fd, device, 1, 0, size, 0};
            return &handles[i];
        }
    return NULL;
}
static struct handle *create(uint64_t size, int device) {
    int fd = memfd_create("standin-device-memory", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size)) { if (fd >= 0) close(fd); return NULL; }
    struct handle *made = new_handle(fd, size, device);
    account();
    return made;
}
static void let_go(struct handle *handle) {
    if (--handle->refs > 0) return;
    if (handle->imported) ME.imported--;
    if (handle->fd >= 0) close(handle->fd);
    handle->used = 0;
    account();
}
static struct handle *handle_of(uint64_t number) {
    uint64_t index = number - 1;
    return number && index < MOST && handles[index].used ? &handles[index] : NULL;
}
static int nothing_at(uint64_t at, uint64_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap((void *)at, size, PROT_NONE, flags, -1, 0) == MAP_FAILED ? -1 : 0;
}
static int show(struct mapping *m) {
    int protection = (m->readable ? PROT_READ : 0) | (m->writable ? PROT_WRITE : 0);
    return mmap((void *)m->at, m->size, protection, MAP_SHARED | MAP_FIXED, m->of->fd, (off_t)m->offset) ==
           MAP_FAILED ? -1 : 0;
}
static struct mapping *map(struct handle *of, uint64_t at, uint64_t size, uint64_t offset, int access, int is_alloc) {
    for (int i = 0; i < MOST; i++)
        if (!mappings[i].used) {
            mappings[i] = (struct mapping){1, access, access, is_alloc, at, size, offset, of};
            if (show(&mappings[i])) { mappings[i].used = 0; return NULL; }
            of->refs++;
            return &mappings[i];
        }
    return NULL;
}
static struct mapping *mapping_at(uint64_t at) {
    for (int i = 0; i < MOST; i++)
        if (mappings[i].used && mappings[i].at <= at && at < mappings[i].at + mappings[i].size) return &mappings[i];
    return NULL;
}
static int unmap(struct mapping *m) {
    struct handle *of = m->of;
    m->used = 0;
    int wrong = nothing_at(m->at, m->size);
    let_go(of);
    return wrong;
}
static uint64_t reserve(uint64_t size, uint64_t wanted) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    uint64_t got;
    if (wanted) {
        void *at = mmap((void *)wanted, size, PROT_NONE, flags | MAP_FIXED_NOREPLACE, -1, 0);
        if (at == (void *)wanted) return wanted;
        if (at != MAP_FAILED) munmap(at, size);
    }
    void *at = mmap(NULL, size + GRANULARITY, PROT_NONE, flags, -1, 0);
    if (at == MAP_FAILED) return 0;
    got = ((uint64_t)at + GRANULARITY - 1) & ~(GRANULARITY - 1);
    if (got > (uint64_t)at) munmap(at, got - (uint64_t)at);
    munmap((void *)(got + size), (uint64_t)at + GRANULARITY - got);
    return got;
}

/* What a thread of the process does when another process asks. `big` is held. */

static void at_rate(uint64_t done, uint64_t began) {
    if (!ME.rate) return;
    uint64_t due = began + done * 1000 / ME.rate;
    while (now_ms() < due) pause_ms(1);
}
static int move(int fd, char *memory, uint64_t size, int out, uint64_t *done, uint64_t began) {
    for (uint64_t at = 0; at < size;) {
        uint64_t piece = size - at < (1u << 20) ? size - at : 1u << 20;
        ssize_t got = out ? pread(fd, memory + at, piece, (off_t)at) : pwrite(fd, memory + at, piece, (off_t)at);
        if (got <= 0) return -1;
        at += (uint64_t)got;
        at_rate(*done += (uint64_t)got, began);
    }
    return 0;
}

static CUresult do_checkpoint(void) {
    if (ME.managed) return NOT_SUPPORTED;
    uint64_t total = CONTEXT_BYTES, done = 0, began = now_ms();
    for (int i = 0; i < MOST; i++)
        if (handles[i].used && !handles[i].imported) { handles[i].staged_at = total; total += handles[i].size; }
    char *area = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) return OUT_OF_MEMORY;
    for (uint64_t at = 0; at < CONTEXT_BYTES; at += 64) memcpy(area + at, "context ", 8);
    staging = area, staging_bytes = total, ME.staged = total;
    for (int i = 0; i < MOST; i++)
        if (handles[i].used && !handles[i].imported &&
            move(handles[i].fd, area + handles[i].staged_at, handles[i].size, 1, &done, began))
            return UNKNOWN;
    for (int i = 0; i < MOST; i++)
        if (mappings[i].used) nothing_at(mappings[i].at, mappings[i].size);
    for (int i = 0; i < MOST; i++)
        if (handles[i].used && handles[i].fd >= 0) { close(handles[i].fd); handles[i].fd = -1; }
    to_eventfd(control_fd);
    to_eventfd(uvm_fd);
    for (int i = 0; i < count; i++) to_eventfd(devices[i].fd);
    return OK;
}

/* Which minors the devices have after a restore; 0 when the pairs cannot be used. */
static CUresult chosen(int to[DEVICES]) {
    if (ME.pairs_count && ME.pairs_count != (uint32_t)count) return INVALID_VALUE;
    for (int i = 0; i < count; i++) {
        to[i] = ME.pairs_count ? -1 : devices[i].minor;
        for (uint32_t p = 0; p < ME.pairs_count; p++) {
            if (memcmp(ME.pairs[p], devices[i].uuid, 16)) continue;
            for (int minor = 0; minor < DEVICES; minor++) {
                uint8_t uuid[16];
                uuid_of((unsigned)minor, uuid);
                if (!memcmp(ME.pairs[p] + 16, uuid, 16)) to[i] = minor;
            }
        }
        char path[256];
        device_path(path, to[i]);
        if (to[i] < 0 || access(path, F_OK)) return INVALID_VALUE;
    }
    return OK;
}

static CUresult do_restore(void) {
    int to[DEVICES];
    char path[256];
    uint64_t done = 0, began = now_ms();
    if (ME.stuck) return OPERATING_SYSTEM;
    if (ME.fault_stuck) { ME.stuck = 1; return (CUresult)ME.fault_stuck; }
    if (ME.peers) { ME.stuck = 1; return INVALID_VALUE; }
    if (ME.imported) { ME.stuck = 1; return NOT_SUPPORTED; }
    CUresult wrong = chosen(to);
    if (wrong) return wrong;
    for (uint64_t at = 0; at < ADDRESSES_BYTES; at += ADDRESSES_PIECE) nothing_at((uint64_t)addresses + at, ADDRESSES_PIECE);
    if (back_to_device(control_fd, named(path, "nvidiactl"))) return OPERATING_SYSTEM;
    back_to_device(uvm_fd, named(path, "nvidia-uvm"));
    for (int i = 0; i < count; i++) {
        device_path(path, to[i]);
        if (back_to_device(devices[i].fd, path)) return OPERATING_SYSTEM;
        devices[i].minor = to[i];
        uuid_of((unsigned)to[i], devices[i].uuid);
    }
    for (uint64_t at = 0; at < CONTEXT_BYTES; at += 64)
        if (memcmp(staging + at, "context ", 8)) return UNKNOWN;
    for (int i = 0; i < MOST; i++) {
        if (!handles[i].used) continue;
        int fd = memfd_create("standin-device-memory", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, (off_t)handles[i].size)) return OUT_OF_MEMORY;
        handles[i].fd = fd;
        if (move(fd, staging + handles[i].staged_at, handles[i].size, 0, &done, began)) return UNKNOWN;
    }
    for (int i = 0; i < MOST; i++)
        if (mappings[i].used && show(&mappings[i])) return UNKNOWN;
    munmap(staging, staging_bytes);
    staging = NULL, staging_bytes = ME.staged = 0;
    tell_minors();
    return OK;
}

static CUresult do_lock(void) {
    uint64_t until = ME.timeout_ms ? now_ms() + ME.timeout_ms : UINT64_MAX;
    closed = 1;
    while (inside || now_ms() < busy_until) {
        if (now_ms() >= until) {
            closed = 0;
            pthread_cond_broadcast(&changed);
            return NOT_READY;
        }
        pthread_mutex_unlock(&big);
        pause_ms(1);
        pthread_mutex_lock(&big);
    }
    return OK;
}

static CUresult asked(void) {
    static const uint32_t needs[] = {0, RUNNING, LOCKED, CHECKPOINTED, LOCKED};
    static const uint32_t leads[] = {0, LOCKED, CHECKPOINTED, LOCKED, RUNNING};
    CUresult result = OK;
    if (ME.command < LOCK || ME.command > UNLOCK) return INVALID_VALUE;
    if (ME.state != needs[ME.command]) return ILLEGAL_STATE;
    if (ME.late_ms) pause_ms(ME.late_ms);
    if (ME.fault_error) return (CUresult)ME.fault_error;
    if (ME.command == LOCK) result = do_lock();
    if (ME.command == CHECKPOINT) result = do_checkpoint();
    if (ME.command == RESTORE) result = do_restore();
    if (ME.command == UNLOCK) closed = 0, pthread_cond_broadcast(&changed);
    if (!result) ME.state = leads[ME.command];
    account();
    return result;
}

static void *serve(void *unused) {
    (void)unused;
    prctl(PR_SET_NAME, "cuda00001400006");
    ME.restore_tid = (int)syscall(SYS_gettid);
    for (;;) {
        if (ME.request != ME.answer) {
            pthread_mutex_lock(&big);
            ME.result = asked();
            pthread_mutex_unlock(&big);
            __sync_synchronize();
            ME.answer = ME.request;
        }
        pause_ms(1);
    }
    return NULL;
}
static void *listen_to_events(void *unused) {
    uint64_t value;
    (void)unused;
    prctl(PR_SET_NAME, "cuda-EvtHandlr");
    while (read(event_fd, &value, sizeof value) >= 0 || errno == EINTR) {}
    return NULL;
}
static void thread(void *(*work)(void *)) {
    sigset_t all, before;
    pthread_t made;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (!pthread_create(&made, NULL, work, NULL)) pthread_detach(made);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
static void bind_socket(void) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    struct stat st;
    if (stat("/proc/self/ns/pid", &st)) return;
    int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "cuda-uvmfd-%lu-%d", (unsigned long)st.st_ino,
                          getpid());
    socket_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (bind(socket_fd, (struct sockaddr *)&name, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length)))
        close(socket_fd), socket_fd = -1;
}

static void forked(void) { /* a child of fork has no context of its own */
    memset(handles, 0, sizeof handles);
    memset(mappings, 0, sizeof mappings);
    ME = (struct control){.magic = MAGIC};
    current = -1;
}

API CUresult cuInit(unsigned flags) {
    CUresult result = OK;
    if (flags) return INVALID_VALUE;
    pthread_mutex_lock(&big);
    if (!ME.initialised) {
        if (!find_devices() || open_devices()) result = NO_DEVICE;
        else {
            event_fd = eventfd(0, EFD_CLOEXEC);
            addresses = mmap(NULL, ADDRESSES_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            bind_socket();
            tell_minors();
            thread(listen_to_events);
            thread(serve);
            pthread_atfork(NULL, NULL, forked);
            ME.initialised = 1;
        }
    }
    pthread_mutex_unlock(&big);
    return result;
}

/* The checkpoint API, as another process calls it */

static int fault(const char *call, char *action, long *value) {
    char path[256], text[128] = "";
    for (int once = 0; once < 2; once++) {
        snprintf(path, sizeof path, "%s/faults/%s%s", home_dir(), call, once ? ".once" : "");
        FILE *file = fopen(path, "re");
        if (!file) continue;
        *value = 0;
        if (fgets(text, sizeof text, file)) sscanf(text, "%31s %ld", action, value);
        fclose(file);
        if (once && unlink(path)) continue; /* another call took it */
        return 1;
    }
    return 0;
}
static uint64_t rate_of(const char *call) {
    char path[256];
    unsigned long long rate = 0;
    snprintf(path, sizeof path, "%s/rate/%s", home_dir(), call);
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    if (fscanf(file, "%llu", &rate) != 1) rate = 0;
    fclose(file);
    return rate;
}
/* A call of a program goes wrong, or takes its time, as the files `faults/NAME` and `rate/NAME` say. */
static CUresult disturbed(const char *name, uint64_t size) {
    char action[32] = "";
    long value = 0;
    uint64_t rate = size ? rate_of(name) : 0;
    if (rate) pause_ms((long)(size * 1000 / rate));
    if (!fault(name, action, &value)) return OK;
    if (!strcmp(action, "hang")) for (;;) pause_ms(1000000);
    if (!strcmp(action, "die")) kill(getpid(), SIGKILL);
    return (CUresult)value;
}
static CUresult found(int pid, uint64_t *at, struct control *there) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    if (access(path, F_OK)) return OPERATING_SYSTEM;
    if (!(*at = control_of(pid)) || read_control(pid, *at, there)) return NOT_INITIALIZED;
    return there->initialised ? OK : NOT_INITIALIZED;
}

static void hang(void) { for (;;) pause_ms(1000000); }

static CUresult ask(const char *name, int pid, struct control *want, uint32_t command) {
    struct control there;
    uint64_t at;
    char action[32] = "";
    long value = 0;
    fault(name, action, &value);
    if (!strcmp(action, "hang")) hang();
    if (!strcmp(action, "refuse")) return (CUresult)value;
    CUresult wrong = found(pid, &at, &there);
    if (wrong) return wrong;
    struct control *c = want;
    c->command = command, c->rate = rate_of(name);
    c->fault_error = c->fault_stuck = c->late_ms = 0;
    if (!strcmp(action, "error")) c->fault_error = (uint32_t)value;
    if (!strcmp(action, "kill")) c->late_ms = 10000; /* the first of a PID namespace cannot kill itself */
    if (!strcmp(action, "stuck")) c->fault_stuck = (uint32_t)value;
    if (!strcmp(action, "late")) c->late_ms = (uint32_t)value;
#define PUT(field) write_there(pid, at + offsetof(struct control, field), (void *)&c->field, sizeof c->field)
    if (PUT(command) || PUT(timeout_ms) || PUT(rate) || PUT(fault_error) || PUT(fault_stuck) ||
        PUT(late_ms) || PUT(pairs_count) || PUT(pairs))
        return OPERATING_SYSTEM;
    c->request = there.request + 1;
    if (PUT(request)) return OPERATING_SYSTEM;
    if (!strcmp(action, "kill")) kill(pid, SIGKILL);
    if (!strcmp(action, "die")) kill(getpid(), SIGKILL);
    if (!strcmp(action, "hang-done")) hang();
    while (there.answer != c->request) {
        pause_ms(1);
        if (read_control(pid, at, &there)) return OPERATING_SYSTEM;
    }
    return there.result;
}

API CUresult cuCheckpointProcessGetState(int pid, int *state) {
    struct control there;
    uint64_t at;
    char action[32] = "";
    long value = 0;
    fault("state", action, &value);
    if (!strcmp(action, "hang")) hang();
    if (!strcmp(action, "refuse")) return (CUresult)value;
    CUresult wrong = found(pid, &at, &there);
    if (!wrong) *state = (int)there.state;
    return wrong;
}
API CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *tid) {
    struct control there;
    uint64_t at;
    CUresult wrong = found(pid, &at, &there);
    if (!wrong) *tid = there.restore_tid;
    return wrong;
}
struct lock_args { unsigned timeout_ms, reserved0; uint64_t reserved1[7]; };
API CUresult cuCheckpointProcessLock(int pid, struct lock_args *args) {
    struct control want = {.timeout_ms = args ? args->timeout_ms : 0};
    return ask("lock", pid, &want, LOCK);
}
API CUresult cuCheckpointProcessCheckpoint(int pid, void *args) {
    struct control want = {0};
    (void)args;
    return ask("checkpoint", pid, &want, CHECKPOINT);
}
struct restore_args { uint8_t (*pairs)[32]; unsigned pairs_count; char reserved[44]; uint64_t reserved1; };
API CUresult cuCheckpointProcessRestore(int pid, struct restore_args *args) {
    struct control want = {0};
    if (args && args->pairs_count > DEVICES) return INVALID_VALUE;
    if (args && args->pairs) {
        want.pairs_count = args->pairs_count;
        memcpy(want.pairs, args->pairs, args->pairs_count * 32);
    }
    return ask("restore", pid, &want, RESTORE);
}
API CUresult cuCheckpointProcessUnlock(int pid, void *args) {
    struct control want = {0};
    (void)args;
    return ask("unlock", pid, &want, UNLOCK);
}

/* Devices and contexts, as a program calls them */

API CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
API CUresult cuGetErrorName(CUresult code, const char **name) {
    static const struct { CUresult code; const char *name; } known[] = {
        {OK, "CUDA_SUCCESS"}, {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"}, {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
        {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"}, {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM"}, {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
        {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE"}, {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {NOT_READY, "CUDA_ERROR_NOT_READY"}, {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"}, {UNKNOWN, "CUDA_ERROR_UNKNOWN"}};
    for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].code == code) { *name = known[i].name; return OK; }
    *name = NULL;
    return INVALID_VALUE;
}
API CUresult cuGetErrorString(CUresult code, const char **text) { return cuGetErrorName(code, text); }
API CUresult cuDeviceGetCount(int *to) { ENTER; *to = count; return leave(OK); }
API CUresult cuDeviceGet(int *device, int ordinal) {
    ENTER;
    *device = ordinal;
    return leave(ordinal >= 0 && ordinal < count ? OK : INVALID_DEVICE);
}
API CUresult cuDeviceGetUuid_v2(uint8_t uuid[16], int device) {
    ENTER;
    if (device < 0 || device >= count) return leave(INVALID_DEVICE);
    memcpy(uuid, devices[device].uuid, 16);
    return leave(OK);
}
API CUresult cuDeviceGetUuid(uint8_t uuid[16], int device) { return cuDeviceGetUuid_v2(uuid, device); }
API CUresult cuDeviceGetName(char *name, int length, int device) {
    (void)device;
    snprintf(name, (size_t)length, "NVIDIA Stand-in");
    return OK;
}
API CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = 1ull << 34; return OK; }
API CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 102 || attribute == 103; /* virtual memory management, file descriptors */
    return OK;
}
static CUresult use(int device) {
    if (device < 0 || device >= count) return INVALID_DEVICE;
    current = device;
    account();
    return OK;
}
static void *context_of(int device) { return (void *)(uintptr_t)(0x1000 + device); }
API CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER;
    *context = context_of(device);
    return leave(use(device));
}
API CUresult cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return OK; }
API CUresult cuCtxCreate_v2(void **context, unsigned flags, int device) {
    (void)flags;
    return cuDevicePrimaryCtxRetain(context, device);
}
API CUresult cuCtxDestroy_v2(void *context) { (void)context; return OK; }
API CUresult cuCtxSetCurrent(void *context) {
    ENTER;
    return leave(context ? use((int)((uintptr_t)context - 0x1000)) : OK);
}
API CUresult cuCtxPushCurrent_v2(void *context) { return cuCtxSetCurrent(context); }
API CUresult cuCtxPopCurrent_v2(void **context) { if (context) *context = context_of(current); return OK; }
API CUresult cuCtxGetCurrent(void **context) { *context = current < 0 ? NULL : context_of(current); return OK; }
API CUresult cuCtxGetDevice(int *device) { *device = current; return current < 0 ? INVALID_CONTEXT : OK; }
API CUresult cuCtxSynchronize(void) {
    if (!ME.initialised) return NOT_INITIALIZED;
    while (now_ms() < busy_until) pause_ms(1);
    ENTER;
    return leave(OK);
}
API CUresult cuCtxEnablePeerAccess(void *peer, unsigned flags) {
    (void)peer, (void)flags;
    ENTER;
    ME.peers++;
    return leave(OK);
}
API CUresult cuDeviceCanAccessPeer(int *can, int device, int peer) { *can = device != peer; return OK; }

/* Memory, as a program calls it */

API CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER;
    *total = 1ull << 34;
    *free_bytes = *total - (current < 0 ? 0 : ME.bytes[devices[current].minor]);
    return leave(OK);
}
static CUresult alloc(CUdeviceptr *at, uint64_t size) {
    if (current < 0) return INVALID_CONTEXT;
    if (!size) return INVALID_VALUE;
    uint64_t whole = (size + 4095) & ~4095ull;
    struct handle *made = create(whole, current);
    if (!made) return OUT_OF_MEMORY;
    *at = reserve(whole, 0);
    if (!*at || !map(made, *at, whole, 0, 1, 1)) { let_go(made); return OUT_OF_MEMORY; }
    let_go(made);
    return OK;
}
API CUresult cuMemAlloc_v2(CUdeviceptr *at, size_t size) { ENTER; return leave(alloc(at, size)); }
API CUresult cuMemAlloc(CUdeviceptr *at, size_t size) { return cuMemAlloc_v2(at, size); }
API CUresult cuMemAllocAsync(CUdeviceptr *at, size_t size, void *stream) { (void)stream; return cuMemAlloc_v2(at, size); }
API CUresult cuMemAllocManaged(CUdeviceptr *at, size_t size, unsigned flags) {
    (void)flags;
    ENTER;
    ME.managed++;
    return leave(alloc(at, size));
}
API CUresult cuMemFree_v2(CUdeviceptr at) {
    ENTER;
    struct mapping *m = mapping_at(at);
    if (!m || m->at != at || !m->is_alloc) return leave(at ? INVALID_VALUE : OK);
    uint64_t size = m->size;
    unmap(m);
    munmap((void *)at, size);
    return leave(OK);
}
API CUresult cuMemFree(CUdeviceptr at) { return cuMemFree_v2(at); }
API CUresult cuMemFreeAsync(CUdeviceptr at, void *stream) { (void)stream; return cuMemFree_v2(at); }
API CUresult cuMemAllocHost_v2(void **at, size_t size) { /* a shared area of /dev/zero, as with the driver */
    ENTER;
    int fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
    *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0) close(fd);
    return leave(*at == MAP_FAILED ? OUT_OF_MEMORY : OK);
}
API CUresult cuMemHostRegister_v2(void *at, size_t size, unsigned flags) { (void)at, (void)size, (void)flags; return OK; }
API CUresult cuMemHostAlloc(void **at, size_t size, unsigned flags) { (void)flags; return cuMemAllocHost_v2(at, size); }

static CUresult copy(void *to, const void *from, size_t size) {
    ENTER;
    memmove(to, from, size);
    return leave(OK);
}
API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size) { return copy((void *)to, from, size); }
API CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) { return copy(to, (void *)from, size); }
API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) { return copy((void *)to, (void *)from, size); }
API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t size) { return copy((void *)to, (void *)from, size); }
API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *stream) {
    (void)stream;
    CUresult wrong = disturbed("to_device", size);
    if (wrong) return wrong;
    return copy((void *)to, from, size);
}
API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *stream) {
    (void)stream;
    CUresult wrong = disturbed("to_host", size);
    if (wrong) return wrong;
    return copy(to, (void *)from, size);
}
API CUresult cuMemsetD8_v2(CUdeviceptr at, unsigned char value, size_t size) {
    ENTER;
    memset((void *)at, value, size);
    return leave(OK);
}
API CUresult cuMemsetD32_v2(CUdeviceptr at, unsigned value, size_t words) {
    ENTER;
    for (size_t i = 0; i < words; i++) ((unsigned *)at)[i] = value;
    return leave(OK);
}

/* Virtual memory management */

struct location { int type, id; };
struct properties { int type, handle_types; struct location location; void *win32; uint8_t flags[8]; };
struct access { struct location location; int flags; };

API CUresult cuMemGetAllocationGranularity(size_t *to, const struct properties *p, int option) {
    (void)p, (void)option;
    *to = GRANULARITY;
    return OK;
}
API CUresult cuMemCreate(uint64_t *handle, size_t size, const struct properties *p, unsigned long long flags) {
    (void)flags;
    ENTER;
    CUresult wrong = disturbed("create", 0);
    if (wrong) return leave(wrong);
    if (!size || size % GRANULARITY || p->location.id < 0 || p->location.id >= count) return leave(INVALID_VALUE);
    struct handle *made = create(size, p->location.id);
    if (!made) return leave(OUT_OF_MEMORY);
    *handle = (uint64_t)(made - handles) + 1;
    return leave(OK);
}
API CUresult cuMemRelease(uint64_t handle) {
    ENTER;
    struct handle *of = handle_of(handle);
    if (of) let_go(of);
    return leave(of ? OK : INVALID_VALUE);
}
API CUresult cuMemAddressReserve(CUdeviceptr *at, size_t size, size_t alignment, CUdeviceptr wanted, unsigned long long flags) {
    (void)alignment, (void)flags;
    ENTER;
    if (!size || size % GRANULARITY) return leave(INVALID_VALUE);
    *at = reserve(size, wanted);
    return leave(*at ? OK : OUT_OF_MEMORY);
}
API CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
    ENTER;
    for (int i = 0; i < MOST; i++)
        if (mappings[i].used && mappings[i].at < at + size && at < mappings[i].at + mappings[i].size)
            return leave(INVALID_VALUE);
    return leave(munmap((void *)at, size) ? INVALID_VALUE : OK);
}
API CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, uint64_t handle, unsigned long long flags) {
    (void)flags;
    ENTER;
    struct handle *of = handle_of(handle);
    if (!of || offset + size > of->size || mapping_at(at)) return leave(INVALID_VALUE);
    return leave(map(of, at, size, offset, 0, 0) ? OK : OUT_OF_MEMORY);
}
API CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
    ENTER;
    int done = 0;
    for (int i = 0; i < MOST; i++)
        if (mappings[i].used && at <= mappings[i].at && mappings[i].at + mappings[i].size <= at + size)
            unmap(&mappings[i]), done = 1;
    return leave(done ? OK : INVALID_VALUE);
}
API CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const struct access *wanted, size_t many) {
    ENTER;
    int flags = many ? wanted[0].flags : 0, done = 0;
    for (int i = 0; i < MOST; i++) {
        struct mapping *m = &mappings[i];
        if (!m->used || m->at < at || m->at + m->size > at + size) continue;
        m->readable = flags & 1, m->writable = flags == 3;
        if (many > 1) ME.peers++;
        mprotect((void *)m->at, m->size, (m->readable ? PROT_READ : 0) | (m->writable ? PROT_WRITE : 0));
        done = 1;
    }
    return leave(done ? OK : INVALID_VALUE);
}
API CUresult cuMemGetAccess(unsigned long long *flags, const struct location *location, CUdeviceptr at) {
    (void)location;
    ENTER;
    struct mapping *m = mapping_at(at);
    if (m) *flags = m->writable ? 3 : m->readable ? 1 : 0;
    return leave(m ? OK : INVALID_VALUE);
}
API CUresult cuMemExportToShareableHandle(void *to, uint64_t handle, int type, unsigned long long flags) {
    (void)flags;
    ENTER;
    struct handle *of = handle_of(handle);
    if (!of || of->imported || type != 1) return leave(INVALID_VALUE);
    ME.exported++;
    *(int *)to = fcntl(of->fd, F_DUPFD_CLOEXEC, 0);
    return leave(*(int *)to < 0 ? OPERATING_SYSTEM : OK);
}
static CUresult import(uint64_t *handle, int fd) {
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) return INVALID_VALUE;
    struct handle *made = new_handle(fd, (uint64_t)st.st_size, current < 0 ? 0 : current);
    if (!made) return OUT_OF_MEMORY;
    made->imported = 1;
    ME.imported++;
    *handle = (uint64_t)(made - handles) + 1;
    return OK;
}
API CUresult cuMemImportFromShareableHandle(uint64_t *handle, void *from, int type) {
    ENTER;
    if (type != 1) return leave(INVALID_VALUE);
    return leave(import(handle, fcntl((int)(intptr_t)from, F_DUPFD_CLOEXEC, 0)));
}
API CUresult cuMemRetainAllocationHandle(uint64_t *handle, void *at) {
    ENTER;
    struct mapping *m = mapping_at((uint64_t)at);
    if (!m || m->is_alloc) return leave(INVALID_VALUE);
    m->of->refs++;
    *handle = (uint64_t)(m->of - handles) + 1;
    return leave(OK);
}
API CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr at) {
    ENTER;
    struct mapping *m = mapping_at(at);
    if (m && base) *base = m->at;
    if (m && size) *size = m->size;
    return leave(m ? OK : INVALID_VALUE);
}
API CUresult cuPointerGetAttribute(void *to, int attribute, CUdeviceptr at) {
    ENTER;
    struct mapping *m = mapping_at(at);
    if (!m) return leave(INVALID_VALUE);
    if (attribute == 2) *(int *)to = 2;               /* memory type: device */
    if (attribute == 9) *(int *)to = m->of->device;   /* device ordinal */
    return leave(attribute == 2 || attribute == 9 ? OK : NOT_SUPPORTED);
}

/* Handles between processes of one PID namespace: pid and number of the descriptor */

struct ipc { int pid, fd; uint64_t size; char rest[48]; };
API CUresult cuIpcGetMemHandle(struct ipc *to, CUdeviceptr at) {
    ENTER;
    struct mapping *m = mapping_at(at);
    if (!m || !m->is_alloc) return leave(INVALID_VALUE);
    *to = (struct ipc){.pid = getpid(), .fd = m->of->fd, .size = m->size};
    ME.exported++;
    return leave(OK);
}
API CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *at, struct ipc from, unsigned flags) {
    char path[256];
    uint64_t handle;
    (void)flags;
    ENTER;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", from.pid, from.fd);
    CUresult wrong = import(&handle, open(path, O_RDWR | O_CLOEXEC));
    if (wrong) return leave(wrong);
    *at = reserve(from.size, 0);
    struct handle *of = handle_of(handle);
    if (!*at || !map(of, *at, from.size, 0, 1, 1)) { let_go(of); return leave(OUT_OF_MEMORY); }
    let_go(of);
    return leave(OK);
}
API CUresult cuIpcCloseMemHandle(CUdeviceptr at) { return cuMemFree_v2(at); }

/* Streams and work: whatever is asked is done at once, but for the time that it is said to take */

API CUresult cuStreamCreate(void **stream, unsigned flags) { (void)flags; *stream = (void *)0x2000; return OK; }
API CUresult cuStreamDestroy_v2(void *stream) { (void)stream; return OK; }
API CUresult cuStreamSynchronize(void *stream) { (void)stream; return cuCtxSynchronize(); }
API CUresult cuLaunchHostFunc(void *stream, void (*work)(void *), void *data) { (void)stream; work(data); return OK; }
API CUresult cuStandinBusy(unsigned ms) {
    ENTER;
    busy_until = now_ms() + ms;
    return leave(OK);
}

API CUresult cuGetProcAddress_v2(const char *symbol, void **to, int version, uint64_t flags, int *status) {
    static void *self;
    char name[128];
    (void)version, (void)flags;
    Dl_info info;
    if (!self && dladdr((void *)cuInit, &info)) self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    snprintf(name, sizeof name, "%s_v2", symbol);
    *to = self ? dlsym(self, name) : NULL;
    if (!*to && self) *to = dlsym(self, symbol);
    if (status) *status = *to ? 0 : 1;
    return *to ? OK : NOT_FOUND;
}
API CUresult cuGetProcAddress(const char *symbol, void **to, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, to, version, flags, NULL);
}
