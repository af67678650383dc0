"""Choosing a merge without labels: how far merges are from the experts in ``criteria``, what is
chosen from and how in ``automatic``."""
