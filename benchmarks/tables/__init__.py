"""Records to tables: a data frame with one row a cell, CSV, and Markdown. Nothing here touches files."""

from benchmarks.tables.comparison import QUALITY, RANKED_BY, gated, ranking
from benchmarks.tables.frame import csv, frame
from benchmarks.tables.markdown import label
from benchmarks.tables.page import END, RENDERERS, START, region, replace_region, report
from benchmarks.tables.paper import numbers_of, paper, reported_gates
from benchmarks.tables.renderers import ablation, leaderboard, left_out, published
from benchmarks.tables.summary import across_tasks, mean_ranks

__all__ = [
    "END",
    "QUALITY",
    "RANKED_BY",
    "RENDERERS",
    "START",
    "ablation",
    "across_tasks",
    "csv",
    "frame",
    "gated",
    "label",
    "leaderboard",
    "left_out",
    "mean_ranks",
    "numbers_of",
    "paper",
    "published",
    "ranking",
    "region",
    "replace_region",
    "report",
    "reported_gates",
]
