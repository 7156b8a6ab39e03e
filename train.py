"""Train a convolutional network on MNIST and publish it as a SavedModel in Triton's model-repository layout.

    python train.py

Three convolution blocks and two dense layers, trained on pictures that are turned, slanted, moved and redrawn with
another pen every time.
"""

import argparse
import io
import lzma
import os
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # No traceback for Ctrl-C during the imports; main() takes over then.
# TensorFlow reads this when it is imported: print what went wrong, not what the CPU could do.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Keras on TensorFlow, as it comes: other projects' keras.json says which backend, float type and data format they need.
os.environ |= {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}

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
from publishing import check_writable, delete_old_versions, new_version, stop_cleanly
from saved_model import SAVED_MODEL, SIGNATURE, ModelError, SavedModel, add_twin

DATA = ROOT / "images" / "mnist.npz"
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 5e-3


class TrainingError(ValueError):
    """Training or publishing that cannot be done; the message is a sentence for the user."""


def prepare(data, train_size=None):
    """Read MNIST from an npz file laid out as Keras's mnist.npz.

    Returns (x_train, y_train), (x_test, y_test): pictures (n, 28, 28, 1) uint8 and digits (n,) uint8, of the
    training pictures only the first `train_size`. Raises TrainingError for any other file.
    """
    try:
        with np.load(data) as arrays:
            x_train, y_train, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    except (AttributeError, TypeError) as error:  # NumPy reads an .npy file too, which holds one array without a name.
        raise TrainingError(f"cannot read MNIST from {data}: it is no npz file") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise TrainingError(f"cannot read MNIST from {data}: {error}") from error
    for pictures, digits in ((x_train, y_train), (x_test, y_test)):
        if (
            (pictures.ndim, pictures.dtype, digits.dtype) != (3, np.uint8, np.uint8)
            or pictures.shape != (*digits.shape, *IMAGE_SHAPE[:2])
            or not len(digits)
            or digits.max() >= CLASSES
        ):
            found = f"pictures {pictures.dtype} {pictures.shape}, digits {digits.dtype} {digits.shape}"
            raise TrainingError(f"{data} is not laid out as Keras's mnist.npz: {found}")
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


def build():
    """Return the model: raw pixels (n, 28, 28, 1) in, probabilities (n, 10) out.

    The scaling to 0…1 is a layer of the model, so that no server and no client can get it wrong. Nothing in it is
    random: augment() stays outside, for a random layer may go on changing pictures in the exported model.
    """
    pictures = keras.Input(shape=IMAGE_SHAPE, name=INPUT_NAME)
    x = layers.Rescaling(1 / 255)(pictures)
    x = normalised(x, layers.Conv2D(16, 5, strides=2, use_bias=False))
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


@tf.autograph.experimental.do_not_convert  # There is nothing to convert, and files in /tmp would come of it.
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
    """Fit the model to pictures (n, 28, 28, 1) uint8 and digits (n,), every epoch augmented anew.

    Raises TrainingError when the loss is no longer finite: what was learnt until then is lost, too.
    """
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
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
    # The batches are shuffled already.
    history = model.fit(batches, epochs=epochs, shuffle=False, callbacks=[keras.callbacks.TerminateOnNaN()])
    if not np.isfinite(history.history["loss"]).all():
        raise TrainingError(f"nothing was published: the loss became {history.history['loss'][-1]}")


def export(model, path):
    """Write the model as a SavedModel that every TensorFlow from 2.9 on can load.

    model.export() would not do: its weights are variables, read by an op that TensorFlow 2.9 does not know, and its
    output is named output_0. Here the weights are constants of one function with the names that Triton expects.
    """
    trainable = [variable.numpy() for variable in model.trainable_variables]
    non_trainable = [variable.numpy() for variable in model.non_trainable_variables]

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, *IMAGE_SHAPE], tf.float32, name=INPUT_NAME)])
    def serve(pictures):
        probabilities, _ = model.stateless_call(trainable, non_trainable, pictures, training=False)
        return {OUTPUT_NAME: probabilities}

    tf.saved_model.save(tf.Module(), str(path), signatures={SIGNATURE: serve})


