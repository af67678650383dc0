"""Recipes of mergekit: read, planned for these checkpoints, merged in its arithmetic."""
