"""Models of the Hugging Face kind: their files, their layers, and text in and out."""

from .files import Tensor as Tensor
from .files import Weights as Weights
from .files import open_safetensors as open_safetensors
from .files import write_safetensors as write_safetensors
