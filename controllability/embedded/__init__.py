"""The small trained Gemma 3 that the package ships, and the micro-world it speaks about."""
