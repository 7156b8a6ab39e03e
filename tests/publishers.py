"""Publish from several processes at once, or from processes that are killed: python tests/publishers.py HOW DIRECTORY

`together` publishes from two at once. `killed SEED COUNT` publishes from one after the other, until COUNT of them were
killed at random moments of it, and prints after how many seconds each was. `stopped SEED COUNT` does the same with the
signals that train.py takes, and fails when one leaves something unpublished behind. `full` publishes on a file system
with less and more room left, until two versions had enough, and prints what was said each time.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import train
from mnist_preprocess import CLASSES, IMAGE_SHAPE, INPUT_NAME
from publishing import UNFINISHED, stop_cleanly
from saved_model import ModelError, versions

KILLS = {"killed": [signal.SIGKILL], "stopped": [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]}


def small_model():
    """Return a model that is made in no time, always the same one: of some random ones LiteRT answers differently."""
    weights = keras.initializers.RandomNormal(stddev=1e-3, seed=0)
    layers = [keras.layers.Flatten(), keras.layers.Dense(CLASSES, activation="softmax", kernel_initializer=weights)]
    return keras.Sequential([keras.Input(IMAGE_SHAPE, name=INPUT_NAME), *layers])


def start_publisher(directory):
    """Fork a process that publishes a small model; returns its pid when it has begun to publish."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        return pid
    # TensorFlow starts its threads in this process, with the first model, and not in the one that forks.
    status = 1
    try:
        pictures = np.zeros((1, *IMAGE_SHAPE), np.uint8)
        model = small_model()
        stop_cleanly(directory)
        os.close(writer)
        train.publish(model, directory, pictures)
        status = 0
    finally:
        os._exit(status)


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(directory, how, seed, count):
    pid, start = start_publisher(directory), time.monotonic()
    if status(pid):
        sys.exit("publishing failed")
    duration = time.monotonic() - start
    random.seed(seed)
    while count:
        pid, seconds = start_publisher(directory), random.uniform(0, duration)
        number = random.choice(KILLS[how])
        time.sleep(seconds)
        os.kill(pid, number)
        ended = status(pid)
        if ended == (-number if how == "killed" else 130):
            print(f"{seconds:.3f}", flush=True)  # Else the next process has the line to print as well.
            count -= 1
        elif ended:
            sys.exit(f"publishing failed: {ended}")
        left = [*directory.glob(f"{UNFINISHED}*"), *Path(tempfile.gettempdir()).glob("*autograph*")]
        if how == "stopped" and left:
            sys.exit(f"{number} after {seconds:.3f} s left {left}")


def fill(directory):
    ballast, room = directory / "ballast", 0
    while len(versions(directory)) < 2:
        before = versions(directory)
        with suppress(OSError), ballast.open("wb") as file:
            file.write(bytes(shutil.disk_usage(directory).free - room))
        try:
            train.publish(small_model(), directory, np.zeros((1, *IMAGE_SHAPE), np.uint8))
            print(f"{room}: published")
        except (OSError, ModelError, tf.errors.OpError) as error:
            print(f"{room}: {error}")
            if versions(directory) != before:
                sys.exit("it failed and published")
        finally:
            ballast.unlink()
        if list(directory.glob(f"{UNFINISHED}*")):
            sys.exit("something was left behind")
        room += 8192


def main(how, directory, *arguments):
    if how in KILLS:
        kill(Path(directory), how, *map(int, arguments))
    elif how == "full":
        fill(Path(directory))
    else:
        pids = [start_publisher(Path(directory)) for _ in range(2)]
        if any([status(pid) for pid in pids]):
            sys.exit("publishing failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
