"""Copying pages inside of a pool by a kernel of asynchronous copies alone, in place."""

from .launch import copy_pages as copy_pages
from .launch import refuses_copy as refuses_copy
