"""train.py: what it refuses, what a run prints and publishes, and that whatever stops it leaves whole versions only."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import require, wait_for
from tensorflow.core.protobuf import saved_model_pb2

import train
from mnist_preprocess import INPUT_NAME, MODEL_NAME, OUTPUT_NAME, ROOT
from publishing import UNFINISHED
from saved_model import SAVED_MODEL, SIGNATURE, ModelError, SavedModel, versions

# Of what the graph must be free: operations on variables, and the one that TensorFlow 2.9 lacks.
FORBIDDEN = re.compile("Var(iable|Handle)|DisableCopyOnRead")
TRIAL = ("--train-size=500", "--epochs=1", "--min-accuracy=0")
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
        ["--keep=0"],
        ["--keep=-1"],
        ["--min-accuracy=101"],
        ["--min-accuracy=nan"],
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
    command = [sys.executable, ROOT / "train.py", *TRIAL, "--model-repository", repository]
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
    assert SavedModel(model / "2" / SAVED_MODEL).runtime == "LiteRT on the CPU"
    after = contents(model)
    assert before.items() <= after.items()
    assert {path.parts[0] for path in after.keys() - before.keys()} == {"2"}
    assert sorted(os.listdir(model)) == sorted([*os.listdir(trained_repository / MODEL_NAME), "2"])
    # Triton may run as another user.
    for path in (model / "2", *(model / "2").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_one_training_picture_is_enough(run, tmp_path):
    status, out, _ = run("--train-size=1", "--epochs=1", "--min-accuracy=0", "--model-repository", tmp_path)
    assert status == 0
    assert out[-2].startswith("Published version 1: ")


@pytest.mark.parametrize(("keep", "left"), [(2, [10, 11]), (5, [1, 2, 10, 11])])
def test_keep_deletes_all_but_the_newest(run, trained_repository, tmp_path, keep, left):
    repository = tmp_path / "repository"
    shutil.copytree(trained_repository, repository)
    model = repository / MODEL_NAME
    for number in (2, 10):
        shutil.copytree(model / "1", model / str(number))
    status, _, err = run(*TRIAL, "--model-repository", repository, f"--keep={keep}")
    assert (status, err) == (0, [])
    assert versions(model) == left
    assert (model / "config.pbtxt").exists()
    assert not list(model.glob(".*"))


def test_model_below_the_floor_is_not_published(run, tmp_path):
    status, out, err = run("--train-size=500", "--epochs=1", "--keep=1", "--model-repository", tmp_path)
    assert (status, err) == (1, ["train.py: nothing was published: --min-accuracy asks for 95 %"])
    assert out[-1].startswith("Test accuracy: ")
    assert not (tmp_path / MODEL_NAME).exists()


def test_model_whose_loss_is_not_finite_is_not_published(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PEAK_LEARNING_RATE", float("inf"))
    status, _, err = run(*TRIAL, "--model-repository", tmp_path)
    assert (status, err) == (1, ["train.py: nothing was published: the loss became nan"])
    assert not (tmp_path / MODEL_NAME).exists()


def test_settings_and_path_that_others_would_stumble_over(tmp_path):
    (tmp_path / ".keras").mkdir()
    settings = '{"backend": "theano", "image_data_format": "channels_first", "floatx": "float16", "epsilon": "none"}'
    (tmp_path / ".keras" / "keras.json").write_text(settings)
    environment = os.environ | {"HOME": str(tmp_path), "KERAS_BACKEND": "torch"}
    environment.pop("KERAS_HOME", None)
    repository = tmp_path / "mnist [1] für alle"
    command = [sys.executable, ROOT / "train.py", *TRIAL, "--model-repository", repository.name]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert f"Published version 1: {repository.name}/{MODEL_NAME}/1/{SAVED_MODEL}\n" in result.stdout
    assert answers(repository / MODEL_NAME / "1").sum() == pytest.approx(1, abs=1e-5)
    assert (tmp_path / ".keras" / "keras.json").read_text() == settings


def start_training(tmp_path, *prefix):
    """Start a long run, wait until it trains and return its process."""
    (tmp_path / "tmp").mkdir()
    command = [*prefix, sys.executable, ROOT / "train.py", "--epochs=1000"]
    command += ["--model-repository", tmp_path / "repository"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")})
    wait_for(lambda: process.poll() is not None or "Epoch 1/" in (tmp_path / "out").read_text())
    return process


@pytest.mark.parametrize(("number", "prefix"), [(signal.SIGINT, []), (signal.SIGHUP, []), (signal.SIGTERM, ["nohup"])])
def test_stopped_run_leaves_nothing(tmp_path, number, prefix):
    process = start_training(tmp_path, *prefix)
    try:
        if prefix:  # It outlives the terminal.
            process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        process.send_signal(number)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
    last_words = (tmp_path / "err").read_text().splitlines()
    assert last_words[-1] == "train.py: stopped"
    assert not [line for line in last_words if "Traceback" in line]
    assert not (tmp_path / "repository").exists()
    assert not os.listdir(tmp_path / "tmp")


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_ctrl_c_while_tensorflow_is_imported_is_no_traceback(seconds):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--help"], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: "/tensorflow/" in Path(f"/proc/{process.pid}/maps").read_text())
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode != 1


def answers(version, pictures=None):
    """Return what a version answers to a batch, by default one blank picture; TensorFlow and the twin must agree."""
    pictures = np.zeros((1, 28, 28, 1), np.float32) if pictures is None else pictures
    by_tensorflow, by_twin = (
        SavedModel(version / SAVED_MODEL, device).predict({INPUT_NAME: pictures})[OUTPUT_NAME]
        for device in ("/CPU:0", None)
    )
    np.testing.assert_allclose(by_twin, by_tensorflow, rtol=0, atol=1e-5)
    return by_twin


def publishers(model, how, *arguments):
    command = [sys.executable, ROOT / "tests" / "publishers.py", how, model, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as temporary:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": temporary}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_killed_publisher_leaves_whole_versions_only(trained_repository, keras_model, mnist_test, tmp_path):
    model = tmp_path / MODEL_NAME
    shutil.copytree(trained_repository / MODEL_NAME, model)
    before = contents(model / "1")
    assert len(publishers(model, "killed", 1, 8)) == 8
    assert contents(model / "1") == before
    published = versions(model)
    assert published == list(range(1, len(published) + 1))
    for version in published:
        assert SavedModel(model / str(version) / SAVED_MODEL).runtime == "LiteRT on the CPU"
        assert answers(model / str(version)).sum() == pytest.approx(1, abs=1e-5)
    # Whatever they left is gone with the next version.
    (model / f"{UNFINISHED}host-1-x" / "version").mkdir(parents=True)
    assert train.publish(keras_model, model, mnist_test[0][:1]) == model / str(len(published) + 1)
    assert not list(model.glob(".*"))


def test_stopped_publisher_leaves_whole_versions_only(tmp_path):
    assert len(publishers(tmp_path, "stopped", 2, 8)) == 8
    assert sorted(map(int, os.listdir(tmp_path))) == versions(tmp_path)
    for version in versions(tmp_path):
        assert answers(tmp_path / str(version)).sum() == pytest.approx(1, abs=1e-5)


def test_two_publishers_at_once_get_two_numbers(tmp_path):
    publishers(tmp_path, "together")
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_number_that_a_file_has_is_left_to_it(keras_model, mnist_test, trained_repository, tmp_path):
    model = tmp_path / MODEL_NAME
    shutil.copytree(trained_repository / MODEL_NAME, model)
    (model / "2").write_text("not a version, and in the way of one")
    before = contents(model)
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
    with pytest.raises(ModelError, match="answers differently"):
        train.publish(keras_model, tmp_path, mnist_test[0][:1])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_sentence(run, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # Bytes that a file may have: a model has more.
    try:
        status, _, err = run(*TRIAL, "--model-repository", tmp_path / "repository")
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


def on_file_system(options, directory, *command):
    """Run a command in a mount namespace of its own, in which the directory is a tmpfs mounted with these options."""
    namespace = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    mount = [*namespace, "sh", "-c", f'mount -t tmpfs -o {options} tmpfs "$1" && shift && exec "$@"', "sh", directory]
    able = subprocess.run([*mount, "true"], capture_output=True, text=True)
    require(able.returncode == 0, f"nothing can be mounted here: {able.stderr}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*mount, sys.executable, *command], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("options", "reason"),
    [("size=1m", "there is no space left in "), ("size=20m,ro", " is not a folder that can be written to")],
)
def test_no_training_where_nothing_can_be_published(tmp_path, options, reason):
    result = on_file_system(options, tmp_path, ROOT / "train.py", *TRIAL, "--model-repository", tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith(f"train.py: cannot publish the model in {tmp_path}: ")
    assert reason in sentence


def test_disk_that_is_full_while_publishing_is_one_sentence_and_leaves_nothing(tmp_path):
    result = on_file_system("size=20m", tmp_path, ROOT / "tests" / "publishers.py", "full", tmp_path)
    assert result.returncode == 0, result.stderr
    *sentences, last = result.stdout.splitlines()
    assert len(sentences) > 5
    assert last.endswith(": published")
    assert all(re.match(r"\d+: (published|.*([Nn]o space left|RESOURCE_EXHAUSTED))", line) for line in sentences)


@pytest.fixture(scope="module")
def exported(trained_repository):
    return trained_repository / MODEL_NAME / "1" / SAVED_MODEL


def operations(graph):
    return {node.op for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes}


def test_graph_is_for_every_tensorflow_from_2_9_on(exported):
    graph = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes()).meta_graphs[0]
    assert not list(filter(FORBIDDEN.search, operations(graph.graph_def)))
    assert "Shape" not in operations(graph.graph_def)  # XNNPACK could not run the network in one piece.
    signature = graph.signature_def[SIGNATURE]
    for tensors, name, sizes in (
        (signature.inputs, "input_1", [-1, 28, 28, 1]),
        (signature.outputs, "output_1", [-1, 10]),
    ):
        assert list(tensors) == [name]
        assert [dim.size for dim in tensors[name].tensor_shape.dim] == sizes
        assert tensors[name].dtype == 1  # DT_FLOAT


def keras_example():
    """The network of Keras's own MNIST example, https://keras.io/examples/vision/mnist_convnet/."""
    layers = keras.layers
    return [
        *(layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D()),
        *(layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D()),
        *(layers.Flatten(), layers.Dropout(0.5), layers.Dense(10, activation="softmax")),
    ]


