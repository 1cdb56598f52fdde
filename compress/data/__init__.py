"""Data sources. Each gives train, validation and test parts that never mix."""
