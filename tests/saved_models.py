"""Write the small SavedModels that try the Triton backend's corners: python -m tests.saved_models MODEL_REPOSITORY

Many are made as TensorFlow 1 makes them, with a session, a builder and signature keys that differ from the tensors'
names: that is what old model repositories hold. Only the models are written, a test gives them their configuration.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.compat import v1

from saved_model import SAVED_MODEL, SIGNATURE, add_twin

DTYPES = {
    "BOOL": tf.bool,
    "UINT8": tf.uint8,
    "UINT16": tf.uint16,
    "UINT32": tf.uint32,
    "UINT64": tf.uint64,
    "INT8": tf.int8,
    "INT16": tf.int16,
    "INT32": tf.int32,
    "INT64": tf.int64,
    "FP16": tf.float16,
    "BF16": tf.bfloat16,
    "FP32": tf.float32,
    "FP64": tf.float64,
    "BYTES": tf.string,
}
# What the two inputs and the two outputs of a model `add_sub_*` are.
ADD_SUB_DTYPES = (
    (tf.int8, tf.int8, tf.int8),
    (tf.float16, tf.float32, tf.float32),
    (tf.int32, tf.int8, tf.int16),
    (tf.int64, tf.int64, tf.int64),
    (tf.float64, tf.float64, tf.int32),
    (tf.string, tf.int32, tf.string),
)
# A sequence model's control inputs, and what identifies the sequence: all that Triton offers but text, of which
# Triton 24.10 sends too many bytes.
SEQUENCE_DTYPES = {"int32": (tf.int32, tf.uint64), "fp32": (tf.float32, tf.int64), "bool": (tf.bool, tf.uint32)}
LARGE = 4096  # The weights of the model `large` are a square of this size: 64 MB.


def saved_model_path(repository, name, version):
    return str(Path(repository, name, str(version), SAVED_MODEL))


def save(repository, name, function, signature=SIGNATURE, variables=(), **inputs):
    """Publish version 1 of a model of TensorFlow 2 that runs `function` on inputs given as (shape, dtype)."""
    specs = {name: tf.TensorSpec(shape, dtype, name=name) for name, (shape, dtype) in inputs.items()}
    module = tf.Module()
    module.variables_to_save = list(variables)
    signatures = {signature: tf.function(function).get_concrete_function(**specs)}
    tf.saved_model.save(module, saved_model_path(repository, name, 1), signatures=signatures)


def save_graph(repository, name, build, version=1):
    """Publish a model of TensorFlow 1: `build` makes the graph and returns the inputs and the outputs by their keys."""
    with tf.Graph().as_default(), v1.Session() as session:
        inputs, outputs = build()
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, saved_model_path(repository, name, version), inputs, outputs)


def save_metagraphs(repository, name, metagraphs):
    """Publish {tag: {signature: factor}}: a MetaGraph for each tag, whose signatures multiply INPUT (16,) FP32."""
    with tf.Graph().as_default(), v1.Session() as session:
        number = v1.placeholder(tf.float32, [16], "TENSOR_INPUT")
        step = v1.get_variable("step", [], initializer=tf.zeros_initializer())  # So that there are variables to load.
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(saved_model_path(repository, name, 1))
        add = builder.add_meta_graph_and_variables
        for tag, factors in metagraphs.items():
            signatures = {
                key: v1.saved_model.predict_signature_def({"INPUT": number}, {"OUTPUT": factor * number + step})
                for key, factor in factors.items()
            }
            if add == builder.add_meta_graph:
                add([tag], signatures)
            else:
                add(session, [tag], signatures)
            add = builder.add_meta_graph
        builder.save()


def every_type(weight, **inputs):
    """Reverse each row of three, whatever its dtype, and double a number per row."""
    rows = {name.replace("in_", "out_"): tf.gather(value, [2, 1, 0], axis=1) for name, value in inputs.items()}
    return rows | {"doubled": 2 * weight}


def lookup(index, text, numbers):
    """Batched, with an index that fails outside 0 to 3 and rows of any length."""
    return {
        "value": tf.gather(tf.constant([0.5, 1.5, 2.5, 3.5]), index),
        "echo": tf.strings.join([text, "!"]),
        "total": tf.reduce_sum(numbers, axis=1, keepdims=True),
    }


def scale(matrix, factor):
    """Unbatched, with scalars on both sides."""
    return {
        "scaled": matrix * factor,
        "total": tf.reduce_sum(matrix),
        "note": tf.strings.join([b"\x00", tf.strings.as_string(tf.shape(matrix)[1]), b"\x00"]),
    }


def double(x):
    return {"y": 2 * x}


def repeat(x, times):
    """Answer each row so many times: with `times` 1, a row for each row, as a batch must."""
    return {"y": tf.repeat(x, times[:, 0], axis=0)}


def square_root(x):
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(x >= 0), ["x must not be negative"])]):
        return {"y": tf.sqrt(x)}


def corners(x):
    """Operations that runtimes answer differently for NaN and infinities."""
    return {
        "relu": tf.nn.relu(x),
        "maximum": tf.maximum(x, 0.5),
        "clipped": tf.clip_by_value(x, -1.0, 1.0),
        "softmax": tf.nn.softmax(x),
        "largest": tf.argmax(x, axis=1)[:, None],
    }


def add_sub(dtype, dtype_0, dtype_1, batch, swap=False, shape_0=None):
    """Return a graph that adds and subtracts INPUT0 and INPUT1, 16 values each, and casts the results.

    batch: the sizes before the 16 values; swap: the difference first; shape_0: another shape for INPUT0.
    """

    def cast(value, dtype):
        return tf.strings.as_string(value) if dtype == tf.string else tf.cast(value, dtype)

    def build():
        shape = [*batch, 16]
        inputs = {
            "INPUT0": v1.placeholder(dtype, shape if shape_0 is None else shape_0, "TENSOR_INPUT0"),
            "INPUT1": v1.placeholder(dtype, shape, "TENSOR_INPUT1"),
        }
        a, b = (tf.strings.to_number(x, tf.int32) if dtype == tf.string else x for x in inputs.values())
        results = (a - b, a + b) if swap else (a + b, a - b)
        outputs = (cast(result, dtype) for result, dtype in zip(results, (dtype_0, dtype_1), strict=True))
        return inputs, {f"OUTPUT{i}": tf.identity(x, f"TENSOR_OUTPUT{i}") for i, x in enumerate(outputs)}

    return build


def identity(dtype, *shapes):
    """Return a graph that copies INPUT0, INPUT1 …, one for each shape, to OUTPUT0, OUTPUT1 …"""

    def build():
        inputs = {f"INPUT{i}": v1.placeholder(dtype, shape, f"INPUT{i}") for i, shape in enumerate(shapes)}
        return inputs, {name.replace("IN", "OUT"): tf.identity(value) for name, value in inputs.items()}

    return build


def sequence(control, batched):
    """Return a graph with all control inputs; one that is not batched adds up a sequence in its variable.

    Batched, it answers START + INPUT + END * CORRID where READY, else -1. Not batched, it answers the sum since
    START, with CORRID added at END.
    """
    control_dtype, corrid_dtype = SEQUENCE_DTYPES[control]
    dtype = tf.float32 if control == "fp32" else tf.int32
    shape = [None, 1] if batched else [1]

    def build():
        inputs = {"INPUT": v1.placeholder(dtype, shape, "TENSOR_INPUT")}
        inputs |= {name: v1.placeholder(control_dtype, shape, name) for name in ("START", "END", "READY")}
        inputs["CORRID"] = v1.placeholder(corrid_dtype, shape, "CORRID")
        number, start, end, ready, corrid = (tf.cast(value, dtype) for value in inputs.values())
        if batched:
            output = tf.where(ready > 0, start + number + end * corrid, -tf.ones_like(number))
        else:
            # It begins at 1000, so that a sequence that was not told of its START shows it.
            total = v1.get_variable("total", [1], dtype, v1.constant_initializer(1000), use_resource=False)
            summed = tf.where(start > 0, number, total + number) + end * corrid
            output = v1.assign(total, tf.where(ready > 0, summed, total))
        return inputs, {"OUTPUT": tf.identity(output, "TENSOR_OUTPUT")}

    return build


def ragged():
    """Return as many rows as SIZES is long, each with the whole of every input."""
    names = ("RAGGED", "SIZES", "EXTRA", "SHAPE")
    inputs = {name: v1.placeholder(tf.float32, [None], f"TENSOR_{name}") for name in names}
    rows = tf.shape(inputs["SIZES"])[0]
    return inputs, {f"{name}_OUT": tf.tile(value[None, :], [rows, 1]) for name, value in inputs.items()}


def with_offset():
    """Return a graph that adds its variable to x; its operation `set_offset` makes that 7."""
    inputs = {"x": v1.placeholder(tf.float32, [None, 2], "TENSOR_X")}
    offset = v1.get_variable("offset", [], initializer=tf.zeros_initializer(), use_resource=True)
    v1.assign(offset, 7, name="set_offset")
    return inputs, {"y": inputs["x"] + offset}


def save_counter(repository):
    """Publish a model that counts its calls from 1, by the sum of what they ask for."""
    count = tf.Variable([0.0])
    save(repository, "counter", lambda x: {"count": count.assign_add(x)}, variables=[count], x=([1], tf.float32))


def save_corners(repository):
    """Publish `corners` and, beside it, what TensorFlow answers to NaN and infinities."""
    save(repository, "corners", corners, x=([None, 4], tf.float32))
    x = np.array([[np.nan, -1, 0, 2], [np.inf, 1, 1, 1], [-np.inf, np.nan, 3, 3], [np.inf, np.inf, -np.inf, 0]])
    x = x.astype(np.float32)
    expected = {name: value.numpy() for name, value in tf.function(corners)(tf.constant(x)).items()}
    np.savez(Path(repository, "corners", "expected.npz"), x=x, **expected)


def save_large(repository):
    """Publish a model whose weights take 64 MB, with its twin."""
    weights = tf.Variable(np.random.default_rng(0).standard_normal((LARGE, LARGE), np.float32) / LARGE)
    inputs = {"x": ([None, LARGE], tf.float32)}
    save(repository, "large", lambda x: {"y": tf.matmul(x, weights)}, variables=[weights], **inputs)


def save_graphdef(repository):
    """Publish a frozen graph, the format before SavedModel."""
    with tf.Graph().as_default() as graph:
        tf.identity(v1.placeholder(tf.float32, [None, 2], "x"), "y")
    tf.io.write_graph(graph, str(Path(repository, "graphdef", "1")), "model.graphdef", as_text=False)


def main(repository):
    rows = {f"in_{name}": ([None, 3], dtype) for name, dtype in DTYPES.items()}
    save(repository, "every_type", every_type, weight=([None], tf.float32), **rows)
    save(
        repository,
        "lookup",
        lookup,
        index=([None, 1], tf.int32),
        text=([None, 1], tf.string),
        numbers=([None, None], tf.float32),
    )
    save(repository, "scale", scale, matrix=([2, None], tf.float32), factor=([], tf.float32))
    for name in ("double", "double_lite"):
        save(repository, name, double, x=([None, 2], tf.float32))
    save(repository, "complex", double, x=([None, 2], tf.complex64))
    save(repository, "any_rank", double, x=(None, tf.float32))
    save(repository, "repeat", repeat, x=([None, 2], tf.float32), times=([None, 1], tf.int32))
    save(repository, "square_root", square_root, x=([None, 2], tf.float32))
    save(repository, "first_only", lambda x, start: {"y": x * start}, x=([None], tf.float32), start=([1], tf.float32))
    save_counter(repository)
    save_corners(repository)
    save_large(repository)
    save_graphdef(repository)
    for dtypes in ADD_SUB_DTYPES:
        name = "_".join(dtype.name for dtype in dtypes)
        save_graph(repository, f"add_sub_{name}", add_sub(*dtypes, batch=[None]))
    for version in (1, 2, 3):
        build = add_sub(*3 * [tf.float32], batch=[None], swap=version > 1)
        save_graph(repository, "add_sub_versions", build, version)
    Path(repository, "add_sub_versions", "labels.txt").write_text("".join(f"label {i}\n" for i in range(16)))
    int32 = 3 * [tf.int32]
    save_graph(repository, "add_sub_lite", add_sub(*int32, batch=[None]))
    save_graph(repository, "add_sub_nobatch", add_sub(*int32, batch=[]))
    save_graph(repository, "no_shape", add_sub(*int32, batch=[None], shape_0=[]))
    save_graph(repository, "no_shape_nobatch", add_sub(*int32, batch=[], shape_0=[]))
    save_graph(repository, "zero", identity(tf.float32, *3 * [[None, None]]))
    save_graph(repository, "zero_strings", identity(tf.string, *3 * [[None, None, None]]))
    save_graph(repository, "zero_nobatch", identity(tf.float16, [None, None]))
    save_graph(repository, "reshape", identity(tf.float32, [None, 4, 1, 2], [None]))
    save_graph(repository, "fixed", identity(tf.float32, [1, 2]))
    save_graph(repository, "ragged", ragged)
    save_graph(repository, "items", identity(tf.float32, [None], [None, 2]))
    save_graph(repository, "with_offset", with_offset)
    Path(repository, "with_offset", "init_ops.json").write_text('{"init_ops": ["set_offset"]}')
    # Any shared library will do for one with operations.
    shutil.copy(np.random.mtrand.__file__, Path(repository, "with_offset", "operations.so"))
    for control in SEQUENCE_DTYPES:
        save_graph(repository, f"sequence_{control}", sequence(control, batched=True))
        save_graph(repository, f"sequence_{control}_nobatch", sequence(control, batched=False))
    save_metagraphs(
        repository,
        "tags",
        {"serve": {SIGNATURE: 1.0, "other": 2.0}, "test": {SIGNATURE: 3.0, "other": 4.0}},
    )
    save(repository, "one_signature", double, signature="predict", x=([None, 2], tf.float32))
    tf.saved_model.save(tf.Module(), saved_model_path(repository, "no_signature", 1))
    for name in ("double_lite", "add_sub_lite", "large"):
        add_twin(saved_model_path(repository, name, 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
