"""Files that a model is made of: weights, their configuration, tokenizers. Nothing in them is ever executed."""

from paged.files import Tensor as Tensor
from paged.files import Weights as Weights
from paged.files import open_safetensors as open_safetensors
from paged.files import parse_object as parse_object
from paged.files import write_safetensors as write_safetensors

from .chat_template import ChatTemplate as ChatTemplate
from .checkpoint import open_checkpoint as open_checkpoint
from .gguf_file import Checkpoint as Checkpoint
from .gguf_file import open_gguf as open_gguf
from .mxfp4 import unpack_mxfp4 as unpack_mxfp4
from .tokenizer import Tokenizer as Tokenizer
from .tokenizer import open_tokenizer as open_tokenizer
