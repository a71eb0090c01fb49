"""Hook specifications, configuration and contracts of Pilotfish, and one module per built-in plugin."""

from .hookspecs import hookimpl

__all__ = ["hookimpl"]
