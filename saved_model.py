"""Run a TensorFlow SavedModel on a CPU or a GPU: load it once, then predict batches from any thread.

    from saved_model import SAVED_MODEL, SavedModel, newest_version

    model = SavedModel(newest_version("model_repository/mnist_model") / SAVED_MODEL)
    outputs = model.predict({"input_1": batch})  # {"output_1": (n, 10) float32}

    python saved_model.py DIR

gives the SavedModel in DIR a twin: the same function for LiteRT, in assets.extra/model.tflite, a folder that TensorFlow
leaves alone. On a CPU the twin runs instead of TensorFlow, whose import alone takes 2 s and 350 MB. TensorFlow runs a
SavedModel without a twin, and what the twin would not answer as TensorFlow does.
"""

import argparse
import glob
import hashlib
import itertools
import math
import os
import re
import sys
import tempfile
import threading
from collections import defaultdict
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

SAVED_MODEL = "model.savedmodel"  # What Triton calls the SavedModel of a version.
TAG = "serve"
SIGNATURE = "serving_default"
TWIN = Path("assets.extra", "model.tflite")
# A twin belongs to one graph and one set of weights. The file, which `sha256sum -c` can check, holds the digests of all
# three; of the weights that of the index will do, in which TensorFlow keeps a checksum of each.
DIGESTS = Path("assets.extra", "SHA256SUMS")
DIGESTED = (Path("saved_model.pb"), Path("variables", "variables.index"), TWIN)
TOLERANCE = 1e-5  # How far a twin's answers may lie from TensorFlow's, absolutely or relatively.
# LiteRT lays out the weights once more for each of its interpreters, and to give one another shape takes 20 us. So a
# small twin has one for each call at the same time and for each shape, up to so many shapes; a large one, of so many
# bytes or more, has only one, which uses all cores.
LARGE_TWIN = 4 * 2**20
MAX_SHAPES = 16

# TensorFlow's names of its data types, by their numbers in tensorflow/core/framework/types.proto.
DTYPES = (
    "invalid float32 float64 int32 uint8 int16 int8 string complex64 int64 bool qint8 quint8 qint32 bfloat16 qint16 "
    "quint16 uint16 complex128 float16 resource variant uint32 uint64"
)


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
    names = []
    with suppress(FileNotFoundError, NotADirectoryError):  # Which it may become while a server watches it.
        names = [entry.name for entry in Path(model_directory).iterdir() if entry.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and name[0] != "0")


def newest_version(model_directory) -> Path:
    """Return the directory of the newest version; ModelError when there is none."""
    numbers = versions(model_directory)
    if not numbers:
        raise ModelError(f"no trained model in {model_directory}: run 'python train.py' first")
    return Path(model_directory) / str(numbers[-1])


def count_gpus() -> int:
    """Return how many GPUs TensorFlow sees; it imports TensorFlow."""
    return len(_import_tensorflow().config.list_physical_devices("GPU"))


