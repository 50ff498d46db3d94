"""A solved patch: its record, applying, merging, extending, comparing."""
