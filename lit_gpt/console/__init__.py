"""What a program of the command line says and is told: messages on stderr, and options."""
