"""What every floor uses: errors, paths, files, logging, ranks."""
