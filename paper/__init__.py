"""The paper: its text, and the numbers, tables and figures that fill it, all from the committed results."""
