"""Records to tables: a data frame with one row a cell, CSV, and Markdown. Nothing here touches files."""

from benchmarks.report.tables.comparison import QUALITY, difference, gated, levels, standings
from benchmarks.report.tables.frame import csv, frame
from benchmarks.report.tables.markdown import label, row_label
from benchmarks.report.tables.page import END, START, region, replace_region, report, section
from benchmarks.report.tables.paper import numbers_of, paper, reported_gates
from benchmarks.report.tables.renderers import ablation, deployed, leaderboard, left_out, newer, own_layers
from benchmarks.report.tables.summary import across_tasks, leaders, mean_ranks

__all__ = [
    "END",
    "QUALITY",
    "START",
    "ablation",
    "across_tasks",
    "csv",
    "deployed",
    "difference",
    "frame",
    "gated",
    "label",
    "leaderboard",
    "leaders",
    "left_out",
    "levels",
    "mean_ranks",
    "newer",
    "numbers_of",
    "own_layers",
    "paper",
    "region",
    "replace_region",
    "report",
    "reported_gates",
    "row_label",
    "section",
    "standings",
]
