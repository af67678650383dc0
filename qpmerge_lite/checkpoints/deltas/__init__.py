"""Task vectors as experts: read, added to the base, and written."""
