"""From text to batches: the shard format, its order, preparation, and the DataModule."""
