"""The serve loop: requests, slots, pages and the model's step, on the device."""

from . import exports as exports
from .drafting import ModelDraft as ModelDraft
from .drafting import NGramDraft as NGramDraft
from .engine import Engine as Engine
from .handles import Event as Event
from .handles import Handle as Handle
from .intake import Intake as Intake
from .record import StepEvents as StepEvents
from .records import Recorder as Recorder
from .records import StepRecord as StepRecord
from .requests import NewRequest as NewRequest
from .requests import Reason as Reason
from .requests import Requests as Requests
from .requests import Sizes as Sizes
from .requests import Status as Status
from .state import Queue as Queue
from .state import ServeState as ServeState
from .stats import EngineStats as EngineStats
from .stats import Quantiles as Quantiles
from .step import serve_many as serve_many
from .step import serve_step as serve_step
