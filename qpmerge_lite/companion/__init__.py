"""What the book is built from: data, benchmark suites, experiments, records and pages; not part of
the wheel."""
