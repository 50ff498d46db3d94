"""How proofs and reports are shown: text, JSON-ready data, LaTeX, HTML, pictures."""
