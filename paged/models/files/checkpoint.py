"""The files of a model, whichever form they have: a folder of Hugging Face's, or a GGUF file."""

import os
import pathlib

from paged.files import open_safetensors, parse_object

from .gguf_file import Checkpoint, open_gguf


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The config and the weights of a model. No weight is read.

    **Arguments:**

    * ``path``: a folder with config.json and safetensors files, or a GGUF file.

    **Returns:** `Checkpoint`.

    Raises ``FileNotFoundError`` if a file is missing, and ``ValueError``, which names the file, if one cannot be read
    or lies about itself.

    >>> import json, tempfile, pathlib
    >>> from paged.models import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (pathlib.Path(folder) / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ...     write_safetensors(folder + "/model.safetensors", {"lm_head.weight": np.ones((4, 2), np.float32)})
    ...     opened = open_checkpoint(folder)
    >>> opened.config, opened.weights
    ({'model_type': 'llama'}, Weights of 1 tensors, 0.0 MB)
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} must be a folder with config.json and safetensors files, or a .gguf file.")
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no config.json, which says what model it is.")
    return Checkpoint(parse_object(file, file.read_bytes()), open_safetensors(path), path=path)
