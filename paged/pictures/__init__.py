"""Pictures of an attention and of serving, as SVG and as text: masks, pages, pools, steps, heads and schedules."""

from ._canvas import Box as Box
from ._explained import explained as explained
from ._heads import heads as heads
from ._mask import mask as mask
from ._pages import pages as pages
from ._picture import Page as Page
from ._picture import Picture as Picture
from ._pool import pool as pool
from ._schedule import schedule as schedule
from ._steps import steps as steps
