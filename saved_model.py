"""Run a TensorFlow SavedModel: load it once, then predict batches from any thread.

    from saved_model import SavedModel, newest_version

    model = SavedModel(newest_version("model_repository/mnist_model") / "model.savedmodel")
    outputs = model.predict({"input_1": batch})  # {"output_1": (n, 10) float32}
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

SIGNATURE = "serving_default"


class TensorSpec(NamedTuple):
    """What a signature says of one tensor: TensorFlow's name of its dtype, and its shape with None for any size."""

    dtype: str
    shape: tuple[int | None, ...] | None


class ModelError(ValueError):
    """A model that cannot be found or run; the message is a sentence for the user."""


def versions(model_directory) -> list[int]:
    """Return the version numbers that a model's directory holds, oldest first, by Triton's rules for their names."""
    directory = Path(model_directory)
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and not name.startswith("0"))


def newest_version(model_directory) -> Path:
    """Return the directory of the newest version; ModelError when there is none."""
    numbers = versions(model_directory)
    if not numbers:
        raise ModelError(f"no trained model in {model_directory}: run 'python train.py' first")
    return Path(model_directory) / str(numbers[-1])


class SavedModel:
    """A loaded SavedModel.

    inputs and outputs map the names of the signature `serving_default` to their TensorSpec.
    """

    def __init__(self, path):
        """Load the SavedModel in the directory `path`; ModelError when there is none or it has no such signature."""
        import tensorflow as tf

        try:
            loaded = tf.saved_model.load(str(path))
        except OSError as error:
            raise ModelError(f"no SavedModel in {path}: {error}") from error
        if SIGNATURE not in loaded.signatures:
            raise ModelError(f"the SavedModel in {path} has no signature {SIGNATURE!r}")
        self._loaded = loaded  # TensorFlow frees the function's weights with the object that was loaded.
        self._function = loaded.signatures[SIGNATURE]
        self._dtypes = {name: spec.dtype for name, spec in self._function.structured_input_signature[1].items()}
        self._constant = tf.constant
        self._errors = (tf.errors.OpError, TypeError, ValueError)
        self.inputs = _specs(self._function.structured_input_signature[1])
        self.outputs = _specs(self._function.structured_outputs)

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch: every input of the signature by name, as an array of its dtype and shape.

        Returns the outputs by name, as arrays. Raises ModelError when the model cannot run on these inputs.
        """
        try:
            tensors = {name: self._constant(array, self._dtypes[name]) for name, array in inputs.items()}
            # By keyword: the positional call of a loaded signature raises and formats an error first, 2.8 ms
            # against 0.36.
            outputs = self._function(**tensors)
        except self._errors as error:
            raise ModelError(f"TensorFlow cannot run the model on these inputs: {_reason(error)}") from error
        return {name: _array(tensor) for name, tensor in outputs.items()}


def _array(tensor):
    """Return a tensor as an array; TensorFlow gives a scalar as a bare value, a string's as bytes."""
    array = tensor.numpy()
    return array if isinstance(array, np.ndarray) else np.array(array, tensor.dtype.as_numpy_dtype)


def _reason(error):
    """Return the line of TensorFlow's message that says what is wrong; names of the graph's nodes surround it."""
    return (str(error).partition("\n\t [[")[0].splitlines() or [type(error).__name__])[-1]


def _specs(tensors) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(tensor.dtype.name, tuple(tensor.shape) if tensor.shape.rank is not None else None)
        for name, tensor in sorted(tensors.items())
    }
