"""What we will do: shapes, memory and time by arithmetic, for machines that may not be here. Needs no torch."""
