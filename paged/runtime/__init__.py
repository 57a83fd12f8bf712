"""When attention runs: pages and who holds them, caches, layers, sampling and serving. State in, state out."""

from ._generate import Generation as Generation
from ._generate import PartialGenerations as PartialGenerations
from ._generate import generate as generate
from ._serve import StepReport as StepReport
from .attention import PagedAttention as PagedAttention
from .cache import PagedCache as PagedCache
from .calibration import calibrate as calibrate
from .conversion import Conversion as Conversion
from .conversion import convert as convert
from .drafts import commit as commit
from .layer_stack import LayerStack as LayerStack
from .pool import PagePool as PagePool
from .rotary import Rotary as Rotary
from .rotary_scaling import LinearScaling as LinearScaling
from .rotary_scaling import Llama3Scaling as Llama3Scaling
from .rotary_scaling import LongRopeScaling as LongRopeScaling
from .rotary_scaling import NtkScaling as NtkScaling
from .rotary_scaling import RotaryScaling as RotaryScaling
from .rotary_scaling import YarnScaling as YarnScaling
from .sampling import Sampler as Sampler
from .sampling import sample as sample
from .stacked_state import StackedState as StackedState
from .stacked_state import pools_of as pools_of
