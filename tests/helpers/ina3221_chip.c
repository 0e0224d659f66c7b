/* Makes a program read the hwmon files of an emulated INA3221 as those of the real chip under Linux's driver.

   Preloaded (LD_PRELOAD), it takes the place of libc's read() for in<N>_input and curr<N>_input in folders that hold
   a file .chip (board.py writes it); all other reads go on as they are. As in drivers/hwmon/ina3221.c:

   - One reader at a time; the driver's lock is held while it waits.
   - A read needs a conversion that nobody has seen yet. The chip converts without pause, shunt 1, bus 1, shunt 2 ...,
     a sixth of the cycle each. The driver looks at the flag, which clears it, and sleeps a quarter to a whole cycle
     before it looks again.
   - A conversion is the mean over its sixth of the cycle, plus the offset, in whole steps of 40 uV or 8 mV.

   .chip: cycle in s, offset in V, shunt in ohm, 1 if every read is to wait for a whole cycle, n if every n-th read is
   to fail with ETIMEDOUT; then what this file keeps: the last cycle seen, the number of reads. All are doubles.
   .truth: rows of doubles, moment on CLOCK_MONOTONIC, watts of three channels from then on, volts. Without it the text
   of the file is the value. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct chip { double cycle, offset, shunt, always, fails, seen, reads; };
struct row { double from, watts[3], volts; };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void sleep_until(double moment) {
    struct timespec t = {(time_t)moment, (long)((moment - floor(moment)) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) { }
}

/* Wait as the driver does; 0, or an error number. */
static int wait_for_conversion(struct chip *chip) {
    double began = now();
    unsigned seed = (unsigned)(began * 1e9);
    if (chip->always) sleep_until(began + chip->cycle);
    else {
        while (floor(now() / chip->cycle) <= chip->seen) {
            if (now() > began + 2 * chip->cycle) return ETIMEDOUT;
            sleep_until(now() + chip->cycle * (0.25 + 0.75 * rand_r(&seed) / RAND_MAX));
        }
    }
    chip->seen = floor(now() / chip->cycle);
    chip->reads += 1;
    return chip->fails && fmod(chip->reads, chip->fails) == 0 ? ETIMEDOUT : 0;
}

/* The mean of a channel's watts (or volts) from a moment on, for as long as a conversion takes. */
static double mean(const struct row *rows, long count, int channel, int volts, double start, double length) {
    long first = 0, last = count - 1;
    while (first < last) { /* the last row that begins at or before the start */
        long middle = (first + last + 1) / 2;
        if (rows[middle].from <= start) first = middle;
        else last = middle - 1;
    }
    double sum = 0, stop = start + length;
    for (long n = first; n < count && (n == first || rows[n].from < stop); n++) {
        double from = n == first ? start : rows[n].from, to = n + 1 < count && rows[n + 1].from < stop ? rows[n + 1].from : stop;
        sum += (volts ? rows[n].volts : rows[n].watts[channel] / rows[n].volts) * (to - from);
    }
    return sum / length;
}

/* The value of a register, mV or mA, by the truth; 0 if there is none. */
static int convert(const char *folder, const struct chip *chip, int channel, int volts, long *value) {
    char path[4200];
    snprintf(path, sizeof path, "%s/.truth", folder);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0) return 0;
    fstat(file, &status);
    struct row *rows = malloc(status.st_size);
    long count = syscall(SYS_read, file, rows, status.st_size) / (long)sizeof *rows;
    close(file);
    double length = chip->cycle / 6, begin = floor(now() / chip->cycle) * chip->cycle + (2 * channel + volts) * length;
    if (begin + length > now()) begin -= chip->cycle;
    double seen = mean(rows, count, channel, volts, begin, length);
    free(rows);
    if (volts) *value = lround(seen / 8e-3) * 8;
    else *value = lround(lround((seen * chip->shunt + chip->offset) / 40e-6) * 40e-6 / chip->shunt * 1e3);
    return 1;
}

ssize_t read(int file, void *buffer, size_t size) {
    char link[40], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int before = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length > 0) {
        path[length] = 0;
        char *name = strrchr(path, '/');
        int channel = 0, end = 0, volts = name && sscanf(name, "/in%d_input%n", &channel, &end) == 1 && end && !name[end];
        int amperes = !volts && name && sscanf(name, "/curr%d_input%n", &channel, &end) == 1 && end && !name[end];
        if ((volts || amperes) && channel >= 1 && channel <= 3 && lseek(file, 0, SEEK_CUR) == 0) {
            struct chip chip;
            char state[4200], text[32];
            long value;
            *name = 0;
            snprintf(state, sizeof state, "%s/.chip", path);
            int held = open(state, O_RDWR | O_CLOEXEC);
            if (held >= 0) {
                flock(held, LOCK_EX);
                int failed = pread(held, &chip, sizeof chip, 0) == sizeof chip ? wait_for_conversion(&chip) : EIO;
                int known = !failed && convert(path, &chip, channel - 1, volts, &value);
                pwrite(held, &chip, sizeof chip, 0);
                close(held);
                if (failed) { errno = failed; return -1; }
                if (known) {
                    int written = snprintf(text, sizeof text, "%ld\n", value);
                    lseek(file, 0, SEEK_END); /* the next read finds nothing more */
                    memcpy(buffer, text, (size_t)written < size ? (size_t)written : size);
                    return (size_t)written < size ? written : (ssize_t)size;
                }
            }
            errno = before;
        }
    }
    return syscall(SYS_read, file, buffer, size);
}
