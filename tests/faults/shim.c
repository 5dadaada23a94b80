/* LD_PRELOAD: makes one chosen change of files below a folder fail, or ends the process there.
 *
 *   FAULT_BELOW  folder; only changes of files and directories below it count
 *   FAULT_AT     number of the change, from 1; 0: none, only count
 *   FAULT_DO     kill: SIGKILL just before it; stop: SIGSTOP just before it; torn: a write does half its bytes, then
 *                SIGKILL; else a number: that errno, once; with a + behind it: that and every later change
 *   FAULT_COUNT  file that gets the number of changes so far, as text
 *   FAULT_CLOCK  seconds by which the wall clock jumps at FAULT_AT
 *
 * Changes are: opening to write, write, fsync, rename, link, unlink, mkdir, rmdir, truncate. Variables are looked up at
 * every change, so that a child of a process that runs already can set its own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long changes;
static atomic_int jumped;

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static int below(int directory, const char *path) {
  const char *folder = getenv("FAULT_BELOW");
  char whole[2 * PATH_MAX], link[64];
  if (!folder) return 0;
  if (path && path[0] == '/') return !strncmp(path, folder, strlen(folder));
  snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
  long length = syscall(SYS_readlink, link, whole, PATH_MAX);
  if (length < 0) return 0;
  snprintf(whole + length, PATH_MAX, "%s%s", path ? "/" : "", path ? path : "");
  return !strncmp(whole, folder, strlen(folder));
}

static void tell(long number) {
  const char *path = getenv("FAULT_COUNT");
  char text[32];
  if (!path) return;
  long fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  syscall(SYS_pwrite64, fd, text, snprintf(text, sizeof text, "%20ld", number), 0L);
  syscall(SYS_close, fd);
}

/* 0: go on; -1: fail with errno set; 1: do half, then die. */
static int happens(int counts, int can_tear) {
  if (!counts) return 0;
  const char *at = getenv("FAULT_AT"), *what = getenv("FAULT_DO");
  long number = atomic_fetch_add(&changes, 1) + 1, wanted = at ? atol(at) : 0;
  tell(number);
  if (!wanted || number < wanted) return 0;
  if (getenv("FAULT_CLOCK")) jumped = 1;
  if (!what) return 0;
  if (number == wanted) {
    if (!strcmp(what, "kill") || (!strcmp(what, "torn") && !can_tear)) kill(getpid(), SIGKILL);
    if (!strcmp(what, "torn")) return 1;
    if (!strcmp(what, "stop")) kill(getpid(), SIGSTOP);
  }
  if (what[0] < '0' || what[0] > '9' || (number > wanted && !strchr(what, '+'))) return 0;
  errno = atoi(what);
  return -1;
}

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY)
#define OPEN(name, parameters, directory, arguments)                 \
  int name parameters {                                              \
    va_list rest;                                                    \
    va_start(rest, flags);                                           \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                    \
    if (happens(WRITES(flags) && below(directory, path), 0)) return -1; \
    return REAL(name) arguments;                                     \
  }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), at, (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), at, (at, path, flags, mode))

ssize_t write(int fd, const void *data, size_t size) {
  int fault = happens(below(fd, NULL), 1);
  if (fault < 0) return -1;
  if (fault) REAL(write)(fd, data, size / 2), kill(getpid(), SIGKILL);
  return REAL(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t where) {
  return happens(below(fd, NULL), 0) ? -1 : REAL(pwrite)(fd, data, size, where);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t where) {
  return happens(below(fd, NULL), 0) ? -1 : REAL(pwrite64)(fd, data, size, where);
}
ssize_t writev(int fd, const struct iovec *data, int count) {
  return happens(below(fd, NULL), 0) ? -1 : REAL(writev)(fd, data, count);
}

#define SIMPLE(name, parameters, directory, path, arguments) \
  int name parameters { return happens(below(directory, path), 0) ? -1 : REAL(name) arguments; }
SIMPLE(fsync, (int fd), fd, NULL, (fd))
SIMPLE(fdatasync, (int fd), fd, NULL, (fd))
SIMPLE(ftruncate, (int fd, off_t size), fd, NULL, (fd, size))
SIMPLE(ftruncate64, (int fd, off64_t size), fd, NULL, (fd, size))
SIMPLE(rename, (const char *old, const char *new), AT_FDCWD, new, (old, new))
SIMPLE(renameat, (int from, const char *old, int to, const char *new), to, new, (from, old, to, new))
SIMPLE(link, (const char *old, const char *new), AT_FDCWD, new, (old, new))
SIMPLE(unlink, (const char *path), AT_FDCWD, path, (path))
SIMPLE(unlinkat, (int at, const char *path, int flags), at, path, (at, path, flags))
SIMPLE(mkdir, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))
SIMPLE(rmdir, (const char *path), AT_FDCWD, path, (path))

static long jump(void) { return jumped ? atol(getenv("FAULT_CLOCK") ? getenv("FAULT_CLOCK") : "0") : 0; }
int clock_gettime(clockid_t clock, struct timespec *now) {
  int code = (int)syscall(SYS_clock_gettime, clock, now);
  if (!code && clock == CLOCK_REALTIME) now->tv_sec += jump();
  return code;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
