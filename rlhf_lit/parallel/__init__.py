"""Several ranks: sharded weights, and ranks that watch each other."""
