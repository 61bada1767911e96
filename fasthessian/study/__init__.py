"""The experiments of the paper: its networks, their data and the training loop."""
