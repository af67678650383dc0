"""Adapters of peft as experts: read, fitted to the base, folded into it."""
