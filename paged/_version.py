"""The version of the package, in the one place that the build and the tuning file read."""

__version__ = "0.1.0"
