"""A disk that is full at some byte, and folders that cannot be written to."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.campaign.faults import FaultClass
from tests.campaign.oracle import Kind, Problem, Truth, judge_answer, judge_folder, rerun
from tests.campaign.process import Answer, Place
from tests.campaign.trials import BASIC, Lab, Skipped, Trial, single

BYTES = 14
"""Random sizes of the disk, for each way of filling it."""

NOBODY = 65534

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* Bytes that are left, shared by all processes through a file. */
static long *left;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("DISK_LEFT");
    int fd = name ? open(name, O_RDWR) : -1;
    if (fd < 0) return;
    void *found = mmap(0, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED) left = found;
    close(fd);
}

static int is_there(int fd) {
    char link[64], path[4096];
    struct stat found;
    const char *under = getenv("DISK_UNDER");
    if (!left || !under || fstat(fd, &found) || !S_ISREG(found.st_mode)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return !strncmp(path, under, strlen(under));
}

/* How many of n bytes may still be written; -1 if none. */
static ssize_t take(int fd, size_t n) {
    if (!n || !is_there(fd)) return n;
    long before = __atomic_fetch_sub(left, (long)n, __ATOMIC_SEQ_CST);
    if (before >= (long)n) return n;
    if (before > 0) return before;
    errno = ENOSPC;
    return -1;
}

#define WRITER(type, name, declared, given, size)                     \
    type name declared {                                              \
        static type (*real) declared;                                 \
        if (!real) real = dlsym(RTLD_NEXT, #name);                    \
        ssize_t n = take(fd, size);                                   \
        if (n < 0) return -1;                                         \
        return real given;                                            \
    }

WRITER(ssize_t, write, (int fd, const void *from, size_t size), (fd, from, n), size)
WRITER(ssize_t, pwrite, (int fd, const void *from, size_t size, off_t at), (fd, from, n, at), size)
WRITER(ssize_t, pwrite64, (int fd, const void *from, size_t size, off64_t at), (fd, from, n, at),
       size)
WRITER(ssize_t, writev, (int fd, const struct iovec *from, int n_parts),
       (fd, from, n > 0 ? n_parts : 0), n_parts ? from[0].iov_len : 0)
"""

Mount = Callable[[str], list[str]]


def trials(lab: Lab) -> Iterator[Trial]:
    """Yield trials of full disks of three kinds, and of folders that cannot be written to."""
    chance = lab.random("disk")
    for name, run, most in (
        ("no file above", _limited, 20),
        ("write fails after", _shimmed, 21),
        ("disk of", _small_disk, 21),
    ):
        for _ in lab.times(BYTES):
            n_bytes = round(2 ** chance.uniform(8, most))
            yield single(f"{name} {n_bytes} bytes", partial(run, lab, n_bytes))
    for kind in ("mounted read-only", "owned by another user"):
        for name, command, codes in (
            ("run on a new folder", "run", {2}),
            ("run on a finished folder", "again", {0, 2}),
            ("leaderboard", "leaderboard", {0}),
            ("gc", "gc", {2}),
            ("rm", "rm", {2}),
        ):
            yield single(f"{name}, {kind}", partial(_read_only, lab, kind, command, codes))


def _judge(place: Place, truth: Truth, answer: Answer) -> list[Problem]:
    """Judge a run without room, and another with room."""
    problems = [*judge_answer(answer, {0, 1, 2})]
    if answer.code == 0 and "warning" not in answer.err:
        problems += judge_folder(place.results, truth)
    return problems + rerun(place, truth)[0]


def _limited(lab: Lab, n_bytes: int, place: Place) -> list[Problem]:
    """Let no file grow above a size: writing fails as on a full disk, with another error."""
    truth = lab.truth(BASIC)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes,) * 2)

    return _judge(place, truth, place.imlbench(*truth.arguments, before=limit))


def _shimmed(lab: Lab, n_bytes: int, place: Place) -> list[Problem]:
    """Let all processes together write so many bytes into the results folder."""
    truth = lab.truth(BASIC)
    shim, left = _compiled(lab), place.folder / "left"
    left.write_bytes((n_bytes).to_bytes(8, sys.byteorder, signed=True))
    environment = {
        "LD_PRELOAD": str(shim),
        "DISK_LEFT": str(left),
        "DISK_UNDER": str(place.results.resolve()),
    }
    return _judge(place, truth, place.imlbench(*truth.arguments, environment=environment))


