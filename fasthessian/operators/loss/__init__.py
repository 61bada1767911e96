"""What is differentiated: the loss of a model or of a closure, its batches and their weights."""
