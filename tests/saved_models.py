"""Write the small SavedModels that try the Triton backend's corners: python tests/saved_models.py MODEL_REPOSITORY"""

import sys
from pathlib import Path

import tensorflow as tf

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


def save(repository, name, function, **inputs):
    """Publish version 1 of a model that runs `function` on inputs given as (shape, dtype)."""
    specs = {name: tf.TensorSpec(shape, dtype, name=name) for name, (shape, dtype) in inputs.items()}
    signature = tf.function(function).get_concrete_function(**specs)
    path = Path(repository, name, "1", "model.savedmodel")
    tf.saved_model.save(tf.Module(), str(path), signatures={"serving_default": signature})


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
    save(repository, "double", double, x=([None, 2], tf.float32))
    save(repository, "complex", double, x=([None, 2], tf.complex64))
    save(repository, "any_rank", double, x=(None, tf.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
