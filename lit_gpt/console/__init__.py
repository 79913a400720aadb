"""Messages on stderr, and the options of commands."""
