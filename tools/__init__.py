"""Programs: python -m tools.NAME. Old or missing packages are named before a tool imports them."""

from cogvideox import versions

versions.check()
