"""saved_model.py: which version is the newest, LiteRT's answers against TensorFlow's, and what falls back or fails."""

import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from saved_models import save, save_graph, saved_model_path, with_offset

from mnist_preprocess import INPUT_NAME, MODEL_NAME, OUTPUT_NAME, ROOT
from saved_model import DIGESTS, SAVED_MODEL, TWIN, ModelError, SavedModel, add_twin, main, newest_version, versions


@pytest.fixture(scope="module")
def trained(trained_repository, tmp_path_factory):
    """The trained model with its twin."""
    path = tmp_path_factory.mktemp("with twin") / SAVED_MODEL
    shutil.copytree(trained_repository / MODEL_NAME / "1" / SAVED_MODEL, path)
    add_twin(path)
    return path


@pytest.fixture(scope="module")
def model(trained):
    return SavedModel(trained)


@pytest.fixture(scope="module")
def pictures(mnist_test):
    return mnist_test[0][:1000].astype(np.float32)


def predict(model, pictures):
    return model.predict({INPUT_NAME: pictures})[OUTPUT_NAME]


def test_versions_are_folders_of_digits_in_the_order_of_numbers(tmp_path):
    for name in ("1", "9", "10", "02", "0", "latest", ".3", "4.tmp", "-5", "6a", "²", "٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").write_text("a file")
    assert versions(tmp_path) == [1, 9, 10]
    assert newest_version(str(tmp_path)) == tmp_path / "10"


@pytest.mark.parametrize("exists", [True, False])
def test_no_version(tmp_path, exists):
    directory = tmp_path if exists else tmp_path / "missing"
    assert versions(directory) == []
    with pytest.raises(ModelError) as error:
        newest_version(directory)
    assert str(error.value) == f"no trained model in {directory}: run 'python train.py' first"


def test_litert_answers_as_tensorflow_does(model, trained, pictures):
    assert model.runtime == "LiteRT on the CPU"
    assert model.inputs == {INPUT_NAME: ("float32", (None, 28, 28, 1))}
    assert model.outputs == {OUTPUT_NAME: ("float32", (None, 10))}
    on_tensorflow = SavedModel(trained, "/CPU:0")
    assert on_tensorflow.runtime == "TensorFlow on /CPU:0"
    answers = predict(model, pictures)
    assert (answers.shape, answers.dtype) == ((1000, 10), np.float32)
    np.testing.assert_allclose(answers, predict(on_tensorflow, pictures), rtol=0, atol=1e-5)


def test_batches_of_every_size_give_the_same_rows(model, pictures):
    expected = predict(model, pictures[:20])
    for size in range(1, 21):
        np.testing.assert_allclose(predict(model, pictures[:size]), expected[:size], rtol=0, atol=1e-6)


def test_answers_belong_to_the_caller(model, pictures):
    first = predict(model, pictures[:1])
    copy = first.copy()
    predict(model, pictures[1:2])
    assert np.array_equal(first, copy)


def test_many_threads_at_once(model, pictures):
    expected = predict(model, pictures)
    sizes = np.random.default_rng(0).integers(1, 5, 400)

    def ask(place):
        start = place * 7 % 990
        rows = slice(start, start + sizes[place])
        return np.abs(predict(model, pictures[rows]) - expected[rows]).max()

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(ask, range(400))) < 1e-5


def test_pickled_and_forked_models_answer(model, pictures):
    expected = predict(model, pictures[:3])
    copy = pickle.loads(pickle.dumps(model))
    assert np.array_equal(predict(copy, pictures[:3]), expected)
    assert (copy.runtime, copy.inputs, copy.outputs) == (model.runtime, model.inputs, model.outputs)


FORKED = """
import multiprocessing, sys
import numpy as np
from saved_model import SavedModel
model = SavedModel(sys.argv[1])
batch = {"input_1": np.zeros((1, 28, 28, 1), np.float32)}
def ask(queue):
    queue.put(model.predict(batch)["output_1"].sum())
queue = multiprocessing.get_context("fork").SimpleQueue()
child = multiprocessing.get_context("fork").Process(target=ask, args=(queue,))
child.start()
print(queue.get(), model.predict(batch)["output_1"].sum())
child.join()
print("tensorflow" in sys.modules)
print(open("/proc/self/status").read().partition("VmRSS:")[2].split()[0])
"""


