"""`srrl view`: every sample of a run, its criteria, runs side by side, and labels by a person.

`index` follows the logs into DuckDB, `queries` answers what the page and the report ask, `labels` keeps what
a person marks, `server` and `export` show the page in `static/`.
"""