class SavedModel:
    """A SavedModel, called by the names of the tensors in one of its signatures.

    inputs, outputs: a TensorSpec for each tensor's name.
    signature: the signature's name.
    twin: the path of the LiteRT twin that runs it, or None where TensorFlow does.
    runtime: what runs the model: a line for the log.

    It can be handed to other processes, forked or pickled: what runs the model is made where it first predicts.
    """

    def __init__(self, path, device=None, tag=TAG, signature=None, **session):
        """Read what the SavedModel in the directory `path` takes and gives; warm_up() or predict() loads the rest.

        device: a TensorFlow device such as "/GPU:0" or "/CPU:0"; None for the CPU, and for the twin where there is one.
        tag, signature: which graph to run; without a signature, `serving_default`, or the only one that there is.
        session: what _Session takes besides.
        Raises ModelError when there is no such SavedModel, graph or signature, or its twin is damaged.
        """
        self._path, self._device, self._tag = Path(path), device, tag
        self._session_settings = session
        self.signature, self.inputs, self.outputs = _read_signature(self._path, tag, signature)
        self.runtime = f"TensorFlow on {device or 'the CPU'}"
        if self.signature != SIGNATURE:
            self.runtime += f", signature '{self.signature}'"
        self.twin = None
        # A twin was made of this one signature, and without operations that the caller wants run first.
        is_its = (tag, self.signature) == (TAG, SIGNATURE) and not session.get("init_operations")
        if device is None and is_its and (self._path / TWIN).exists():
            if self._is_twin_mine():
                self.twin = str(self._path / TWIN)
                self.runtime = "LiteRT on the CPU"
            else:
                self.runtime += f": its twin was made for another model, 'python saved_model.py {path}' makes a new one"
        self._begin()

    def _begin(self):
        """Start with nothing that runs the model, as in a new process."""
        self._session = None
        self._loading = threading.Lock()
        self._idle_interpreters = {}
        self._is_large = bool(self.twin) and os.path.getsize(self.twin) >= LARGE_TWIN
        self._one_at_a_time = threading.Lock() if self._is_large else nullcontext()
        options = self._session_settings.get("options", {})
        self._threads = options.get("intra_op_parallelism_threads") or (os.cpu_count() if self._is_large else 1)

    def __getstate__(self):
        made = ("_session", "_loading", "_idle_interpreters", "_one_at_a_time", "_threads")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()

    def predict(self, inputs: dict[str, np.ndarray], outputs=None) -> dict[str, np.ndarray]:
        """Run one batch: every input of the signature by its name. Returns the outputs by their names, as arrays.

        outputs: the names of those that TensorFlow shall compute, of all without it; a twin always computes all.
        Raises ModelError for inputs that do not fit the signature, or that the model itself refuses.
        """
        # What the twin refuses, TensorFlow answers, or says what is wrong with it.
        if self.twin and all(_is_for_twin(array) for array in inputs.values()):
            with suppress(RuntimeError), self._one_at_a_time:
                return self._run_twin(inputs)
        self._check(inputs)
        if self.twin and not any(array.size for array in inputs.values()):
            shapes = {name: [size or 0 for size in spec.shape] for name, spec in self.outputs.items()}
            if all(0 in shape for shape in shapes.values()):
                # As many rows as the inputs have, which add_twin() makes sure of.
                return {name: np.empty(shape, self.outputs[name].dtype) for name, shape in shapes.items()}
        return self._load_session()(inputs, tuple(outputs or self.outputs))

    def keeps_state(self) -> bool:
        """Tell whether a run may change what later runs answer, so that none may be repeated."""
        operations = () if self.twin else _operations(self._path, self._tag, self.signature)
        return any(
            stateful and name not in HARMLESS and not REPEATABLE.fullmatch(name) for name, stateful in operations
        )

    def warm_up(self):
        """Load what runs the model. A twin runs once, for its first run is slow; another model might keep a state.

        Raises ModelError when the model cannot be loaded.
        """
        if self.twin:
            self.predict(_examples(self.inputs, batch_size=1, kind="zero"))
        else:
            self._load_session()

    def _run_twin(self, inputs):
        shapes = tuple([(name, array.shape, array.dtype) for name, array in inputs.items()])
        kind = None if self._is_large else shapes
        idle = self._idle_interpreters.get(kind)
        if idle is None:
            self._check(inputs)
            if len(self._idle_interpreters) >= MAX_SHAPES:
                self._idle_interpreters.clear()
            idle = self._idle_interpreters.setdefault(kind, [])
        # An interpreter serves one call at a time. list.pop and list.append are atomic, so threads share the idle ones
        # without a lock.
        try:
            interpreter = idle.pop()
        except IndexError:
            interpreter = _Interpreter(self.twin, self._threads)
        if shapes != interpreter.shapes:
            self._check(inputs)
            interpreter.resize(inputs)
            interpreter.shapes = shapes
        outputs = interpreter.run(inputs)
        idle.append(interpreter)
        return outputs

    def _load_session(self):
        with self._loading:
            if self._session is None:
                self._session = _Session(self._path, self._tag, self.signature, self._device, **self._session_settings)
        return self._session

    def _check(self, inputs):
        """Raise ModelError unless the inputs fit the signature."""
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

    def _is_twin_mine(self):
        """Tell whether the twin has the digest and the signature of this SavedModel; ModelError when it is damaged."""
        digests = self._path / DIGESTS
        try:
            if digests.exists() and digests.read_bytes() != _digests(self._path).encode():
                return False
        except OSError as error:
            raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error
        return _Interpreter(str(self._path / TWIN), threads=1).has_signature(self)