def test_litert_process_forks_stays_small_and_never_imports_tensorflow(trained):
    command = [sys.executable, "-c", FORKED, trained]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    sums, imported, kibibytes = result.stdout.splitlines()
    assert [float(number) for number in sums.split()] == pytest.approx([1, 1], abs=1e-5)
    assert imported == "False"
    assert int(kibibytes) < 100_000


def random_rows(x):
    return {"y": x + tf.random.uniform(tf.shape(x))}


def doubled(x):
    return {"y": 2 * x}


def texts(x):
    return {"y": tf.strings.join([x, "!"])}


def total(x):
    return {"y": tf.reduce_sum(x, axis=1, keepdims=True)}


def beta(x):
    return {"y": tf.math.betainc(x, x + 1.0, tf.fill(tf.shape(x), 0.5))}


def one_more_row(x):
    return {"y": tf.concat([x, tf.ones([1, 4])], axis=0)}


def frequencies(x):
    return {"y": tf.math.real(tf.signal.fft(tf.cast(x, tf.complex64)))}


def length(x):
    return {"y": tf.strings.length(tf.strings.as_string(x))}


def checked(x):
    tf.debugging.assert_less(x, 1e9)
    return {"y": 2 * x}


def branched(x):
    return {"y": tf.cond(tf.reduce_sum(x) > 0, lambda: 2 * x, lambda: 3 * x)}


def printed(x):
    tf.print(x)
    return {"y": 2 * x}


def square_root(x):
    """A function whose answers to negative numbers are NaN."""
    return {"y": tf.nn.relu(tf.sqrt(x))}


def rows(x):
    return {"y": tf.gather(tf.constant([0.5, 1.5, 2.5, 3.5]), x)}


@pytest.mark.parametrize(
    ("function", "shape", "dtype", "reason"),
    [
        (texts, [None, 1], tf.string, "its x is string, which LiteRT and NumPy do not share"),
        (total, [None, None], tf.float32, "more than the first size of a tensor is open"),
        (doubled, None, tf.float32, "more than the first size of a tensor is open"),
        (beta, [None, 4], tf.float32, "for LiteRT cannot run it: it has no Betainc"),
        (random_rows, [None, 4], tf.float32, "its RandomUniform checks, keeps, prints or draws something"),
        (length, [None, 4], tf.float32, "it has no AsString, StringLength"),
        (doubled, [None, 4], tf.complex64, "its x is complex64, which LiteRT and NumPy do not share"),
        (checked, [None, 4], tf.float32, "checks, keeps, prints or draws something"),
        (printed, [None, 4], tf.float32, "its PrintV2 checks, keeps, prints or draws something"),
        (branched, [None, 4], tf.float32, "If is control flow"),
        (frequencies, [None, 4], tf.float32, "differ in y"),
        (one_more_row, [None, 4], tf.float32, "y has 2 rows for 1 rows of the inputs"),
    ],
)
def test_models_that_get_no_twin(tmp_path, function, shape, dtype, reason):
    save(tmp_path, "model", function, x=(shape, dtype))
    path = tmp_path / "model" / "1" / SAVED_MODEL
    with pytest.raises(ModelError) as error:
        add_twin(path)
    is_sentence(error, f"the SavedModel in {path} gets no twin", reason)
    assert not list((path / TWIN).parent.glob("*"))
    model = SavedModel(path)
    assert model.runtime == "TensorFlow on the CPU"
    if dtype is tf.string:
        assert model.predict({"x": np.array([[b"a"], [b"b"]], object)})["y"].tolist() == [[b"a!"], [b"b!"]]
    else:
        x = np.array([[0.5, 0.25, 0.75, 1.0]] * 2, dtype.as_numpy_dtype)
        answer = model.predict({"x": x})["y"]
        if function is random_rows:
            assert ((x <= answer) & (answer < x + 1)).all()
        else:
            np.testing.assert_allclose(answer, function(x)["y"], rtol=1e-6)


def same_as_tensorflow(model, on_tensorflow, inputs):
    """Check that a model gives the very answers that TensorFlow gives, or refuses the inputs in the same words."""
    try:
        expected = on_tensorflow.predict(inputs)
    except ModelError as refusal:
        with pytest.raises(ModelError) as error:
            model.predict(inputs)
        assert str(error.value) == str(refusal)
    else:
        answers = model.predict(inputs)
        assert answers.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(answers[name], array)


