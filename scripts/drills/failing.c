/* Calls of the C library that touch files below a directory: written down, or one of them refused.
 *
 *     cc -shared -fPIC -O1 -o failing.so failing.c -ldl        LD_PRELOAD=failing.so
 *
 * DRILL_ROOT   the directory; without it nothing happens
 * DRILL_TRACE  a file that a line goes to for each call: its name, a tab, the path
 * DRILL_CALL, DRILL_PATH, DRILL_ERRNO   refuse the first call of that name whose path fits the pattern (fnmatch, part by part);
 *              that it happened is a line in DRILL_FIRED
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int fired;                /* of this process */
static __thread int inside;      /* our own calls are passed on */

static void note(const char *variable, const char *call, const char *path) {
  const char *name = getenv(variable);
  if (!name) return;
  char line[PATH_MAX + 64];
  int size = snprintf(line, sizeof line, "%s\t%s\n", call, path);
  int file = open(name, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (file < 0) return;
  if (write(file, line, size) < 0) errno = 0;
  close(file);
}

/* Whether to refuse; sets errno. */
static int refuse(const char *call, const char *path) {
  const char *root = getenv("DRILL_ROOT");
  if (inside || !root || !path || strncmp(path, root, strlen(root))) return 0;
  const char *wanted = getenv("DRILL_CALL"), *pattern = getenv("DRILL_PATH"), *number = getenv("DRILL_ERRNO");
  int before = errno, is_it = 0;
  inside = 1;
  note("DRILL_TRACE", call, path);
  if (wanted && pattern && !strcmp(call, wanted) && !fnmatch(pattern, path, FNM_PATHNAME))
    is_it = !__atomic_exchange_n(&fired, 1, __ATOMIC_SEQ_CST);
  if (is_it) note("DRILL_FIRED", call, path);
  inside = 0;
  errno = is_it ? (number ? atoi(number) : EIO) : before;
  return is_it;
}

static int refuse_file(const char *call, int file) {
  if (inside || !getenv("DRILL_ROOT")) return 0;
  char link[64], path[PATH_MAX];
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  errno = before;
  if (size <= 0) return 0;
  path[size] = 0;
  return refuse(call, path);
}

static int refuse_at(const char *call, int folder, const char *name) {
  if (inside || !getenv("DRILL_ROOT") || !name) return 0;
  if (*name == '/' || folder == AT_FDCWD) return refuse(call, name);
  char link[64], path[2 * PATH_MAX];
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
  ssize_t size = readlink(link, path, PATH_MAX - 1);
  errno = before;
  if (size <= 0) return 0;
  snprintf(path + size, sizeof path - size, "/%s", name);
  return refuse(call, path);
}

#define NEXT(name) \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static const char *kind(int flags) { return (flags & O_ACCMODE) == O_RDONLY ? "open" : "open to write"; }

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    NEXT(name); \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    return refuse(kind(flags), path) ? -1 : next(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    NEXT(name); \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    return refuse_at(kind(flags), folder, path) ? -1 : next(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int file, void *data, size_t size) {
  NEXT(read);
  return refuse_file("read", file) ? -1 : next(file, data, size);
}
#define PREAD(name, offset) \
  ssize_t name(int file, void *data, size_t size, offset at) { \
    NEXT(name); \
    return refuse_file("read", file) ? -1 : next(file, data, size, at); \
  }
PREAD(pread, off_t)
PREAD(pread64, off64_t)
ssize_t write(int file, const void *data, size_t size) {
  NEXT(write);
  return refuse_file("write", file) ? -1 : next(file, data, size);
}
#define PWRITE(name, offset) \
  ssize_t name(int file, const void *data, size_t size, offset at) { \
    NEXT(name); \
    return refuse_file("write", file) ? -1 : next(file, data, size, at); \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
ssize_t writev(int file, const struct iovec *parts, int count) {
  NEXT(writev);
  return refuse_file("write", file) ? -1 : next(file, parts, count);
}

#define OF_FILE(name) \
  int name(int file) { \
    NEXT(name); \
    return refuse_file("fsync", file) ? -1 : next(file); \
  }
OF_FILE(fsync)
OF_FILE(fdatasync)
#define TRUNCATE(name, offset) \
  int name(int file, offset size) { \
    NEXT(name); \
    return refuse_file("truncate", file) ? -1 : next(file, size); \
  }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

int rename(const char *from, const char *to) {
  NEXT(rename);
  return refuse("rename", to) ? -1 : next(from, to);
}
int renameat(int folder, const char *from, int other, const char *to) {
  NEXT(renameat);
  return refuse_at("rename", other, to) ? -1 : next(folder, from, other, to);
}
int renameat2(int folder, const char *from, int other, const char *to, unsigned flags) {
  NEXT(renameat2);
  return refuse_at("rename", other, to) ? -1 : next(folder, from, other, to, flags);
}
int unlink(const char *path) {
  NEXT(unlink);
  return refuse("remove", path) ? -1 : next(path);
}
int unlinkat(int folder, const char *path, int flags) {
  NEXT(unlinkat);
  return refuse_at("remove", folder, path) ? -1 : next(folder, path, flags);
}
int rmdir(const char *path) {
  NEXT(rmdir);
  return refuse("remove", path) ? -1 : next(path);
}
int mkdir(const char *path, mode_t mode) {
  NEXT(mkdir);
  return refuse("make directory", path) ? -1 : next(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
  NEXT(mkdirat);
  return refuse_at("make directory", folder, path) ? -1 : next(folder, path, mode);
}