def _is_for_twin(array):
    """Tell whether LiteRT answers this input as TensorFlow does: not where it is empty or holds NaN or infinity."""
    if not array.size:
        return False
    # The product is the fastest to find them, though it may overflow without one.
    return array.dtype.kind != "f" or math.isfinite(np.vdot(array, array)) or np.isfinite(array).all()


def _digests(path):
    """Return the lines that sha256sum prints of the files to which a twin belongs."""
    lines = []
    for name in DIGESTED:
        with suppress(FileNotFoundError):  # A SavedModel may have no variables.
            lines.append(f"{hashlib.sha256(Path(path, name).read_bytes()).hexdigest()}  {name}\n")
    return "".join(lines)


class _Interpreter:
    """LiteRT's interpreter of a twin: it serves one call at a time. Its user notes the `shapes` that it has now."""

    def __init__(self, twin, threads):
        # TensorFlow's own tf.lite.Interpreter is deprecated for this package, which needs no TensorFlow.
        from ai_edge_litert.interpreter import Interpreter

        try:
            # By its path, so that the weights are the file's own pages, which processes share.
            self._interpreter = Interpreter(twin, num_threads=threads)
            signature = self._interpreter.get_signature_runner(SIGNATURE)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"the twin {twin} is damaged, delete it to have TensorFlow run the model: {error}"
            ) from error
        self._input_details, self._output_details = signature.get_input_details(), signature.get_output_details()
        # It would do what run() does, but allocate anew at every call, and nobody else may while it lives.
        del signature
        self._inputs = [(name, tensor["index"]) for name, tensor in self._input_details.items()]
        self._outputs = [(name, tensor["index"]) for name, tensor in self._output_details.items()]
        self.shapes = None

    def has_signature(self, model):
        """Tell whether the twin takes what the SavedModel takes, and gives tensors of the same names and dtypes."""
        inputs = {
            name: (
                np.dtype(tensor["dtype"]).name,
                # Empty where no size is open.
                tuple(None if size < 0 else size for size in (*tensor["shape_signature"],) or tensor["shape"]),
            )
            for name, tensor in self._input_details.items()
        }
        outputs = {name: np.dtype(tensor["dtype"]).name for name, tensor in self._output_details.items()}
        return inputs == model.inputs and outputs == {name: spec.dtype for name, spec in model.outputs.items()}

    def resize(self, arrays):
        for name, index in self._inputs:
            self._interpreter.resize_tensor_input(index, arrays[name].shape)
        self._interpreter.allocate_tensors()

    def run(self, arrays):
        for name, index in self._inputs:
            self._interpreter.set_tensor(index, arrays[name])
        self._interpreter.invoke()
        return {name: self._interpreter.get_tensor(index) for name, index in self._outputs}


