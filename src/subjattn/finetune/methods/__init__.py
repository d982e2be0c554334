"""Training methods: each module a record, found by itself."""
