"""What the verbs of the command line do with their arguments."""
