"""Train a convolutional network on MNIST and publish it as a SavedModel in Triton's model-repository layout.

    python train.py

Three convolution blocks and two dense layers, trained on pictures that are turned, slanted, moved and redrawn with
another pen every time.
"""

import argparse
import itertools
import lzma
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

# TensorFlow reads this when it is imported: print what went wrong, not what the CPU could do.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from PIL import Image, ImageDraw, ImageFont

from mnist_preprocess import (
    CLASSES,
    IMAGE_SHAPE,
    INPUT_NAME,
    MODEL_NAME,
    MODEL_REPOSITORY,
    OUTPUT_NAME,
    ROOT,
    preprocess,
)
from saved_model import SAVED_MODEL, SIGNATURE, SavedModel, versions

DATA = ROOT / "images" / "mnist.npz"
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 5e-3
UNFINISHED = ".publishing-"


def prepare(data, train_size=None):
    """Read MNIST from an npz file laid out as Keras's mnist.npz.

    Returns (x_train, y_train), (x_test, y_test): pictures (n, 28, 28, 1) uint8 and digits (n,) uint8, of the
    training pictures only the first `train_size`. Raises ValueError, with a sentence, for any other file.
    """
    try:
        with np.load(data) as arrays:
            x_train, y_train, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"cannot read MNIST from {data}: {error}") from error
    except (AttributeError, TypeError) as error:  # NumPy reads an .npy file too, which holds one array without a name.
        raise ValueError(f"cannot read MNIST from {data}: it is no npz file") from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"cannot read MNIST from {data}: the file is damaged ({error})") from error
    for pictures, digits in ((x_train, y_train), (x_test, y_test)):
        if (
            (pictures.ndim, pictures.dtype, digits.dtype) != (3, np.uint8, np.uint8)
            or pictures.shape != (*digits.shape, *IMAGE_SHAPE[:2])
            or not len(digits)
            or digits.max() >= CLASSES
        ):
            raise ValueError(
                f"{data} is not laid out as Keras's mnist.npz: "
                f"pictures {pictures.dtype} {pictures.shape}, digits {digits.dtype} {digits.shape}"
            )
    return (x_train[:train_size, ..., np.newaxis], y_train[:train_size]), (x_test[..., np.newaxis], y_test)


def printed(count, seed):
    """Return digits set in Pillow's own font, as MNIST would hold them, (count, 28, 28, 1) uint8, and which they are.

    Light to bold, narrow to wide, upright to slanted. Every third one is a 1: handwriting alone teaches that a 1 with a
    flag and without a foot, as most sans-serif fonts have it, is a 7.
    """
    rng = np.random.default_rng(seed)
    digits = np.where(np.arange(count) % 3, rng.integers(CLASSES, size=count), 1).astype(np.uint8)
    font = ImageFont.load_default(80)
    pictures = np.empty((count, *IMAGE_SHAPE), np.uint8)
    for picture, digit in zip(pictures, digits, strict=True):
        page = Image.new("L", (160, 160))
        ImageDraw.Draw(page).text((80, 80), str(digit), 255, font, anchor="mm", stroke_width=rng.uniform(0, 5))
        width, slant = rng.uniform(0.6, 1.2), rng.uniform(-0.1, 0.3)
        affine = (1 / width, slant, 80 - 80 / width - 80 * slant, 0, 1, 0)
        picture[:] = preprocess(page.transform(page.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))
    return pictures, digits


class FirstConv2D(layers.Conv2D):
    """Conv2D(filters, 5, strides=2) for pictures of one channel, over which it would take three times as long.

    It has the same weights and gives the same results, but reads four neighbours in a row as four channels, and takes
    two neighbouring points of the map in one step.
    """

    def convolution_op(self, inputs, kernel):
        # Of the eight columns that the two points see together, the first sees 0 to 4 and the second 2 to 6.
        kernels = [keras.ops.pad(kernel, [[0, 0], [start, 3 - start], [0, 0], [0, 0]]) for start in (0, 2)]
        fours = keras.ops.reshape(keras.ops.concatenate(kernels, axis=-1), (5, 2, 4, 2 * self.filters))
        points = keras.ops.conv(keras.ops.reshape(inputs, (-1, 28, 7, 4)), fours, strides=(2, 1))
        return keras.ops.reshape(points, (-1, 12, 12, self.filters))


