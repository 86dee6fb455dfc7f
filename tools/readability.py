"""Measure how dense the code of a folder is.

    python -m tools.readability lepton_jax tools recipes

Prints the figures that CONTRIBUTING.md sets limits for, and the functions and lines
that are furthest above them. Files whose path says "test" are left out. Exits with 1 if
a limit is broken.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# The limits are what the code bases that we find easy to read measure with this script:
# Kauldron, Optax, torchtitan, Grain, torchrec's planner and Alpa, at their newest
# commits of November 2026.
LINE_MEDIAN = 7  # tokens
LINE_P90 = 14  # tokens
LONGEST_LINE = 88  # columns
LARGE_FUNCTION = 260  # tokens
LARGE_SHARE = 0.05  # of all functions

SHOWN = 10  # of the worst functions and lines
NOT_COUNTED = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


@dataclass
class Figures:
    """The sizes found in a folder.

    Attributes:
      lines: (tokens, place) of each line that has any.
      functions: (tokens, place) of each function.
      long: the places of lines that are too long.
    """

    lines: list[tuple[int, str]] = field(default_factory=list)
    functions: list[tuple[int, str]] = field(default_factory=list)
    long: list[str] = field(default_factory=list)

    @property
    def large(
        self,
    ) -> list[tuple[int, str]]:
        """Functions with more than `LARGE_FUNCTION` tokens, largest first."""
        large = [entry for entry in self.functions if entry[0] > LARGE_FUNCTION]
        return sorted(large, reverse=True)

    def quantile(self, share: float) -> int:
        """Return the tokens that `share` of the lines do not exceed."""
        counts = sorted(tokens for tokens, _ in self.lines)
        position = min(len(counts) - 1, int(len(counts) * share))
        return counts[position] if counts else 0

    def broken(self) -> bool:
        """Return whether a limit is broken."""
        return (
            self.quantile(0.5) > LINE_MEDIAN
            or self.quantile(0.9) > LINE_P90
            or len(self.large) > LARGE_SHARE * len(self.functions)
            or bool(self.long)
        )


def main(arguments: list[str] | None = None) -> int:
    """Print the figures of each folder; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="+")
    folders = parser.parse_args(arguments).folder

    broken = False
    for folder in folders:
        figures = measure(folder)
        _show(folder, figures)
        broken |= figures.broken()
    return int(broken)


def measure(folder: Path) -> Figures:
    """Return the figures of a folder, or of one file."""
    figures = Figures()
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
    for file in files:
        if folder.is_file() or "test" not in str(file.relative_to(folder)):
            _measure_file(file, figures)
    return figures


def _measure_file(file: Path, figures: Figures) -> None:
    source = file.read_text(encoding="utf-8")
    tokens = Counter(_rows(source))
    figures.lines += [(count, f"{file}:{row}") for row, count in tokens.items()]

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            rows = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            count = sum(tokens[row] for row in rows)
            figures.functions.append((count, f"{file}:{node.lineno} {node.name}"))

    for row, line in enumerate(source.splitlines(), start=1):
        if len(line) > LONGEST_LINE:
            figures.long.append(f"{file}:{row}")


def _rows(source: str) -> Iterator[int]:
    """Yield the row of each token that counts; docstrings do not."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        docstring = token.string.startswith(('"""', 'r"""'))
        if token.type not in NOT_COUNTED and not docstring:
            yield token.start[0]


def _show(folder: Path, figures: Figures) -> None:
    functions = len(figures.functions)
    print(
        f"{folder}\n"
        f"  tokens a line: median {figures.quantile(0.5)} (at most {LINE_MEDIAN}),"
        f" 90th percentile {figures.quantile(0.9)} (at most {LINE_P90})\n"
        f"  functions over {LARGE_FUNCTION} tokens: {len(figures.large)} of {functions}"
        f" (at most {LARGE_SHARE:.0%})\n"
        f"  lines over {LONGEST_LINE} columns: {len(figures.long)} (none)"
    )
    densest = sorted(figures.lines, reverse=True)[:SHOWN]
    for title, worst in (("largest", figures.large[:SHOWN]), ("densest", densest)):
        for tokens, place in worst:
            print(f"    {title} {tokens:>5}  {place}")


if __name__ == "__main__":
    sys.exit(main())
