"""The commands, thin: ``controllability demo | list | prove | patch | verify``."""
