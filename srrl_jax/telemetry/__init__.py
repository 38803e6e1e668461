"""What a run leaves behind and shows while it lasts: logs, the live table, the HTML report.

``srrl_jax.telemetry.report`` is imported on its own, because it pulls in the index of samples.
"""

from srrl_jax.telemetry.live import LiveTable
from srrl_jax.telemetry.run_log import RunLog, iter_jsonl, read_jsonl, read_metrics

__all__ = ["LiveTable", "RunLog", "iter_jsonl", "read_jsonl", "read_metrics"]
