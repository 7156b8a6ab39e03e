"""Serve any TensorFlow SavedModel from Triton: a drop-in for the TensorFlow backend that NVIDIA removed in 25.03.

A Triton *Python-based backend*: this file and saved_model.py side by side in the folder `backends/tensorflow` serve
every model whose configuration says `backend: "tensorflow"` or `platform: "tensorflow_savedmodel"`, or that has no
configuration at all. Triton runs one process of it per model instance.
"""

import json
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from saved_model import SAVED_MODEL, ModelError, SavedModel, count_gpus

DEFAULT_MAX_BATCH_SIZE = 4  # NVIDIA's backend gave it to a model that can batch and does not say how far.

# TensorFlow's name of each dtype that Triton carries too, and Triton's.
DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "string": "TYPE_STRING",
}


class TritonPythonModel:
    """One instance of one model; Triton creates it and calls its methods."""

    @staticmethod
    def auto_complete_config(config):
        """Fill in what config.pbtxt leaves out: names, data types and dims from the signature, and batching."""
        # The setters of pb_utils.ModelConfig do not know `reshape`, and what Triton reads back is this very dictionary.
        settings = config.as_dict()
        if not _is_complete(settings):  # Loading TensorFlow takes seconds, and initialize does it again.
            model = _load(pb_utils.get_model_dir(), settings)
            _complete(settings, model)
            _check(settings, model)
        if settings["max_batch_size"] > 1 and "sequence_batching" not in settings:
            settings.setdefault("dynamic_batching", {})  # Triton prefers batches of max_batch_size then.
        return config

    def initialize(self, args):
        """Load the SavedModel and refuse a configuration that contradicts it."""
        config = json.loads(args["model_config"])
        device = choose_device(args["model_instance_kind"], int(args["model_instance_device_id"]), count_gpus)
        self._model = _load(Path(args["model_repository"], args["model_version"]), config, device)
        pb_utils.Logger.log_info(f"{args['model_instance_name']}: run by {self._model.runtime}")
        _check(config, self._model)
        with suppress(ModelError):  # A model may refuse made-up inputs; its first request is a slow one then.
            self._model.warm_up()
        self._batched = config["max_batch_size"] > 0
        self._to_array = {name: _reader(spec) for name, spec in self._model.inputs.items()}
        outputs = [tensor["name"] for tensor in config["output"]]
        self._to_tensor = {name: _writer(self._model.outputs[name]) for name in outputs}

    def execute(self, requests):
        """Answer every request: in one run where they can be joined, each alone where not or where that run fails."""
        if self._batched and len(requests) > 1:
            try:
                return self._answer_together(requests)
            except ValueError:  # One of them is to blame: alone, each gets its own answer or its own error.
                pass
        return [self._answer(request) for request in requests]

    def _answer_together(self, requests):
        """Join the requests' inputs, run once and split the outputs; ValueError when any step of it fails."""
        parts = {
            name: [read(pb_utils.get_input_tensor_by_name(request, name)) for request in requests]
            for name, read in self._to_array.items()
        }
        sizes = [len(array) for array in next(iter(parts.values()))]
        outputs = self._model.predict({name: np.concatenate(arrays) for name, arrays in parts.items()})
        if any(array.shape[:1] != (sum(sizes),) for array in outputs.values()):
            raise ValueError("an output has not one row per row of the inputs, so it cannot be split")
        return [
            self._response({name: array[end - size : end] for name, array in outputs.items()})
            for size, end in zip(sizes, accumulate(sizes), strict=True)
        ]

    def _answer(self, request):
        """Run one request; its response carries the outputs or the error."""
        try:
            inputs = {
                name: read(pb_utils.get_input_tensor_by_name(request, name)) for name, read in self._to_array.items()
            }
            return self._response(self._model.predict(inputs))
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

    def _response(self, outputs):
        # With every output of the configuration: Triton itself leaves out those that a request did not ask for.
        return pb_utils.InferenceResponse([write(name, outputs[name]) for name, write in self._to_tensor.items()])


def choose_device(instance_kind, device_id, count_gpus):
    """Return TensorFlow's name of the device that an instance runs on, or None for the CPU and LiteRT.

    instance_kind is "CPU", "GPU" or "MODEL", device_id the GPU's number, both as Triton says them; count_gpus tells
    how many GPUs TensorFlow sees: none, where it was installed without its CUDA packages.
    """
    if instance_kind != "GPU":
        return None
    gpus = count_gpus()
    if device_id < gpus:
        return f"/GPU:{device_id}"
    pb_utils.Logger.log_warn(
        f"Triton places the model on GPU {device_id} and TensorFlow sees {gpus} GPUs, so the CPU runs it: install "
        "tensorflow[and-cuda], or say KIND_CPU in the model's instance_group"
    )
    return None


def _load(version_directory, config, device=None):
    try:
        return SavedModel(Path(version_directory, config["default_model_filename"] or SAVED_MODEL), device)
    except ModelError as error:
        raise pb_utils.TritonModelException(str(error)) from error


def _is_complete(config):
    tensors = config["input"] + config["output"]
    described = all(tensor["dims"] and tensor["data_type"] != "TYPE_INVALID" for tensor in tensors)
    return config["max_batch_size"] > 0 and config["input"] and config["output"] and described


