"""A user's own model, from a file or folder that is looked through before it is loaded."""

from __future__ import annotations

import builtins
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import tensorflow as tf
import tf_keras
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT, Data
from compress.errors import CompressError, did_you_mean
from compress.graph.keras3 import is_keras3_file, read_keras3, short
from compress.graph.keras3_export import to_keras3
from compress.graph.nesting import Nests, nest
from compress.graph.rewrite import flatten
from compress.models.saved_model import is_saved_model, load_saved_model
from compress.models.source import ModelSource, Origin, check_finite

layers = tf_keras.layers

MODEL_SUFFIXES = (".keras", ".h5", ".hdf5")
"""How names of files end that hold a whole model."""
_MOST_BYTES = 16 * 2**30
"""Largest size of a file's content, unpacked."""
_MOST_TFLITE_BYTES = 2**31
"""Where offsets in such a file end."""
_MOST_CONFIG_BYTES = 2**28
_CODE = ("Lambda", "__lambda__", "ResidualWrapper", "DropoutWrapper", "DeviceWrapper")
"""Classes that can carry Python code in their configuration."""
_FOREIGN = ("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "ClassMethod", "InstanceMethod")
"""Classes of Keras that run something which is not a Keras layer."""
_KERAS_MODULE = re.compile(
    r"(tf_)?keras(\.src)?(\.(activations|constraints|dtype_policies|engine|initializers|layers|losses|metrics|"
    r"mixed_precision|models|ops|optimizers|random|regularizers)(\.\w+)*)?"
)
_TENSOR_FUNCTION = re.compile(
    r"(compat\.v1\.)?((__operators__|bitwise|dtypes|image|linalg|math|nn|quantization|random|signal|strings|"
    r"keras\.activations|keras\.backend)\.(\w+\.)?)?\w+"
)
"""Names in TensorFlow's API that a TFOpLambda layer may call: those that compute tensors from tensors."""
_NOT_A_TENSOR_FUNCTION = re.compile(r"(?i)py_?func|numpy_func|library|file|save|restore|print|\bfunction$")
_DAMAGED = (OSError, ValueError, LookupError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged file raises."""
_SAVE = "Save the whole model with model.save('model.keras')."


@dataclass(frozen=True, config=STRICT)
class FileModel(ModelSource):
    """A trained model of the user's: any ``.keras`` or ``.h5`` file with Keras' own layers.

    A SavedModel comes as one layer that cannot be changed; a ``.tflite`` file can only be measured.
    """

    path: str | None = None
    allow_code: bool = False

    def origin(self) -> Origin:
        """Look for the file."""
        if self.path is None:
            raise CompressError(
                "model.path",
                expected="the path of a .keras or .h5 file, a SavedModel or a .tflite file",
                received="nothing",
                fix="Write model=file model.path=/path/to/model.keras.",
            )
        file = Path(self.path).expanduser()
        if self.exported() is None:
            _check_place(file)
        elif not file.is_file() or file.stat().st_size > _MOST_TFLITE_BYTES:
            received = f"{file.stat().st_size:,} bytes" if file.is_file() else "no such file"
            expected = f"a .tflite file of at most {_MOST_TFLITE_BYTES / 2**30:.0f} GiB"
            raise CompressError(_where(file), expected=expected, received=received, fix="Check the path.")
        return Origin(file, None)

    def exported(self) -> Path | None:
        """Return the path of a ``.tflite`` file."""
        file = Path(str(self.path)).expanduser()
        return file if file.suffix == ".tflite" and not is_saved_model(file) else None

    def build(self, data: Data, seed: int) -> tf_keras.Model:
        """Return the model of the file; ``data`` and ``seed`` do not change it."""
        return load_model_file(Path(str(self.path)).expanduser(), allow_code=self.allow_code)

    def save(self, model: tf_keras.Model, path: Path) -> None:
        """Write ``path`` for Keras 3 if the file came from there, else for ``tf_keras``; nested again if it was."""
        source = Path(str(self.path)).expanduser()
        nested = nest(model, read_model_file(source, allow_code=self.allow_code)[1])
        if is_keras3_file(source):
            to_keras3(nested, path)
        else:
            super().save(nested, path)


def load_model_file(path: Path, *, allow_code: bool) -> tf_keras.Model:
    """Return the model of :func:`read_model_file`."""
    return read_model_file(path, allow_code=allow_code)[0]


def read_model_file(path: Path, *, allow_code: bool) -> tuple[tf_keras.Model, Nests]:
    """Return the model of a ``.keras`` or ``.h5`` file, by ``tf_keras`` or Keras 3, as a flat one; and its nests.

    The graph of a SavedModel comes as a single layer.

    ``allow_code``: load Lambda layers too, which runs code of the file.

    Raises:
        CompressError: if the file is absent, damaged or no Keras model, carries code that is not allowed or
            classes that are not Keras's, has no graph of layers, or its weights are not finite.
    """
    _check_place(path)
    if path.is_dir():
        model = load_saved_model(path, _where(path))
        check_finite(model)
        return model, {}
    config = _read_config(path)
    _check_config(path, config, allow_code)
    try:
        if is_keras3_file(path):
            flat, nests = read_keras3(path, allow_code=allow_code)
        else:
            _check_known(path, config)
            model = tf_keras.models.load_model(str(path), compile=False, safe_mode=not allow_code)
            flat, nests = flatten(model)
    except (*_DAMAGED, TypeError, AttributeError, NameError, tf.errors.OpError) as error:
        raise CompressError(
            _where(path),
            expected=f"a model that tf_keras {tf_keras.__version__} can build",
            received=short(error),
            fix=f"{_SAVE} Use Keras' own layers only, and take wrappers off (strip_pruning, strip_clustering).",
        ) from error
    check_finite(flat)
    return flat, nests


def check_file(path: Path) -> None:
    """Look at a model's file without loading it.

    Raises:
        CompressError: if it is absent, damaged, too large or no Keras model.
    """
    _check_place(path)
    if not path.is_dir():
        _read_config(path)


def _where(path: Path, layer: str | None = None) -> str:
    return f"model.path {path}" + (f", layer {layer}" if layer else "")


def _check_place(path: Path) -> None:
    """Refuse what can be told from the path and the first bytes."""
    received, fix = "", _SAVE
    if path.is_dir():
        received = "" if is_saved_model(path) else "a folder without saved_model.pb"
    elif not path.is_file():
        received, fix = "no such file", "Check the path."
    elif path.suffix == ".tflite":
        received, fix = "a .tflite file, which holds no Keras layers", f"Bring the model it was made from. {_SAVE}"
    elif path.suffix not in MODEL_SUFFIXES:
        received = f"a file with the ending {path.suffix or '(none)'!s}"
    elif path.stat().st_size == 0:
        received = "an empty file"
    else:
        with path.open("rb") as file:
            start = file.read(8)
        is_zip, is_hdf5 = start.startswith(b"PK"), start == b"\x89HDF\r\n\x1a\n" or h5py.is_hdf5(path)
        if is_zip and path.suffix != ".keras":
            received, fix = f"a zip archive called {path.suffix}", "If it is a .keras file, call it so."
        elif not is_zip and not is_hdf5:
            received = f"a file that is neither (it begins with {start!r})"
    if received:
        expected = "a Keras model: a .keras file (zip archive), a .h5 file (HDF5), or a SavedModel folder"
        raise CompressError(_where(path), expected=expected, received=received, fix=fix)


def _read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of the model; on the way look at all there is in the file, but load nothing."""
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                _check_weights(path, file)
                text = file.attrs.get("model_config")
        else:
            with zipfile.ZipFile(path) as archive:
                text = _read_archive(path, archive)
        config = json.loads(text) if text is not None else None
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    if text is None:
        raise CompressError(
            _where(path),
            expected="a whole model: its configuration and its weights",
            received="an HDF5 file without model_config, as weights alone are saved",
            fix=_SAVE,
        )
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict | list):
        raise _damaged(path, ValueError(f"the configuration is {str(config)[:60]!r}"))
    return config


def _damaged(path: Path, error: BaseException) -> CompressError:
    return CompressError(
        _where(path),
        expected="an undamaged Keras model",
        received=short(error),
        fix=f"Copy the file again (an interrupted download?), or: {_SAVE}",
    )


def _read_archive(path: Path, archive: zipfile.ZipFile) -> bytes:
    """Return ``config.json`` of a ``.keras`` file after a look at every member."""
    members = {member.filename: member for member in archive.infolist()}
    for name in members:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
            raise CompressError(
                _where(path),
                expected="members with names inside the archive",
                received=repr(name),
                fix="Do not trust this file: unpacking it would write elsewhere.",
            )
    _check_size(path, sum(member.file_size for member in archive.infolist()))
    weights = {"model.weights.h5", "model.weights.npz"} & set(members)
    if "config.json" not in members or not weights:
        raise CompressError(
            _where(path),
            expected="config.json and model.weights.h5 in the archive",
            received=", ".join(sorted(members)[:8]) or "an empty archive",
            fix=_SAVE,
        )
    if members["config.json"].file_size > _MOST_CONFIG_BYTES:
        raise ValueError(f"config.json of {members['config.json'].file_size:,} bytes")
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} does not match")
    if "model.weights.h5" in weights:
        with archive.open("model.weights.h5") as stored, h5py.File(stored, "r") as file:
            _check_weights(path, file)
    return archive.read("config.json")


