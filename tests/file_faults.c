/* Preloaded into a process: counts what it does to files below some folders, and at one of these operations kills the
 * process or reports an error. Python, Rust (safetensors, tokenizers) and C++ (torch, Arrow) call libc alike, so all of
 * them are seen. tests/file_faults.py compiles and drives it.
 *
 * An operation is: opening a file for writing, each write, a change of length, rename, link, unlink, mkdir, rmdir,
 * fsync, chmod, a copy by the kernel, a shared map for writing. It is refused or the process dies before it happens; with
 * `half` a write happens for the first half of its bytes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { NAMES, BYTES, FLUSH }; /* of an operation: a disk that is full refuses NAMES that are new, and BYTES */

static const char *folders; /* separated by a colon; NULL = nothing is counted */
static long target;         /* the number of the operation, from 1; 0 = none */
static int error_number;    /* 0 = the process is killed */
static int half, stays;     /* stays: every later operation fails too, as on a full disk */
static int log_descriptor = -1;
static volatile long count;

void file_faults_arm(const char *names, long number, int error, int half_written, int permanent, int log) {
    folders = strdup(names);
    target = number, error_number = error, half = half_written, stays = permanent, log_descriptor = log;
    count = 0;
}

long file_faults_count(void) { return count; }

static int is_below(const char *path) {
    size_t length = strlen(path);
    for (const char *begin = folders; begin && *begin;) {
        const char *end = strchrnul(begin, ':');
        size_t size = (size_t)(end - begin);
        if (length >= size && !strncmp(path, begin, size) && (path[size] == '/' || !path[size])) return 1;
        begin = *end ? end + 1 : end;
    }
    return 0;
}

static int resolve(int folder, const char *path, char *full) {
    char base[PATH_MAX], link[64];
    if (path[0] == '/') return snprintf(full, PATH_MAX, "%s", path) > 0;
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size < 0) return 0;
        base[size] = 0;
    }
    return snprintf(full, PATH_MAX, *path ? "%s/%s" : "%s", base, path) > 0;
}

/* Return 0 = go on, 1 = refuse (errno is set), 2 = write half, then die. */
static int meet(const char *name, int folder, const char *path, enum kind kind) {
    char full[PATH_MAX];
    int before = errno;
    if (!folders || !resolve(folder, path, full) || !is_below(full)) {
        errno = before;
        return 0;
    }
    long number = __sync_add_and_fetch(&count, 1);
    if (log_descriptor >= 0) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%ld %s %s\n", number, name, full);
        syscall(SYS_write, log_descriptor, line, size);
    }
    errno = before;
    if (!target || number < target || (number > target && !stays)) return 0;
    if (!error_number) {
        if (half && kind == BYTES) return 2;
        kill(getpid(), SIGKILL);
    }
    if ((error_number == ENOSPC || error_number == EDQUOT) && kind == NAMES && !strncmp(name, "un", 2)) return 0;
    if (error_number == EACCES && kind != NAMES) return 0; /* an open file stays open */
    errno = error_number;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define TWO_PATHS(name, old_folder, old, new_folder, new)                                                              \
    int stops = meet(name, old_folder, old, NAMES);                                                                    \
    if (!stops && folders) {                                                                                           \
        char full[PATH_MAX];                                                                                           \
        if (!resolve(old_folder, old, full) || !is_below(full)) stops = meet(name, new_folder, new, NAMES);            \
    }                                                                                                                  \
    if (stops) return -1

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(more, mode_t) : 0;                                    \
        va_end(more);                                                                                                  \
        if (WRITES(flags) && meet("open", AT_FDCWD, path, NAMES)) return -1;                                           \
        return REAL(name)(path, flags, mode);                                                                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(more, mode_t) : 0;                                    \
        va_end(more);                                                                                                  \
        if (WRITES(flags) && meet("open", folder, path, NAMES)) return -1;                                             \
        return REAL(name)(folder, path, flags, mode);                                                                  \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode) {                                                                   \
        if (strpbrk(mode, "wa+") && meet("open", AT_FDCWD, path, NAMES)) return NULL;                                  \
        return REAL(name)(path, mode);                                                                                 \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void *bytes, size_t size) {
    int stops = meet("write", file, "", BYTES);
    if (stops == 1) return -1;
    if (stops == 2) {
        syscall(SYS_write, file, bytes, size / 2);
        kill(getpid(), SIGKILL);
    }
    return REAL(write)(file, bytes, size);
}

ssize_t writev(int file, const struct iovec *parts, int number) {
    int stops = meet("write", file, "", BYTES);
    if (stops == 1) return -1;
    if (stops == 2) {
        syscall(SYS_writev, file, parts, (number + 1) / 2);
        kill(getpid(), SIGKILL);
    }
    return REAL(writev)(file, parts, number);
}

