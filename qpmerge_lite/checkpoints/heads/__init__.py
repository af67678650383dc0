"""Heads of tasks beside a merged backbone: told from it, written, and run."""
