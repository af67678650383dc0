"""What an expert's layers read, measured once and kept in a file, and merges by such files."""
