"""A model as a folder that other libraries read too."""

import pathlib

from paged import models


def as_folder(path: pathlib.Path, folder: str) -> str:
    """A folder that both libraries read, with the weights of a GGUF file as float32."""
    if path.is_dir():
        return str(path)
    model, _, _ = models.load(path, num_pages=1, dtype="float32")
    models.save(model, folder)
    return folder
