"""The command line of the module, run for real on the checkpoints of an embedded suite."""
