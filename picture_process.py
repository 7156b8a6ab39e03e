"""Read uploaded pictures in a process of its own, which alone ends when one takes too long.

    from picture_process import read_picture

    pixels = read_picture(upload)  # What preprocess(open_image(upload)) returns.

picture_file.py refuses what is known to be dear before it is decoded. This is for what nobody has thought of: the
kernel counts the time, and stops a decoder wherever it is.
"""

import atexit
import functools
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from mnist_preprocess import ImageError, open_image, preprocess

SECONDS = 2  # Of processor time. What picture_file.py lets pass takes 0.7 at most where its limits were measured.
# What glibc keeps of the memory that one picture took, for the next: a photo takes 5 to 10 % longer without.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(64 * 2**20), "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20)}
PNG = b"\x89PNG\r\n\x1a\n"
SMALL = 16384  # Bytes of a PNG that needs no other process: Deflate makes a thousand times as many of them at most.


def read_picture(file):
    """Return (28, 28, 1) float32 as preprocess() does, of a picture that is open. One thread may call it at a time.

    Raises ImageError when it cannot be read within SECONDS.
    """
    is_png, size = file.read(len(PNG)) == PNG, file.seek(0, io.SEEK_END)
    file.seek(0)
    if is_png and size <= SMALL:
        return preprocess(open_image(file))
    if reader().poll() is not None:  # The last picture has ended it, or somebody else.
        reader().communicate()
        reader.cache_clear()
    try:
        pickle.dump(size, reader().stdin)
        shutil.copyfileobj(file, reader().stdin)
        reader().stdin.flush()
        answer = pickle.load(reader().stdout)
    except (EOFError, BrokenPipeError) as error:
        reader().communicate()
        if reader().returncode > 0:
            raise RuntimeError("the process that reads pictures failed, as it says above") from error
        raise ImageError(f"the picture takes more than {SECONDS} seconds to decode, or breaks the decoder") from error
    if isinstance(answer, ImageError):
        raise answer
    return answer


@functools.cache
def reader():
    """Return the process that reads, started when it is first needed; it ends with this one."""
    command = [sys.executable, __file__, str(SECONDS)]
    process = subprocess.Popen(command, env=os.environ | KEEP_MEMORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(process.communicate)  # Which closes its input.
    return process


def main(seconds):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Nobody waits for the answer any more.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # Where memory runs out, this process is the one to end.
    with suppress(EOFError):
        while True:
            size = pickle.load(sys.stdin.buffer)
            file = io.BytesIO(sys.stdin.buffer.read(size))
            signal.setitimer(signal.ITIMER_PROF, seconds)  # Its signal ends the process.
            try:
                answer = preprocess(open_image(file))
            except ImageError as error:
                answer = error
            signal.setitimer(signal.ITIMER_PROF, 0)
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
