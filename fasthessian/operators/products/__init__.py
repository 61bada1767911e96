"""How the product of one part of the loss is made: engines, layer factors, kept graphs."""
