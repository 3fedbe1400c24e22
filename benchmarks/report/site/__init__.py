"""One page to look at, of all cells: a table that sorts and filters, charts, and the same noise under any two rows.

The page loads nothing: styles, scripts, numbers and pictures are in it, and it opens from a folder without a server.
DataTables does the table and Vega the charts; `page.js` only joins them. Equal records are equal bytes.
"""

from benchmarks.report.site.page import page

__all__ = ["page"]