class _Session:
    """A signature as TensorFlow runs it, in a session of its own: that is how TensorFlow's C++ servers run it, too."""

    def __init__(self, path, tag, signature, device, options=None, libraries=(), init_operations=()):
        """Load the graph and its variables.

        options: fields of TensorFlow's ConfigProto, as a dictionary.
        libraries: paths of the shared libraries of operations that TensorFlow lacks.
        init_operations: the names of operations to run once, after those that the SavedModel itself names.
        """
        tf = _import_tensorflow()
        from tensorflow.core.protobuf.config_pb2 import CallableOptions

        if device and "GPU" in device:
            # Without it the first process takes all memory of every GPU, and the next model finds none.
            devices = {"gpu_options": {"allow_growth": True}}
        else:
            devices = {"device_count": {"GPU": 0}}
        graph = tf.Graph()
        config = tf.compat.v1.ConfigProto(**{"allow_soft_placement": True} | devices | (options or {}))
        session = tf.compat.v1.Session(graph=graph, config=config)
        logger = tf.get_logger()
        level = logger.level
        logger.setLevel("ERROR")  # Else it advises the loader's users of another loader, which loads one graph only.
        try:
            for library in libraries:
                tf.load_op_library(library)
            with graph.as_default(), graph.device(device):
                loaded = tf.compat.v1.saved_model.load(session, [tag], _plain(path)).signature_def[signature]
            if init_operations:
                session.run(init_operations)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError, tf.errors.OpError) as error:
            raise ModelError(f"cannot load the SavedModel in {path}: {_reason(error)}") from error
        finally:
            logger.setLevel(level)
        self._errors = (TypeError, ValueError, tf.errors.OpError)
        self._session, self._inputs, self._outputs = session, dict(loaded.inputs), dict(loaded.outputs)
        self._callable_options = CallableOptions
        self._strings = {name for name, info in loaded.outputs.items() if info.dtype == tf.string}
        self._runs = {}

    def __call__(self, inputs, outputs):
        run = self._runs.get(outputs)
        if run is None:
            fetched = [self._outputs[name].name for name in outputs]
            # The public make_callable() takes twice as long, and refuses a shape that the graph would not.
            options = self._callable_options(feed=[info.name for info in self._inputs.values()], fetch=fetched)
            run = self._session._make_callable_from_options(options)
            self._runs[outputs] = run
        try:
            values = run(*[inputs[name] for name in self._inputs])
        except self._errors as error:
            raise ModelError(f"TensorFlow cannot run the model on these inputs: {_reason(error)}") from error
        # A scalar comes as a bare value, a string's as bytes.
        return {
            name: np.asarray(value, object if name in self._strings else None)
            for name, value in zip(outputs, values, strict=True)
        }


def _plain(path):
    """Return a path for TensorFlow, which takes brackets in one for a pattern."""
    if glob.escape(str(path)) == str(path):
        return str(path)
    return f"/proc/self/fd/{os.open(path, os.O_RDONLY)}"  # It stays open: a graph may read its assets late.


def _import_tensorflow():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Told to use the older tf_keras, TensorFlow does not import Keras, which takes 0.5 s.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    # It reads Keras's settings nevertheless, and asserts that it knows them: it shall find none.
    home = os.environ.get("KERAS_HOME")
    os.environ["KERAS_HOME"] = os.devnull
    try:
        import tensorflow
    finally:
        del os.environ["KERAS_HOME"]
        if home is not None:
            os.environ["KERAS_HOME"] = home
    return tensorflow


def _reason(error):
    """Return what a message of TensorFlow says is wrong, as one line without the graph's nodes that surround it."""
    message = str(getattr(error, "message", error)).removeprefix("Graph execution error:").partition("\n\t [[")[0]
    message = re.sub(r"\{\{\w+ .*?\}\}", "", re.split(r"\nNode: .*\n", message)[-1])
    return " ".join(message.split()) or type(error).__name__