@pytest.mark.parametrize("function", [doubled, square_root, rows])
def test_a_twin_answers_and_refuses_what_tensorflow_does(tmp_path, function):
    dtype = tf.int32 if function is rows else tf.float32
    save(tmp_path, "model", function, x=([None, 3], dtype))
    path = tmp_path / "model" / "1" / SAVED_MODEL
    assert main([str(path)]) == 0
    with_twin, without = SavedModel(path), SavedModel(path, "/CPU:0")
    assert with_twin.runtime == "LiteRT on the CPU"
    numbers = [0, 1, 3, 2, 9, -1, 2**30] + ([] if function is rows else [np.nan, np.inf, -np.inf, 0.25])
    for number in numbers:
        same_as_tensorflow(with_twin, without, {"x": np.full((2, 3), number, dtype.as_numpy_dtype)})
    assert with_twin.predict({"x": np.zeros((0, 3), dtype.as_numpy_dtype)})["y"].shape == (0, 3)


def test_a_twin_of_another_model_is_left_alone(trained, tmp_path, pictures):
    path = tmp_path / SAVED_MODEL
    shutil.copytree(trained, path)
    (path / "saved_model.pb").write_bytes((path / "saved_model.pb").read_bytes() + bytes([0x08, 0x01]))
    model = SavedModel(path)
    assert model.runtime.startswith("TensorFlow on the CPU: its twin was made for another model")
    assert predict(model, pictures[:3]).shape == (3, 10)
    add_twin(path)
    assert SavedModel(path).runtime == "LiteRT on the CPU"


def test_a_damaged_twin_is_refused(trained, tmp_path):
    path = tmp_path / SAVED_MODEL
    shutil.copytree(trained, path)
    (path / DIGESTS).unlink()
    for content in (b"", b"damaged", (path / TWIN).read_bytes()[:1000]):
        (path / TWIN).write_bytes(content)
        with pytest.raises(ModelError) as error:
            SavedModel(path)
        is_sentence(error, path / TWIN, "delete it to have TensorFlow run the model")


def test_missing_saved_model(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelError, match="it has no saved_model"):
            SavedModel(path)


def is_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    for part in parts:
        assert str(part) in text


@pytest.mark.parametrize("device", [None, "/CPU:0"])
@pytest.mark.parametrize("content", [b"", b"damaged", b"\x08\x01" * 100])
def test_damaged_saved_model(tmp_path, content, device):
    (tmp_path / "saved_model.pb").write_bytes(content)
    with pytest.raises(ModelError) as error:
        SavedModel(tmp_path, device)
    is_sentence(error, tmp_path)


def test_saved_model_without_the_signature(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path))
    with pytest.raises(ModelError) as error:
        SavedModel(tmp_path)
    is_sentence(
        error, "expected 'serving_default' signature: the SavedModel in", tmp_path, "has none for the tag 'serve'"
    )


