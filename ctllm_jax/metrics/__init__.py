"""What a run says of itself: definitions of all metrics, log, meter, trackers, timesheet, profiles, report."""

from ctllm_jax.metrics.log import LogConfig, MetricsLog, read_metrics

__all__ = ["LogConfig", "MetricsLog", "read_metrics"]
