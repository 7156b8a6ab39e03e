"""How the drop-in TensorFlow backend completes a configuration, and what it honours, refuses and warns of in one."""

import itertools
import re
import shutil

import numpy as np
import pytest
from conftest import ask, model_server, stub, wait_for
from tritonclient.utils import InferenceServerException

from saved_model import SAVED_MODEL

ONE_INSTANCE = "instance_group { count: 1 } "
IO = "".join(
    f'{side} {{{{ name: "{side.upper()}{i}" data_type: TYPE_INT32 dims: [ {{0}} ] }}}} '
    for side in ("input", "output")
    for i in range(2)
)
INPUT1, OUTPUT1 = (
    f'{side} {{ name: "{side.upper()}1" data_type: TYPE_INT32 dims: [ 16 ] }}' for side in ("input", "output")
)
FULL = "max_batch_size: 8 " + IO.format(16)
PARAMETER = ' parameters {{ key: "{}" value {{ string_value: "{}" }} }}'
PER_SESSION = PARAMETER.format("TF_USE_PER_SESSION_THREADS", "1")
ONE_THREAD = PARAMETER.format("TF_NUM_INTRA_THREADS", 1) + PARAMETER.format("TF_NUM_INTER_THREADS", 1)
HONOURED = f"""
{ONE_INSTANCE} {PER_SESSION}
{PARAMETER.format("TF_NUM_INTRA_THREADS", 6)} {PARAMETER.format("TF_NUM_INTER_THREADS", 6)}
{PARAMETER.format("TF_INIT_OPS_FILE", "init_ops.json")}
model_operations {{ op_library_filename: [ "operations.so" ] }}
optimization {{ graph {{ level: 1 }} }}
"""
SERVED = {
    f"sig_tag{number}": (
        "tags",
        f"{ONE_INSTANCE} {PARAMETER.format('TF_GRAPH_TAG', tag)} {PARAMETER.format('TF_SIGNATURE_DEF', key)}",
    )
    for number, (tag, key) in enumerate(itertools.product(("serve", "test"), ("serving_default", "other")))
} | {
    "default_graph": ("tags", ONE_INSTANCE),
    "one_signature": ("one_signature", ONE_INSTANCE),
    "plain": ("with_offset", f"{ONE_INSTANCE} {PER_SESSION} {ONE_THREAD}"),
    "honoured": ("with_offset", HONOURED),
    "numbers": ("reshape", ONE_INSTANCE),
}
numbered = itertools.count()


@pytest.fixture
def load(models):
    """Load a SavedModel under a new name with this config.pbtxt, or none, until the test ends; returns it completed."""
    name = f"configured_{next(numbered)}"
    yield lambda saved_model, config: models.load(name, saved_model, config)
    with models.grpc as client:
        client.unload_model(name)


def test_every_model_of_the_table_loads(served):
    assert {name: loading.exception() for name, loading in served.items() if loading.exception()} == {}


def tensors(side):
    return {tensor["name"]: (tensor["data_type"], tensor["dims"]) for tensor in side}


COMPLETE = {"INPUT0": ("TYPE_INT32", [16]), "INPUT1": ("TYPE_INT32", [16])}
COMPLETE_OUTPUTS = {name.replace("IN", "OUT"): value for name, value in COMPLETE.items()}
NO_BATCH = {"INPUT0": ("TYPE_INT32", [-1, 16]), "INPUT1": ("TYPE_INT32", [-1, 16])}
NO_BATCH_OUTPUTS = {name.replace("IN", "OUT"): value for name, value in NO_BATCH.items()}