#define PWRITE(name, offset_type)                                                                                      \
    ssize_t name(int file, const void *bytes, size_t size, offset_type offset) {                                       \
        int stops = meet("write", file, "", BYTES);                                                                    \
        if (stops == 1) return -1;                                                                                     \
        if (stops == 2) {                                                                                              \
            REAL(name)(file, bytes, size / 2, offset);                                                                 \
            kill(getpid(), SIGKILL);                                                                                   \
        }                                                                                                              \
        return REAL(name)(file, bytes, size, offset);                                                                  \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define SENDFILE(name, offset_type)                                                                                    \
    ssize_t name(int target_file, int source, offset_type *offset, size_t size) {                                      \
        int stops = meet("copy", target_file, "", BYTES);                                                              \
        if (stops == 1) return -1;                                                                                     \
        if (stops == 2) {                                                                                              \
            REAL(name)(target_file, source, offset, size / 2);                                                         \
            kill(getpid(), SIGKILL);                                                                                   \
        }                                                                                                              \
        return REAL(name)(target_file, source, offset, size);                                                          \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int source, off64_t *from, int target_file, off64_t *to, size_t size, unsigned flags) {
    int stops = meet("copy", target_file, "", BYTES);
    if (stops == 1) return -1;
    if (stops == 2) {
        REAL(copy_file_range)(source, from, target_file, to, size / 2, flags);
        kill(getpid(), SIGKILL);
    }
    return REAL(copy_file_range)(source, from, target_file, to, size, flags);
}

#define LENGTH(name, offset_type, first_type, folder, path)                                                            \
    int name(first_type first, offset_type size) {                                                                     \
        if (meet("truncate", folder, path, NAMES)) return -1;                                                          \
        return REAL(name)(first, size);                                                                                \
    }
LENGTH(ftruncate, off_t, int, first, "")
LENGTH(ftruncate64, off64_t, int, first, "")
LENGTH(truncate, off_t, const char *, AT_FDCWD, first)
LENGTH(truncate64, off64_t, const char *, AT_FDCWD, first)

#define ALLOCATE(name, offset_type)                                                                                    \
    int name(int file, offset_type offset, offset_type size) {                                                         \
        if (meet("allocate", file, "", NAMES)) return errno;                                                           \
        return REAL(name)(file, offset, size);                                                                         \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

int fsync(int file) { return meet("fsync", file, "", FLUSH) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return meet("fsync", file, "", FLUSH) ? -1 : REAL(fdatasync)(file); }

int rename(const char *old, const char *new) {
    TWO_PATHS("rename", AT_FDCWD, old, AT_FDCWD, new);
    return REAL(rename)(old, new);
}
int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    TWO_PATHS("rename", old_folder, old, new_folder, new);
    return REAL(renameat)(old_folder, old, new_folder, new);
}
int link(const char *old, const char *new) {
    TWO_PATHS("link", AT_FDCWD, old, AT_FDCWD, new);
    return REAL(link)(old, new);
}
int symlink(const char *old, const char *new) {
    if (meet("symlink", AT_FDCWD, new, NAMES)) return -1;
    return REAL(symlink)(old, new);
}
int unlink(const char *path) { return meet("unlink", AT_FDCWD, path, NAMES) ? -1 : REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) {
    return meet("unlink", folder, path, NAMES) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int remove(const char *path) { return meet("unlink", AT_FDCWD, path, NAMES) ? -1 : REAL(remove)(path); }
int rmdir(const char *path) { return meet("unlink-folder", AT_FDCWD, path, NAMES) ? -1 : REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) {
    return meet("mkdir", AT_FDCWD, path, NAMES) ? -1 : REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    return meet("mkdir", folder, path, NAMES) ? -1 : REAL(mkdirat)(folder, path, mode);
}
int chmod(const char *path, mode_t mode) { return meet("chmod", AT_FDCWD, path, NAMES) ? -1 : REAL(chmod)(path, mode); }
int fchmod(int file, mode_t mode) { return meet("chmod", file, "", NAMES) ? -1 : REAL(fchmod)(file, mode); }
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
    if (path && meet("utime", folder, path, NAMES)) return -1;
    return REAL(utimensat)(folder, path, times, flags);
}

#define MMAP(name, offset_type)                                                                                        \
    void *name(void *address, size_t size, int protection, int flags, int file, offset_type offset) {                  \
        if (file >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE) && meet("map", file, "", BYTES) == 1)       \
            return MAP_FAILED;                                                                                         \
        return REAL(name)(address, size, protection, flags, file, offset);                                             \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)
