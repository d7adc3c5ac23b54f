/* LD_PRELOAD shim: the Nth write-class call on a path that contains KP_PATH kills the process or fails.
 *   cc -shared -fPIC -O1 -o preload.so preload.c -ldl
 *   LD_PRELOAD=./preload.so KP_PATH=FOLDER KP_N=17 KP_MODE=kill python program.py
 * KP_MODE: kill; enospc, eio: the Nth call and every later one fails; enospc-once, eio-once: only the Nth.
 * KP_N=0 counts and never faults. KP_LOG names a file that gets one line per call: its name and its path.
 * The variables are read at each call, so a program may set them when it is ready, or in a forked child.
 * A kill leaves the page cache, so it shows the death of a process. For a loss of power KP_SHADOW names
 * a folder: each fsync copies its file there, and that of a folder takes away what was unlinked in it, so
 * it always holds what would be left if the disk kept nothing but what it was told to keep. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static long count;

static void note(const char *log, const char *name, const char *path) {
    char line[4300];
    int n = snprintf(line, sizeof line, "%s %s\n", name, path), fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) return;
    syscall(SYS_write, fd, line, (size_t)n);
    syscall(SYS_close, fd);
}

/* At once, or not at all: the process may end in another thread meanwhile. */
static void copy(int fd, const char *to) {
    char block[1 << 14], partial[4500];
    snprintf(partial, sizeof partial, "%s.partial", to);
    int out = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    off_t at = 0;
    ssize_t n;
    if (out < 0) return;
    while ((n = pread(fd, block, sizeof block, at)) > 0) at += syscall(SYS_write, out, block, (size_t)n);
    syscall(SYS_close, out);
    syscall(SYS_renameat2, AT_FDCWD, partial, AT_FDCWD, to, 0);
}

static void forget_unlinked(const char *folder, const char *shadow) {
    char there[4400], kept[4400];
    struct dirent *entry;
    DIR *listing = opendir(shadow);
    while (listing && (entry = readdir(listing))) {
        snprintf(there, sizeof there, "%s/%s", folder, entry->d_name);
        snprintf(kept, sizeof kept, "%s/%s", shadow, entry->d_name);
        if (entry->d_name[0] != '.' && access(there, F_OK)) syscall(SYS_unlinkat, AT_FDCWD, kept, 0);
    }
    if (listing) closedir(listing);
}

/* The copy reads through the descriptor it was given: closing another one would drop this process's POSIX locks. */
static int synced(int fd, int result) {
    const char *shadow = getenv("KP_SHADOW"), *want = getenv("KP_PATH");
    char link[64], path[4096], to[4400];
    struct stat what;
    if (result || !shadow || !want || fd < 3 || fstat(fd, &what)) return result;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return result;
    path[n] = 0;
    if (!strstr(path, want)) return result;
    snprintf(to, sizeof to, "%s/%s", shadow, strrchr(path, '/') + 1);
    if (S_ISDIR(what.st_mode)) forget_unlinked(path, shadow);
    else copy(fd, to);
    return result;
}

static int reached(const char *name, const char *path) {
    const char *nth = getenv("KP_N"), *want = getenv("KP_PATH"), *log = getenv("KP_LOG"), *mode = getenv("KP_MODE");
    if (!nth || !path || (want && !strstr(path, want))) return 0;
    long n = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST), at = atol(nth);
    if (log) note(log, name, path);
    if (at <= 0) return 0;
    return mode && !strstr(mode, "once") && strcmp(mode, "kill") ? n >= at : n == at;
}

static int reached_fd(const char *name, int fd) {
    char link[64], path[4096];
    if (fd < 3 || !getenv("KP_N")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return reached(name, path);
}

static int reached_at(const char *name, int folder, const char *entry) {
    char link[64], path[8500];
    if (folder == AT_FDCWD || entry[0] == '/') return reached(name, entry);
    if (!getenv("KP_N")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, path, 4096);
    if (n < 0) return 0;
    snprintf(path + n, sizeof path - (size_t)n, "/%s", entry);
    return reached(name, path);
}

static int fault(void) {
    const char *mode = getenv("KP_MODE");
    if (!mode || !strcmp(mode, "kill")) {
        kill(getpid(), SIGKILL);
        pause();
    }
    errno = !strncmp(mode, "eio", 3) ? EIO : ENOSPC;
    return -1;
}

#define WRAP(type, name, args, call, hit)                  \
    type name args {                                       \
        static type(*real) args;                           \
        if (!real) real = dlsym(RTLD_NEXT, #name);         \
        return (hit) ? (type)fault() : call;               \
    }
WRAP(ssize_t, write, (int fd, const void *b, size_t n), real(fd, b, n), reached_fd("write", fd))
WRAP(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), real(fd, b, n, o), reached_fd("write", fd))
WRAP(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), real(fd, b, n, o), reached_fd("write", fd))
WRAP(int, fsync, (int fd), synced(fd, real(fd)), reached_fd("fsync", fd))
WRAP(int, fdatasync, (int fd), synced(fd, real(fd)), reached_fd("fsync", fd))
WRAP(int, ftruncate, (int fd, off_t n), real(fd, n), reached_fd("truncate", fd))
WRAP(int, ftruncate64, (int fd, off64_t n), real(fd, n), reached_fd("truncate", fd))
WRAP(int, rename, (const char *a, const char *b), real(a, b), reached("rename", b))
WRAP(int, unlink, (const char *a), real(a), reached("unlink", a))
WRAP(int, renameat, (int x, const char *a, int y, const char *b), real(x, a, y, b), reached_at("rename", y, b))
WRAP(int, unlinkat, (int x, const char *a, int flags), real(x, a, flags), reached_at("unlink", x, a))
WRAP(int, mkdirat, (int x, const char *a, mode_t mode), real(x, a, mode), reached_at("mkdir", x, a))
WRAP(int, mkdir, (const char *a, mode_t mode), real(a, mode), reached("mkdir", a))
