"""What a run will take, said before it starts: memory and time, by arithmetic and by a probe."""
