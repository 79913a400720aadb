"""From logits to text: one cached engine and the strategies that drive it."""
