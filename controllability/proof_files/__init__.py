"""A proof as JSON: written, read, and followed node by node without a search."""
