"""The merge that is chosen without labels: what it reaches in ``automatic``, and what each of its
parts matters in ``factors``."""
