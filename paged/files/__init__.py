"""Files of arrays: tensors by name, read from safetensors files by memory map, and written to them."""

from .json_text import parse_object as parse_object
from .safetensors import open_safetensors as open_safetensors
from .safetensors import write_safetensors as write_safetensors
from .weights import Tensor as Tensor
from .weights import Weights as Weights
