"""Executes plans: feeds tiles from disk through surveys and merges to a sink, and reports what was measured."""
