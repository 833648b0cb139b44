"""Other people's programs around a guard; each module is imported by name and brings its own extra."""