def _check_weights(path: Path, file: h5py.File) -> None:
    """Refuse arrays that lie in other files, and more of them than the limit."""
    total, elsewhere = 0, ""

    def look(name: str, link: Any) -> None:
        # An error raised in here would be lost in h5py.
        nonlocal total, elsewhere
        item = None if isinstance(link, h5py.ExternalLink) else file.get(name)
        if isinstance(link, h5py.ExternalLink) or (isinstance(item, h5py.Dataset) and item.external):
            elsewhere = name
        elif isinstance(item, h5py.Dataset):
            total += item.nbytes

    file.visititems_links(look)
    if elsewhere:
        raise CompressError(
            _where(path),
            expected="weights inside the file",
            received=f"{elsewhere}, which points to another file",
            fix=f"Do not trust this file, or: {_SAVE}",
        )
    _check_size(path, total)


def _check_size(path: Path, size: int) -> None:
    if size > _MOST_BYTES:
        raise CompressError(
            _where(path),
            expected=f"at most {_MOST_BYTES / 2**30:.0f} GiB unpacked",
            received=f"{size / 2**30:.1f} GiB",
            fix="Save the model without its optimizer.",
        )


def _check_config(path: Path, config: dict[str, Any], allow_code: bool) -> None:
    """Refuse code and classes that are not Keras's, wherever they stand in the configuration."""
    graph = isinstance(config["config"], list) or "layers" in config["config"]
    # How the model was compiled is never read.
    for item, layer in _objects({key: value for key, value in config.items() if key != "compile_config"}):
        inner = item["config"] if isinstance(item.get("config"), dict) else {}
        code = _code(item, inner)
        if code and not allow_code:
            raise CompressError(
                _where(path, layer),
                expected="a model that carries no code of its own",
                received=f"{code}, which can run any program on this computer",
                fix="Put a Keras layer there; or, if you trust whoever made the file, bring it as the base model with "
                "model.allow_code=true.",
            )
        foreign = _foreign(item)
        if foreign and not graph:
            raise CompressError(
                _where(path),
                expected="a functional or Sequential Keras model",
                received=f"a subclassed model (class {config.get('class_name')}), which has no graph of layers to read",
                fix="Rebuild it with the functional API, Model(inputs, outputs), copy its weights, and save that.",
            )
        if foreign:
            raise CompressError(
                _where(path, layer),
                expected="Keras' own layers and functions only",
                received=foreign,
                fix="Put layers of Keras in its place: its code is not in the file, and compress does not know it.",
            )


