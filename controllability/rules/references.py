"""What the short citations in rules, pages and docstrings stand for."""

import re

PAPERS = {
    "G": "Goldwaser, Munn, Gonzalvo, Dherin: Equivalence of Context and Parameter Updates in Modern Transformer Blocks. "
    "ICML 2026, arXiv 2511.17864",
    "D": "Dherin et al.: Learning without training. arXiv 2507.16003",
}


def references(text: str) -> dict[str, str]:
    """What is cited in a text, by its key, papers first."""
    papers = {f"[{key}]": paper for key, paper in PAPERS.items() if re.search(rf"\[{key}[],]", text)}
    numbers = sorted(set(re.findall(r"theory (\d+)", text)))
    return papers | {f"theory {n}": f"docs/theory.md of this package, section {n}" for n in numbers}
