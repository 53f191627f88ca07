"""Disks and file systems that refuse or fail."""

import errno
import os


def no_direct(monkeypatch):
    """A file system without O_DIRECT."""
    real = os.open

    def refuse(path, flags, *more, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)


def failing(number):
    """A call that fails with an errno, whatever it is given."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def after(count, real, fault):
    """Works so many times, then fails."""
    left = [count]

    def call(*arguments):
        left[0] -= 1
        return real(*arguments) if left[0] >= 0 else fault(*arguments)

    return call


def short_writes(monkeypatch, most):
    """Writes of `most` bytes at a time; O_DIRECT takes whole sectors at sectors, and nothing else."""
    import fcntl

    real = os.pwrite

    def short(file, data, at):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT and (len(data) | at) % 512:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, data[: max(most // 512 * 512, 512)], at)

    monkeypatch.setattr(os, "pwrite", short)
