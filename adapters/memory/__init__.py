"""An exact collection in memory: the reference that other adapters are held to."""

from amips_plugins.adapters.memory.collection import MemoryCollection

__all__ = ["MemoryCollection"]
