"""What a run will need, from formulas: memory, collectives and time; nothing is computed."""
