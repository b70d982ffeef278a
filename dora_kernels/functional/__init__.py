"""The public functions, what they ask of their arguments, and their gradients."""
