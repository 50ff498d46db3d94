"""Patches as PEFT adapters, and adapters as patches: forms, tensors, exporting, checking, importing."""
