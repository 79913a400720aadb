"""`lit_gpt info`: parameters, shapes, memory, FLOPs."""
