"""picture_process.py: it answers as preprocess() does, and outlives what takes too long or breaks a decoder."""

import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from wild_digits import encoded

import picture_process
from mnist_preprocess import ROOT, SAMPLE_IMAGE, ImageError, NoDigitError, open_image, preprocess
from picture_process import SMALL, read_picture, reader

SAMPLE = SAMPLE_IMAGE.read_bytes()
JPEG = (ROOT / "images" / "pen_stroke.jpg").read_bytes()


@pytest.fixture(autouse=True)
def own_reader():
    """A process of the test's own, which has ended afterwards."""
    reader.cache_clear()
    yield
    if reader.cache_info().currsize:
        reader().communicate()
    reader.cache_clear()


@pytest.mark.parametrize("upload", [SAMPLE, JPEG, SAMPLE + bytes(SMALL)], ids=["small PNG", "JPEG", "PNG"])
def test_answers_as_preprocess_does(upload):
    for _ in range(2):
        np.testing.assert_array_equal(read_picture(io.BytesIO(upload)), preprocess(open_image(io.BytesIO(upload))))
    assert reader.cache_info().currsize == (upload != SAMPLE)


@pytest.mark.parametrize(
    ("upload", "error"),
    [(JPEG[:100], ImageError), (b"", ImageError), (encoded(Image.new("L", (99, 99)), "BMP"), NoDigitError)],
)
def test_what_cannot_be_read_is_the_same_sentence(upload, error):
    with pytest.raises(error) as expected:
        preprocess(open_image(io.BytesIO(upload)))
    with pytest.raises(error) as said:
        read_picture(io.BytesIO(upload))
    assert (type(said.value), str(said.value)) == (type(expected.value), str(expected.value))


def test_picture_that_takes_too_long_ends_its_process_alone(monkeypatch):
    """An honest one, which no check refuses, where less time is allowed."""
    noise = np.random.default_rng(0).integers(88, 168, (4900, 4900), np.uint8)
    upload = encoded(Image.fromarray(noise).convert("RGB"), "JPEG", progressive=True)
    monkeypatch.setattr(picture_process, "SECONDS", 0.05)
    with pytest.raises(ImageError, match=r"the picture takes more than 0\.05 seconds to decode, or breaks the decoder"):
        read_picture(io.BytesIO(upload))
    assert reader().returncode == -signal.SIGPROF
    monkeypatch.setattr(picture_process, "SECONDS", 60)
    with pytest.raises(NoDigitError):
        read_picture(io.BytesIO(upload))


def test_process_that_has_died_is_replaced():
    read_picture(io.BytesIO(JPEG))
    os.kill(reader().pid, signal.SIGSEGV)
    reader().wait()
    assert read_picture(io.BytesIO(JPEG)).max() == 255


def test_process_ends_with_the_one_that_started_it():
    code = "import os; from picture_process import *; read_picture(open(os.sys.argv[1], 'rb')); os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", code, ROOT / "images" / "pen_stroke.jpg"]
    # It returns when nobody holds the other end of its pipes any more.
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (killed.returncode, killed.stdout, killed.stderr) == (-signal.SIGKILL, "", "")


def test_fault_of_the_process_itself_is_no_fault_of_the_picture(monkeypatch, capfd):
    monkeypatch.setattr(picture_process, "SECONDS", "never")
    with pytest.raises(RuntimeError):
        read_picture(io.BytesIO(JPEG))
    assert "ValueError" in capfd.readouterr().err
