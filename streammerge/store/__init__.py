"""Bytes in and bytes out: checkpoints are opened, read, written, journalled and found on the Hub here."""
