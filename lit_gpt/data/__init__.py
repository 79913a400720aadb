"""From text to batches: preparation, token shards, the shuffled order of samples, and the DataModule."""
