"""Looking inside: what a model is made of, how it chose, how much it remembers."""
