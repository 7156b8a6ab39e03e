"""What the drop-in TensorFlow backend answers through the real server: what NVIDIA's backend answered, or an error."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ask, stub, wait_for
from saved_models import ADD_SUB_DTYPES, LARGE
from tritonclient import grpc
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

# Triton gives a TensorFlow model without a GPU two.
ONE_INSTANCE = "instance_group { count: 1 } "
PROTOCOLS = ("http", "json", "grpc")
TRITON_TYPES = {"string": "STRING", "float16": "FP16", "float32": "FP32", "float64": "FP64"}
ADD_SUB = """
platform: "tensorflow_savedmodel"
max_batch_size: {max_batch_size}
instance_group {{ count: 1 }}
version_policy: {{ {policy} }}
input [ {{ name: "INPUT0" data_type: TYPE_{0} dims: [ 16 ] }}, {{ name: "INPUT1" data_type: TYPE_{0} dims: [ 16 ] }} ]
output [
  {{ name: "OUTPUT0" data_type: TYPE_{1} dims: [ 16 ] {labels} }},
  {{ name: "OUTPUT1" data_type: TYPE_{2} dims: [ 16 ] }}
]
"""
RESHAPE = """
platform: "tensorflow_savedmodel"
max_batch_size: 8
instance_group { count: 1 }
input [
  { name: "INPUT0" data_type: TYPE_FP32 dims: [ 8 ] reshape: { shape: [ 4, 1, 2 ] } },
  { name: "INPUT1" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } }
]
output [
  { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 2, 4 ] reshape: { shape: [ 4, 1, 2 ] } },
  { name: "OUTPUT1" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } }
]
"""
ANY_RANK = """
input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }
instance_group { count: 1 }
"""
# Long enough for the requests of several clients to become one batch on a busy machine; three do not wait.
WAITING = ONE_INSTANCE + (
    "max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 3 ] max_queue_delay_microseconds: 60000000 }"
)
RAGGED = """
input {{ name: "RAGGED" data_type: TYPE_FP32 dims: [ {} ] allow_ragged_batch: true }}
batch_input [
  {{ kind: BATCH_{} target_name: "SIZES" data_type: TYPE_FP32 source_input: "RAGGED" }},
  {{ kind: BATCH_{} target_name: "EXTRA" data_type: TYPE_FP32 source_input: "RAGGED" }},
  {{ kind: BATCH_MAX_ELEMENT_COUNT_AS_SHAPE target_name: "SHAPE" data_type: TYPE_FP32 source_input: "RAGGED" }}
]
"""
ITEMS = """
max_batch_size: 8
instance_group { count: 1 }
input { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1, -1 ] allow_ragged_batch: true }
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1, -1 ] }, { name: "OUTPUT1" } ]
batch_input { kind: BATCH_ITEM_SHAPE target_name: "INPUT1" data_type: TYPE_FP32 source_input: "INPUT0" }
batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "OUTPUT0" source_input: "INPUT0" }
dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 60000000 }
"""


def add_sub_config(*data_types, max_batch_size=8, policy="latest { num_versions: 1 }", labels=""):
    return ADD_SUB.format(*data_types, max_batch_size=max_batch_size, policy=policy, labels=labels)


def dtype_name(dtype):
    return TRITON_TYPES.get(dtype.name, dtype.name.upper())


ADD_SUB_MODELS = {
    "savedmodel_" + "_".join(dtype.name for dtype in dtypes): tuple(map(dtype_name, dtypes))
    for dtypes in ADD_SUB_DTYPES
}
INT32 = 3 * ["INT32"]
SERVED = {
    name: (name.replace("savedmodel", "add_sub"), add_sub_config(*data_types))
    for name, data_types in ADD_SUB_MODELS.items()
} | {
    "savedmodel_nobatch_int32_int32_int32": ("add_sub_nobatch", add_sub_config(*INT32, max_batch_size=0)),
    "savedmodel_float32_float32_float32": (
        "add_sub_versions",
        add_sub_config(*3 * ["FP32"], policy="specific { versions: [ 1, 3 ] }", labels='label_filename: "labels.txt"'),
    ),
    "no_shape": ("no_shape", add_sub_config(*INT32)),
    "no_shape_nobatch": ("no_shape_nobatch", add_sub_config(*INT32, max_batch_size=0)),
    "savedmodel_zero_3_float32": ("zero", ONE_INSTANCE + "max_batch_size: 8"),
    "savedmodel_zero_3_object": ("zero_strings", ONE_INSTANCE + "max_batch_size: 8"),
    "savedmodel_nobatch_zero_1_float16": (
        "zero_nobatch",
        ONE_INSTANCE + 'input { name: "INPUT0" data_type: TYPE_FP16 dims: [ -1, -1 ] }',
    ),
    "savedmodel_reshape": ("reshape", RESHAPE),
    "unknown_rank": ("any_rank", ANY_RANK),
    "repeat": ("repeat", WAITING),
    "square_root": ("square_root", WAITING),
    "counter": ("counter", ONE_INSTANCE),
    "corners": ("corners", ONE_INSTANCE),
    "ragged": ("ragged", WAITING + RAGGED.format("-1", "ELEMENT_COUNT", "ACCUMULATED_ELEMENT_COUNT_WITH_ZERO")),
    "ragged_items": ("ragged", WAITING + RAGGED.format("-1, -1", "ACCUMULATED_ELEMENT_COUNT", "ITEM_SHAPE_FLATTEN")),
    "items": ("items", ITEMS),
    "large": ("large", ONE_INSTANCE + "max_batch_size: 32"),
    "small": ("double_lite", ONE_INSTANCE + "max_batch_size: 32"),
}


@pytest.fixture(scope="module", autouse=True)
def _(served):
    """Load the models of the table."""


def test_every_model_of_the_table_loads(served):
    assert {name: loading.exception() for name, loading in served.items() if loading.exception()} == {}


def together(models, name, requests):
    """Send the requests at once; returns their outputs or errors, after a check that Triton ran them as one batch."""

    def attempt(inputs):
        try:
            return ask(models, name, inputs)
        except InferenceServerException as error:
            return error

    def counted():
        """Return how many rows Triton has run, and in how many runs."""
        (statistics,) = client.get_inference_statistics(name).model_stats
        rows = sum(batch.batch_size * batch.compute_infer.count for batch in statistics.batch_stats)
        return rows, statistics.execution_count

    with models.grpc as client, ThreadPoolExecutor(len(requests)) as pool:
        rows, runs = counted()
        rows += sum(len(next(iter(inputs.values()))) for inputs in requests)
        answers = list(pool.map(attempt, requests))
        wait_for(lambda: counted()[0] >= rows)  # Triton counts a run after it has sent the answers.
        assert counted() == (rows, runs + 1)
    return answers


def refused(models, name, inputs, protocol="grpc"):
    """Return the sentence that refuses these inputs; it must be one, without where in the code it arose."""
    with pytest.raises(InferenceServerException) as refusal:
        ask(models, name, inputs, protocol)
    return checked_sentence(refusal.value)


def checked_sentence(error):
    message = error.message()
    for noise in ("At:", "Traceback", ".py", "\n"):
        assert noise not in message
    return message


def numbers(data_type, *shape):
    """Return numbers of this type from 0 to 15, as text where it is STRING."""
    values = np.arange(np.prod(shape)).reshape(shape) % 16
    return values.astype(str).astype(object) if data_type == "STRING" else values.astype(triton_to_np_dtype(data_type))


def as_text(array):
    """Return strings, which come as bytes except from JSON, as text."""
    return np.char.decode(array.astype(bytes))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("name", "data_types"), ADD_SUB_MODELS.items(), ids=ADD_SUB_MODELS)
def test_every_data_type_over_every_protocol(models, name, data_types, rows, protocol):
    if protocol == "json" and "FP16" in data_types:
        protocol = "http"  # JSON has no FP16.
    inputs = {f"INPUT{i}": numbers(data_types[0], rows, 16)[:, :: 1 - 2 * i] for i in range(2)}
    outputs = ask(models, name, inputs, protocol, outputs=["OUTPUT0", "OUTPUT1"])
    a, b = (x.astype(int) for x in inputs.values())
    for output, data_type, expected in zip(outputs.values(), data_types[1:], (a + b, a - b), strict=True):
        if data_type == "STRING":
            output, expected = as_text(output), expected.astype(str)
        else:
            assert output.dtype == triton_to_np_dtype(data_type)
        assert (output == expected).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_model_without_a_batch(models, protocol):
    inputs = {"INPUT0": numbers("INT32", 16), "INPUT1": np.full(16, 3, np.int32)}
    outputs = ask(models, "savedmodel_nobatch_int32_int32_int32", inputs, protocol, outputs=["OUTPUT1"])
    assert list(outputs) == ["OUTPUT1"]
    assert outputs["OUTPUT1"].tolist() == list(range(-3, 13))


def test_request_that_lacks_an_input_is_refused(models):
    message = refused(models, "savedmodel_int8_int8_int8", {"INPUT0": numbers("INT8", 1, 16)})
    assert "missing required input(s) ['INPUT1']" in message


def test_versions_of_the_policy_are_served(models):
    name = "savedmodel_float32_float32_float32"
    inputs = {"INPUT0": np.full((2, 16), 5, np.float32), "INPUT1": np.full((2, 16), 3, np.float32)}
    for version, sums in (("1", [8, 2]), ("3", [2, 8]), ("", [2, 8])):
        outputs = ask(models, name, inputs, model_version=version)
        assert [outputs[f"OUTPUT{i}"][1, 15] for i in range(2)] == sums
    with pytest.raises(InferenceServerException, match="version 2 is not"):
        ask(models, name, inputs, model_version="2")


def test_labels(models):
    name = "savedmodel_float32_float32_float32"
    requested = [
        grpc.InferRequestedOutput("OUTPUT1", class_count=2),
        grpc.InferRequestedOutput("OUTPUT0", class_count=2),
    ]
    tensors = [
        grpc.InferInput(name, [1, 16], "FP32").set_data_from_numpy(numbers("FP32", 1, 16))
        for name in ("INPUT0", "INPUT1")
    ]
    with models.grpc as client:
        result = client.infer(name, tensors, outputs=requested, model_version="1")
    assert result.as_numpy("OUTPUT0").tolist() == [[b"30.000000:15:label 15", b"28.000000:14:label 14"]]
    assert result.as_numpy("OUTPUT1").ravel()[0].startswith(b"0.000000:")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("name", "data_type", "shapes"),
    [
        ("savedmodel_zero_3_float32", "FP32", shapes)
        for shapes in ([[0], [0], [0]], [[0], [0], [1]], [[0], [1], [0]], [[1], [0], [1]], [[1], [2], [1]])
    ]
    + [
        ("savedmodel_zero_3_object", "STRING", shapes)
        for shapes in ([[2, 2], [2, 2], [1, 1]], [[0, 0]] * 3, [[1, 0], [1, 3], [0, 1]], [[1, 1], [0, 6], [2, 2]])
    ],
)
@pytest.mark.parametrize("rows", [1, 8])
def test_tensors_without_elements(models, name, data_type, shapes, rows, protocol):
    inputs = {f"INPUT{i}": numbers(data_type, rows, *shape) for i, shape in enumerate(shapes)}
    outputs = ask(models, name, inputs, protocol, outputs=[f"OUTPUT{i}" for i in range(3)])
    for given, answer in zip(inputs.values(), outputs.values(), strict=True):
        assert answer.shape == given.shape
        assert ((as_text(answer) == as_text(given)) if data_type == "STRING" else (answer == given)).all()


@pytest.mark.parametrize("shape", [[2, 2], [1, 0], [0, 1], [0, 0]])
def test_tensors_without_elements_nor_a_batch(models, shape):
    value = numbers("FP16", *shape)
    answer = ask(models, "savedmodel_nobatch_zero_1_float16", {"INPUT0": value})["OUTPUT0"]
    assert (answer.shape, answer.tolist()) == (value.shape, value.tolist())


@pytest.mark.parametrize(("name", "shape"), [("no_shape", [8, 16]), ("no_shape", [1, 16]), ("no_shape_nobatch", [16])])
def test_signature_without_a_shape_takes_the_dims_of_the_configuration(models, name, shape):
    value = numbers("INT32", *shape)
    outputs = ask(models, name, {"INPUT0": value, "INPUT1": value})
    assert (outputs["OUTPUT0"] == 2 * value).all()
    assert outputs["OUTPUT0"].shape == outputs["OUTPUT1"].shape == value.shape
    assert not outputs["OUTPUT1"].any()


def test_unknown_rank_takes_the_dims_of_the_configuration(models):
    assert ask(models, "unknown_rank", {"x": np.array([4], np.float32)})["y"].tolist() == [8]
    message = refused(models, "unknown_rank", {"x": np.ones((1, 2), np.float32)})
    assert "unexpected shape for input 'x' for model 'unknown_rank'. Expected [1], got [1,2]" in message


def test_reshape(models):
    inputs = {"INPUT0": numbers("FP32", 3, 8), "INPUT1": numbers("FP32", 3, 1)}
    outputs = ask(models, "savedmodel_reshape", inputs)
    assert outputs["OUTPUT0"].tolist() == inputs["INPUT0"].reshape(3, 2, 4).tolist()
    assert outputs["OUTPUT1"].tolist() == inputs["INPUT1"].tolist()


def repeat_rows(value, times, rows=1):
    return {"x": np.full((rows, 2), value, np.float32), "times": np.full((rows, 1), times, np.int32)}


@pytest.mark.parametrize("times", [0, 2])
def test_answer_with_another_number_of_rows_is_an_error(models, times):
    message = refused(models, "repeat", repeat_rows(5, times, rows=3))
    assert f"output 'y' has the shape [{3 * times}, 2] for a batch of 3" in message


def test_answer_with_another_number_of_rows_fails_alone(models):
    good, bad, other = together(models, "repeat", [repeat_rows(5, 1), repeat_rows(6, 2), repeat_rows(7, 1)])
    assert good["y"].tolist() == [[5, 5]]
    assert "[2, 2] for a batch of 1" in checked_sentence(bad)
    assert other["y"].tolist() == [[7, 7]]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_assertion_of_the_model_refuses_the_request(models, protocol):
    x = np.array([[4, 9]] * 3, np.float32)
    assert ask(models, "square_root", {"x": x}, protocol)["y"].tolist() == [[2, 3]] * 3
    message = refused(models, "square_root", {"x": -x}, protocol)
    assert "assertion failed: [x must not be negative]" in message


def test_assertion_fails_alone_in_a_batch(models):
    requests = [{"x": np.full((1, 2), value, np.float32)} for value in (4, -4, 9)]
    first, refusal, last = together(models, "square_root", requests)
    assert (first["y"].tolist(), last["y"].tolist()) == ([[2, 2]], [[3, 3]])
    assert "x must not be negative" in checked_sentence(refusal)


def test_state_begins_as_it_was_saved_and_goes_on_in_order(models):
    answers = [ask(models, "counter", {"x": np.array([step], np.float32)})["count"].item() for step in (1, 1, 5, -2)]
    assert answers == [1, 2, 7, 5]


def test_not_a_number_and_infinities_are_answered_as_tensorflow_does(models, saved_models):
    expected = dict(np.load(saved_models / "corners" / "expected.npz"))
    outputs = ask(models, "corners", {"x": expected.pop("x")})
    assert outputs.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name], values, rtol=1e-6, err_msg=name)


def test_ragged_requests_are_one_flat_tensor_with_its_batch_inputs(models):
    lengths = (2, 4, 1)
    answers = together(models, "ragged", [{"RAGGED": np.full((1, length), length, np.float32)} for length in lengths])
    # The requests come in any order, the same for every tensor.
    sizes = answers[0]["SIZES_OUT"][0].astype(int)
    assert sorted(sizes) == sorted(lengths)
    for answer in answers:
        assert answer["RAGGED_OUT"].tolist() == [np.repeat(sizes, sizes).tolist()]
        assert answer["SIZES_OUT"].tolist() == [sizes.tolist()]
        assert answer["EXTRA_OUT"].tolist() == [[0, *np.cumsum(sizes)]]
        assert answer["SHAPE_OUT"].shape == (1, max(lengths))


def test_ragged_requests_tell_the_shapes_of_their_items(models):
    shapes = ((4, 1), (1, 3), (2, 2))
    requests = [{"RAGGED": np.full((1, *shape), index, np.float32)} for index, shape in enumerate(shapes)]
    for answer in together(models, "ragged_items", requests):
        order = [shapes[int(index)] for index in dict.fromkeys(answer["RAGGED_OUT"][0])]
        assert answer["EXTRA_OUT"].tolist() == [[size for shape in order for size in shape]]
        assert answer["SIZES_OUT"].tolist() == [np.cumsum([np.prod(shape) for shape in order]).tolist()]


def test_output_is_given_back_in_the_shape_of_its_input(models):
    shapes = ((2, 1, 2), (1, 3, 1), (1, 2, 2))
    inputs = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in shapes]
    for x, answer in zip(inputs, together(models, "items", [{"INPUT0": x} for x in inputs]), strict=True):
        assert answer["OUTPUT0"].tolist() == x.tolist()
        assert answer["OUTPUT1"].tolist() == [list(x.shape[1:])] * len(x)


def test_twin_keeps_its_weights_once_whatever_batches_come(models):
    for rows in range(1, 33):
        batch = np.zeros((rows, LARGE), np.float32)
        assert ask(models, "large", {"x": batch})["y"].shape == batch.shape
    weights = 4 * LARGE**2
    large, small = (anonymous_bytes(stub(models, name)) for name in ("large", "small"))
    # The file with the weights is mapped; how much of what is mapped is in memory, the kernel decides.
    assert weights + large - small <= 2.5 * weights


def anonymous_bytes(process):
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", (process / "status").read_text())[1])
