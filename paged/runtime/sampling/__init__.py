"""From logits to token ids: the rule of a request, the rules of many rows as arrays, and the draw."""

from .draw import draw as draw
from .history import tokens_from as tokens_from
from .log_probs import log_probs as log_probs
from .log_probs import top_log_probs as top_log_probs
from .sample import sample as sample
from .sampler import Sampler as Sampler
from .samplers import Samplers as Samplers
