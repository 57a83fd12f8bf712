"""Models of the Hugging Face kind: their files, their layers, and text in and out."""

from paged.runtime import TextStream as TextStream

from .architectures import ARCHITECTURES as ARCHITECTURES
from .config import Config as Config
from .config import ExpertsConfig as ExpertsConfig
from .config import LayerConfig as LayerConfig
from .decoder import Decoder as Decoder
from .files import ChatTemplate as ChatTemplate
from .files import Checkpoint as Checkpoint
from .files import Tensor as Tensor
from .files import Tokenizer as Tokenizer
from .files import Weights as Weights
from .files import open_checkpoint as open_checkpoint
from .files import open_gguf as open_gguf
from .files import open_safetensors as open_safetensors
from .files import open_tokenizer as open_tokenizer
from .files import unpack_mxfp4 as unpack_mxfp4
from .files import write_safetensors as write_safetensors
from .load import load as load
from .load import save as save
