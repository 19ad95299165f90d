"""The report: page, tables, style and pictures."""
