"""A detector that answers, and pictures of its answers."""
