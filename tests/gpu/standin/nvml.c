/* A stand-in for libnvidia-ml.so.1: the node's devices, and who uses them. The file `devices` has them.
 *
 * A line of that file: MINOR TOTAL_MIB MIG COMPUTE_MODE NAME. The file `driver` has the driver's version. */
#define _GNU_SOURCE
#include "process.h"
#include <dirent.h>

#define API __attribute__((visibility("default")))
enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7 };
static struct device { unsigned minor, mig, mode; unsigned long long total; char name[96]; } devices[DEVICES];
static unsigned count;
static char driver[80];

static const char *in_home(char path[256], const char *name) {
    snprintf(path, 256, "%s/%s", home_dir(), name);
    return path;
}

API int nvmlInit_v2(void) {
    char line[256], path[256];
    count = 0;
    FILE *file = fopen(in_home(path, "devices"), "re");
    if (!file) return UNINITIALIZED;
    while (count < DEVICES && fgets(line, sizeof line, file)) {
        struct device *d = &devices[count];
        if (sscanf(line, "%u %llu %u %u %95[^\n]", &d->minor, &d->total, &d->mig, &d->mode, d->name) == 5)
            d->total <<= 20, count++;
    }
    fclose(file);
    if ((file = fopen(in_home(path, "driver"), "re"))) {
        if (fscanf(file, "%79s", driver) != 1) *driver = 0;
        fclose(file);
    }
    return OK;
}
API int nvmlShutdown(void) { return OK; }
API int nvmlSystemGetDriverVersion(char *to, unsigned length) { snprintf(to, length, "%s", driver); return OK; }
API int nvmlDeviceGetCount_v2(unsigned *to) { *to = count; return OK; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **to) {
    if (index >= count) return INVALID_ARGUMENT;
    *to = &devices[index];
    return OK;
}
API int nvmlDeviceGetMinorNumber(struct device *d, unsigned *to) { *to = d->minor; return OK; }
API int nvmlDeviceGetName(struct device *d, char *to, unsigned length) { snprintf(to, length, "%s", d->name); return OK; }
API int nvmlDeviceGetUUID(struct device *d, char *to, unsigned length) {
    uint8_t u[16];
    uuid_of(d->minor, u);
    snprintf(to, length, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2], u[3],
             u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
    return OK;
}
API int nvmlDeviceGetMigMode(struct device *d, unsigned *now, unsigned *pending) {
    *now = *pending = d->mig;
    return OK;
}
API int nvmlDeviceGetComputeMode(struct device *d, unsigned *to) { *to = d->mode; return OK; }

struct process { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; };
API int nvmlDeviceGetComputeRunningProcesses_v3(struct device *d, unsigned *many, struct process *to) {
    struct control there;
    unsigned found = 0, room = *many;
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    while (proc && (entry = readdir(proc))) {
        int pid = atoi(entry->d_name);
        uint64_t at = pid > 0 ? control_of(pid) : 0;
        if (!at || read_control(pid, at, &there) || !there.initialised || !there.bytes[d->minor]) continue;
        if (found < room) to[found] = (struct process){(unsigned)pid, there.bytes[d->minor], ~0u, ~0u};
        found++;
    }
    if (proc) closedir(proc);
    *many = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}
API int nvmlDeviceGetMemoryInfo(struct device *d, unsigned long long to[3]) {
    struct process list[256];
    unsigned many = 256;
    to[0] = d->total, to[2] = 0;
    nvmlDeviceGetComputeRunningProcesses_v3(d, &many, list);
    for (unsigned i = 0; i < many && i < 256; i++) to[2] += list[i].bytes;
    to[1] = to[0] - to[2];
    return OK;
}