def build():
    """Return the model: raw pixels (n, 28, 28, 1) in, probabilities (n, 10) out.

    The scaling to 0…1 is a layer of the model, so that no server and no client can get it wrong. Nothing in it is
    random: augment() stays outside, for a random layer may go on changing pictures in the exported model.
    """
    pictures = keras.Input(shape=IMAGE_SHAPE, name=INPUT_NAME)
    x = layers.Rescaling(1 / 255)(pictures)
    x = normalised(x, FirstConv2D(16, 5, strides=2, use_bias=False))
    # Strides halve the maps, where pooling would: a quarter of the arithmetic, and no digit more is misread.
    x = normalised(x, layers.Conv2D(32, 3, strides=2, use_bias=False))
    x = normalised(x, layers.Conv2D(96, 3, strides=2, use_bias=False))
    # Not layers.Flatten: it asks for the batch's size, which XNNPACK cannot, so LiteRT would run the model in pieces.
    x = keras.ops.reshape(x, (-1, 2 * 2 * 96))
    x = normalised(x, layers.Dense(64, use_bias=False))
    return keras.Model(pictures, layers.Dense(CLASSES, activation="softmax")(x))


def normalised(x, layer):
    """Return what a layer without a bias makes of x, after a normalisation, which brings the bias, and ReLU."""
    # With this momentum it settles within a short run, too.
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(layer(x)))


def augment(pictures, digits):
    """Return the pictures of one batch as other hands might have written them, float32, and their digits one-hot.

    Another pen: every picture is blended with itself written one pixel broader, or finer, on all sides.
    Another hand: one affine map turns, slants, stretches and moves it, each by a few percent.
    """
    pictures = tf.cast(pictures, tf.float32)
    count = tf.shape(pictures)[0]
    broader, finer = among_neighbours(tf.maximum, pictures), among_neighbours(tf.minimum, pictures)
    pen = tf.random.uniform([count, 1, 1, 1], -1, 1)
    pen *= tf.abs(pen)  # Mostly a little, now and then all of it.
    pictures += tf.nn.relu(pen) * (broader - pictures) + tf.nn.relu(-pen) * (finer - pictures)

    # The rows of the map say at which x and which y of the picture the output point (x, y, 1) is read. The linear part
    # leaves the centre of the picture where it is.
    linear = tf.eye(2) + tf.random.normal([count, 2, 2], stddev=0.1)
    centre = tf.fill([2, 1], (IMAGE_SHAPE[0] - 1) / 2)
    moved = centre - linear @ centre + tf.random.normal([count, 2, 1], stddev=1.0)
    rows = tf.reshape(tf.concat([linear, moved], axis=2), [count, 6])
    affine = tf.pad(rows, [[0, 0], [0, 2]])  # The last two of the eight numbers are the perspective: none.
    pictures = keras.ops.image.affine_transform(pictures, affine, fill_mode="constant", fill_value=0)
    return pictures, tf.one_hot(digits, CLASSES)