def _check_known(path: Path, config: dict[str, Any]) -> None:
    """Refuse layers that Keras has under that name in another version at most."""
    for item, layer in _objects(config):
        if item.get("module") in ("keras.layers", "tf_keras.layers") and not hasattr(layers, item["class_name"]):
            raise CompressError(
                _where(path, layer),
                expected=f"a layer of tf_keras {tf_keras.__version__}",
                received=f"the class {item['class_name']}",
                fix=did_you_mean(item["class_name"], (name for name in dir(layers) if name[0].isupper())),
            )


def _objects(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every object of a configuration with the name of the layer that it belongs to."""
    stack: list[tuple[Any, str]] = [(config, "")]
    while stack:
        item, layer = stack.pop()
        if isinstance(item, dict):
            if isinstance(item.get("class_name"), str):
                inner = item.get("config")
                layer = str(inner["name"]) if isinstance(inner, dict) and "name" in inner else layer
                yield item, layer
            stack.extend((value, layer) for value in reversed(item.values()))
        elif isinstance(item, list):
            stack.extend((value, layer) for value in reversed(item))


def _code(item: dict[str, Any], inner: dict[str, Any]) -> str | None:
    """Say what code an object carries, if any."""
    kind = item["class_name"].rpartition(">")[2]
    registered = str(item.get("registered_name")).rpartition(">")[2]
    if kind in _CODE or registered in _CODE:
        return "a Lambda layer with Python code" if "Lambda" in (kind, registered) else f"{kind} with Python code"
    if any(key.endswith("_type") and value == "lambda" for key, value in inner.items()):
        return f"{kind} with Python code"
    called = str(inner.get("function")) if kind in ("TFOpLambda", "SlicingOpLambda") else ""
    if called and (_TENSOR_FUNCTION.fullmatch(called) is None or _NOT_A_TENSOR_FUNCTION.search(called)):
        return f"a call of tf.{called}"
    if kind == "TensorFlowOpLayer" and _NOT_A_TENSOR_FUNCTION.search(str(inner.get("node_def"))):
        return "a TensorFlow operation that reads or writes files"
    return None


def _foreign(item: dict[str, Any]) -> str | None:
    """Say which class or function an object names that is not one of Keras's layers and their parts, if so."""
    kind, module, registered = item["class_name"], item.get("module"), item.get("registered_name")
    if kind in _FOREIGN:
        return f"{kind}, which is no layer of Keras itself"
    if ">" in kind or ">" in str(registered):
        return f"the custom class {registered if '>' in str(registered) else kind}"
    if module is None:
        # Keras writes so what is no part of it; older files have no such entry.
        return f"the custom class {kind}" if "module" in item and registered == kind != "function" else None
    if kind == "function":
        is_keras = module == "builtins" and not hasattr(builtins, str(item.get("config")))
        is_keras = is_keras or re.fullmatch(r"(tf_)?keras(\.src)?\.activations(\.\w+)*", str(module)) is not None
        return None if is_keras else f"the function {item.get('config')} of module {module}"
    is_class = re.fullmatch(r"[A-Z]\w*|__\w+__", kind) is not None
    return None if is_class and _KERAS_MODULE.fullmatch(str(module)) else f"the class {kind} of module {module}"
