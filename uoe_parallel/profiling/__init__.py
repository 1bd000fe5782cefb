"""Where the time of a run's communication goes, measured while it trains."""
