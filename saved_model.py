"""Run a TensorFlow SavedModel fast on a CPU: load it once, then predict batches from any thread.

    from saved_model import SAVED_MODEL, SavedModel, newest_version

    model = SavedModel(newest_version("model_repository/mnist_model") / SAVED_MODEL)
    outputs = model.predict({"input_1": batch})  # {"output_1": (n, 10) float32}

A child process has TensorFlow convert the model to LiteRT, so that the process that serves neither imports TensorFlow
(2 s, 350 MB) nor calls it (0.5 ms for a picture instead of 0.01). TensorFlow itself runs what LiteRT cannot convert or
answers differently, and whatever shall run on a GPU.
"""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

SAVED_MODEL = "model.savedmodel"  # What Triton calls the SavedModel of a version.
SIGNATURE = "serving_default"
TOLERANCE = 1e-5  # How far LiteRT's answers may lie from TensorFlow's, absolutely or relatively.
MAX_SHAPES = 64  # Interpreters are kept per shape of the inputs; past this many shapes they are made anew.


class ModelError(ValueError):
    """A model that cannot be found, loaded, or run on what it was given; the message is a sentence for the user."""


class TensorSpec(NamedTuple):
    """What a signature says of a tensor: TensorFlow's name of its dtype, its shape with None for an open size.

    The shape is None where even the number of dimensions is open.
    """

    dtype: str
    shape: tuple[int | None, ...] | None


def versions(model_directory) -> list[int]:
    """Return the version numbers in a model's directory, oldest first. Triton's rule: digits, no leading zero."""
    directory = Path(model_directory)
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and name[0] != "0")


def newest_version(model_directory) -> Path:
    """Return the directory of the newest version; ModelError when there is none."""
    numbers = versions(model_directory)
    if not numbers:
        raise ModelError(f"no trained model in {model_directory}: run 'python train.py' first")
    return Path(model_directory) / str(numbers[-1])


def count_gpus() -> int:
    """Return how many GPUs TensorFlow sees; it imports TensorFlow."""
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))