def recurrent():
    rows = keras.layers.Reshape((28, 28))
    return [rows, keras.layers.LSTM(8), keras.layers.Dense(10, activation="softmax")]


@pytest.mark.parametrize(("network", "runtime"), [(keras_example, "LiteRT"), (recurrent, "TensorFlow")])
def test_readers_own_model_is_published(tmp_path, mnist_test, capsys, network, runtime):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Rescaling(1 / 255), *network()])
    version = train.publish(model, tmp_path, mnist_test[0][:100])
    pictures = mnist_test[0][:100].astype(np.float32)
    np.testing.assert_allclose(answers(version, pictures), model.predict(pictures, verbose=0), rtol=0, atol=1e-5)
    assert SavedModel(version / SAVED_MODEL).runtime == f"{runtime} on the CPU"
    graph = saved_model_pb2.SavedModel.FromString((version / SAVED_MODEL / "saved_model.pb").read_bytes())
    assert not list(filter(FORBIDDEN.search, operations(graph.meta_graphs[0].graph_def)))
    # What has no twin says why.
    assert ("gets no twin" in capsys.readouterr().err) == (runtime == "TensorFlow")


def test_exported_model_is_deterministic(exported, keras_model, mnist_test):
    pictures = mnist_test[0][:50].astype(np.float32)
    model = SavedModel(exported, "/CPU:0")
    first = model.predict({INPUT_NAME: pictures})[OUTPUT_NAME]
    assert np.array_equal(first, model.predict({INPUT_NAME: pictures})[OUTPUT_NAME])
    one_by_one = [model.predict({INPUT_NAME: picture[None]})[OUTPUT_NAME][0] for picture in pictures]
    np.testing.assert_allclose(one_by_one, first, rtol=0, atol=1e-6)
    np.testing.assert_allclose(keras_model.predict(pictures, verbose=0), first, rtol=0, atol=1e-5)


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
