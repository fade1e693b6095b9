"""From files of preferences to packed batches: readers, pairs, who trains on what and when."""