def publish(model, model_directory, pictures):
    """Export the model with its LiteRT twin as the next version in `model_directory` and return that version's path.

    Raises ModelError unless it answers to `pictures` as the trained model does: then no version appears.
    """
    pictures = pictures.astype(np.float32)
    with new_version(model_directory) as version:
        export(model, SAVED_MODEL)
        try:
            add_twin(SAVED_MODEL)  # For CPUs. It is compared with TensorFlow there, and with Keras here.
        except ModelError as error:  # As of a model with a loop, which TensorFlow runs, only more slowly.
            print(f"train.py: {error}", file=sys.stderr)
        answers = SavedModel(SAVED_MODEL).predict({INPUT_NAME: pictures})[OUTPUT_NAME]
        with tf.device("/CPU:0"):  # A GPU rounds earlier, which is no reason to refuse a model.
            expected = model(pictures, training=False)
        if not np.allclose(answers, expected, rtol=0, atol=1e-3):  # Rounding is far below that, a wrong export above.
            raise ModelError("the exported model answers differently from the trained one")
    return version


def parse_args(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    option, count = parser.add_argument, within(1, 10**9)
    option("--data", type=Path, default=DATA, metavar="FILE", help="an npz file laid out as Keras's mnist.npz")
    option("--epochs", type=count, default=26, metavar="N", help="passes over the training pictures")
    option("--seed", type=within(0, 2**32 - 1), default=0, metavar="N", help="the start of every random number")
    option("--train-size", type=count, metavar="N", help="train on the first N pictures only")
    option("--model-repository", type=Path, default=MODEL_REPOSITORY, metavar="DIR", help="where to publish the model")
    option("--min-accuracy", type=within(0, 100, float), default=95, metavar="PERCENT", help="publish nothing below it")
    option("--keep", type=count, metavar="N", help="delete all versions but the newest N")
    return parser.parse_args(argv)


def within(low, high, kind=int):
    """Return what makes an option's text a number in low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} to {high}")
        return value

    return number


def main(argv=None) -> int:
    args = parse_args(argv)
    stop_cleanly(args.model_repository / MODEL_NAME)
    sys.stdout = sys.stdout or io.StringIO()  # Keras cannot do without.
    try:
        run(args)
    except (TrainingError, OSError) as error:  # What is left of the latter concerns standard output.
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


def run(args):
    """Train and publish, and print how it went. Raises TrainingError, with a sentence, when that cannot be done."""
    # Prepare.
    model_directory = args.model_repository / MODEL_NAME
    (x_train, y_train), (x_test, y_test) = prepare(args.data, args.train_size)
    try:
        check_writable(model_directory)  # To fail now, and not after training.
    except OSError as error:
        raise TrainingError(f"cannot publish the model in {args.model_repository}: {error}") from error
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
    if not 100 * accuracy >= args.min_accuracy:
        raise TrainingError(f"nothing was published: --min-accuracy asks for {args.min_accuracy:g} %")

    # Publish.
    try:
        version = publish(model, model_directory, x_test[:100])
    except (OSError, ModelError, tf.errors.OpError) as error:
        reason = str(error).rpartition("}} ")[2]  # TensorFlow puts the names of its functions in front.
        raise TrainingError(f"cannot publish the model in {args.model_repository}: {reason}") from error
    print(f"Published version {version.name}: {os.path.relpath(version / SAVED_MODEL)}")
    try:
        if args.keep:
            delete_old_versions(model_directory, args.keep)
    except OSError as error:
        raise TrainingError(f"cannot delete old versions in {args.model_repository}: {error}") from error
    print("Next: python flask/server.py")


if __name__ == "__main__":
    raise SystemExit(main())
