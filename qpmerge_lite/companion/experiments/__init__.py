"""What the chapters measure: benchmarks, single layers, populations of merges, calibration studies,
timings."""