def _complete(config, model):
    """Fill in max_batch_size and what the signature tells of each input and output; outputs may be a selection."""
    sides = {"input": model.inputs, "output": model.outputs}
    if config["max_batch_size"] == 0 and _can_batch(config, sides):
        config["max_batch_size"] = DEFAULT_MAX_BATCH_SIZE
    for side, specs in sides.items():
        tensors = {tensor["name"]: tensor for tensor in config[side]}
        if side == "input" or not tensors:
            tensors |= {name: {"name": name} for name in specs if name not in tensors}
        for name in tensors.keys() & specs.keys():
            _complete_tensor(f"{side} '{name}'", tensors[name], specs[name], config["max_batch_size"] > 0)
        config[side] = list(tensors.values())


def _can_batch(config, sides):
    """Tell whether the first dimension of every tensor is free, and no dims in the configuration count it."""
    shapes = [spec.shape for specs in sides.values() for spec in specs.values()]
    counted = any(
        tensor["dims"] and tensor["name"] in specs and len(_dims(tensor)) == len(specs[tensor["name"]].shape or ())
        for side, specs in sides.items()
        for tensor in config[side]
    )
    return not counted and all(shape and shape[0] is None for shape in shapes)


def _complete_tensor(title, tensor, spec, batched):
    if tensor.get("data_type", "TYPE_INVALID") == "TYPE_INVALID":
        tensor["data_type"] = _data_type(title, spec)
    if not tensor.get("dims"):
        if spec.shape is None:
            raise pb_utils.TritonModelException(
                f"{title}: the SavedModel leaves its rank open, so config.pbtxt must give its dims"
            )
        # Triton has no empty dims: a scalar travels as one element. Reshaped by Triton where the batch leaves it a
        # dimension, by _reader and _writer where it does not.
        tensor["dims"] = _sizes(spec.shape[batched:]) or [1]
        if batched and len(spec.shape) == 1:
            tensor["reshape"] = {"shape": []}


def _check(config, model):
    """Raise TritonModelException, with what is expected and what is given, when the two contradict each other."""
    batch = [-1] if config["max_batch_size"] > 0 else []
    for side, specs in (("input", model.inputs), ("output", model.outputs)):
        names = [tensor["name"] for tensor in config[side]]
        missing = [name for name in specs if side == "input" and name not in names]
        if missing or not specs.keys() >= set(names):
            raise pb_utils.TritonModelException(
                f"{side}s: the SavedModel expects {_quoted(specs)}, the configuration gives {_quoted(names)}"
            )
        for tensor in config[side]:
            title, spec = f"{side} '{tensor['name']}'", specs[tensor["name"]]
            expected_type, given_type = _data_type(title, spec), tensor["data_type"]
            given = batch + _dims(tensor)
            expected = given if spec.shape is None else _sizes(spec.shape) or [1]
            fits = len(expected) == len(given) and all(e in (-1, g) for e, g in zip(expected, given, strict=True))
            if not fits or expected_type != given_type:
                raise pb_utils.TritonModelException(
                    f"{title}: the SavedModel expects {expected_type} {expected}, the configuration gives "
                    f"{given_type} {given}" + (" with the batch as its first dimension" if batch else "")
                )
            if tensor.get("optional"):
                raise pb_utils.TritonModelException(f"{title}: a SavedModel has no optional inputs")


def _dims(tensor):
    """Return the dims as the model sees them, without the batch."""
    return tensor["reshape"]["shape"] if "reshape" in tensor else tensor["dims"]


def _data_type(title, spec):
    if spec.dtype not in DATA_TYPES:
        raise pb_utils.TritonModelException(f"{title}: Triton has no data type for TensorFlow's {spec.dtype}")
    return DATA_TYPES[spec.dtype]


def _sizes(shape):
    """Return a signature's shape as Triton writes it."""
    return [-1 if size is None else size for size in shape]


def _quoted(names):
    return ", ".join(f"'{name}'" for name in names)


def _reader(spec):
    """Return the function that turns a request's tensor into the array that the model reads."""
    # bfloat16 is the one dtype that NumPy lacks, so the one that pb_utils cannot turn into an array.
    read = _bfloat16_array if spec.dtype == "bfloat16" else pb_utils.Tensor.as_numpy
    return read if spec.shape != () else lambda tensor: read(tensor).reshape(())


def _writer(spec):
    """Return the function that turns a name and the model's array into a response's tensor."""
    write = _bfloat16_tensor if spec.dtype == "bfloat16" else pb_utils.Tensor
    return write if spec.shape != () else lambda name, array: write(name, array.reshape(1))


def _bfloat16_array(tensor):
    """Return a BF16 input as the array that TensorFlow reads (dtype ml_dtypes.bfloat16)."""
    import tensorflow as tf

    return tf.experimental.dlpack.from_dlpack(tensor.to_dlpack()).numpy()


def _bfloat16_tensor(name, array):
    import tensorflow as tf

    return pb_utils.Tensor.from_dlpack(name, tf.experimental.dlpack.to_dlpack(tf.constant(array, tf.bfloat16)))
