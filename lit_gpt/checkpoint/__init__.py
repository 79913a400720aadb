"""Our checkpoint files."""
