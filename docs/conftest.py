"""A page whose examples need what is not installed is passed over."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("pyarrow") else ["surveys.md"]
