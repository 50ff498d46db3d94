"""GGUF files: looked over before anything is allocated by what they say, then read by transformers."""