def _compiled(lab: Lab) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Skipped("no C compiler")
    library = lab.folder / "shim.so"
    if not library.exists():
        made = lab.folder / f"shim-{os.urandom(4).hex()}"
        source = made.with_suffix(".c")
        source.write_text(SHIM)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(source), "-ldl"],
            check=True,
            capture_output=True,
        )
        made.replace(library)
    return library


@contextlib.contextmanager
def _namespace(place: Place) -> Iterator[Callable[..., None]]:
    """Run the place's commands where mounts are seen by nobody else; yields how to mount.

    Raises:
        Skipped: That is not permitted.
    """
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        raise Skipped("no unshare and nsenter")
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert holder.stdout is not None
    enter = ("nsenter", "--target", str(holder.pid), "--mount")
    # What is mounted below the current folder is seen only by who goes there from inside.
    inside = (*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(place.work))
    try:
        if holder.stdout.readline() != b"ready\n":
            raise Skipped("no mount namespace of one's own is permitted")
        place.prefix = inside
        yield partial(_mount, inside)
    finally:
        place.prefix = ()
        holder.communicate()


def _mount(inside: tuple[str, ...], *arguments: str) -> None:
    made = subprocess.run([*inside, "mount", *arguments], capture_output=True, text=True)
    if made.returncode:
        raise Skipped(f"mount is not permitted: {made.stderr.strip()}")


def _small_disk(lab: Lab, n_bytes: int, place: Place) -> list[Problem]:
    """Run on a disk of its own, in memory; then give it more room."""
    truth = lab.truth(BASIC)
    place.results.mkdir()
    with _namespace(place) as mount:
        mount("-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(place.results))
        answer = place.imlbench(*truth.arguments)
        mount("-o", "remount,size=1g", str(place.results))
        return _judge(_Inside(place), truth, answer)


class _Inside(Place):
    """A place in a mount namespace; what is looked at from outside is a copy of the results."""

    def __init__(self, place: Place) -> None:
        self.__dict__.update(place.__dict__)
        self._n_copies = 0

    @property
    def results(self) -> Path:
        self._n_copies += 1
        copy = self.folder / f"copy-{self._n_copies}"
        subprocess.run([*self.prefix, "cp", "-a", str(self.work / "results"), copy], check=True)
        return copy


def _read_only(lab: Lab, kind: str, command: str, codes: set[int], place: Place) -> list[Problem]:
    truth = lab.truth(BASIC)
    if command == "run":
        place.results.mkdir()
    else:
        lab.copy(truth, place)
    job = next(iter(truth.jobs))
    arguments = {
        "run": truth.arguments,
        "again": truth.arguments,
        "leaderboard": ("leaderboard",),
        "gc": ("gc",),
        "rm": ("rm", job, "--yes"),
    }[command]
    if kind == "mounted read-only":
        with _namespace(place) as mount:
            mount("--bind", str(place.results), str(place.results))
            mount("-o", "remount,bind,ro", str(place.results))
            answer = place.imlbench(*arguments)
    else:
        answer = _as_nobody(place, arguments)
    problems = [*judge_answer(answer, codes)]
    if command == "leaderboard" and "kde" not in answer.out:
        problems.append(Problem(Kind.HIDDEN, f"leaderboard prints no table: {answer.err[:200]}"))
    if answer.code == 2 and "error:" not in answer.err.lower():
        problems.append(Problem(Kind.HIDDEN, f"no message: {answer.err[:200]}"))
    return problems + rerun(place, truth)[0]


def _as_nobody(place: Place, arguments: tuple[str, ...]) -> Answer:
    """Run a command as somebody who may read the results folder, but not write."""
    if os.geteuid() != 0:
        raise Skipped("needs root, to become somebody else")
    for path in (place.folder, place.folder.parent):
        path.chmod(0o755)
    for path in (place.cache, place.folder / "tmp"):
        path.chmod(0o777)
    options: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    environment = {"HOME": str(place.folder / "tmp"), "MPLCONFIGDIR": str(place.folder / "tmp")}
    try:
        can_read = place.start("plugins", environment=environment, **options).wait().code == 0
    except PermissionError:
        can_read = False
    if not can_read:
        raise Skipped("Python, or imlbench, cannot be read by other users")
    return place.start(*arguments, environment=environment, **options).wait()


CLASS = FaultClass(
    "disk",
    "The disk is full at a random byte of a run of four jobs: by a limit on the size of files, by "
    "a library that lets write() fail, and on a small file system of its own. And results folders "
    "that are mounted read-only, or belong to another user.",
    "a message and an honest exit status; once there is room again, the same command brings all "
    "jobs to the scores of an undisturbed run. Finished results can be read where nothing can be "
    "written.",
    trials,
)
