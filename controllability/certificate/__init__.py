"""Proofs as files: written, read back, and checked again node by node, without search."""
