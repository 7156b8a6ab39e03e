"""Publish from several processes at once, or from processes that are killed: python tests/publishers.py HOW DIRECTORY

`together` publishes from two at once. `killed SEED COUNT` publishes from one after the other, until COUNT of them were
killed at random moments of it, and prints after how many seconds each was.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np

import train
from mnist_preprocess import CLASSES, IMAGE_SHAPE, INPUT_NAME


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
        layers = [keras.layers.Flatten(), keras.layers.Dense(CLASSES, activation="softmax")]
        model = keras.Sequential([keras.Input(IMAGE_SHAPE, name=INPUT_NAME), *layers])
        os.close(writer)
        train.publish(model, directory, pictures)
        status = 0
    finally:
        os._exit(status)


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(directory, seed, count):
    pid, start = start_publisher(directory), time.monotonic()
    if status(pid):
        sys.exit("publishing failed")
    duration = time.monotonic() - start
    random.seed(seed)
    while count:
        pid, seconds = start_publisher(directory), random.uniform(0, duration)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        ended = status(pid)
        if ended == -signal.SIGKILL:
            print(f"{seconds:.3f}")
            count -= 1
        elif ended:
            sys.exit("publishing failed")


def main(how, directory, *arguments):
    if how == "killed":
        kill(Path(directory), *map(int, arguments))
    else:
        pids = [start_publisher(Path(directory)) for _ in range(2)]
        if any([status(pid) for pid in pids]):
            sys.exit("publishing failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
