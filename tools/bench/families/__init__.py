"""Model families on which the planner's claims are tried, one a file.

Half of them, chosen by a seed, are for finding rules ("tuning"). The other half judges:
whoever changes a rule of the planner neither opens those files nor looks at what a
single one of them measures.
"""

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.split import HALVES, NAMES, half, load

__all__ = [
    "HALVES",
    "NAMES",
    "Case",
    "Draw",
    "half",
    "load",
    "shape",
]
