"""train.py: what it refuses, what a run prints and publishes, and that whatever stops it leaves whole versions only."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import train
from mnist_preprocess import INPUT_NAME, MODEL_NAME, OUTPUT_NAME, ROOT
from saved_model import SAVED_MODEL, SIGNATURE, SavedModel, versions

# What the graph may be made of: operations of TensorFlow 2.9 and older. None of them reads or writes a variable, and
# none asks for a shape, as Flatten does: XNNPACK could not run the network in one piece.
OPERATIONS = {
    *("AddV2", "BiasAdd", "ConcatV2", "Const", "Conv2D", "Identity", "MatMul", "Mul", "NoOp", "Pack", "Pad"),
    *("PartitionedCall", "Placeholder", "Relu", "Reshape", "RestoreV2", "Rsqrt", "SaveV2", "Select", "Softmax"),
    *("StatefulPartitionedCall", "Sub"),
    *("MergeV2Checkpoints", "ShardedFilename", "StaticRegexFullMatch", "StringJoin"),
}
ARRAYS = {
    "x_train": np.zeros((20, 28, 28), np.uint8),
    "y_train": np.zeros(20, np.uint8),
    "x_test": np.zeros((10, 28, 28), np.uint8),
    "y_test": np.zeros(10, np.uint8),
}
LZMA = zipfile.ZIP_LZMA
DEFLATED = zipfile.ZIP_DEFLATED


@pytest.fixture
def run(capsys, monkeypatch):
    """Run train.py's main in this process; returns its status, its lines on stdout and those on stderr."""
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # It is for a process of its own.

    def run(*options):
        try:
            status = train.main([str(option) for option in options])
        except SystemExit as exit:
            status = exit.code
        output = capsys.readouterr()
        return status, output.out.splitlines(), output.err.splitlines()

    return run