@pytest.mark.parametrize(
    ("config", "max_batch_size", "inputs", "outputs"),
    [
        (None, 4, COMPLETE, COMPLETE_OUTPUTS),
        ("", 4, COMPLETE, COMPLETE_OUTPUTS),
        ('platform: "tensorflow_savedmodel"', 4, COMPLETE, COMPLETE_OUTPUTS),
        ('backend: "tensorflow"', 4, COMPLETE, COMPLETE_OUTPUTS),
        ("max_batch_size: 1", 1, COMPLETE, COMPLETE_OUTPUTS),
        ("max_batch_size: 13", 13, COMPLETE, COMPLETE_OUTPUTS),
        (
            'input [ { name: "INPUT0" data_type: TYPE_INT32 }, { name: "INPUT1" dims: [ 16 ] } ]',
            4,
            COMPLETE,
            COMPLETE_OUTPUTS,
        ),
        (
            'output [ { name: "OUTPUT0" data_type: TYPE_INT32 }, { name: "OUTPUT1" dims: [ 16 ] } ]',
            4,
            COMPLETE,
            COMPLETE_OUTPUTS,
        ),
        ('output { name: "OUTPUT1" }', 4, COMPLETE, {"OUTPUT1": ("TYPE_INT32", [16])}),
        (
            FULL.replace(INPUT1, ""),
            8,
            COMPLETE,
            COMPLETE_OUTPUTS,
        ),
        ('input { name: "INPUT1" dims: [ -1, 16 ] }', 0, NO_BATCH, NO_BATCH_OUTPUTS),
        ('output [ { name: "OUTPUT1" dims: [ -1, 16 ] }, { name: "OUTPUT0" } ]', 0, NO_BATCH, NO_BATCH_OUTPUTS),
        (IO.format("-1, 16"), 0, NO_BATCH, NO_BATCH_OUTPUTS),
        (IO.format(16), 4, COMPLETE, COMPLETE_OUTPUTS),
        (FULL, 8, COMPLETE, COMPLETE_OUTPUTS),
    ],
)
def test_what_a_configuration_leaves_out_comes_from_the_signature(load, config, max_batch_size, inputs, outputs):
    completed = load("add_sub_lite", config)
    assert completed["max_batch_size"] == max_batch_size
    assert tensors(completed["input"]) == inputs
    assert tensors(completed["output"]) == outputs
    assert ("dynamic_batching" in completed) == (max_batch_size > 1)
    assert (completed["platform"], completed["backend"]) == ("tensorflow_savedmodel", "tensorflow")


def test_numbers_without_a_dimension_of_their_own_are_reshaped(served):
    completed = served["numbers"].result()
    assert [(tensor["dims"], tensor.get("reshape")) for tensor in completed["input"]] == [
        ([4, 1, 2], None),
        ([1], {"shape": []}),
    ]


@pytest.mark.parametrize("kind", ["KIND_CPU", "KIND_MODEL"])
def test_each_instance_says_what_runs_it(models, load, kind):
    completed = load("add_sub_lite", f"instance_group [ {{ count: 3 kind: {kind} }} ]")
    assert [(group["kind"], group["count"]) for group in completed["instance_group"]] == [(kind, 3)]
    line = rf"{completed['name']}_0_(\d): run by LiteRT on the CPU"
    wait_for(lambda: sorted(re.findall(line, models.log.read_text())) == ["0", "1", "2"])


