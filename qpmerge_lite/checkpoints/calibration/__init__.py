"""Calibration of a merge from files, folders and the Hub, as batches of what a model reads."""
