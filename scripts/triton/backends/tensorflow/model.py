"""Serve any TensorFlow SavedModel from Triton: a drop-in for the TensorFlow backend that NVIDIA removed in 25.03.

A Triton *Python-based backend*: this file and saved_model.py side by side in the folder `backends/tensorflow` serve
every model whose configuration says `backend: "tensorflow"` or `platform: "tensorflow_savedmodel"`, or that has no
configuration at all. Triton runs one process of it per model instance. scripts/triton/README.md lists which settings it
honours and which it refuses.
"""

import json
import os
import signal
from itertools import accumulate
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from saved_model import SAVED_MODEL, TAG, ModelError, SavedModel, count_gpus

DEFAULT_MAX_BATCH_SIZE = 4  # NVIDIA's backend gave it to a model that can batch and does not say how far.

# The fields of a control input that hold its values, of which one is given; the data type is in the field's name.
CONTROL_VALUES = ("int32_false_true", "fp32_false_true", "bool_false_true")
MIXED_PRECISION = "auto_mixed_precision"
TRUE, FALSE = ("true", "on", "1"), ("false", "off", "0")  # How NVIDIA's backend reads a truth value, in any case.
# Triton's names of the two kinds of errors that a backend in Python cannot tell it apart, and what NVIDIA's said next.
UNLOADABLE = "Invalid argument: unable to load model"
NOT_COMPLETED = "Internal: unable to autofill for"

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
        """Fill in what config.pbtxt leaves out: names, data types and dims from the signature, and batching.

        What cannot be served is refused here where it can be, since initialize runs in several instances at once.
        """
        _ignore_interrupts()
        # The setters of pb_utils.ModelConfig do not know `reshape`, and what Triton reads back is this very dictionary.
        settings = config.as_dict()
        model = _load(pb_utils.get_model_dir(), settings)
        _complete(settings, model)
        _check(settings, model)
        return config

    def initialize(self, args):
        """Load the SavedModel and refuse a configuration that contradicts it."""
        _ignore_interrupts()
        settings = json.loads(args["model_config"])
        device = choose_device(args["model_instance_kind"], int(args["model_instance_device_id"]), count_gpus)
        self._model = _load(Path(args["model_repository"], args["model_version"]), settings, device)
        _check(settings, self._model)
        try:
            self._model.warm_up()
        except ModelError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        _warn_of_settings(settings, device)
        pb_utils.Logger.log_info(f"{args['model_instance_name']}: run by {self._model.runtime}")
        self._batched = settings["max_batch_size"] > 0
        self._batch_inputs = settings.get("batch_input", [])
        self._batch_outputs = {
            name: output["source_input"][0]
            for output in settings.get("batch_output", [])
            for name in output["target_name"]
        }
        self._ragged = {tensor["name"] for tensor in settings["input"] if tensor.get("allow_ragged_batch")}
        made_here = _batch_input_types(settings)
        self._readers = {name: _reader(spec) for name, spec in self._model.inputs.items() if name not in made_here}
        names = [tensor["name"] for tensor in settings["output"]]
        self._writers = {name: _writer(self._model.outputs[name]) for name in names}
        self._may_repeat = "sequence_batching" not in settings and not self._model.keeps_state()

    def execute(self, requests):
        """Answer every request: in one run where they can be joined, each alone where not or where that run fails."""
        if self._batched:
            return self._answer(requests)
        return [response for request in requests for response in self._answer([request])]

    def _answer(self, requests):
        """Run the requests as one batch. Returns the response to each: its rows of the outputs, or the error."""
        try:
            parts = {
                name: [read(pb_utils.get_input_tensor_by_name(request, name)) for request in requests]
                for name, read in self._readers.items()
            }
            outputs = self._model.predict(self._join(parts), self._wanted_outputs(requests))
            answers = {name: self._split(name, outputs[name], parts) for name in self._writers if name in outputs}
        except (ValueError, pb_utils.TritonModelException) as error:
            if len(requests) > 1 and self._may_repeat:  # One of them is to blame: alone, each gets its own answer.
                return [response for request in requests for response in self._answer([request])]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
        # Triton itself leaves out the outputs that a request did not ask for.
        return [
            pb_utils.InferenceResponse([self._writers[name](name, arrays[place]) for name, arrays in answers.items()])
            for place in range(len(requests))
        ]

    def _join(self, parts):
        """Return the inputs of the model, from those of the requests; ValueError where they cannot be joined."""
        inputs = {
            name: np.concatenate([array.ravel() for array in arrays] if name in self._ragged else arrays)
            if name in self._ragged or len(arrays) > 1
            else arrays[0]
            for name, arrays in parts.items()
        }
        for batch_input in self._batch_inputs:
            values = BATCH_INPUTS[batch_input["kind"]](parts[batch_input["source_input"][0]])
            inputs |= {name: np.array(values, self._model.inputs[name].dtype) for name in batch_input["target_name"]}
        return inputs

    def _wanted_outputs(self, requests):
        """Return the names of the outputs for TensorFlow to compute. A twin computes all, so nobody asks for them."""
        if self._model.twin:
            return None
        wanted = {name for request in requests for name in request.requested_output_names()}
        return [name for name in self._writers if name in wanted]

    def _split(self, name, array, parts):
        """Return each request's part of an output; ModelError when the output has other rows than the inputs."""
        if not self._batched:
            return [array]
        source = self._batch_outputs.get(name)
        if source:  # One element per element of that input, in its shape.
            array, sizes = array.ravel(), [part.size for part in parts[source]]
        else:
            sizes = [len(part) for part in next(iter(parts.values()))]
        if array.shape[:1] != (sum(sizes),):
            raise ModelError(f"output '{name}' has the shape {list(array.shape)} for a batch of {sum(sizes)}")
        arrays = [array[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
        if source:
            return [array.reshape(part.shape) for array, part in zip(arrays, parts[source], strict=True)]
        return arrays


def _ignore_interrupts():
    """Leave Ctrl-C, which reaches all processes of the terminal, to Triton, which then ends this one in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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


def _load(version_directory, settings, device=None):
    """Return the SavedModel that the settings ask for, on `device`."""
    if settings.get("platform") == "tensorflow_graphdef":
        raise _refusal(settings, "a GraphDef has no signature: export the model as a SavedModel")
    directory = Path(version_directory)
    parameters = _parameters(settings)
    try:
        return SavedModel(
            directory / (settings["default_model_filename"] or SAVED_MODEL),
            device,
            parameters.get("TF_GRAPH_TAG") or TAG,
            parameters.get("TF_SIGNATURE_DEF") or None,
            options=_session_options(settings, parameters, device),
            libraries=_operation_libraries(settings, directory),
            init_operations=_init_operations(settings, directory, parameters.get("TF_INIT_OPS_FILE")),
        )
    except ModelError as error:
        raise _refusal(settings, error) from error


def _refusal(settings, reason, start=UNLOADABLE):
    return pb_utils.TritonModelException(f"{start} '{settings['name']}', {reason}")


def _parameters(settings):
    return {name: value["string_value"] for name, value in settings.get("parameters", {}).items()}


def _session_options(settings, parameters, device):
    """Return the fields of TensorFlow's ConfigProto that the settings ask for."""
    threads = {"TF_NUM_INTRA_THREADS": 0, "TF_NUM_INTER_THREADS": 0, "MAX_SESSION_SHARE_COUNT": 1}
    for name, least in threads.items():
        text = parameters.get(name, str(least))
        if not text.strip().isdecimal() or int(text) < least:
            kind = "non-negative" if least == 0 else "positive"
            raise _refusal(
                settings,
                f"parameter '{name}' must be {kind} number for TensorFlow model '{settings['name']}', not '{text}'",
            )
        threads[name] = int(text)
    per_session = parameters.get("TF_USE_PER_SESSION_THREADS", "false")
    options = {
        "intra_op_parallelism_threads": threads["TF_NUM_INTRA_THREADS"],
        "inter_op_parallelism_threads": threads["TF_NUM_INTER_THREADS"],
        "use_per_session_threads": _is_true(settings, "parameter 'TF_USE_PER_SESSION_THREADS'", per_session),
    }
    level = settings.get("optimization", {}).get("graph", {}).get("level", 0)
    graph_options = {}
    if level:  # OptimizerOptions.GlobalJitLevel: XLA off, on, and on with more of it.
        graph_options["optimizer_options"] = {"global_jit_level": -1 if level < 0 else min(level, 2)}
    if device:
        if MIXED_PRECISION in _gpu_accelerators(settings):
            graph_options["rewrite_options"] = {"auto_mixed_precision": 1}  # RewriterConfig.ON
        share = _command_line_number(settings, "gpu-memory-fraction", float, default=0)
        if share:
            options["gpu_options"] = {"per_process_gpu_memory_fraction": share}
    soft_placement = _command_line_setting("allow-soft-placement")
    if soft_placement:
        options["allow_soft_placement"] = _is_true(settings, "--backend-config: allow-soft-placement", soft_placement)
    return options | {"graph_options": graph_options}


def _is_true(settings, name, text):
    if text.lower() not in (*TRUE, *FALSE):
        raise _refusal(settings, f"{name} must be true or false, not '{text}'")
    return text.lower() in TRUE


def _operation_libraries(settings, directory):
    """Return the paths of the shared libraries of operations, which stand in the model's folder or are absolute."""
    names = settings.get("model_operations", {}).get("op_library_filename", [])
    for name in names:
        if not (directory.parent / name).is_file():
            raise _refusal(settings, f"op_library_filename: there is no {directory.parent / name}")
    return [str(directory.parent / name) for name in names]


def _init_operations(settings, directory, name):
    """Return the names of the operations in the JSON file `name`, of the version's folder or of the model's."""
    if not name:
        return []
    for file in (directory / name, directory.parent / name):
        if file.is_file():
            try:
                return list(json.loads(file.read_text())["init_ops"])
            except (KeyError, TypeError, ValueError) as error:
                raise _refusal(settings, f"TF_INIT_OPS_FILE: {file} is no JSON with a list 'init_ops'") from error
    raise _refusal(settings, f"TF_INIT_OPS_FILE: there is no {name} in {directory} or {directory.parent}")


def _command_line_setting(name):
    """Return what the option --backend-config of tritonserver, which starts this process, gives `name`, or None.

    Triton tells a Python backend none of it. What is meant for this backend precedes what is meant for all.
    """
    arguments = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace")
    arguments = arguments.replace("--backend-config\0", "--backend-config=").split("\0")
    for prefix in ("tensorflow,", ""):
        option = f"--backend-config={prefix}{name}="
        values = [argument.removeprefix(option) for argument in arguments if argument.startswith(option)]
        if values:
            return values[-1]
    return None


def _command_line_number(settings, name, kind, default):
    text = _command_line_setting(name)
    try:
        return kind(text) if text else default
    except ValueError as error:
        raise _refusal(settings, f"--backend-config: {name} must be a number, not '{text}'") from error


def _control_types(settings):
    """Return the data type of each input by which Triton tells a model where a sequence stands."""
    types = {}
    for tensor in settings.get("sequence_batching", {}).get("control_input", []):
        for control in tensor["control"]:
            types[tensor["name"]] = (
                control["data_type"]
                if control["kind"] == "CONTROL_SEQUENCE_CORRID"
                else next(f"TYPE_{key.partition('_')[0].upper()}" for key in CONTROL_VALUES if control.get(key))
            )
    return types


def _batch_input_types(settings):
    """Return the data type of each input that is made here, from how many elements the requests have."""
    return {name: tensor["data_type"] for tensor in settings.get("batch_input", []) for name in tensor["target_name"]}


def _complete(settings, model):
    """Fill in max_batch_size and what the signature tells of each input and output; outputs may be a selection."""
    filled = _control_types(settings) | _batch_input_types(settings)
    sides = {
        "input": {name: spec for name, spec in model.inputs.items() if name not in filled},
        "output": model.outputs,
    }
    for side, specs in sides.items():
        given = [tensor["name"] for tensor in settings[side]]
        if side == "input" or not given:
            settings[side] += [{"name": name} for name in specs if name not in given]
    _check_names(settings, model)
    shapes = [spec.shape for spec in (*model.inputs.values(), *model.outputs.values())]
    if settings["max_batch_size"] > 0:
        if any(shape is not None and shape[:1] != (None,) for shape in shapes):
            raise _refusal(
                settings,
                f"configuration specified max-batch {settings['max_batch_size']} but model signature does not support "
                "batching",
                NOT_COMPLETED,
            )
    elif all(shape and shape[0] is None for shape in shapes) and _leaves_out_a_batch(settings, sides):
        size = _command_line_number(settings, "default-max-batch-size", int, DEFAULT_MAX_BATCH_SIZE)
        settings["max_batch_size"] = max(size, 0)
    for side, specs in sides.items():
        for tensor in settings[side]:
            _complete_tensor(settings, side, tensor["name"], tensor, specs[tensor["name"]])
    if settings["max_batch_size"] > 1 and "sequence_batching" not in settings:
        settings.setdefault("dynamic_batching", {})  # Triton prefers batches of max_batch_size then.


def _leaves_out_a_batch(settings, sides):
    """Tell whether the dims in the configuration, if there are any, lack the first size of the signature's shapes."""
    hints = {
        len(_dims(tensor)) + 1 == len(specs[tensor["name"]].shape)
        for side, specs in sides.items()
        for tensor in settings[side]
        if tensor.get("dims")
    }
    if len(hints) > 1:
        raise _refusal(
            settings,
            "model tensor configurations are contradicting each other in terms of whether batching is supported",
            NOT_COMPLETED,
        )
    return hints != {False}


def _complete_tensor(settings, side, name, tensor, spec):
    if tensor.get("data_type", "TYPE_INVALID") == "TYPE_INVALID":
        tensor["data_type"] = _data_type(settings, side, name, spec)
    if not tensor.get("dims"):
        if not spec.shape:
            raise pb_utils.TritonModelException(
                f"Unable to autofill for '{settings['name']}': the rank of model tensor '{name}' is 0 and dimensions "
                "are not defined"  # Which NVIDIA's backend says of an unknown rank, too.
            )
        batched = settings["max_batch_size"] > 0
        tensor["dims"] = _sizes(spec.shape[batched:])
        if not tensor["dims"]:  # Triton has no empty dims: what remains for an example travels as one element.
            tensor["dims"] = [1]
            if not tensor.get("allow_ragged_batch"):
                tensor["reshape"] = {"shape": []}


def _check_names(settings, model):
    """Raise TritonModelException for inputs and outputs that the SavedModel lacks, or that are given twice."""
    controls, made_here = _control_types(settings), _batch_input_types(settings)
    for name in controls:
        if name not in model.inputs:
            raise _refusal(
                settings, f"configuration specified sequence control '{name}', but model does not provide that input"
            )
    given = [*controls, *made_here, *(tensor["name"] for tensor in settings["input"])]
    for side, names, specs in (
        ("input", given, model.inputs),
        ("output", [tensor["name"] for tensor in settings["output"]], model.outputs),
    ):
        for name in names:
            if name in specs and names.count(name) == 1:
                continue
            reason = f"{side} '{name}' is given twice"
            if name not in specs:
                reason = f"unexpected inference {side} '{name}', allowed {side}s are: {', '.join(specs)}"
            if side == "input" and len(names) > len(specs):
                reason = f"configuration expects {len(names)} inputs, model provides {len(specs)}: {reason}"
            raise _refusal(settings, reason)


def _check(settings, model):
    """Raise TritonModelException for a configuration that contradicts the SavedModel, or that would be ignored here."""
    _check_names(settings, model)
    _check_settings(settings, model)
    controls, made_here = _control_types(settings), _batch_input_types(settings)
    missing = model.inputs.keys() - {*controls, *made_here, *(tensor["name"] for tensor in settings["input"])}
    if missing:
        given = len(model.inputs) - len(missing)
        raise _refusal(
            settings,
            f"configuration expects {given} inputs, model provides {len(model.inputs)}: "
            f"{_quoted(sorted(missing))} is missing",
        )
    for name, data_type in controls.items():
        spec = model.inputs[name]
        expected = _data_type(settings, "sequence control", name, spec)
        if data_type != expected:
            raise _refusal(
                settings,
                f"sequence control '{name}': the model expects {expected} but the model configuration specifies "
                f"data-type {data_type}",
            )
        _check_dims(settings, name, spec, [1], exact=True)
    for name, data_type in made_here.items():
        _check_type(settings, "batch input", name, model.inputs[name], data_type)
    scattered = {name for output in settings.get("batch_output", []) for name in output["target_name"]}
    for side, specs in (("input", model.inputs), ("output", model.outputs)):
        for tensor in settings[side]:
            name, dims = tensor["name"], _dims(tensor)
            spec = specs[name]
            if tensor.get("optional"):
                raise _refusal(settings, f"{side} '{name}': a SavedModel has no optional inputs")
            ragged = tensor.get("allow_ragged_batch")
            if ragged and spec.shape != (None,):
                raise _refusal(
                    settings,
                    "configuration expects model provides input with shape [-1] for ragged input "
                    f"'{name}', model provides {_written(spec.shape)}",
                )
            _check_type(settings, side, name, spec, tensor["data_type"])
            if not ragged and name not in scattered:
                _check_dims(settings, name, spec, dims, exact=side == "output")


def _check_type(settings, side, name, spec, data_type):
    expected = _data_type(settings, side, name, spec)
    if data_type != expected:
        raise _refusal(
            settings, f"configuration expects datatype {data_type} for {side} '{name}', model provides {expected}"
        )


def _check_dims(settings, name, spec, dims, exact):
    """Compare a tensor's dims with the signature; `exact` ones may not narrow an open size down."""
    if spec.shape is None:
        return
    expected, batched = _sizes(spec.shape), settings["max_batch_size"] > 0
    if batched and expected[:1] != [-1]:
        raise _refusal(
            settings,
            f"tensor '{name}': for the model to support batching the shape should have at least 1 dimension and the "
            f"first dimension must be -1; but shape expected by the model is {_written(spec.shape)}",
        )
    given = [-1, *dims] if batched else dims
    if not expected and given == [1]:
        return
    fits = [size == wanted or (wanted == -1 and not exact) for size, wanted in zip(given, expected, strict=False)]
    if len(given) != len(expected) or not all(fits):
        batch = "an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, "
        raise _refusal(
            settings,
            f"tensor '{name}': the model expects {len(expected)} dimensions (shape {_written(spec.shape)}) but the "
            f"model configuration specifies {len(given)} dimensions ({f'{batch}making complete ' * batched}shape "
            f"[{','.join(map(str, given))}])",
            "Invalid argument: model",
        )


def _check_settings(settings, model):
    """Raise TritonModelException for settings that would change the answers and are not honoured here."""
    if settings.get("optimization", {}).get("execution_accelerators", {}).get("cpu_execution_accelerator"):
        raise _refusal(settings, "CPU Execution Accelerator is not supported in TensorFlow backend")
    if settings.get("model_transaction_policy", {}).get("decoupled"):
        raise _refusal(settings, "model_transaction_policy: decoupled is not supported in TensorFlow backend")
    if settings.get("sequence_batching", {}).get("state"):
        raise _refusal(settings, "sequence_batching: state is not supported in TensorFlow backend, but variables are")
    if settings.get("cc_model_filenames"):
        raise _refusal(settings, "cc_model_filenames is not supported: every GPU runs default_model_filename")
    for tensor in settings.get("batch_input", []):
        if tensor["kind"] not in BATCH_INPUTS:
            raise _refusal(settings, f"batch_input: kind {tensor['kind']} is not supported in TensorFlow backend")
    instances = sum(group.get("count", 1) for group in settings.get("instance_group", []))
    if _shares_sessions(settings) and instances != 1 and model.keeps_state():
        raise _refusal(settings, "MAX_SESSION_SHARE_COUNT: instances cannot share the model's state, so give it one")


def _warn_of_settings(settings, device):
    """Log a line for each setting that changes no answer and is not honoured here."""
    name = settings["name"]
    if _shares_sessions(settings):
        pb_utils.Logger.log_warn(f"{name}: MAX_SESSION_SHARE_COUNT is ignored, each instance has a session of its own")
    ignored = [
        accelerator for accelerator in _gpu_accelerators(settings) if not device or accelerator != MIXED_PRECISION
    ]
    if ignored:
        where = "on GPU by this TensorFlow" if device else "for model instance on CPU"
        pb_utils.Logger.log_warn(f"{name}: GPU Execution Accelerator {_quoted(ignored)} will be ignored {where}")


def _gpu_accelerators(settings):
    accelerators = settings.get("optimization", {}).get("execution_accelerators", {})
    return [accelerator["name"] for accelerator in accelerators.get("gpu_execution_accelerator", [])]


def _shares_sessions(settings):
    return int(_parameters(settings).get("MAX_SESSION_SHARE_COUNT", 1)) > 1


def _dims(tensor):
    """Return the dims as the model sees them, without the batch."""
    return tensor["reshape"]["shape"] if "reshape" in tensor else tensor["dims"]


def _data_type(settings, side, name, spec):
    if spec.dtype not in DATA_TYPES:
        raise _refusal(settings, f"{side} '{name}': Triton has no data type for TensorFlow's {spec.dtype}")
    return DATA_TYPES[spec.dtype]


def _sizes(shape):
    """Return a signature's shape as Triton writes it."""
    return [-1 if size is None else size for size in shape]


def _written(shape):
    return "of unknown rank" if shape is None else f"[{','.join(map(str, _sizes(shape)))}]"


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


# The kinds of batch_input, each made of the arrays of its source input, one a request, without their batch's dimension.
BATCH_INPUTS = {
    "BATCH_ELEMENT_COUNT": lambda arrays: [array.size for array in arrays],
    "BATCH_ACCUMULATED_ELEMENT_COUNT": lambda arrays: list(accumulate(array.size for array in arrays)),
    "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO": lambda arrays: [0, *accumulate(array.size for array in arrays)],
    "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE": lambda arrays: [0] * max(array.size for array in arrays),
    "BATCH_ITEM_SHAPE": lambda arrays: [array.shape[1:] for array in arrays for _ in array],
    "BATCH_ITEM_SHAPE_FLATTEN": lambda arrays: [size for array in arrays for _ in array for size in array.shape[1:]],
}
