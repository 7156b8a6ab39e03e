"""The SavedModel that train.py publishes, in the TensorFlow of every Triton release that has a TensorFlow backend."""

import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import require

from mnist_preprocess import INPUT_NAME, MODEL_NAME, OUTPUT_NAME, ROOT
from saved_model import SIGNATURE

PICTURES = 100
# TensorFlow without GPU code is half the download; for arm64 it goes by the plain name.
TENSORFLOW = "tensorflow-cpu" if platform.machine() == "x86_64" else "tensorflow"

# Runs in the other environments, which hold TensorFlow alone and nothing of the project.
ASK = f"""
import sys
import numpy as np
import tensorflow as tf

model, pictures, answers = sys.argv[1:]
ask = tf.saved_model.load(model).signatures[{SIGNATURE!r}]
np.save(answers, ask({INPUT_NAME}=tf.constant(np.load(pictures)))[{OUTPUT_NAME!r}].numpy())
print(tf.__version__)
"""


def find_python(versions):
    """Return the command of the first of these Python versions that is on PATH and runs, or None."""
    for version in versions:
        if sys.version_info[:2] == tuple(map(int, version.split("."))):
            return sys.executable
        command = shutil.which(f"python{version}")
        # A version manager puts commands on PATH for versions that it would first have to install.
        if command and subprocess.run([command, "--version"], capture_output=True).returncode == 0:
            return command
    return None


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The first test pictures, as a file of raw pixels (100, 28, 28, 1) float32."""
    file = tmp_path_factory.mktemp("pictures") / "pictures.npy"
    with np.load(ROOT / "images" / "mnist.npz") as data:
        np.save(file, data["x_test"][:PICTURES, ..., None].astype(np.float32))
    return file


def ask(python, repository, pictures, folder):
    """Return (probabilities, TensorFlow's version), asked with a Python's own TensorFlow."""
    model = repository / MODEL_NAME / "1" / "model.savedmodel"
    answers = folder / "answers.npy"
    result = subprocess.run([python, "-c", ASK, model, pictures, answers], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return np.load(answers), result.stdout.split()[-1]


@pytest.fixture(scope="module")
def expected(trained_repository, pictures, tmp_path_factory):
    """The answers of the TensorFlow that requirements.txt names."""
    return ask(sys.executable, trained_repository, pictures, tmp_path_factory.mktemp("current"))[0]


def test_current_tensorflow_recognises_the_digits(expected):
    with np.load(ROOT / "images" / "mnist.npz") as data:
        labels = data["y_test"][:PICTURES]
    assert expected.shape == (PICTURES, 10)
    assert np.mean(expected.argmax(axis=1) == labels) > 0.9


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="it installs older TensorFlows, 1 GB: set CI=true to run it")
@pytest.mark.parametrize(
    ("tensorflow", "pythons"),
    [
        ("2.9.1", ["3.10"]),
        ("2.12.1", ["3.11", "3.10"]),
        ("2.15.1", ["3.11", "3.10"]),
        ("2.17.1", ["3.12", "3.11", "3.10"]),
    ],
)
def test_older_tensorflow_gives_the_same_answers(
    tensorflow, pythons, trained_repository, pictures, expected, tmp_path, pytestconfig
):
    python = find_python(pythons)
    reason = f"TensorFlow {tensorflow} needs Python {' or '.join(pythons)} on PATH"
    if tensorflow == "2.12.1":
        require(python, reason)
    elif not python:
        pytest.skip(reason)
    environment = pytestconfig.cache.mkdir(f"tensorflow-{tensorflow}")
    if not (environment / "complete").exists():
        shutil.rmtree(environment)
        subprocess.run([python, "-m", "venv", environment], check=True, capture_output=True)
        # With patience: a mirror may have to fetch a file of 500 MB first.
        install = ("-m", "pip", "install", "--quiet", "--no-compile", "--timeout=60", "--retries=10")
        packages = (f"{TENSORFLOW}=={tensorflow}", "numpy<2")
        command = [environment / "bin" / "python", *install, *packages]
        installed = subprocess.run(command, capture_output=True, text=True)
        require(installed.returncode == 0, f"pip cannot install TensorFlow {tensorflow}: {installed.stderr.strip()}")
        (environment / "complete").touch()
    answers, version = ask(environment / "bin" / "python", trained_repository, pictures, tmp_path)
    assert version == tensorflow
    np.testing.assert_array_equal(answers.argmax(axis=1), expected.argmax(axis=1))
    np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-5)