def _read_graph(path, tag):
    """Return the fields of the MetaGraphDef with this one tag in saved_model.pb, see _parse().

    The numbers, here and where its parts are read, are those in tensorflow/core/protobuf and tensorflow/core/framework;
    TensorFlow's own classes of these messages come with TensorFlow alone.
    Raises ModelError when there is no such graph.
    """
    file = path / "saved_model.pb"
    if not file.is_file():
        raise ModelError(f"no SavedModel in {path}: it has no saved_model.pb")
    try:
        graphs = [_parse(graph) for graph in _parse(memoryview(file.read_bytes()))[2]]
        tags = [sorted(_text(text) for info in graph[1] for text in _parse(info)[4]) for graph in graphs]
        if not graphs:
            raise IndexError("no graph")
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error
    except DAMAGE as error:
        raise ModelError(f"cannot load the SavedModel in {path}: its saved_model.pb is damaged") from error
    if [tag] not in tags:
        there = _listed(", ".join(names) for names in tags)
        raise ModelError(f"expected '{tag}' tag: the SavedModel in {path} has graphs with the tags {there}")
    return graphs[tags.index([tag])]


def _read_signature(path, tag, name):
    """Return the name, inputs and outputs of the signature `name`, or the default one, of the graph with this one tag.

    Raises ModelError when there is no such graph or signature.
    """
    graph = _read_graph(path, tag)
    if graph[3] and not (path / "variables" / "variables.index").exists():  # Field 3 says how to restore them.
        raise ModelError(f"the SavedModel in {path} has no variables/variables.index: copy the whole folder")
    try:
        signatures = {key: value for key, value in _entries(graph[5]).items() if key not in NOT_SERVED}
        name = name or (next(iter(signatures)) if len(signatures) == 1 else SIGNATURE)
        if name not in signatures:
            there = _listed(signatures) or "none"
            raise ModelError(f"expected '{name}' signature: the SavedModel in {path} has {there} for the tag '{tag}'")
        # TensorFlow 1 wrote a rank of 0, too, where it knew none. TensorFlow 2 adds its objects, field 7.
        is_exact = bool(graph[7])
        sides = [_entries(signatures[name][number]) for number in (1, 2)]
        return (name, *({key: _tensor_spec(key, info, is_exact) for key, info in side.items()} for side in sides))
    except DAMAGE as error:
        raise ModelError(f"cannot load the SavedModel in {path}: its saved_model.pb is damaged") from error


# What SavedModels keep among their signatures and no client asks for.
NOT_SERVED = ("__saved_model_init_op", "__saved_model_train_op")


def _listed(names):
    return ", ".join(f"'{name}'" for name in names)


# What _parse() and the readers of its results raise for a damaged file.
DAMAGE = (IndexError, KeyError, TypeError, UnicodeDecodeError)


def _parse(message):
    """Return a protocol buffer's values by the numbers of its fields: integers, or the bytes of anything longer."""
    fields = defaultdict(list)
    position = 0

    def integer():
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while position < len(message):
        number, kind = divmod(integer(), 8)
        if kind == 0:
            value = integer()
        else:
            size = integer() if kind == 2 else {1: 8, 5: 4}[kind]
            value = message[position : position + size]
            position += size
            if position > len(message):
                raise IndexError("the message ends inside a field")
        fields[number].append(value)
    return fields


def _entries(field):
    """Return a map of messages, which has the fields 1 for a key and 2 for a value, sorted by key."""
    entries = [_parse(entry) for entry in field]
    return dict(sorted(((_text(entry[1][0]), _parse(entry[2][0])) for entry in entries), key=lambda entry: entry[0]))


def _text(value):
    return bytes(value).decode()


def _tensor_spec(name, info, is_exact):
    if not info[1]:
        raise ModelError(f"{name} is a sparse or composite tensor, which has more than one part")
    dtypes = dict(enumerate(DTYPES.split()))
    number = info[2][-1] if info[2] else 0
    shape = _parse(info[3][0]) if info[3] else defaultdict(list)
    sizes = [sum(_parse(dim)[1]) for dim in shape[2]]
    is_open = any(shape[3]) or not (sizes or is_exact)
    # -1 is an open size; negative numbers are written with 64 bits.
    sizes = None if is_open else tuple(None if size >> 63 else size for size in sizes)
    return TensorSpec(dtypes.get(number, f"type {number}"), sizes)


