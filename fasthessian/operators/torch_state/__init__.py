"""What torch must be during a product: modes, random states, hooks, rewritten layers."""
