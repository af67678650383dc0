"""Merges of checkpoints on disk: folders of Hugging Face models in, one such folder out. The
modules that only look at files import no torch."""