@pytest.mark.parametrize(("number", "factor"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_tag_and_signature_choose_the_graph(models, served, number, factor):
    answer = ask(models, f"sig_tag{number}", {"INPUT": np.arange(16, dtype=np.float32)})["OUTPUT"]
    assert answer.tolist() == [factor * value for value in range(16)]


def test_without_a_word_it_is_the_default_graph(models, served):
    assert ask(models, "default_graph", {"INPUT": np.ones(16, np.float32)})["OUTPUT"].tolist() == [1] * 16


def test_the_one_signature_serves_whatever_its_name(models, served):
    assert ask(models, "one_signature", {"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[2, 2]]


def refusal(load, saved_model, config):
    """Return the sentence with which the backend refuses to load the model, without where in the code it arose."""
    with pytest.raises(InferenceServerException) as error:
        load(saved_model, config)
    return error.value.message().partition("\n\nAt:")[0]


@pytest.mark.parametrize(
    ("saved_model", "parameters", "named"),
    [
        ("tags", {"TF_GRAPH_TAG": "absent"}, ["'absent'", "'serve'", "'test'"]),
        ("tags", {"TF_SIGNATURE_DEF": "absent"}, ["'absent'", "'other'", "'serving_default'"]),
        ("tags", {"TF_GRAPH_TAG": "test", "TF_SIGNATURE_DEF": "absent"}, ["'absent'", "'other'", "'serving_default'"]),
        ("one_signature", {"TF_SIGNATURE_DEF": "serving_default"}, ["'serving_default'", "'predict'"]),
        ("no_signature", {}, ["'serving_default'"]),
    ],
)
def test_absent_graphs_are_refused_with_those_there_are(load, saved_model, parameters, named):
    sentence = refusal(load, saved_model, "".join(itertools.starmap(PARAMETER.format, parameters.items())))
    assert [word for word in named if word not in sentence] == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("dims: [ 16 ]", "dims: [ 16, 1 ]", ["'INPUT0'", "[-1,16]", "[-1,16,1]"]),
        (
            '"INPUT1" data_type: TYPE_INT32',
            '"INPUT1" data_type: TYPE_FP32',
            [
                "Invalid argument: unable to load model 'configured_",
                "configuration expects datatype TYPE_FP32 for input 'INPUT1', model provides TYPE_INT32",
            ],
        ),
        (
            OUTPUT1,
            OUTPUT1.replace("16", "1"),
            [
                "Invalid argument: model 'configured_",
                "tensor 'OUTPUT1': the model expects 2 dimensions (shape [-1,16]) but the model configuration "
                "specifies 2 dimensions (an initial batch dimension because max_batch_size > 0 followed by the "
                "explicit tensor shape, making complete shape [-1,1])",
            ],
        ),
        (OUTPUT1, OUTPUT1.replace("16", "-1"), ["'OUTPUT1'", "[-1,16]", "[-1,-1]"]),
        (OUTPUT1, OUTPUT1.replace("INT32", "INT8"), ["'OUTPUT1'", "TYPE_INT8", "TYPE_INT32"]),
        (
            '"INPUT1"',
            '"UNKNOWN"',
            [
                "configuration expects 3 inputs, model provides 2: "
                "unexpected inference input 'UNKNOWN', allowed inputs are: INPUT0, INPUT1"
            ],
        ),
        ('"OUTPUT1"', '"UNKNOWN"', ["unexpected inference output 'UNKNOWN', allowed outputs are: OUTPUT0, OUTPUT1"]),
        (INPUT1, 2 * INPUT1, ["3 inputs", "provides 2", "'INPUT1' is given twice"]),
        (INPUT1, INPUT1 + INPUT1.replace("INPUT1", "INPUT2"), ["3 inputs", "provides 2"]),
        (OUTPUT1, 2 * OUTPUT1, ["'OUTPUT1'", "twice"]),
        ('"INPUT1"', '"INPUT1" optional: true', ["'INPUT1'", "optional"]),
    ],
)
def test_contradictions_of_the_signature_are_refused(load, old, new, named):
    assert old in FULL
    sentence = refusal(load, "add_sub_lite", FULL.replace(old, new))
    assert [word for word in named if word not in sentence] == []


@pytest.mark.parametrize(
    ("saved_model", "config", "named"),
    [
        ("add_sub_nobatch", FULL, ["batch"]),
        ("add_sub_nobatch", "max_batch_size: 8", ["max-batch 8", "batch"]),
        (
            "add_sub_lite",
            'input [ { name: "INPUT0" dims: [ 16 ] }, { name: "INPUT1" dims: [ -1, 16 ] } ]',
            ["Internal: unable to autofill for 'configured_", "contradicting"],
        ),
        ("no_shape_nobatch", None, ["'INPUT0'", "rank", "dimensions"]),
        ("any_rank", None, ["Unable to autofill", "the rank of model tensor 'x' is 0 and dimensions are not defined"]),
        ("complex", None, ["input 'x': Triton has no data type for TensorFlow's complex64"]),
        ("graphdef", 'platform: "tensorflow_graphdef"', ["GraphDef"]),
        ("graphdef", None, ["GraphDef"]),
    ],
)
def test_models_that_cannot_be_served_so_are_refused(load, saved_model, config, named):
    sentence = refusal(load, saved_model, config)
    assert [word for word in named if word not in sentence] == []


Y = 'output { name: "y" data_type: TYPE_FP32 dims: [ 2 ] }'
ACCELERATORS = 'optimization { execution_accelerators { %s_execution_accelerator [ { name: "%s" } ] } }'
REFUSED = {
    ACCELERATORS % ("cpu", "openvino"): "CPU Execution Accelerator",
    "model_transaction_policy { decoupled: true }": "decoupled",
    'cc_model_filenames { key: "7.5" value: "other.savedmodel" }': "cc_model_filenames",
    PARAMETER.format("TF_NUM_INTRA_THREADS", "-1"): "TF_NUM_INTRA_THREADS",
    PARAMETER.format("TF_NUM_INTRA_THREADS", "many"): "TF_NUM_INTRA_THREADS",
    PARAMETER.format("TF_NUM_INTER_THREADS", "-1"): "TF_NUM_INTER_THREADS",
    PARAMETER.format("TF_USE_PER_SESSION_THREADS", "perhaps"): "TF_USE_PER_SESSION_THREADS",
    PARAMETER.format("MAX_SESSION_SHARE_COUNT", "0"): "MAX_SESSION_SHARE_COUNT",
    PARAMETER.format("TF_INIT_OPS_FILE", "init_ops.json"): "TF_INIT_OPS_FILE",
    'model_operations { op_library_filename: [ "/absent/operations.so" ] }': "/absent/operations.so",
    'sequence_batching { state [ { input_name: "x" output_name: "y" data_type: TYPE_FP32 dims: [ 2 ] } ] }': "state",
}
WARNED = {
    ACCELERATORS % ("gpu", "tensorrt"): "gpu_execution_accelerator|GPU Execution Accelerator",
    ACCELERATORS % ("gpu", "auto_mixed_precision"): "gpu_execution_accelerator|GPU Execution Accelerator",
    PARAMETER.format("MAX_SESSION_SHARE_COUNT", "2"): "MAX_SESSION_SHARE_COUNT",
}


@pytest.mark.parametrize(("setting", "named"), list(REFUSED.items()), ids=list(REFUSED.values()))
def test_settings_that_would_change_answers_are_refused(load, setting, named):
    assert named in refusal(load, "double_lite", f"max_batch_size: 8 {Y} {setting}")


@pytest.mark.parametrize(("setting", "named"), list(WARNED.items()), ids=list(WARNED.values()))
def test_settings_that_change_no_answers_are_warned_of(models, load, setting, named):
    name = load("double_lite", f"max_batch_size: 8 {Y} {setting}")["name"]
    assert ask(models, name, {"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[2, 2]]
    line = rf"^W.*\b{name}\b.*({named})"
    wait_for(lambda: re.search(line, models.log.read_text(), re.MULTILINE))


def test_instances_do_not_share_a_state(load):
    shared = "instance_group { count: 2 } " + PARAMETER.format("MAX_SESSION_SHARE_COUNT", 2)
    assert "MAX_SESSION_SHARE_COUNT" in refusal(load, "counter", shared)


def threads(process):
    return len(list((process / "task").iterdir()))


def test_honoured_settings(models, served):
    """The first model has none of them: its variable stays 0."""
    x = np.array([[1, 2]], np.float32)
    assert ask(models, "plain", {"x": x})["y"].tolist() == [[1, 2]]
    assert ask(models, "honoured", {"x": x})["y"].tolist() == [[8, 9]]
    honoured, plain = (stub(models, name) for name in ("honoured", "plain"))
    assert threads(honoured) - threads(plain) >= 10
    assert str(models.repository / "honoured" / "operations.so") in (honoured / "maps").read_text()


def test_file_of_the_model_may_have_another_name(models):
    model = models.add(
        "other_name", "double_lite", 'platform: "tensorflow_savedmodel" default_model_filename: "other.savedmodel"'
    )
    (model / "1" / SAVED_MODEL).rename(model / "1" / "other.savedmodel")
    assert models.load("other_name")["default_model_filename"] == "other.savedmodel"
    assert ask(models, "other_name", {"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[2, 2]]


def break_model(directory, how):
    """Damage the SavedModel in this directory, as an interrupted copy would."""
    if how == "no variables":
        shutil.rmtree(directory / "variables")
    elif how == "no data":
        next((directory / "variables").glob("variables.data-*")).unlink()
    else:
        content = (directory / "saved_model.pb").read_bytes()
        (directory / "saved_model.pb").unlink()
        if how == "half a graph":
            (directory / "saved_model.pb").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("no variables", "variables"),
        ("no data", "variables"),
        ("half a graph", "saved_model.pb"),
        ("no graph", "saved_model.pb"),
    ],
)
def test_broken_copies_are_told_so_and_leave_the_server_alone(models, how, named):
    name = f"broken {how}".replace(" ", "_")
    model = models.add(name, "counter", "instance_group { count: 2 }")
    break_model(model / "1" / SAVED_MODEL, how)
    assert named in refusal(lambda *_: models.load(name), None, None)
    assert models.process.poll() is None
    with models.http as client:
        assert client.is_server_live()


@pytest.mark.parametrize(
    ("options", "max_batch_size"),
    [
        (["--backend-config=default-max-batch-size=7"], 7),
        (["--backend-config=tensorflow,default-max-batch-size=9", "--backend-config=default-max-batch-size=7"], 9),
        (["--backend-config=tensorflow,default-max-batch-size=0"], 0),
    ],
)
def test_default_of_the_command_line_counts(saved_models, tmp_path, options, max_batch_size):
    with model_server(saved_models, tmp_path, *options) as server:
        assert server.load("double", "double_lite")["max_batch_size"] == max_batch_size
        assert server.load("own", "double_lite", "max_batch_size: 3")["max_batch_size"] == 3


@pytest.mark.parametrize("setting", ["default-max-batch-size=many", "allow-soft-placement=perhaps"])
def test_values_of_the_command_line_that_mean_nothing_are_refused(saved_models, tmp_path, setting):
    with model_server(saved_models, tmp_path, f"--backend-config=tensorflow,{setting}") as server:
        sentence = refusal(lambda *model: server.load("double", *model), "double_lite", None)
    name, _, value = setting.partition("=")
    assert f"--backend-config: {name} must be" in sentence
    assert f"not '{value}'" in sentence


def test_settings_of_keras_keep_no_model_from_loading(saved_models, tmp_path, monkeypatch):
    (tmp_path / "keras.json").write_text('{"backend": "theano", "floatx": "bfloat16"}')
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with model_server(saved_models, tmp_path) as server:
        server.load("double", "double", ONE_INSTANCE)
        assert ask(server, "double", {"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[2, 2]]
