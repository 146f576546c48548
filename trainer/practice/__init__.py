"""The practice model, its small world and its rows."""
