"""Add versions to a model's directory, and delete old ones, so that a server which watches it sees whole versions only.

    with new_version("model_repository/mnist_model") as version:
        write("model.savedmodel")  # A relative path.
    print(f"{version} is there")

A version appears by one rename when all of it was written, and disappears by one before its files are deleted:
whatever stops this process, a version is whole or absent.
"""

import fcntl
import os
import platform
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from saved_model import versions

UNFINISHED = ".publishing-"  # Triton takes no such name for a version.
ROOM = 10_000_000  # Bytes that shall be free; a version of mnist_model takes half a million, and more while it is made.


@contextmanager
def new_version(model_directory):
    """Give the path that the next version will have, while the working directory is an empty one in its place.

    When the block ends, what it wrote is that version; when it raises, nothing is left of it. TensorFlow needs the
    relative paths, for it takes brackets in a path for a pattern.
    """
    model_directory = Path(model_directory).absolute()
    model_directory.mkdir(parents=True, exist_ok=True)
    with _folder_beside_versions(model_directory) as folder:
        taken = [int(name) for name in os.listdir(model_directory) if name.isdecimal()]
        destination = model_directory / str(max(taken, default=0) + 1)
        version, before = folder / "version", (os.getcwd(), tempfile.tempdir)
        version.mkdir()
        os.chdir(version)
        tempfile.tempdir = str(folder)  # TensorFlow's converter leaves files there until its process ends.
        try:
            yield destination
        finally:
            os.chdir(before[0])
            tempfile.tempdir = before[1]
        version.rename(destination)


def delete_old_versions(model_directory, keep):
    """Delete all versions but the newest `keep`."""
    model_directory = Path(model_directory).absolute()
    with _folder_beside_versions(model_directory) as folder:
        for number in versions(model_directory)[:-keep]:
            (model_directory / str(number)).rename(folder / str(number))


@contextmanager
def _folder_beside_versions(model_directory):
    """Give an empty folder on the same file system as the versions; other processes wait until it has been deleted."""
    lock = os.open(model_directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # However this process ends, that ends the lock.
        _delete(model_directory)  # Who holds the lock knows that what others left is not in use.
        with tempfile.TemporaryDirectory(prefix=UNFINISHED + _this_process(), dir=model_directory) as folder:
            yield Path(folder)
    finally:
        os.close(lock)


def _this_process():
    return f"{platform.node()}-{os.getpid()}-"  # In every container that has no other number, a process is number 1.


def _delete(model_directory, whose=""):
    for leaving in model_directory.glob(f"{UNFINISHED}{whose}*"):
        shutil.rmtree(leaving, ignore_errors=True)


def check_writable(directory):
    """Raise OSError unless `directory` can be written to, or made, and has room; it makes none."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise OSError(f"{existing} is not a folder that can be written to")
    if shutil.disk_usage(existing).free < ROOM:
        raise OSError(f"there is no space left in {existing}")


def stop_cleanly(model_directory):
    """Have Ctrl-C, `kill` and a closed terminal end this process at once, leaving nothing unpublished; status 130."""
    model_directory, script = Path(model_directory).absolute(), Path(sys.argv[0]).name

    def stop(*_):
        with suppress(OSError, RuntimeError):  # Whoever reads it may have been stopped as well.
            sys.stdout.flush()
            os.write(sys.stderr.fileno(), f"{script}: stopped\n".encode())
        _delete(model_directory, _this_process())
        # Not by an exception, which foreign code may swallow. Nor by way of Python's end: there TensorFlow waits for
        # the epoch to be over, seconds or longer.
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # As nohup wants it.
            signal.signal(number, stop)
    signal.signal(signal.SIGPIPE, stop)  # Nobody reads the output any more, as of `train.py | head`.