def test_the_only_other_signature_is_the_default_one(tmp_path):
    module = tf.Module()
    module.double = tf.function(doubled, input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    for names, served in ((["other"], "other"), (["other", "serving_default"], "serving_default")):
        path = tmp_path / served
        tf.saved_model.save(module, str(path), signatures=dict.fromkeys(names, module.double))
        model = SavedModel(path)
        assert model.signature == served
        assert model.predict({"x": np.ones((3, 2), np.float32)})["y"].tolist() == [[2, 2]] * 3
        assert ("signature 'other'" in model.runtime) == (served == "other")
    with pytest.raises(ModelError) as error:
        SavedModel(path, signature="absent")
    is_sentence(error, "expected 'absent' signature", "has 'other', 'serving_default' for the tag 'serve'")
    with pytest.raises(ModelError) as error:
        SavedModel(path, tag="train")
    is_sentence(error, "expected 'train' tag", "has graphs with the tags 'serve'")


def test_a_state_begins_as_it_was_saved_and_goes_on(tmp_path):
    module = tf.Module()
    module.total = tf.Variable(0.0)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def accumulate(x):
        return {"y": module.total.assign_add(tf.reduce_sum(x))}

    tf.saved_model.save(module, str(tmp_path), signatures=accumulate)
    model, other = SavedModel(tmp_path), SavedModel(tmp_path)
    assert model.keeps_state()
    model.warm_up()
    assert [model.predict({"x": np.ones(size, np.float32)})["y"] for size in (1, 2, 1)] == [1, 3, 4]
    assert other.predict({"x": np.ones(1, np.float32)})["y"] == 1
    with pytest.raises(ModelError) as error:
        add_twin(tmp_path)
    is_sentence(error, "its AssignAddVariableOp checks, keeps, prints or draws something")


def test_a_twin_does_not_answer_for_a_model_that_is_initialised_otherwise(tmp_path):
    save_graph(tmp_path, "with_offset", with_offset)
    path = saved_model_path(tmp_path, "with_offset", 1)
    add_twin(path)
    x = np.array([[1, 2]], np.float32)
    assert SavedModel(path).predict({"x": x})["y"].tolist() == [[1, 2]]
    assert SavedModel(path, init_operations=["set_offset"]).predict({"x": x})["y"].tolist() == [[8, 9]]


@pytest.mark.parametrize("folder", ["brackets [1]", "a space and an umlaut ä", "star * question ?"])
def test_folders_of_any_name(trained, tmp_path, pictures, folder):
    path = tmp_path / folder / SAVED_MODEL
    shutil.copytree(trained, path, ignore=shutil.ignore_patterns("assets.extra"))
    expected = predict(SavedModel(trained, "/CPU:0"), pictures[:2])
    np.testing.assert_array_equal(predict(SavedModel(path), pictures[:2]), expected)
    add_twin(path)
    np.testing.assert_allclose(predict(SavedModel(path), pictures[:2]), expected, rtol=0, atol=1e-5)


WITHOUT_KERAS = """
import sys
from saved_model import SavedModel
SavedModel(sys.argv[1], "/CPU:0").warm_up()
print("tensorflow" in sys.modules, "keras" in sys.modules, "tf_keras" in sys.modules)
"""


def test_tensorflow_comes_without_keras_and_its_settings(trained, tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "theano", "floatx": "bfloat16"}')
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERAS, trained],
        cwd=ROOT,
        env=os.environ | {"KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "theano"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["True", "False", "False"], result.stderr


def test_saved_model_without_its_variables(trained, tmp_path):
    path = tmp_path / SAVED_MODEL
    shutil.copytree(trained, path)
    shutil.rmtree(path / "variables")
    with pytest.raises(ModelError) as error:
        SavedModel(path)
    is_sentence(error, f"the SavedModel in {path} has no variables/variables.index: copy the whole folder")


PICTURE = np.zeros((1, 28, 28, 1), np.float32)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "the model takes the inputs ['input_1'], not []"),
        ({"input_2": PICTURE}, "the model takes the inputs ['input_1'], not ['input_2']"),
        ({"input_1": PICTURE, "input_2": PICTURE}, "not ['input_1', 'input_2']"),
        ({"input_1": PICTURE[0]}, "input input_1 is float32 (None, 28, 28, 1), not float32 (28, 28, 1)"),
        ({"input_1": PICTURE[:, :27]}, "not float32 (1, 27, 28, 1)"),
        ({"input_1": PICTURE.astype(np.uint8)}, "not uint8 (1, 28, 28, 1)"),
        ({"input_1": PICTURE.astype(np.float64)}, "not float64 (1, 28, 28, 1)"),
        ({"input_1": PICTURE.astype(">f4")}, "not >f4 (1, 28, 28, 1)"),
        ({"input_1": PICTURE.astype(str)}, "input input_1 is float32 (None, 28, 28, 1), not"),
    ],
)
@pytest.mark.parametrize("device", [None, "/CPU:0"])
def test_inputs_that_do_not_fit(request, trained, model, inputs, sentence, device):
    with pytest.raises(ModelError) as error:
        (SavedModel(trained, device) if device else model).predict(inputs)
    is_sentence(error, sentence)


@pytest.mark.parametrize("batch", [PICTURE + np.nan, PICTURE - np.inf])
def test_what_a_twin_does_not_answer_tensorflow_does(model, trained, pictures, batch):
    expected = predict(model, pictures[:1])
    same_as_tensorflow(model, SavedModel(trained, "/CPU:0"), {INPUT_NAME: batch})
    assert np.array_equal(predict(model, pictures[:1]), expected)


def test_an_empty_batch_has_an_empty_answer(model):
    answer = predict(model, PICTURE[:0])
    assert (answer.shape, answer.dtype) == ((0, 10), np.float32)
