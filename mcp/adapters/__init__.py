"""One class for each outside thing, which translates and decides nothing; it may touch the model and its own library."""
