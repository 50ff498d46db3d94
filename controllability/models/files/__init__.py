"""Patches on disk: our own format and PEFT adapters, both ways."""
