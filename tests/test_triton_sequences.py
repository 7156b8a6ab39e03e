"""Sequences through the drop-in TensorFlow backend: Triton fills the control inputs, and the model sees them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ask
from tritonclient.utils import InferenceServerException

# What each kind of control input needs: how Triton writes false and true, the type of INPUT, and that of CORRID.
CONTROLS = {
    "int32": ("int32", "INT32", "UINT64"),
    "fp32": ("fp32", "FP32", "INT64"),
    "bool": ("bool", "INT32", "UINT32"),
}
CONFIG = """
platform: "tensorflow_savedmodel"
max_batch_size: {max_batch_size}
sequence_batching {{
  max_sequence_idle_microseconds: 60000000
  {strategy}
  control_input [
    {{ name: "START" control [ {{ kind: CONTROL_SEQUENCE_START {control}_false_true: [ 0, 1 ] }} ] }},
    {{ name: "END" control [ {{ kind: CONTROL_SEQUENCE_END {control}_false_true: [ 0, 1 ] }} ] }},
    {{ name: "READY" control [ {{ kind: CONTROL_SEQUENCE_READY {control}_false_true: [ 0, 1 ] }} ] }},
    {{ name: "CORRID" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_{corrid} }} ] }}
  ]
}}
input [ {{ name: "INPUT" data_type: TYPE_{number} dims: [ 1 ] }} ]
output [ {{ name: "OUTPUT" data_type: TYPE_{number} dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: {instances} }} ]
"""
OLDEST = "oldest { max_candidate_sequences: 4 preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 0 }"
DIRECT = "direct { }"


def config(kind, max_batch_size=0, strategy="", instances=1):
    control, number, corrid = CONTROLS[kind]
    return CONFIG.format(
        control=control,
        number=number,
        corrid=corrid,
        max_batch_size=max_batch_size,
        strategy=strategy,
        instances=instances,
    )


SERVED = {
    "savedmodel_sequence_int32": ("sequence_int32", config("int32", 4, DIRECT)),
    "savedmodel_sequence_fp32": ("sequence_fp32", config("fp32", 4, OLDEST)),
    "savedmodel_sequence_bool": ("sequence_bool", config("bool", 4, DIRECT)),
    "savedmodel_nobatch_sequence_int32": ("sequence_int32_nobatch", config("int32", instances=2)),
    "savedmodel_nobatch_sequence_fp32": ("sequence_fp32_nobatch", config("fp32")),
    "savedmodel_nobatch_sequence_bool": ("sequence_bool_nobatch", config("bool")),
}
BATCHED = [name for name in SERVED if "nobatch" not in name]
NOT_BATCHED = [name for name in SERVED if "nobatch" in name]


@pytest.fixture(scope="module", autouse=True)
def _(served):
    """Load the models of the table."""


def test_every_model_of_the_table_loads(served):
    assert {name: loading.exception() for name, loading in served.items() if loading.exception()} == {}


def run_sequence(models, name, corrid, numbers, protocol="grpc"):
    """Send the numbers as one sequence; return the model's answers."""
    dtype = np.float32 if "fp32" in name else np.int32
    last = len(numbers) - 1
    return [
        ask(
            models,
            name,
            {"INPUT": np.full((1,) if "nobatch" in name else (1, 1), number, dtype)},
            protocol,
            sequence_id=corrid,
            sequence_start=index == 0,
            sequence_end=index == last,
        )["OUTPUT"].item()
        for index, number in enumerate(numbers)
    ]


@pytest.mark.parametrize("name", SERVED)
def test_clients_are_not_asked_for_the_control_inputs(models, served, name):
    assert [tensor["name"] for tensor in served[name].result()["input"]] == ["INPUT"]
    with models.grpc as client:
        assert [tensor.name for tensor in client.get_model_metadata(name).inputs] == ["INPUT"]
    assert "dynamic_batching" not in served[name].result()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("name", BATCHED)
def test_batched_model_sees_its_controls(models, name, protocol):
    # START + INPUT + END * CORRID
    assert run_sequence(models, name, 500, [7, 8, 9], protocol) == [8, 8, 509]
    assert run_sequence(models, name, 600, [7], protocol) == [608]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("name", NOT_BATCHED)
def test_variable_adds_up_each_sequence(models, name, protocol):
    assert run_sequence(models, name, 500, [1, 2, 30], protocol) == [1, 3, 533]
    assert run_sequence(models, name, 600, [4, 5], protocol) == [4, 609]


def test_control_that_has_no_batch_leaves_the_model_without_one(models):
    control = 'control_input { name: "start" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } }'
    instances = "instance_group { kind: KIND_CPU count: 1 }"
    completed = models.load("first_only", "first_only", f"sequence_batching {{ {control} }} {instances}")
    assert (completed["max_batch_size"], completed["input"][0]["dims"]) == (0, [-1])
    x = {"x": np.array([4, 5], np.float32)}
    answers = [ask(models, "first_only", x, sequence_id=7, sequence_start=first)["y"] for first in (True, False)]
    assert [answer.tolist() for answer in answers] == [[4, 5], [0, 0]]


@pytest.mark.parametrize("name", BATCHED)
def test_sequences_at_once_keep_apart(models, name):
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(lambda corrid: run_sequence(models, name, corrid, [corrid] * 5), (100, 200, 300))
        assert list(answers) == [[corrid + 1, *3 * [corrid], 2 * corrid] for corrid in (100, 200, 300)]


def test_each_instance_keeps_a_state_of_its_own(models):
    """Two sequences go to two instances, request by request, and neither sees what the other adds up."""
    name = "savedmodel_nobatch_sequence_int32"

    def step(corrid, number, **flags):
        return ask(models, name, {"INPUT": np.array([number], np.int32)}, sequence_id=corrid, **flags)["OUTPUT"].item()

    assert [step(1, 1, sequence_start=True), step(2, 100, sequence_start=True)] == [1, 100]
    assert [step(1, 1), step(2, 100), step(2, 100), step(1, 1)] == [2, 200, 300, 3]
    assert [step(2, 100, sequence_end=True), step(1, 1, sequence_end=True)] == [402, 5]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('name: "READY"', 'name: "PREPARED"', "PREPARED"),
        (
            '"END" control [ { kind: CONTROL_SEQUENCE_END int32_',
            '"END" control [ { kind: CONTROL_SEQUENCE_END fp32_',
            "END",
        ),
        ("TYPE_UINT64", "TYPE_STRING", "CORRID"),
        (', { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }', "", None),
        (
            'input [ { name: "INPUT"',
            'input [ { name: "START" data_type: TYPE_INT32 dims: [ 1 ] }, { name: "INPUT"',
            "START",
        ),
    ],
    ids=["unknown", "control type", "identity type", "left out", "asked for as well"],
)
def test_controls_that_contradict_the_signature(models, request, old, new, sentence):
    changed = " ".join(config("int32", max_batch_size=4).split()).replace("] }, { name", "] }, { name")
    assert old in changed
    name = request.node.callspec.id.replace(" ", "_")
    changed = changed.replace(old, new)
    if sentence is None:
        # It is an input like any other then, which clients give.
        assert [tensor["name"] for tensor in models.load(name, "sequence_int32", changed)["input"]] == [
            "INPUT",
            "CORRID",
        ]
    else:
        with pytest.raises(InferenceServerException, match=f"'{sentence}'"):
            models.load(name, "sequence_int32", changed)
