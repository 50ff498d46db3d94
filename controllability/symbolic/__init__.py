"""SymPy arrays: normal forms, names for intermediate values, index notation with every size a symbol."""
