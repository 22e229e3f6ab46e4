/* How another process's control block is found. Included by both libraries: each must find the one
 * of libcuda.so.1, whose place in the file the symbol table tells. */
#ifndef QT_STANDIN_PROCESS_H
#define QT_STANDIN_PROCESS_H
#define _GNU_SOURCE
#include "control.h"
#include <elf.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* The value of qt_standin_control in a library file, 0 when it is no stand-in. */
static uint64_t symbol_in(const char *path) {
    uint64_t found = 0;
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    if (fstat(fd, &st) || st.st_size < (off_t)sizeof(Elf64_Ehdr)) { close(fd); return 0; }
    char *at = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (at == MAP_FAILED) return 0;
    Elf64_Ehdr *head = (Elf64_Ehdr *)at;
    Elf64_Shdr *sections = (Elf64_Shdr *)(at + head->e_shoff);
    for (int i = 0; i < head->e_shnum && !found; i++) {
        if (sections[i].sh_type != SHT_DYNSYM) continue;
        Elf64_Sym *symbols = (Elf64_Sym *)(at + sections[i].sh_offset);
        char *names = at + sections[sections[i].sh_link].sh_offset;
        for (uint64_t s = 0; s < sections[i].sh_size / sizeof(Elf64_Sym); s++)
            if (!strcmp(names + symbols[s].st_name, "qt_standin_control")) found = symbols[s].st_value;
    }
    munmap(at, (size_t)st.st_size);
    return found;
}

uint64_t control_of(int pid) {
    char path[64], line[4400], name[4200];
    uint64_t found = 0;
    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    FILE *maps = fopen(path, "re");
    if (!maps) return 0;
    while (fgets(line, sizeof line, maps)) {
        unsigned long start, offset, end;
        if (!strstr(line, "libcuda.so") ||
            sscanf(line, "%lx-%lx %*s %lx %*s %*s %4199[^\n]", &start, &end, &offset, name) != 4 || offset)
            continue;
        snprintf(path, sizeof path, "/proc/%d/map_files/%lx-%lx", pid, start, end);
        uint64_t symbol = symbol_in(path);
        if (symbol) found = start + symbol;
        break;
    }
    fclose(maps);
    return found;
}

int read_control(int pid, uint64_t at, struct control *into) {
    struct iovec here = {into, sizeof *into}, there = {(void *)at, sizeof *into};
    return process_vm_readv(pid, &here, 1, &there, 1, 0) == (ssize_t)sizeof *into &&
           !memcmp(into->magic, MAGIC, 8) ? 0 : -1;
}

int write_there(int pid, uint64_t at, const void *from, uint64_t size) {
    struct iovec here = {(void *)from, size}, there = {(void *)at, size};
    return process_vm_writev(pid, &here, 1, &there, 1, 0) == (ssize_t)size ? 0 : -1;
}
#endif
