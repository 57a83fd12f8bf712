"""Files that a model is made of: weights, their configuration, tokenizers. Nothing in them is ever executed."""

from .chat_template import ChatTemplate as ChatTemplate
from .checkpoint import open_checkpoint as open_checkpoint
from .gguf_file import Checkpoint as Checkpoint
from .gguf_file import open_gguf as open_gguf
from .json_text import parse_object as parse_object
from .mxfp4 import unpack_mxfp4 as unpack_mxfp4
from .safetensors import open_safetensors as open_safetensors
from .safetensors import write_safetensors as write_safetensors
from .text_stream import TextStream as TextStream
from .tokenizer import Tokenizer as Tokenizer
from .tokenizer import open_tokenizer as open_tokenizer
from .weights import Tensor as Tensor
from .weights import Weights as Weights
