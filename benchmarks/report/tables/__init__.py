"""Records to tables: a data frame with one row a cell, CSV, and Markdown. Nothing here touches files."""

from benchmarks.report.tables.comparison import QUALITY, RANKED_BY, gated, ranking
from benchmarks.report.tables.frame import csv, frame
from benchmarks.report.tables.markdown import label
from benchmarks.report.tables.page import END, RENDERERS, START, region, replace_region, report
from benchmarks.report.tables.paper import numbers_of, paper, reported_gates
from benchmarks.report.tables.renderers import ablation, leaderboard, left_out, published
from benchmarks.report.tables.summary import across_tasks, leaders, mean_ranks

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
    "leaders",
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
