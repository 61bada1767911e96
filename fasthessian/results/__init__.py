"""Result records, their file format and their figures."""
