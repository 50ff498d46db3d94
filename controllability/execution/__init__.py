"""Running an expression: node values on demand, the patched run, its journal; patches, samples, input checks."""
