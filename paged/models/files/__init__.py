"""Files that a model is made of: weights, their configuration, tokenizers. Nothing in them is ever executed."""

from .json_text import parse_object as parse_object
from .safetensors import open_safetensors as open_safetensors
from .safetensors import write_safetensors as write_safetensors
from .weights import Tensor as Tensor
from .weights import Weights as Weights