# Operations that TensorFlow calls stateful and that change nothing.
HARMLESS = {"Placeholder", "PartitionedCall", "StatefulPartitionedCall", "VarHandleOp", "ReadVariableOp", "VariableV2"}
# Others that may be repeated, for they keep nothing that an answer depends on, or are random anyway.
REPEATABLE = re.compile("Assert|Print.*|CheckNumerics.*|.*Random.*|.*HashTable.*|LookupTableFind.*|Multinomial")
CONTROL_FLOW = re.compile("(Stateless)?(If|While|Case)|For|Switch|Merge|Enter")
NUMBERS = re.compile("bool|u?int(8|16|32|64)|float(16|32|64)")
# Kinds of examples to compare on, and by what random ones are multiplied for them.
KINDS = {"random": 1, "zero": 0, "negative": -1, "large": 1e6, "NaN": np.nan, "infinite": np.inf}


def add_twin(path):
    """Convert the SavedModel in the directory `path` to LiteRT, compare the two, and write the twin into it.

    Raises ModelError with the reason where the twin would not answer as TensorFlow does.
    """
    tf = _import_tensorflow()
    from tensorflow.lite.python.convert_phase import ConverterError  # Not exported, alas.

    path = Path(path)
    refused = f"the SavedModel in {path} gets no twin"
    model = SavedModel(path, device="/CPU:0", signature=SIGNATURE)
    shapes = [spec.shape for spec in (*model.inputs.values(), *model.outputs.values())]
    if any(shape is None or None in shape[1:] for shape in shapes):
        raise ModelError(f"{refused}: more than the first size of a tensor is open")
    for name, spec in {**model.inputs, **model.outputs}.items():
        if not NUMBERS.fullmatch(spec.dtype):
            raise ModelError(f"{refused}: its {name} is {spec.dtype}, which LiteRT and NumPy do not share")
    for name, is_stateful in _operations(path, TAG, SIGNATURE):
        if is_stateful and name not in HARMLESS:
            raise ModelError(f"{refused}: its {name} checks, keeps, prints or draws something")
        if CONTROL_FLOW.fullmatch(name):
            raise ModelError(f"{refused}: its {name} is control flow")
    try:
        content = tf.lite.TFLiteConverter.from_saved_model(_plain(path), signature_keys=[SIGNATURE]).convert()
    except (ConverterError, RuntimeError, ValueError) as error:
        missing = re.search(r"^(?:TF Select|Custom) ops: (.+)", str(error), re.M)  # The whole graph follows.
        reason = f"it has no {missing[1]}" if missing else str(error).strip().splitlines()[-1]
        raise ModelError(f"{refused}, for LiteRT cannot run it: {reason}") from error
    twin = path / TWIN
    twin.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".twin-", dir=twin.parent) as temporary:
        unfinished = Path(temporary, twin.name)
        unfinished.write_bytes(content)
        _compare(model, unfinished, refused)
        (path / DIGESTS).unlink(missing_ok=True)
        unfinished.replace(twin)
        unfinished.write_text(_digests(path))
        unfinished.replace(path / DIGESTS)