def among_neighbours(choose, pictures):
    """Return pictures (n, 28, 28, 1) of the largest, or smallest, of every pixel and its eight neighbours.

    choose is tf.maximum or tf.minimum. tf.nn.max_pool2d would do the same in twenty times the time.
    """
    padded = tf.pad(pictures, [[0, 0], [1, 1], [1, 1], [0, 0]], "SYMMETRIC")
    columns = choose(choose(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    return choose(choose(columns[:, :, :-2], columns[:, :, 1:-1]), columns[:, :, 2:])


def train(model, pictures, digits, epochs):
    """Fit the model to pictures (n, 28, 28, 1) uint8 and digits (n,), every epoch augmented anew."""
    batches = tf.data.Dataset.from_tensor_slices((pictures, digits)).shuffle(len(pictures)).batch(BATCH_SIZE)
    batches = batches.map(augment).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1  # Spread over all cores, augment() gets in the training step's way.
    options.threading.max_intra_op_parallelism = 1
    batches = batches.with_options(options)
    steps = epochs * len(batches)
    warmup_steps = steps // 10
    learning_rate = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=PEAK_LEARNING_RATE / 25,
        warmup_target=PEAK_LEARNING_RATE,
        warmup_steps=warmup_steps,
        decay_steps=steps - warmup_steps,
    )
    model.compile(
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        optimizer=keras.optimizers.Adam(learning_rate),
        metrics=["accuracy"],
    )
    model.fit(batches, epochs=epochs, shuffle=False)  # The batches are shuffled already.


def export(model, path):
    """Write the model as a SavedModel that every TensorFlow from 2.9 on can load.

    model.export() would not do: its weights are variables, read by an op that TensorFlow 2.9 does not know, and its
    output is named output_0. Here the weights are constants of one function with the names that Triton expects.
    """
    trainable = [variable.numpy() for variable in model.trainable_variables]
    non_trainable = [variable.numpy() for variable in model.non_trainable_variables]

    @tf.function(input_signature=[tf.TensorSpec([None, *IMAGE_SHAPE], tf.float32, name=INPUT_NAME)])
    def serve(pictures):
        probabilities, _ = model.stateless_call(trainable, non_trainable, pictures, training=False)
        return {OUTPUT_NAME: probabilities}

    tf.saved_model.save(tf.Module(), str(path), signatures={SIGNATURE: serve})


def publish(model, model_directory, pictures):
    """Export the model as the next version below `model_directory` and return that version's directory.

    The version appears whole, by one rename, after its answers to `pictures` were compared with the model's own:
    whatever stops this process, a server that watches the directory sees all of the version or nothing.
    Raises RuntimeError when the answers differ.
    """
    model_directory.mkdir(parents=True, exist_ok=True)
    for leftover in model_directory.glob(f"{UNFINISHED}*"):
        # A killed run could not remove it; publishing takes seconds, so after an hour no run is at it any more.
        if time.time() - leftover.stat().st_mtime > 3600:
            shutil.rmtree(leftover, ignore_errors=True)
    # On the same file system as its destination, and under a name that Triton does not take for a version.
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=model_directory) as temporary:
        version = Path(temporary, "version")
        version.mkdir()
        export(model, version / SAVED_MODEL)
        answers = SavedModel(version / SAVED_MODEL, device="/CPU:0").predict({INPUT_NAME: pictures.astype(np.float32)})[
            OUTPUT_NAME
        ]
        if not np.allclose(answers, model.predict(pictures, verbose=0), rtol=0, atol=1e-5):
            raise RuntimeError("the exported model answers differently from the trained one: nothing was published")
        for number in itertools.count(max(versions(model_directory), default=0) + 1):
            destination = model_directory / str(number)
            try:
                return version.rename(destination)
            except OSError:
                # Another run took this number in between, or a file has it: try the next one.
                if not destination.exists():
                    raise


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="FILE", help="an npz file laid out as Keras's mnist.npz"
    )
    parser.add_argument("--epochs", type=positive, default=26, metavar="N", help="passes over the training pictures")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="the start of every random number")
    parser.add_argument("--train-size", type=positive, metavar="N", help="train on the first N pictures only")
    parser.add_argument(
        "--model-repository", type=Path, default=MODEL_REPOSITORY, metavar="DIR", help="where to publish the model"
    )
    return parser.parse_args(argv)


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def seed(text):
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to {2**32 - 1}")
    return number


def check_writable(directory):
    """Raise OSError unless `directory` can be written to, or made; it makes none, for training may yet be stopped."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise OSError(f"{existing} is not a folder that can be written to")


def main(argv=None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Whoever stops it, it takes its leavings along.
    try:
        return run(args)
    except KeyboardInterrupt:
        print("train.py: stopped", file=sys.stderr, flush=True)
        with suppress(OSError):  # Whoever read it may have been stopped as well.
            sys.stdout.flush()
        # Not by way of Python's end: there TensorFlow waits for the epoch to be over, seconds or longer.
        os._exit(130)


def run(args) -> int:
    # Prepare.
    try:
        (x_train, y_train), (x_test, y_test) = prepare(args.data, args.train_size)
        check_writable(args.model_repository / MODEL_NAME)  # To fail now, and not after training.
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"train.py: cannot publish the model in {args.model_repository}: {error}", file=sys.stderr)
        return 1
    print(f"{len(x_train)} training pictures, {len(x_test)} test pictures")

    # Build and train.
    keras.utils.set_random_seed(args.seed)
    model = build()
    start = time.monotonic()
    pictures, digits = printed(len(x_train) // 150, args.seed)  # A few will do: handwriting is what counts.
    train(model, np.concatenate([x_train, pictures]), np.concatenate([y_train, digits]), args.epochs)
    seconds = time.monotonic() - start

    # Evaluate.
    _, accuracy = model.evaluate(x_test, keras.utils.to_categorical(y_test, CLASSES), batch_size=1000, verbose=0)
    print(f"Test accuracy: {accuracy:.2%}, after {seconds:.0f} s of training")

    # Publish.
    try:
        version = publish(model, args.model_repository / MODEL_NAME, x_test[:100])
    except (OSError, RuntimeError, tf.errors.OpError) as error:
        print(f"train.py: cannot publish the model in {args.model_repository}: {error}", file=sys.stderr)
        return 1
    print(f"Published version {version.name}: {os.path.relpath(version / SAVED_MODEL)}")
    print("Next: python flask/server.py")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