def contents(directory):
    """Return the bytes of every file below a directory by its path."""
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def write_zip(path, compression):
    """Write the arrays as an npz file of which some compressed bytes are damaged."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in (ARRAYS | {"x_train": noise}).items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, array)
    damaged = bytearray(path.read_bytes())
    damaged[60:160] = bytes(100)
    path.write_bytes(damaged)


def is_of(**changes):
    return lambda path: np.savez(path, **(ARRAYS | changes))


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: None, id="missing"),
        pytest.param(lambda path: path.mkdir(), id="folder"),
        pytest.param(lambda path: path.write_text("These are no pictures.\n"), id="text"),
        pytest.param(lambda path: path.write_bytes(b""), id="no bytes"),
        pytest.param(lambda path: path.write_bytes(train.DATA.read_bytes()[:100_000]), id="cut off"),
        pytest.param(lambda path: write_zip(path, LZMA), id="damaged LZMA"),
        pytest.param(lambda path: write_zip(path, DEFLATED), id="damaged"),
        pytest.param(lambda path: np.save(path.open("wb"), ARRAYS["x_train"]), id="npy"),
        pytest.param(lambda path: np.savez(path, pictures=ARRAYS["x_train"]), id="other arrays"),
        pytest.param(lambda path: np.savez(path, **{n: a for n, a in ARRAYS.items() if n != "y_test"}), id="one less"),
        pytest.param(is_of(x_train=np.zeros((20, 32, 32), np.uint8)), id="32x32"),
        pytest.param(is_of(x_test=np.zeros((10, 784), np.uint8)), id="flat"),
        pytest.param(is_of(x_train=np.zeros((20, 28, 28))), id="float"),
        pytest.param(is_of(x_train=np.zeros((19, 28, 28), np.uint8)), id="more digits than pictures"),
        pytest.param(is_of(x_test=ARRAYS["x_test"][:0], y_test=ARRAYS["y_test"][:0]), id="empty"),
        pytest.param(is_of(y_train=np.zeros((20, 10), np.uint8)), id="one-hot digits"),
        pytest.param(is_of(y_train=np.uint8(7)), id="one digit"),
        pytest.param(is_of(y_test=np.full(10, 10, np.uint8)), id="digit 10"),
        pytest.param(is_of(y_test=np.full(10, 0.5)), id="fractions as digits"),
        pytest.param(is_of(y_train=np.array([None] * 20)), id="objects"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # NumPy's own, about a file it cannot read.
def test_bad_data_is_one_sentence(run, tmp_path, write):
    data = tmp_path / "data.npz"
    write(data)
    repository = tmp_path / "repository"
    status, out, err = run("--data", data, "--epochs=1", "--model-repository", repository)
    assert (status, out) == (1, [])
    assert len(err) == 1
    assert err[0].startswith("train.py: ")
    assert str(data) in err[0]
    assert not repository.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--epochs=0"],
        ["--epochs=many"],
        ["--train-size=-1"],
        ["--train-size=0"],
        ["--seed=x"],
        ["--seed=-1"],
        ["--seed=4294967296"],
        ["--data"],
        ["--no-such-option"],
        ["mnist.npz"],
    ],
)
def test_wrong_usage(run, options):
    status, out, err = run(*options)
    assert (status, out) == (2, [])
    assert err[0].startswith("usage: ")


def test_run_publishes_the_next_version_and_says_so(trained_repository, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(trained_repository, repository)
    model = repository / MODEL_NAME
    before = contents(model)
    assert versions(model) == [1]
    command = [sys.executable, ROOT / "train.py", "--train-size=500", "--epochs=1", "--model-repository", repository]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, umask=0o022)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "500 training pictures, 10000 test pictures"
    assert any(line.startswith("Test accuracy: ") for line in lines)
    assert lines[-2:] == [
        f"Published version 2: {os.path.relpath(model / '2' / SAVED_MODEL, tmp_path)}",
        "Next: python flask/server.py",
    ]
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    after = contents(model)
    assert before.items() <= after.items()
    assert {path.parts[0] for path in after.keys() - before.keys()} == {"2"}
    assert sorted(os.listdir(model)) == sorted([*os.listdir(trained_repository / MODEL_NAME), "2"])
    # Triton may run as another user.
    for path in (model / "2", *(model / "2").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_one_training_picture_is_enough(run, tmp_path):
    status, out, err = run("--train-size=1", "--epochs=1", "--model-repository", tmp_path)
    assert (status, err) == (0, [])
    assert out[-2].startswith("Published version 1: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_leaves_nothing(tmp_path, number):
    command = [sys.executable, ROOT / "train.py", "--epochs=1000", "--model-repository", tmp_path / "repository"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
    try:
        deadline = time.monotonic() + 120
        while "Epoch 1/" not in (tmp_path / "out").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
    last_words = (tmp_path / "err").read_text().splitlines()
    assert last_words[-1] == "train.py: stopped"
    assert not [line for line in last_words if "Traceback" in line]
    assert not (tmp_path / "repository").exists()


def publishers(model, how, *arguments):
    command = [sys.executable, ROOT / "tests" / "publishers.py", how, model, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_killed_publisher_leaves_whole_versions_only(trained_repository, tmp_path):
    model = tmp_path / MODEL_NAME
    shutil.copytree(trained_repository / MODEL_NAME, model)
    before = contents(model / "1")
    assert len(publishers(model, "killed", 1, 20)) == 20
    assert contents(model / "1") == before
    assert list(model.glob(f"{train.UNFINISHED}*"))  # Some were killed while they wrote.
    published = versions(model)
    assert published == list(range(1, len(published) + 1))
    pictures = np.zeros((1, 28, 28, 1), np.float32)
    for version in published:
        answer = SavedModel(model / str(version) / SAVED_MODEL, "/CPU:0").predict({INPUT_NAME: pictures})[OUTPUT_NAME]
        assert answer.sum() == pytest.approx(1, abs=1e-5)


def test_two_publishers_at_once_get_two_numbers(tmp_path):
    publishers(tmp_path, "together")
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_number_taken_meanwhile(keras_model, mnist_test, trained_repository, tmp_path, monkeypatch):
    model = tmp_path / MODEL_NAME
    shutil.copytree(trained_repository / MODEL_NAME, model)
    (model / "2").write_text("not a version, and in the way of one")
    before = contents(model)
    listed = iter([[]])
    monkeypatch.setattr(train, "versions", lambda directory: next(listed, [1]))
    assert train.publish(keras_model, model, mnist_test[0][:1]) == model / "3"
    assert before.items() <= contents(model).items()


def test_publishing_that_fails_leaves_nothing(keras_model, mnist_test, tmp_path, monkeypatch):
    export = train.export

    def interrupted(model, path):
        export(model, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.publish(keras_model, tmp_path, mnist_test[0][:1])
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(train, "export", lambda model, path: export(train.build(), path))
    with pytest.raises(RuntimeError, match="answers differently"):
        train.publish(keras_model, tmp_path, mnist_test[0][:1])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_sentence(run, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # Bytes that a file may have: a model has more.
    try:
        status, _, err = run("--train-size=10", "--epochs=1", "--model-repository", tmp_path / "repository")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, len(err)) == (1, 1)
    assert err[0].startswith(f"train.py: cannot publish the model in {tmp_path / 'repository'}: ")
    assert list((tmp_path / "repository" / MODEL_NAME).iterdir()) == []


def test_repository_that_is_a_file_is_one_sentence(run, tmp_path):
    repository = tmp_path / "file"
    repository.write_text("")
    status, _, err = run("--train-size=10", "--epochs=1", "--model-repository", repository)
    assert (status, len(err)) == (1, 1)
    assert err[0].startswith(f"train.py: cannot publish the model in {repository}: ")


def test_leavings_of_killed_runs_are_removed_after_an_hour(keras_model, mnist_test, tmp_path):
    for name, age in (("old", 3700), ("young", 3500)):
        leaving = tmp_path / f"{train.UNFINISHED}{name}" / "version" / SAVED_MODEL
        leaving.mkdir(parents=True)
        os.utime(leaving.parents[1], (time.time() - age,) * 2)
    train.publish(keras_model, tmp_path, mnist_test[0][:1])
    assert sorted(os.listdir(tmp_path)) == [f"{train.UNFINISHED}young", "1"]


@pytest.fixture(scope="module")
def exported(trained_repository):
    return trained_repository / MODEL_NAME / "1" / SAVED_MODEL


def test_graph_is_for_every_tensorflow_from_2_9_on(exported):
    graph = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes()).meta_graphs[0]
    nodes = [*graph.graph_def.node, *(node for f in graph.graph_def.library.function for node in f.node_def)]
    assert {node.op for node in nodes} <= OPERATIONS
    signature = graph.signature_def[SIGNATURE]
    for tensors, name, sizes in (
        (signature.inputs, "input_1", [-1, 28, 28, 1]),
        (signature.outputs, "output_1", [-1, 10]),
    ):
        assert list(tensors) == [name]
        assert [dim.size for dim in tensors[name].tensor_shape.dim] == sizes
        assert tensors[name].dtype == 1  # DT_FLOAT


def test_exported_model_is_deterministic(exported, keras_model, mnist_test):
    pictures = mnist_test[0][:50].astype(np.float32)
    model = SavedModel(exported, "/CPU:0")
    first = model.predict({INPUT_NAME: pictures})[OUTPUT_NAME]
    assert np.array_equal(first, model.predict({INPUT_NAME: pictures})[OUTPUT_NAME])
    one_by_one = [model.predict({INPUT_NAME: picture[None]})[OUTPUT_NAME][0] for picture in pictures]
    np.testing.assert_allclose(one_by_one, first, rtol=0, atol=1e-6)
    np.testing.assert_allclose(keras_model.predict(pictures, verbose=0), first, rtol=0, atol=1e-5)


def test_first_convolution_is_an_ordinary_one():
    pictures = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    ours, keras_own = (kind(16, 5, strides=2) for kind in (train.FirstConv2D, keras.layers.Conv2D))
    ours.build(pictures.shape)
    keras_own.build(pictures.shape)
    keras_own.set_weights([ours.kernel, np.arange(16)])
    ours.set_weights(keras_own.get_weights())
    np.testing.assert_allclose(ours(pictures), keras_own(pictures), rtol=0, atol=1e-5)


def test_neighbours_are_those_in_a_window_of_3x3():
    pictures = np.random.default_rng(0).random((2, 28, 28, 1), np.float32) + 1
    largest, smallest = (train.among_neighbours(choose, pictures) for choose in (tf.maximum, tf.minimum))
    np.testing.assert_array_equal(largest, tf.nn.max_pool2d(pictures, ksize=3, strides=1, padding="SAME"))
    np.testing.assert_array_equal(smallest, -tf.nn.max_pool2d(-pictures, ksize=3, strides=1, padding="SAME"))


def test_printed_digits_are_mnist_like_and_a_third_are_ones():
    pictures, digits = train.printed(60, seed=0)
    assert pictures.shape == (60, 28, 28, 1)
    assert (pictures.dtype, digits.dtype) == (np.uint8, np.uint8)
    assert set(digits) == set(range(10))
    assert (digits == 1).sum() >= 20
    again, _ = train.printed(60, seed=0)
    np.testing.assert_array_equal(pictures, again)
