"""What a person reads of a run: self-contained pages with charts, tables and answers side by side."""
