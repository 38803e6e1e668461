"""What a run leaves behind and shows while it lasts: logs and the live table."""

from srrl_jax.telemetry.live import LiveTable
from srrl_jax.telemetry.run_log import RunLog, iter_jsonl, read_jsonl, read_metrics

__all__ = ["LiveTable", "RunLog", "iter_jsonl", "read_jsonl", "read_metrics"]
