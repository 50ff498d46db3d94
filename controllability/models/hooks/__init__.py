"""What is put on live modules and taken off again: hooks, taps, patches that a model carries."""
