"""Hook specifications, configuration and contracts of Pilotfish plugins, and one module for each built-in plugin."""

from .hookspecs import hookimpl

__all__ = ["hookimpl"]
