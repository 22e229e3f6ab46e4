/* What the stand-in keeps in each process that has loaded it, and reads and writes from outside
 * with process_vm_readv and process_vm_writev: so it works across namespaces, after CRIU, and not
 * while the process is stopped, as with the real driver. */
#ifndef QT_STANDIN_CONTROL_H
#define QT_STANDIN_CONTROL_H
#include <stdint.h>
#include <stdlib.h>

#define DEVICES 16

enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };
enum { NOTHING, LOCK, CHECKPOINT, RESTORE, UNLOCK };

struct control {
    char magic[8];
    volatile uint32_t initialised, state, request, answer, command, timeout_ms, pairs_count;
    volatile int32_t result, restore_tid;
    volatile uint32_t fault_error, fault_stuck, late_ms; /* of this request */
    volatile uint64_t rate;                                          /* bytes a second, 0: no limit */
    volatile uint32_t stuck, peers, imported, exported, managed;
    volatile uint32_t minors_count;
    volatile uint32_t minors[DEVICES];
    volatile uint64_t bytes[DEVICES]; /* on the device with this minor */
    volatile uint64_t staged;
    uint8_t pairs[DEVICES][32];
};
#define MAGIC "QTSTAND1"

/* Where faults, rates and the list of devices are, and the device files: see build.py. */
static inline const char *home_dir(void) {
    const char *named = getenv("CUDA_STANDIN_HOME");
    return named ? named : "/run/cuda-standin";
}
static inline const char *dev_dir(void) {
    const char *named = getenv("CUDA_STANDIN_DEV");
    return named ? named : "/dev";
}

/* The UUID of the device with a minor: the same in a container and on its node. */
static inline void uuid_of(unsigned minor, uint8_t to[16]) {
    for (int i = 0; i < 16; i++) to[i] = (uint8_t)("stand-in-gpu-000"[i]);
    to[15] = (uint8_t)('0' + minor % 10);
    to[14] = (uint8_t)('0' + minor / 10);
}

/* from process.c: where the control of another process is, 0 when it has none. */
uint64_t control_of(int pid);
int read_control(int pid, uint64_t at, struct control *into);
int write_there(int pid, uint64_t at, const void *from, uint64_t size);
extern struct control qt_standin_control;
#endif