class SavedModel:
    """A SavedModel, called by the names of the tensors in its signature `serving_default`.

    inputs, outputs: a TensorSpec for each tensor's name.
    runtime: what runs the model and, where that is not LiteRT, why: a line for the log.

    It can be handed to other processes, forked or pickled: what runs the model is made where it first predicts.
    """

    def __init__(self, path, device=None):
        """Load the SavedModel in the directory `path`, for the CPU or for a TensorFlow device such as "/GPU:0".

        Raises ModelError when there is none, or it has no such signature.
        """
        self._path, self._device = str(path), device
        self._lite = None
        self._function = None
        self._interpreters = {}
        if not Path(path, "saved_model.pb").is_file():
            raise ModelError(f"no SavedModel in {path}: it has no saved_model.pb")
        if device:
            self._function = _TensorFlowFunction(self._path, device)
            self.inputs, self.outputs = self._function.inputs, self._function.outputs
            self.runtime = f"TensorFlow on {device}"
        else:
            signature, self._lite = _convert_in_child(self._path)
            self.inputs, self.outputs = (
                {
                    name: TensorSpec(dtype, None if shape is None else tuple(shape))
                    for name, (dtype, shape) in signature[key].items()
                }
                for key in ("inputs", "outputs")
            )
            self.runtime = "LiteRT on the CPU" if self._lite else f"TensorFlow on the CPU: {signature['reason']}"

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch: every input of the signature by its name. Returns every output by its name, as an array.

        Raises ModelError for inputs that do not fit the signature, or that the model itself refuses.
        """
        shapes = tuple([(name, array.shape, array.dtype) for name, array in inputs.items()])
        idle = self._interpreters.get(shapes)
        if idle is None:
            self._check(inputs)
            if len(self._interpreters) >= MAX_SHAPES:
                self._interpreters.clear()
            idle = self._interpreters.setdefault(shapes, [])
        if not self._lite:
            if self._function is None:
                self._function = _TensorFlowFunction(self._path, self._device)
            return self._function(inputs)
        # An interpreter serves one call at a time, and one shape: resizing it costs more than it does. list.pop and
        # list.append are atomic, so threads share the idle interpreters without a lock.
        try:
            try:
                run = idle.pop()
            except IndexError:
                run = _lite_runner(self._lite, inputs)
            outputs = run(inputs)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"LiteRT cannot run the model on these inputs: {_reason(error)}") from error
        idle.append(run)
        return outputs

    def warm_up(self):
        """Run the model once: the first run is slow, so let no client wait for it."""
        self.predict(_examples(self.inputs, batch_size=1))

    def __getstate__(self):
        return self.__dict__ | {"_function": None, "_interpreters": {}}

    def _check(self, inputs):
        """Raise ModelError unless the inputs fit the signature: LiteRT would take any shape, and fail in it."""
        if inputs.keys() != self.inputs.keys():
            raise ModelError(f"the model takes the inputs {sorted(self.inputs)}, not {sorted(inputs)}")
        for name, (dtype, shape) in self.inputs.items():
            given = inputs[name]
            fits = shape is None or (
                given.ndim == len(shape)
                and all(size in (None, actual) for size, actual in zip(shape, given.shape, strict=True))
            )
            given_dtype = "string" if given.dtype.kind in "OSU" else given.dtype.name
            # LiteRT would copy the bytes of the other order as they are.
            if not fits or given_dtype != dtype or not given.dtype.isnative:
                raise ModelError(f"input {name} is {dtype} {shape}, not {given.dtype} {given.shape}")


class _TensorFlowFunction:
    """The signature as TensorFlow runs it."""

    def __init__(self, path, device):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            # Without it the first process takes all memory of every GPU, and the next model finds none.
            tf.config.experimental.set_memory_growth(gpu, True)
        try:
            self._loaded = tf.saved_model.load(path)  # Kept: its variables go with it.
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise ModelError(f"cannot load the SavedModel in {path}: {_reason(error)}") from error
        if SIGNATURE not in self._loaded.signatures:
            raise ModelError(f"the SavedModel in {path} has no signature {SIGNATURE!r}")
        self._tf, self._device = tf, device
        self._signature = self._loaded.signatures[SIGNATURE]
        self._specs = self._signature.structured_input_signature[1]
        self.inputs = _tensor_specs(self._specs)
        self.outputs = _tensor_specs(self._signature.structured_outputs)

    def __call__(self, inputs):
        tf = self._tf
        try:
            with tf.device(self._device):
                tensors = {name: tf.constant(array, self._specs[name].dtype) for name, array in inputs.items()}
                # By keyword: called by position, a loaded signature first raises and formats an error, for 2.5 ms.
                outputs = self._signature(**tensors)
        except (TypeError, ValueError, tf.errors.OpError) as error:
            raise ModelError(f"TensorFlow cannot run the model on these inputs: {_reason(error)}") from error
        # A scalar comes as a bare value, a string's as bytes.
        return {name: np.asarray(tensor.numpy(), tensor.dtype.as_numpy_dtype) for name, tensor in outputs.items()}


def _reason(error):
    """Return what a message of TensorFlow or LiteRT says is wrong: one line of it, or which operations LiteRT lacks."""
    message = str(error)
    missing = re.search(r"^(?:TF Select|Custom) ops: (.+)", message, re.M)  # The whole graph follows.
    if missing:
        return f"it has no {missing[1]}"
    # Names of nodes surround the line.
    return (message.partition("\n\t [[")[0].splitlines() or [type(error).__name__])[-1]


def _tensor_specs(tensors):
    return {
        name: TensorSpec(spec.dtype.name, None if spec.shape.rank is None else tuple(spec.shape))
        for name, spec in sorted(tensors.items())
    }


def _lite_runner(content, examples):
    """Return a function that runs the model on inputs shaped like these, and returns its outputs."""
    # TensorFlow's own tf.lite.Interpreter is deprecated for this package, which needs no TensorFlow.
    from ai_edge_litert.interpreter import Interpreter

    if not all(array.size for array in examples.values()):  # LiteRT itself mostly refuses that, but not always.
        raise ValueError("an input is empty")
    interpreter = Interpreter(model_content=content, num_threads=1)
    signature = interpreter.get_signature_runner(SIGNATURE)
    inputs, outputs = (
        {name: tensor["index"] for name, tensor in details.items()}
        for details in (signature.get_input_details(), signature.get_output_details())
    )
    del signature  # It would do what run() does, but allocate anew at every call, and nobody else may while it lives.
    for name, index in inputs.items():
        interpreter.resize_tensor_input(index, examples[name].shape)
    interpreter.allocate_tensors()

    def run(arrays):
        for name, index in inputs.items():
            interpreter.set_tensor(index, arrays[name])
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in outputs.items()}

    return run


def _examples(specs, batch_size):
    """Return a batch for each TensorSpec: every other example in 0…255, the others in 0…1, as models are fed.

    Raises ModelError for a dtype that NumPy lacks.
    """
    random = np.random.default_rng(0)
    examples = {}
    for name, (dtype, shape) in specs.items():
        values = random.random([batch_size if size is None else size for size in shape or ()])
        if values.ndim:
            values[::2] *= 255
        try:
            examples[name] = values.astype(str).astype(object) if dtype == "string" else values.astype(dtype)
        except TypeError as error:
            raise ModelError(f"there are no examples of {dtype}") from error
    return examples


def _convert_in_child(path):
    """Return the signature of a SavedModel (see _convert) and the model for LiteRT, or None where it is not for it."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, path, directory]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        # Told to use the older tf_keras, TensorFlow does not import Keras, which takes 0.5 s and converts nothing.
        # A GPU would take time, too, and TensorFlow's answers to compare with would be less exact.
        environment = os.environ | {"TF_USE_LEGACY_KERAS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
        with subprocess.Popen(command, **pipes, env=environment, text=True, errors="replace") as child:
            with suppress(ImportError):  # Meanwhile, for it takes a while, too; without it, the child says so.
                import ai_edge_litert.interpreter  # noqa: F401
            _, errors = child.communicate()
        last_words = errors.strip().rpartition("\n")[2]
        signature, lite = Path(directory, "signature.json"), Path(directory, "model.tflite")
        if not signature.exists():
            raise ModelError(last_words or f"cannot load the SavedModel in {path}: status {child.returncode}")
        signature = json.loads(signature.read_text())
        if child.returncode == 0:
            return signature, lite.read_bytes()
        return signature | {"reason": last_words}, None


def _convert(path, directory):
    """Write signature.json into `directory` and, when LiteRT runs the model as TensorFlow does, model.tflite."""
    function = _TensorFlowFunction(path, None)
    Path(directory, "signature.json").write_text(json.dumps({"inputs": function.inputs, "outputs": function.outputs}))
    shapes = [spec.shape for spec in (*function.inputs.values(), *function.outputs.values())]
    if any(shape is None or None in shape[1:] for shape in shapes):
        raise ModelError("LiteRT is used where only the first size of each tensor is open")

    import tensorflow as tf

    try:
        content = tf.lite.TFLiteConverter.from_saved_model(path, signature_keys=[SIGNATURE]).convert()
    except Exception as error:  # TensorFlow does not export the converter's own.
        raise ModelError(f"LiteRT cannot run the model: {_reason(error)}") from error
    examples = _examples(function.inputs, batch_size=4)
    expected, answers = function(examples), _lite_runner(content, examples)(examples)
    for name in expected:
        same_shape = answers[name].shape == expected[name].shape
        if not same_shape or not np.allclose(answers[name], expected[name], TOLERANCE, TOLERANCE, equal_nan=True):
            raise ModelError(f"LiteRT and TensorFlow differ by more than {TOLERANCE}, or in shape, in {name}")
    Path(directory, "model.tflite").write_bytes(content)


if __name__ == "__main__":
    gc.disable()  # TensorFlow's import leaves 250 000 objects, and to look for garbage among them takes 0.3 s.
    try:
        _convert(*sys.argv[1:])
    except ModelError as error:
        sys.exit(str(error))
    os._exit(0)  # To take TensorFlow down would take 0.7 s.
