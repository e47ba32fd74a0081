"""Metrics, held-out evaluation, figures and the report."""
