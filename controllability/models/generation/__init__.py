"""Patched generation, token by token."""
