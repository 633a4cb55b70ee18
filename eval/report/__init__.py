"""The report that every run writes."""