def _operations(path, tag, signature):
    """Yield the name of each operation behind a signature's outputs, and whether TensorFlow calls it stateful."""
    graph = _read_graph(path, tag)
    known = [_parse(operation) for listed in _parse(graph[1][0])[2] for operation in _parse(listed)[1]]
    stateful = {_text(operation[1][0]): any(operation[17]) for operation in known}
    (definition,) = map(_parse, graph[2])
    functions = [_parse(function) for library in definition[2] for function in _parse(library)[1]]
    functions = {_text(_parse(function[1][0])[1][0]): function[3] for function in functions}
    nodes = {_text(node[1][0]): node for node in map(_parse, definition[1])}
    names = [_text(info[1][0]) for info in _entries(_entries(graph[5])[signature][2]).values()]
    behind = []
    while names:
        # A tensor's name is its operation's and a number; ^ stands before that of an operation that must run first.
        node = nodes.pop(names.pop().lstrip("^").partition(":")[0], None)
        if node:
            behind.append(node)
            names += map(_text, node[3])
    for node in behind:  # It grows on the way, by the functions that it calls.
        name = _text(node[2][0])
        yield name, stateful.get(name, True)
        values = _entries(node[5]).values()
        calls = [call for value in values for call in value[10]]
        calls += [call for value in values for many in value[1] for call in _parse(many)[9]]
        for call in calls:
            behind += map(_parse, functions.pop(_text(_parse(call)[1][0]), ()))


def _compare(model, twin, refused):
    """Raise ModelError unless a SavedModel with this twin takes, refuses and answers what the model does."""
    candidate = SavedModel(model._path, device="/CPU:0", signature=SIGNATURE)
    candidate.twin, candidate._session = str(twin), model._load_session()
    interpreter = _Interpreter(candidate.twin, threads=1)
    if not interpreter.has_signature(model):
        raise ModelError(f"{refused}: LiteRT's version of it has another signature")
    for kind, batch_size in itertools.product(KINDS, (1, 2, 5, 32, 0)):
        examples = _examples(model.inputs, batch_size, kind)
        # By how much a change in the last bits of the inputs changes TensorFlow's answers, LiteRT's may differ, too.
        changed = {
            name: (array * (1 + 2**-22)).astype(array.dtype) if array.dtype.kind == "f" else array
            for name, array in examples.items()
        }
        expected, near, answers = _answers(model, examples), _answers(model, changed), _answers(candidate, examples)
        if batch_size and expected.keys() != answers.keys():
            raise ModelError(f"{refused}: of LiteRT and TensorFlow only one answers {kind} inputs")
        for name, array in expected.items():
            shape = model.outputs[name].shape
            if shape and shape[0] is None and len(array) != batch_size:
                raise ModelError(f"{refused}: {name} has {len(array)} rows for {batch_size} rows of the inputs")
            # TensorFlow 2.21's convolutions give an empty batch the shape of their input, so that only its rows count.
            if batch_size and not _are_close(answers[name], array, near.get(name, array)):
                raise ModelError(f"{refused}: for {kind} inputs LiteRT and TensorFlow differ in {name}")


def _are_close(answers, expected, near):
    with np.errstate(all="ignore"):
        spread = np.abs(near.astype(float) - expected.astype(float))
    spread = spread[np.isfinite(spread)].max(initial=0)
    return answers.shape == expected.shape and np.allclose(
        answers, expected, rtol=TOLERANCE, atol=TOLERANCE + 4 * spread, equal_nan=True
    )


def _answers(model, inputs):
    """Return what the model answers: nothing, where it refuses the inputs."""
    try:
        return model.predict(inputs)
    except ModelError:
        return {}


def _examples(specs, batch_size, kind):
    """Return a batch for each TensorSpec: every other random example in 0…255, the others in 0…1, as models are fed."""
    random = np.random.default_rng(batch_size)
    examples = {}
    for name, (dtype, shape) in specs.items():
        values = random.random([batch_size if size is None else size for size in shape])
        if values.ndim:
            values[::2] *= 255
        with np.errstate(all="ignore"):
            values *= KINDS[kind]
            if np.dtype(dtype).kind in "iu":
                values = np.nan_to_num(values).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
            examples[name] = np.asarray(values, dtype)
    return examples


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Give a SavedModel a twin for LiteRT, which serves it faster on a CPU."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the SavedModel: the folder of saved_model.pb")
    directory = parser.parse_args(argv).directory
    try:
        add_twin(directory)
    except ModelError as error:
        print(f"saved_model.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"saved_model.py: cannot write the twin to {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(directory / TWIN)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
