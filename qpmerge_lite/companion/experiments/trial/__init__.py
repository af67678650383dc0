"""What the trial of the diagnostic needs besides its population: correlations with their intervals,
the quantity that the paper speaks of, and a construction in which energy misleads."""
